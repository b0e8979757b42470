"""Caches at rest: kept in files, for another process or another day."""

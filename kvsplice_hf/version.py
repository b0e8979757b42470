"""The version, in a file that imports nothing, so that packaging tools can read it."""

__version__ = "0.3.0"

"""The backend in Triton, for GPUs."""

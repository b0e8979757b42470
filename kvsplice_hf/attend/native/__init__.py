"""The backend in C++, for CPUs. Its sources are in `csrc`; they are compiled at first use."""

"""What computes on rows: an interface, PyTorch as its reference, and faster backends, of which one is chosen."""

"""What can be done with a patched model: splices are merged, pruned, loaded; caches sized; paths explained."""

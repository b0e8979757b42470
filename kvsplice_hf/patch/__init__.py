"""Where a model is entered: its layers are found, hooked, and let go again."""

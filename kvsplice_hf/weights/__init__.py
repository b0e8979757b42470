"""Where the weights of a model are, and how they are read and written: offloaded, spread over processes, or here."""

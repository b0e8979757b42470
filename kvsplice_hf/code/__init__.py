"""What a row of the cache is: the projection that makes codes, the codec that packs them, and their file format."""

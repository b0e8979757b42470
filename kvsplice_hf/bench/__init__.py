"""What the programs in `scripts` share: command lines, results, model shapes, rival codecs, training from scratch.

It needs the packages of the extra `bench`: pip install kvsplice_hf[bench].
"""

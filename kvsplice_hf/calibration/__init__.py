"""Calibration: from text to a projection, bits and step sizes, in closed form.

The rooms, in the order in which a calibration walks through them:

- `data`: token batches from texts, data sets, or the model itself;
- `collect`: runs the model over them; `readers` watches its queries;
- `statistics`: what is remembered of each layer;
- `solve`: the basis in which an error costs its square;
- `allocate`: bits for its coordinates;
- `fit`: parameters for the splice;
- `calibrator`: `KVSpliceCalibrator`, all of it behind one object; `auto` uses it without data.
"""

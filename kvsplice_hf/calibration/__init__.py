"""Calibration: from text to a projection, bits and step sizes, in closed form.

The files, in the order in which a calibration walks through them:

- `splices`: the question that patching asks: which splices do these settings make?
- `data`: token batches from texts, data sets and paths, read by `pieces`, `items` and `tokens`; or from the model
  itself, by `sampling`; `auto` chooses where nothing was given;
- `collect`: runs the model over them; `readers` watches its queries;
- `vectors`: samples of latents and values, for `kvsplice_hf.geometry`; `geometries`: of a whole model, fitted to them;
- `splines`: the splices of `transform="spline"`, made of those;
- `statistics`: what is remembered of each layer; `fingerprint`: of which model;
- `solve`: the basis in which an error costs its square;
- `allocate`: bits for its coordinates; `holdout`: which of two allocations loses less;
- `fit`: parameters for the splice;
- `calibrator`: `KVSpliceCalibrator`, all of it behind one object.
"""

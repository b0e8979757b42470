"""The exceptions of the package. Each message says what was found, what was needed, and what to do next.

```
KVSpliceError
├── ConfigError            (also a ValueError)    a setting that cannot work, with the value and the allowed range
├── NotMLAError            (also a TypeError)     no Multi-head Latent Attention to patch in this model
├── TransformersTooOldError (also an ImportError) the installed transformers does not cache latents for this model
├── UpstreamChangedError   (also a RuntimeError and an AttributeError)  a module of transformers does not do what the
│                                                 patch relies on: a release newer than this package, as a rule
├── CalibrationError       (also a RuntimeError)  calibration text or statistics that nothing can be fitted to
├── PatchStateError        (also a RuntimeError)  patched twice, or not patched where that is needed
├── UnsupportedError       (also a RuntimeError)  a feature that cannot run on a patched model
├── FoldingError           (also a RuntimeError)  `kv_b_proj` cannot be folded, so absorbed attention is impossible
├── CacheMismatchError     (also a RuntimeError)  a cache that does not fit the patched model
├── TrainingError          (also a RuntimeError)  fine-tuning that would change the base model, or that diverged
└── CheckpointError        (also a RuntimeError)  a saved splice or cache that is damaged, newer, or made for
                                                 other shapes; or that cannot be written
```
"""


class KVSpliceError(Exception):
    """Base class of every exception raised by this package."""


class ConfigError(KVSpliceError, ValueError):
    """A setting is out of its range or contradicts another one."""


class NotMLAError(KVSpliceError, TypeError):
    """The model has no attention layer that can be patched, neither latent nor ordinary."""


class TransformersTooOldError(KVSpliceError, ImportError):
    """The installed transformers caches expanded keys and values for this model, so there is no latent to splice."""


class UpstreamChangedError(KVSpliceError, RuntimeError, AttributeError):
    """A module of transformers does not do what the patch relies on, so that the cache would not be compressed.

    Also an `AttributeError`, for it is raised where foreign code looks for something in our codes that only a tensor
    has.
    """


class CalibrationError(KVSpliceError, RuntimeError):
    """Calibration text or statistics are missing, damaged, too few, or of another model."""


class PatchStateError(KVSpliceError, RuntimeError):
    """The model is already patched, or is not patched although the call needs it."""


class UnsupportedError(KVSpliceError, RuntimeError):
    """A feature of transformers that a patched model cannot serve."""


class FoldingError(KVSpliceError, RuntimeError):
    """`kv_b_proj` is packed, wrapped or sharded, or the folded weights of a splice are not finite."""


class CacheMismatchError(KVSpliceError, RuntimeError):
    """The cache holds rows, or has layers, that the patched model cannot use."""


class TrainingError(KVSpliceError, RuntimeError):
    """Fine-tuning that cannot go on: base model trainable, nothing trainable, splice merged, or loss not finite."""


class CheckpointError(KVSpliceError, RuntimeError):
    """A saved splice or cache is missing, damaged, of a newer schema, made for other shapes, or cannot be written."""

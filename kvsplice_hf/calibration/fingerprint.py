"""Which model statistics are of: a digest of all its weights, and of the tokenizer that made its text.

Statistics of one model fit another one badly, and nothing shows it. So they carry a fingerprint of the model that they
were made on.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.weights.fingerprint import decoder_around, digest, modules_of_splices
from kvsplice_hf.weights.packed import decompress


_PREFIX = "all-weights"


def model_fingerprint(model: nn.Module, sites: Sequence[AttentionSite]) -> str:
    """A digest of the decoder around the sites, and one of everything else in `model` (the output layer, say).

    Both are of numbers rounded to bf16, so that the dtype in which a model was loaded makes no difference. Weights that
    accelerate offloads are read; of what is nowhere (meta device) only the sizes count. Splices do not count.

    Returns:
        "all-weights:DECODER:REST".
    """
    decompress(model)
    inside = decoder_around(model, sites[0].module)
    return ":".join([_PREFIX, digest(inside, modules_of_splices(inside)), digest(model, inside.modules())])


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints may be of one model: what both know of it agrees.

    A model without its output layer is the same one. Fingerprints of releases before 0.2 knew a part of the weights
    only, and agree with none.
    """
    left, right = one.split(":"), other.split(":")
    if len(left) != 3 or len(right) != 3:
        return one == other
    agree = left[1] == right[1]
    return agree and (left[2] == right[2] or not left[2] or not right[2])


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of what a tokenizer makes of text; empty without one."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
    else:
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
        content = json.dumps([type(tokenizer).__name__, sorted(vocabulary.items())])
    return hashlib.sha256(content.encode()).hexdigest()

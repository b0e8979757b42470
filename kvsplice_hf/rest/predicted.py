"""`save_cache(..., compress="layers")`: the tensors of a file whose packed rows are written by their prediction."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from kvsplice_hf.errors import CacheMismatchError, CheckpointError, ConfigError, UnsupportedError
from kvsplice_hf.rest.ans import damaged
from kvsplice_hf.rest.row_prediction import RowPrediction, packed_splices, tokens_of


# Tensors of a file by name, and what gives one of a name.
Tensors: TypeAlias = Mapping[str, torch.Tensor]
Reader: TypeAlias = Callable[[str], torch.Tensor]
# By the name of a tensor of packed rows, uint8 [B, 1, S, row_bytes], the splice that made it, in the order of layers.
Splices: TypeAlias = Mapping[str, nn.Module]
_PREFIX = "predicted."


def require_prediction(prediction: Any) -> RowPrediction:
    """Check that there is a prediction where one is needed.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(prediction, RowPrediction):
        raise ConfigError(
            f'`compress="layers"` predicts rows, and `prediction` is {prediction!r}. Fit one once, with '
            "fit_row_prediction(model, data, tokenizer=tokenizer), keep it with save_row_prediction, and give it to "
            "save_cache and load_cache."
        )
    return prediction


def pack_rows(
    tensors: Tensors, splices: Splices, prediction: RowPrediction, model: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors that a file holds in place of these, and what it must say of them.

    Args:
        tensors: all of a cache, with `input_ids` among them where the prediction uses tokens.
        splices: of those that are packed rows.
        prediction: of these splices.
        model: whose cache it is.

    Raises:
        CacheMismatchError: the prediction is of other splices.
        ConfigError: tokens are needed, and not given.
        UnsupportedError: the model has no packed rows, or its layers hold those of different tokens.
    """
    packed_splices(model)
    shapes = {tuple(tensors[name].shape[:-1]) for name in splices}
    if len(shapes) != 1:
        raise UnsupportedError(
            f"The layers of this cache hold rows of different tokens ({sorted(shapes)}), as sliding windows do, so "
            'that none can be predicted from another. Save it without `compress="layers"`.'
        )
    batch, _, length = shapes.pop()
    rows = [tensors[name].flatten(0, 2) for name in splices]
    tokens = tokens_of(model, batch * length, _ids(tensors.get("input_ids")), prediction.uses_tokens)
    streams = prediction.compress(list(splices.values()), rows, tokens)
    kept = {name: tensor for name, tensor in tensors.items() if name not in splices}
    kept |= {_PREFIX + name: torch.from_numpy(array) for name, array in streams.items()}
    record = {"prediction": prediction.identity, "shape": [batch, length], "rows": _digest(rows)}
    return kept, record


def unpack_rows(
    read: Reader, record: Mapping[str, Any], splices: Splices, prediction: Any, model: nn.Module, path: object
) -> Reader:
    """What gives the tensors that `pack_rows` was given, of what gives those of the file.

    Rows are read as soon as one of them is asked for, all at once.

    Raises:
        CacheMismatchError: the file needs another prediction.
        ConfigError: there is none.
        CheckpointError: the file is damaged; from the reader.
    """
    found = require_prediction(prediction)
    if found.identity != record.get("prediction"):
        raise CacheMismatchError(
            f"{path} was written with the prediction of rows with the digest {str(record.get('prediction'))[:12]}, and "
            f"this is {found.identity[:12]}. Give that one, or compute the cache again."
        )

    @functools.cache
    def rows() -> dict[str, torch.Tensor]:
        batch, length = _shape(record, path)
        tokens = tokens_of(
            model, batch * length, _ids(read("input_ids")) if found.uses_tokens else None, found.uses_tokens
        )
        if found.uses_tokens and len(tokens) != batch * length:
            raise damaged(path)
        made = found.restore(list(splices.values()), lambda name: read(_PREFIX + name).numpy(), tokens, path)
        if _digest(made) != record.get("rows"):
            raise CheckpointError(
                f"{path} decodes to other rows than those that were saved: it is damaged, or this machine does not "
                "compute whole numbers exactly. Compute the cache again."
            )
        return {name: own.view(batch, 1, length, -1) for name, own in zip(splices, made, strict=True)}

    return lambda name: rows()[name] if name in splices else read(name)


def _ids(ids: torch.Tensor | None) -> torch.Tensor | None:
    return None if ids is None else ids.flatten()


def _shape(record: Mapping[str, Any], path: object) -> tuple[int, int]:
    shape = record.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape)):
        raise damaged(path)
    return shape[0], shape[1]


def _digest(rows: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for own in rows:
        digest.update(own.contiguous().numpy().data)
    return digest.hexdigest()

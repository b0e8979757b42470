"""How packed rows are made smaller in a file, without loss: what `save_cache(..., compress=...)` names.

Another way is a module with a function that packs and one that unpacks, and a line in `COMPRESSIONS`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from kvsplice_hf.errors import CheckpointError, ConfigError
from kvsplice_hf.rest import entropy, predicted


logger = logging.getLogger(__name__)

# Tensors of a file by name, and what gives one of a name.
Tensors: TypeAlias = Mapping[str, torch.Tensor]
Reader: TypeAlias = Callable[[str], torch.Tensor]
# By the name of a tensor of packed rows, uint8 [B, 1, S, row_bytes], the splice that made it, in the order of layers.
Splices: TypeAlias = Mapping[str, nn.Module]
# What a file says of its compression beside the name: what JSON can hold.
Record: TypeAlias = dict[str, Any]


class Compression(NamedTuple):
    """One way.

    Attributes:
        pack: gives the tensors that the file is to hold in place of these, and a record. All tensors are handed over,
            and those that are no packed rows must be given back under their names.
        unpack: of a reader of such tensors and the record makes a reader of those that `pack` was given. It may be
            asked for them in any order, each any number of times, and raises CheckpointError where they are damaged.
    """

    pack: Callable[[Tensors, Splices], tuple[dict[str, torch.Tensor], Record]]
    unpack: Callable[[Reader, Record, Splices], Reader]


COMPRESSIONS: dict[str, Compression] = {"entropy": Compression(entropy.pack_rows, entropy.unpack_rows)}
# The one that needs more than splices: the model, and a prediction of its rows.
LAYERS = "layers"


def check_compress(compress: str | None, prediction: Any = None) -> None:
    """Check the name of a compression; None is none.

    Raises:
        ConfigError: there is none of that name, or there is no prediction where it needs one.
    """
    if compress == LAYERS:
        predicted.require_prediction(prediction)
    if compress is not None and compress != LAYERS and compress not in COMPRESSIONS:
        known = ", ".join(map(repr, (*COMPRESSIONS, LAYERS)))
        raise ConfigError(f"`compress` is {compress!r}; it must be one of {known}, or None: rows as they are.")


def compressed(
    compress: str | None, tensors: dict[str, torch.Tensor], splices: Splices, model: nn.Module, prediction: Any
) -> tuple[dict[str, torch.Tensor], Record]:
    """Tensors of a file, and what it must say of them: nothing where they stay as they are."""
    if compress is None:
        return tensors, {}
    if compress == LAYERS:
        smaller, record = predicted.pack_rows(tensors, splices, predicted.require_prediction(prediction), model)
        return smaller, {"compression": {"name": compress, **record}}
    if not splices:
        logger.warning(
            "There are no packed rows in this cache, so that `compress=%r` makes its file no smaller. Patch the model "
            "with a budget in bytes (bytes_per_token, bits or compression).",
            compress,
        )
    smaller, record = COMPRESSIONS[compress].pack(tensors, splices)
    return smaller, {"compression": {"name": compress, **record}}


def decompressed(
    reader: Reader, description: Mapping[str, Any], splices: Splices, path: Any, model: nn.Module, prediction: Any
) -> Reader:
    """What gives the tensors that were saved, of what gives those of the file.

    Raises:
        CheckpointError: the file names a compression that is not known here; or, by what is returned, it is damaged.
        CacheMismatchError, ConfigError: it needs another prediction of rows, or one at all.
    """
    record = description.get("compression")
    if record is None:
        return reader
    if record["name"] == LAYERS:
        return predicted.unpack_rows(reader, record, splices, prediction, model, path)
    if record["name"] not in COMPRESSIONS:
        raise CheckpointError(
            f"{path} holds rows that were made smaller by {record['name']!r}, which this release does not know. "
            "Upgrade kvsplice_hf, or save the cache again with this release."
        )
    return COMPRESSIONS[record["name"]].unpack(reader, record, splices)

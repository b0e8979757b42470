"""`fit_row_prediction`: from text to the prediction of the rows of a model; and the files that it is kept in."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from kvsplice_hf import folders, upstream
from kvsplice_hf.calibration.data import as_batches
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import CheckpointError, ConfigError
from kvsplice_hf.rest.prediction import KINDS, LayerPrediction, Part
from kvsplice_hf.rest.prediction_fit import fit_prediction
from kvsplice_hf.rest.row_prediction import (
    RowPrediction,
    RowsOfLayer,
    codecs_of,
    level_tables,
    packed_splices,
    tokens_of,
)
from kvsplice_hf.weights.offload import input_device


Arrays: TypeAlias = Mapping[str, NDArray[Any]]
TOKENS, WINDOW, DEPTH = 32_768, 1024, 2
_FORMAT, _VERSION = "kvsplice_prediction", 1
# The first tokens of a sequence have rows unlike all others; they are exact beside them as well.
_FIRST = KVSpliceConfig.sink_tokens


@torch.no_grad()
def fit_row_prediction(
    model: Any,
    data: Any = "varied",
    *,
    tokenizer: Any = None,
    max_tokens: int = TOKENS,
    window: int = WINDOW,
    depth: int = DEPTH,
    uses_tokens: bool = True,
    progress: bool = True,
) -> RowPrediction:
    """Fit the prediction of a patched model's rows to text, for `save_cache(..., compress="layers")`.

    Args:
        model: patched, with packed rows.
        data: texts or token ids, as of `KVSpliceCalibrator.collect`.
        tokenizer: of the model, where `data` are texts.
        max_tokens: tokens to fit to. The more the better: a weight is fitted to each pair of numbers of two layers.
        window: tokens of a sequence.
        depth: how many layers before a layer predict it.
        uses_tokens: let the embeddings of the tokens predict too; caches are then saved with `input_ids` only.
        progress: show progress bars.

    Raises:
        CalibrationError: the data cannot be read, or hold too few tokens.
        ConfigError: a setting is out of range, or there is no tokenizer for texts.
        UnsupportedError: the model has no packed rows.
    """
    if depth < 0 or window <= _FIRST:
        raise ConfigError(
            f"`depth` is {depth} and `window` {window}; rows are predicted from 0 or more layers, in windows of more "
            f"than {_FIRST} tokens."
        )
    splices = packed_splices(model)
    codecs = {index: codecs_of(splice, f"layer {index}") for index, splice in splices.items()}
    tables = level_tables(next(iter(codecs.values()))[0])
    of_layers = {index: RowsOfLayer(own, tables) for index, own in codecs.items()}
    found = as_batches(data, tokenizer, max_tokens, window)
    batches = [ids for batch in found for ids in batch["input_ids"].split(1)]  # one by one, whatever the memory
    numbers = _numbers_of_text(model, batches, of_layers, progress)
    ids = torch.cat([batch.flatten() for batch in batches]).cpu()
    counted = np.concatenate([np.tile(np.arange(b.shape[1]) >= min(_FIRST, b.shape[1] - 1), len(b)) for b in batches])
    tokens = tokens_of(model, len(ids), ids, uses_tokens)
    columns = [rows.columns for rows in of_layers.values()]
    layers = fit_prediction(list(numbers.values()), columns, tokens, counted, depth, progress)
    identities: list[Any] = [splice.identity for splice in splices.values()]
    prediction = RowPrediction(layers, tables, identities, depth, uses_tokens, "")
    prediction.identity = _digest(_arrays(prediction), _description(prediction))
    return prediction


def _numbers_of_text(
    model: Any, batches: list[torch.Tensor], of_layers: Mapping[int, RowsOfLayer], progress: bool
) -> dict[int, dict[str, NDArray[np.uint8]]]:
    """By layer and kind of part the levels of all tokens."""
    found: dict[int, list[dict[str, NDArray[np.uint8]]]] = {index: [] for index in of_layers}
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # without logits, which are large
    for ids in tqdm(batches, desc="rows of text", file=sys.stderr, disable=not progress):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        decoder(input_ids=ids.to(input_device(model)), use_cache=True, **upstream.cache_argument(cache))
        for index, rows in of_layers.items():
            layer: Any = cache.layers[index]
            found[index].append(rows.numbers(layer.keys[:, 0].flatten(0, 1).cpu()))
    return {
        index: {kind: np.concatenate([part[kind] for part in parts]) for kind in KINDS}
        for index, parts in found.items()
    }


def _arrays(prediction: RowPrediction) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {
        f"{index}.{kind}.{name}": np.ascontiguousarray(value)
        for index, layer in enumerate(prediction.layers)
        for kind in KINDS
        for name, value in zip(Part._fields, layer.parts[kind], strict=True)
    }
    return arrays | {f"levels.{width}": table for width, table in prediction.tables.items()}


def _description(prediction: RowPrediction) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "identities": prediction.identities,
        "depth": prediction.depth,
        "uses_tokens": prediction.uses_tokens,
    }


def _digest(arrays: Mapping[str, NDArray[Any]], description: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_row_prediction(prediction: RowPrediction, path: str | Path) -> None:
    """Write a prediction to a safetensors file, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    metadata = {
        "format": _FORMAT,
        "description": json.dumps(_description(prediction)),
        "sha256": prediction.identity,
    }
    try:
        folders.write_bytes(Path(path), save(_arrays(prediction), metadata))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The prediction of rows cannot be written to {path}: {error}.") from error


def load_row_prediction(model: nn.Module, path: str | Path) -> RowPrediction:
    """Read a prediction that `save_row_prediction` has written.

    Args:
        model: patched with the splices that it was fitted to.
        path: of the file.

    Raises:
        CheckpointError: the file is missing, damaged, no such file, or of a newer version.
        CacheMismatchError: it is of other splices.
        UnsupportedError: the model has no packed rows.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"The prediction of rows cannot be read from {path}: {error}. Fit it again.") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} holds no prediction of rows, as save_row_prediction(prediction, path) writes it."
        )
    try:
        description = json.loads(metadata["description"])
        if description["version"] > _VERSION:
            raise CheckpointError(
                f"{path} holds a prediction of rows of version {description['version']}; this release reads up to "
                f"{_VERSION}. Upgrade kvsplice_hf, or fit it again."
            )
        if _digest(arrays, description) != metadata.get("sha256"):
            raise ValueError("its content does not have the digest that it names")
        return _put_together(model, arrays, description)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. Fit the prediction of rows again.") from error


def _put_together(
    model: nn.Module, arrays: Mapping[str, NDArray[Any]], description: Mapping[str, Any]
) -> RowPrediction:
    tables = {int(name.partition(".")[2]): array for name, array in arrays.items() if name.startswith("levels.")}
    identities = [str(identity) for identity in description["identities"]]
    prediction = RowPrediction([], tables, identities, description["depth"], description["uses_tokens"], "")
    splices = list(packed_splices(model).values())
    prediction.require_splices(splices)
    for index, splice in enumerate(splices):
        parts = {kind: Part(*(arrays[f"{index}.{kind}.{name}"] for name in Part._fields)) for kind in KINDS}
        columns = RowsOfLayer(codecs_of(splice, f"layer {index}"), tables).columns
        prediction.layers.append(LayerPrediction(parts, columns))
    prediction.identity = _digest(arrays, description)
    return prediction

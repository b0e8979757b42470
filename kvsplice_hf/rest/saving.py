"""Saves caches to files, and loads them into models: `save_cache`, `load_cache`, `describe_cache`.

Legend: `B` sequences, `S` tokens in the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticCache
from transformers.utils import ModelOutput

from kvsplice_hf import upstream
from kvsplice_hf.cache.layers import splice_cache_layer
from kvsplice_hf.cache.rows import RowGeometry
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.errors import CacheMismatchError, ConfigError, UnsupportedError
from kvsplice_hf.patch.state import is_patched, patched_sites
from kvsplice_hf.rest.compression import check_compress, compressed, decompressed
from kvsplice_hf.rest.file import CacheFile, open_cache_file, write_cache_file
from kvsplice_hf.rest.row_prediction import RowPrediction
from kvsplice_hf.rest.state import Packed, Unpacked, empty_like
from kvsplice_hf.rest.whose import WORDS, model_identity, text_identity
from kvsplice_hf.version import __version__


@dataclass(frozen=True)
class CacheDescription:
    """What a file of a cache says of itself.

    Attributes:
        model: class of the decoder that computed it.
        length: S, tokens per sequence, padding included.
        lengths: of each sequence, without padding.
        input_ids: of the tokens, int64 [B, S]; None where they were not given.
        spliced: numbers of the layers whose rows are spliced.
        static: whether it is a cache of fixed size.
        compress: how its packed rows are compressed, as of `save_cache`; None where they are as they were.
        nbytes: of the file.
        transformers, kvsplice_hf: releases that it was saved with.
    """

    model: str
    length: int
    lengths: tuple[int, ...]
    input_ids: torch.Tensor | None
    spliced: tuple[int, ...]
    static: bool
    compress: str | None
    nbytes: int
    transformers: str
    kvsplice_hf: str


def save_cache(
    cache: Cache | ModelOutput,
    path: str | Path,
    model: nn.Module,
    *,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    tokenizer: Any = None,
    compress: str | None = None,
    prediction: RowPrediction | None = None,
) -> int:
    """Save a cache to one safetensors file, packed rows as they are; `load_cache` reads it in another process.

    Spliced and stock caches are saved alike, dynamic and static ones, of any number of sequences. The file names the
    model, its splice and the tokens, so that it is not taken for the cache of something else.

    Args:
        cache: or the output of a model or of `generate` that holds it.
        path: of the file, which is written whole or not at all.
        model: that has filled the cache.
        input_ids: its tokens, [B, S] or longer (the last token that `generate` writes is not in its cache). Without
            them loading cannot check what the cache stands for.
        attention_mask: the same of padded sequences, [B, S] or longer.
        tokenizer: loading with another one is refused then.
        compress: None, packed rows as they are; or "entropy", the same rows in fewer bytes, which takes time to save
            and to load; or "layers", in fewer still, for which it takes `prediction` and `input_ids`. What is not
            packed rows stays as it is.
        prediction: of this model's rows (`fit_row_prediction`), for "layers". Loading takes the same one.

    Returns:
        Bytes of the file.

    Raises:
        ConfigError: there is no cache in what was given, it is empty, tokens or mask do not fit it, or there is no
            such compression, or no prediction for it.
        CacheMismatchError: the cache was filled by another splice than that of the model.
        UnsupportedError: a kind of cache that cannot be saved (quantised, of an encoder and a decoder, of a model that
            is spread over processes).
        CheckpointError: the file cannot be written.

    Examples:
        >>> output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
        >>> save_cache(output, "prompt.safetensors", model, input_ids=inputs["input_ids"])  # doctest: +SKIP
    """
    check_compress(compress, prediction)
    found = cache if isinstance(cache, Cache) else upstream.cache_of(cache)
    _require_saveable(cache if found is None else found)
    _require_own_splices(found, model)
    length = int(found.get_seq_length())
    packed = Packed()
    layers = [packed.layer(layer, index) for index, layer in enumerate(found.layers)]
    batch = _batch_of(found)
    masks = _of_tokens("attention_mask", attention_mask, batch, length)
    ids = _of_tokens("input_ids", input_ids, batch, length)
    lengths = [length] * batch
    if masks is not None:
        packed.tensors["attention_mask"] = masks.to(torch.bool)
        lengths = masks.to(torch.bool).sum(-1).tolist()
    if ids is not None:
        packed.tensors["input_ids"] = ids.to(torch.int64)
    rows = _packed_rows(layers, splices_by_layer(model))
    tensors, record = compressed(compress, packed.tensors, rows, model, prediction)
    description = {
        "model": model_identity(model),
        "tokenizer": text_identity(tokenizer),
        "length": length,
        "lengths": lengths,
        "static": isinstance(found, StaticCache),
        "layers": layers,
        "tables": packed.tables,
        "transformers": upstream.INSTALLED,
        "kvsplice_hf": __version__,
        **record,
    }
    write_cache_file(Path(path), tensors, description)
    return Path(path).stat().st_size


def load_cache(
    model: nn.Module,
    path: str | Path,
    *,
    input_ids: torch.Tensor | None = None,
    tokenizer: Any = None,
    tokens: int | None = None,
    verify: bool = True,
    prediction: RowPrediction | None = None,
) -> Cache:
    """Load a cache that `save_cache` has written, for `model.generate(**inputs, ...)` to go on from.

    Tensors are mapped into memory and read where they are looked at. The file may be replaced or removed meanwhile, but
    not written to.

    Args:
        model: the model that has filled it, or another copy; with the same splice, if it was patched.
        path: of the file.
        input_ids: the prompt that is to go on, [B, more than S]: it must begin with the tokens of the cache.
        tokenizer: must be the one that the file was saved with, where that was given.
        tokens: load the first so many tokens of each sequence only; by default all. A sliding window that has closed
            has no such part.
        verify: read all of the file once, and compare its digest. Without it a changed file may be loaded.
        prediction: that the file was saved with, where that was with `compress="layers"`.

    Returns:
        A `DynamicCache` or a `StaticCache`, as it was saved, on the devices of the model.

    Raises:
        CheckpointError: the file is missing, damaged, no such file, or of a newer version.
        CacheMismatchError: it is the cache of another model, splice, tokenizer or prompt; or of another release of
            transformers, whose caches hold something else.
        ConfigError: `tokens` is out of range, or the file needs a prediction and none is given.

    Examples:
        >>> cache = load_cache(model, "prompt.safetensors", input_ids=inputs["input_ids"])  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """
    file = open_cache_file(Path(path), verify=verify)
    description = file.description
    _require_same_model(file, model_identity(model))
    _require_same_tokenizer(file, tokenizer)
    if input_ids is not None:
        _require_begins(file, input_ids, tokens)
    length = description["length"]
    if tokens is not None and not 0 < tokens <= length:
        raise ConfigError(f"`tokens` is {tokens}; {file.path} holds {length} of each sequence. Give 1 to {length}.")
    cache = _filled(model, file, prediction)
    if tokens is not None and tokens < length:
        _crop(cache, length - tokens, file)
    return cache


def describe_cache(path: str | Path, *, verify: bool = True) -> CacheDescription:
    """What a file of `save_cache` says of itself, without a model.

    Args:
        path: of the file.
        verify: as of `load_cache`.

    Raises:
        CheckpointError: the file is missing, damaged, no such file, or of a newer version.
    """
    file = open_cache_file(Path(path), verify=verify)
    description = file.description
    spliced = tuple(index for index, layer in enumerate(description["layers"]) if layer["geometry"] is not None)
    return CacheDescription(
        model=description["model"]["class"],
        length=description["length"],
        lengths=tuple(description["lengths"]),
        input_ids=file.tensor("input_ids") if "input_ids" in file.names else None,
        spliced=spliced,
        static=description["static"],
        compress=description.get("compression", {}).get("name"),
        nbytes=file.path.stat().st_size,
        transformers=description["transformers"],
        kvsplice_hf=description["kvsplice_hf"],
    )


def _require_saveable(cache: Any) -> None:
    if not isinstance(cache, (Cache, EncoderDecoderCache)):
        raise ConfigError(
            f"There is no cache in this {type(cache).__name__} to save. Give a `Cache`, or the output of a model "
            "called with `use_cache=True` or of `generate(..., return_dict_in_generate=True)`."
        )
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, (DynamicCache, StaticCache)):
        raise UnsupportedError(
            f"A {type(cache).__name__} cannot be saved. Saved are DynamicCache and StaticCache: leave "
            '`cache_implementation` unset, or set it to "static" or "offloaded".'
        )
    if int(cache.get_seq_length()) == 0:
        raise ConfigError("The cache is empty: there is nothing to save. Run the model with it first.")


def _batch_of(cache: Any) -> int:
    rows = next(layer.keys for layer in cache.layers if isinstance(getattr(layer, "keys", None), torch.Tensor))
    return int(rows.shape[0])


def _of_tokens(name: str, given: Any, batch: int, length: int) -> torch.Tensor | None:
    """What was given of the tokens of a cache, [B, S]; what comes behind them is left out."""
    if given is None:
        return None
    if not isinstance(given, torch.Tensor) or given.dim() != 2 or given.shape[0] != batch or given.shape[1] < length:
        found = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ConfigError(
            f"`{name}` is {found}; the cache holds {batch} sequences of {length} tokens. Give those that it was filled "
            "with, or nothing."
        )
    return given[:, :length].cpu()


def splices_by_layer(model: nn.Module) -> dict[int, Any]:
    """The splices of a model, by cache layer index; none where it is not patched."""
    return {site.layer_idx: patched.splice for site, patched in patched_sites(model)} if is_patched(model) else {}


def _packed_rows(layers: list[dict[str, Any]], splices: Mapping[int, Any]) -> dict[str, Any]:
    """By the name of its tensor in a file, the splice that has made the packed rows of a layer, in order of layers."""
    found: dict[str, Any] = {}
    for index, saved in enumerate(layers):
        if saved["geometry"] is not None and saved["geometry"]["packed_bytes"] is not None and index in splices:
            rows = saved["fields"]["keys"]
            name = rows.get("rows", rows).get("tensor")
            if name is not None:  # a layer that no token has reached yet
                found.setdefault(name, splices[index])
    return found


def _require_own_splices(cache: Any, model: nn.Module) -> None:
    """Refuse a cache whose rows the model could not read."""
    splices = splices_by_layer(model)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, SplicedLayerMixin) and layer.is_initialized:
            _require_splice(index, layer.identity, splices.get(index), "The cache")


def _require_splice(index: int, identity: str, splice: Any, whose: str) -> None:
    if splice is None or splice.identity != identity:
        found = "is not spliced there" if splice is None else f"has that with the digest {splice.identity[:12]}"
        raise CacheMismatchError(
            f"{whose} holds rows in layer {index} that were coded by the splice with the digest {identity[:12]}; this "
            f"model {found}. Load that splice into the model (load_kvsplice), or compute the cache again."
        )


def _require_same_model(file: CacheFile, model: Mapping[str, Any]) -> None:
    saved = file.description["model"]
    differs = [words for name, words in WORDS.items() if saved[name] != model[name]]
    if differs:
        raise CacheMismatchError(
            f"{file.path} was computed by a {saved['class']} in {saved['dtype']}, and this {model['class']} in "
            f"{model['dtype']} is a model {' and '.join(differs)}: it would read other numbers than its own. Compute "
            "the cache again with this model."
        )


def _require_same_tokenizer(file: CacheFile, tokenizer: Any) -> None:
    saved = file.description["tokenizer"]
    if tokenizer is not None and saved and text_identity(tokenizer) != saved:
        raise CacheMismatchError(
            f"{file.path} stands for text that another tokenizer made into tokens. Compute the cache again with this "
            "one."
        )


def _require_begins(file: CacheFile, input_ids: torch.Tensor, tokens: int | None) -> None:
    """Refuse a prompt that does not go on from the tokens of the cache."""
    if "input_ids" not in file.names:
        raise CacheMismatchError(
            f"{file.path} does not say which tokens it stands for, so that a prompt cannot be compared. Save it with "
            "`input_ids`, or load it without."
        )
    saved = file.tensor("input_ids")[:, :tokens]
    count = saved.shape[1]
    if input_ids.dim() != 2 or input_ids.shape[0] != saved.shape[0] or input_ids.shape[1] <= count:
        raise CacheMismatchError(
            f"The prompt is {list(input_ids.shape)}, and {file.path} stands for {list(saved.shape)} tokens: a prompt "
            "must have at least one more, for a model to go on from. `tokens` loads the first part of a cache."
        )
    if not torch.equal(input_ids[:, :count].cpu(), saved):
        first = int((input_ids[:, :count].cpu() != saved).any(0).nonzero()[0])
        raise CacheMismatchError(
            f"The prompt is another one than that of {file.path}: they differ from token {first} on. `tokens` loads "
            "the part that they have in common."
        )


def _filled(model: nn.Module, file: CacheFile, prediction: RowPrediction | None) -> Cache:
    """The cache in a file, on the devices of the model."""
    description = file.description
    sites = {site.layer_idx: (site, patched) for site, patched in patched_sites(model)} if is_patched(model) else {}
    elsewhere: Any = next(model.parameters()).device
    cache = _empty_cache(model, description)
    rows = _packed_rows(description["layers"], splices_by_layer(model))
    read = decompressed(file.tensor, description, rows, file.path, model, prediction)
    unpacked = Unpacked(read, description["tables"])
    for index, saved in enumerate(description["layers"]):
        site, patched = sites.get(index, (None, None))
        geometry = None if saved["geometry"] is None else RowGeometry(**saved["geometry"])
        if geometry is None and patched is not None and saved["fields"]["is_initialized"]["plain"]:
            raise CacheMismatchError(
                f"{file.path} holds layer {index} without a splice, and this model has one there. Load it into the "
                "unpatched model (unpatch_model), or compute the cache again."
            )
        if geometry is not None:
            _require_splice(index, saved["identity"], None if patched is None else patched.splice, str(file.path))
            assert patched is not None
            splice_cache_layer(cache, index, geometry, patched.splice)
        unpacked.fill(cache.layers[index], index, saved, elsewhere if site is None else site.device)
    return cache


def _empty_cache(model: nn.Module, description: Mapping[str, Any]) -> Cache:
    layers = [empty_like(saved["kind"], saved["fields"], index) for index, saved in enumerate(description["layers"])]
    if description["static"]:
        config: Any = model.config
        cache: Cache = StaticCache(config=config, max_cache_len=1)
    else:
        cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    return cache


def _crop(cache: Cache, count: int, file: CacheFile) -> None:
    try:
        cache.crop(-count)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:  # early releases have no crop
        raise CacheMismatchError(
            f"Of {file.path} no part can be loaded, only all {file.description['length']} tokens: {error}"
        ) from error

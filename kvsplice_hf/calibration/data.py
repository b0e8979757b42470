"""What calibration may be given: texts, data sets, token batches, paths, or nothing at all but the model.

Legend: `B` batch, `T` tokens.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kvsplice_hf.calibration.collect import Batch
from kvsplice_hf.errors import CalibrationError, ConfigError
from kvsplice_hf.text import load_texts, spread_evenly, token_windows


WINDOW = 512
_SAMPLE_BATCH = 16
_TEXT_KEYS = ("text", "content")


def as_batches(data: Any, tokenizer: Any, max_tokens: int, window: int = WINDOW) -> list[Batch]:
    """At most `max_tokens` tokens of `data` as batches of one sequence.

    Args:
        data: token ids [B, T] or a list of such; batches with `input_ids` and perhaps `attention_mask`; a text or a
            list of texts; a `datasets` data set with a column "text"; the name or path of a source (`load_texts`).
        tokenizer: needed for everything but tokens.
        max_tokens: texts are cut into windows, and those taken are spread evenly over them.
        window: tokens per sequence of texts.

    Raises:
        CalibrationError: the data cannot be read as any of these, or holds too few tokens.
        ConfigError: a tokenizer is needed and there is none.
    """
    if isinstance(data, torch.Tensor):
        data = [data]
    if isinstance(data, (str, Path)):
        is_source = isinstance(data, Path) or len(data) < 4096 and (Path(data).exists() or "\n" not in data)
        data = load_texts(str(data), "calibration") if is_source else [data]
    items = data if isinstance(data, Sequence) else list(_limited(data, max_tokens))
    if not items:
        raise CalibrationError("The calibration data are empty.")
    first = items[0]
    if isinstance(first, torch.Tensor) or (isinstance(first, Mapping) and "input_ids" in first):
        return _token_batches(items, max_tokens)
    texts = [_text_of(item) for item in items]
    if tokenizer is None:
        raise ConfigError("Calibration on text needs its `tokenizer`. Pass it, or pass token ids [B, T].")
    return _text_batches(texts, tokenizer, max_tokens, window)


def sample_from_model(model: Any, max_tokens: int, window: int = WINDOW, seed: int = 0) -> list[Batch]:
    """Text that the model itself writes: temperature 1, after a random first token. Needs no data at all.

    Args:
        model: a causal language model; spliced or not, it is run as it is.
        max_tokens: about how many tokens, in whole sequences.
        window: tokens per sequence.
        seed: of the first tokens and of the sampling; the global generators are left as they were.
    """
    count = max(1, max_tokens // window)
    device = model.get_input_embeddings().weight.device
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    batches: list[Batch] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in tqdm(range(0, count, _SAMPLE_BATCH), desc="sampling text", file=sys.stderr):
            first = torch.randint(vocabulary, (min(_SAMPLE_BATCH, count - start), 1), device=device)
            ids = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                # A sequence that ended would go on with padding.
                min_new_tokens=window - 1,
                max_new_tokens=window - 1,
                pad_token_id=0,
            )
            batches.extend({"input_ids": row[None].cpu()} for row in ids)
    return batches


def share_of_process(batches: Sequence[Batch], rank: int, world_size: int) -> list[Batch]:
    """The batches that process `rank` of `world_size` takes."""
    return list(batches[rank::world_size])


def _limited(data: Any, max_tokens: int) -> Iterable[Any]:
    """Items of an iterable, until they surely hold enough: a text has at least one token per ten characters or so."""
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"Calibration data of type {type(data).__name__} cannot be read. Give texts, a data set with a column "
            '"text", token ids [B, T], or the path of a file or folder.'
        )
    seen = 0
    for item in data:
        yield item
        seen += len(_text_of(item)) // 10 if not isinstance(item, (torch.Tensor, Mapping)) or _has_text(item) else 1
        if seen >= max_tokens:
            return


def _has_text(item: Any) -> bool:
    return isinstance(item, Mapping) and any(key in item for key in _TEXT_KEYS)


def _text_of(item: Any) -> str:
    if isinstance(item, str):
        return item
    for key in _TEXT_KEYS:
        if isinstance(item, Mapping) and isinstance(item.get(key), str):
            return item[key]
    keys = f" with {sorted(item)}" if isinstance(item, Mapping) else ""
    raise CalibrationError(
        f"Calibration data hold a {type(item).__name__}{keys}; they must hold texts, mappings with one of "
        f"{_TEXT_KEYS} or with input_ids, or token ids [B, T]."
    )


def _token_batches(items: Sequence[Any], max_tokens: int) -> list[Batch]:
    batches: list[Batch] = []
    total = 0
    for item in items:
        batch = {"input_ids": item} if isinstance(item, torch.Tensor) else dict(item)
        batch = {name: torch.as_tensor(batch[name]) for name in ("input_ids", "attention_mask") if name in batch}
        batch = {name: tensor[None] if tensor.dim() == 1 else tensor for name, tensor in batch.items()}
        ids = batch["input_ids"]
        if ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] < 2:
            raise CalibrationError(f"Calibration tokens are {ids.dtype} {list(ids.shape)}; they must be int64 [B, T].")
        batches.append(batch)
        total += ids.numel()
        if total >= max_tokens:
            break
    return batches


def _text_batches(texts: Sequence[str], tokenizer: Any, max_tokens: int, window: int) -> list[Batch]:
    joined = list(texts)
    ids = tokenizer("\n\n".join(joined[:1]), return_tensors="pt", verbose=False).input_ids
    if len(joined) == 1 and 2 <= ids.shape[1] < window:  # short text is better than none
        return [{"input_ids": ids}]
    try:
        windows = token_windows(tokenizer, joined, window)
    except ConfigError as error:
        raise CalibrationError(str(error)) from error
    return [{"input_ids": row[None]} for row in spread_evenly(windows, max(1, max_tokens // window))]

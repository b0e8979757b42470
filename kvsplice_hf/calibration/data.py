"""What calibration may be given: texts, chats, data sets, token batches, paths, or nothing at all but the model.

Whatever it comes in, data are read as a stream of pieces: texts, token batches, and rows that hold neither. What cannot
be read is refused by its name, for the next best reading (the names of the columns, the path itself) would be
calibrated on without a word.

Legend: `B` batch, `T` tokens.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from numbers import Integral, Number
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kvsplice_hf.calibration.collect import Batch
from kvsplice_hf.errors import CalibrationError, ConfigError
from kvsplice_hf.text import (
    HUB_SETS,
    SOURCES,
    cut_windows,
    load_texts,
    looks_like_path,
    spread_evenly,
    token_ids,
)
from kvsplice_hf.weights.offload import input_device


WINDOW = 512
_SAMPLE_BATCH = 16
# Fewer tokens than this are a mistake: a name that was mistyped, say.
_FEWEST_TOKENS = 16
_TEXT_KEYS = ("text", "content")
_CHAT_KEYS = ("messages", "conversations", "conversation")
# Names of the same roles in two conventions of chat data.
_ROLES = {"human": "user", "gpt": "assistant"}
# Files of rows, and what `datasets` calls their kind.
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_SAVED_DATA_SET = ("dataset_info.json", "dataset_dict.json")
# The array kinds of numpy that are neither bool, integers nor floats.
_NO_NUMBERS = "OSUTMmVc"
# What pandas writes for a missing value that is neither None nor a float.
_MISSING = ("NAType", "NaTType")
_ACCEPTED = (
    'texts, chats, a data set with a column "text", "messages" or "input_ids", token ids [B, T], or the path of a file '
    "or folder"
)
# What is sometimes passed as data and is none: the type, and what to do instead.
_NOT_DATA: tuple[tuple[tuple[type, ...], str], ...] = (
    ((bytes, bytearray, memoryview), " Decode it to a str first."),
    ((PreTrainedTokenizerBase, ProcessorMixin), " Pass it as `tokenizer`, beside the data."),
    ((nn.Module,), " It is a model; the data are what it is run over."),
    ((type,), " It is a class; give what is made with it."),
    ((Number,), ""),
)

# A text, a token batch, or None for a row that holds nothing.
Piece = str | Batch | None


def as_batches(data: Any, tokenizer: Any, max_tokens: int, window: int = WINDOW) -> list[Batch]:
    """About `max_tokens` tokens of `data`, at most, as batches.

    Args:
        data: a text of any length; the name of a source (`kvsplice_hf.text`), or the path of a file or folder, where
            a `Path` is always a path; token ids [B, T] or [T]; a mapping with `input_ids` and perhaps `attention_mask`
            (what a tokenizer returns), with texts under "text" or "content", or with a chat under "messages" or
            "conversations"; a chat, that is a list of messages; or many of these: a list, a generator, a `DataLoader`,
            a data set of `datasets` or a column of one, a table of pandas. Of several splits "train" is taken. Rows
            that are empty or None are skipped.
        tokenizer: needed for everything but tokens; a processor's is used. Chats go through its chat template.
        max_tokens: texts are cut into windows, and those taken are spread evenly over them; so are the rows of a batch
            that has more, and token sequences that are longer.
        window: tokens per sequence of texts.

    Raises:
        CalibrationError: the data cannot be read as any of these, or hold too few tokens.
        ConfigError: a tokenizer is needed and there is none, or no file is where a path leads.
    """
    texts: list[str] = []
    batches: list[Batch] = []
    rows = total = 0
    for piece in _Reader(tokenizer, max_tokens).pieces_of_all(data):
        rows += 1
        if isinstance(piece, str):
            texts.append(piece)
        elif piece is not None:
            batches.append(piece)
            total += piece["input_ids"].numel()
        if total >= max_tokens:
            break
    if texts and batches:
        raise CalibrationError("The calibration data hold both texts and token ids. Give one of the two.")
    if batches:
        return [part for batch in batches for part in _within(batch, max_tokens, window)]
    if not texts:
        found = f": of {rows} rows none holds a text, or two tokens" if rows else ""
        raise CalibrationError(f"The calibration data are empty{found}. Give {_ACCEPTED}.")
    return _text_batches(texts, tokenizer_of(tokenizer), max_tokens, window)


def tokenizer_of(given: Any) -> Any:
    """The tokenizer itself: what was given, or what is in it if that is a processor.

    Raises:
        ConfigError: there is none, or it is something else.
    """
    if given is None:
        raise ConfigError("Calibration on text needs its `tokenizer`. Pass it, or pass token ids [B, T].")
    is_processor = not hasattr(given, "convert_tokens_to_ids") and hasattr(given, "tokenizer")
    tokenizer = given.tokenizer if is_processor else given
    if callable(tokenizer) and not isinstance(tokenizer, (nn.Module, type)):
        return tokenizer
    name = f"the str {given!r}" if isinstance(given, str) else f"a {type(given).__name__}"
    raise ConfigError(
        f"`tokenizer` is {name}; it must be a tokenizer of transformers, or a processor that has one. Load it with "
        "AutoTokenizer.from_pretrained(...)."
    )


def sample_from_model(model: Any, max_tokens: int, window: int = WINDOW, seed: int = 0) -> list[Batch]:
    """Text that the model itself writes: temperature 1, after a random first token. Needs no data at all.

    Args:
        model: a causal language model; spliced or not, it is run as it is.
        max_tokens: about how many tokens, in whole sequences.
        window: tokens per sequence.
        seed: of the first tokens and of the sampling; the global generators are left as they were.
    """
    count = max(1, max_tokens // window)
    device = input_device(model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    batches: list[Batch] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in tqdm(range(0, count, _SAMPLE_BATCH), desc="sampling text", file=sys.stderr):
            first = torch.randint(vocabulary, (min(_SAMPLE_BATCH, count - start), 1), dtype=torch.int64, device=device)
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


class _Reader:
    """Reads data as pieces.

    Every method takes an item and whether it is `inside` the data, rather than all of them.

    Args:
        tokenizer: as given to `as_batches`.
        max_tokens: streams are read until they surely hold as many.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def pieces_of_all(self, data: Any) -> Iterator[Piece]:
        """The pieces of all the data. Here alone a str may be a name, and a list of numbers is a sequence of tokens."""
        if isinstance(data, str):
            return self._named(data)
        if data is None:
            raise _unreadable(data, inside=False)
        if isinstance(data, (list, tuple)) and isinstance(_first(data), Number):
            return _one_sequence(data)
        return self._pieces(data, inside=False)

    def _pieces(self, item: Any, inside: bool = True) -> Iterator[Piece]:
        item = _plain(item)
        if _is_missing(item):
            yield None
            return
        read = next(read for kinds, read in _READERS if isinstance(item, kinds))
        yield from read(self, item, inside)

    def _named(self, name: str) -> Iterator[Piece]:
        if name in SOURCES:
            # The large ones have no end; every document has a token at least.
            samples = self.max_tokens if name in HUB_SETS else None
            return self._texts(load_texts(name, "calibration", samples))
        # `os.path.exists`, unlike `Path.exists`, says no to what cannot be a path: too long, or with a NUL.
        if os.path.exists(name):
            return self._file(name)
        if looks_like_path(name):
            raise ConfigError(
                f"There is no file or folder {name!r}. Give the path of one that is there, or one of "
                f"{', '.join(SOURCES)}. A text that looks like a path is given in a list: [text]."
            )
        return self._text(name)

    def _text(self, text: str, inside: bool = True) -> Iterator[Piece]:
        tokenizer_of(self.tokenizer)  # not only after all of the data have been read
        yield text if text.strip() else None

    def _texts(self, texts: Iterable[str]) -> Iterator[Piece]:
        return (piece for text in texts for piece in self._text(text))

    def _file(self, name: "str | os.PathLike[str]", inside: bool = True) -> Iterator[Piece]:
        path, is_file = Path(name), os.path.isfile(name)
        if path.suffix == ".safetensors" and is_file:
            raise CalibrationError(
                f"{path} holds tensors, not calibration data. If they are saved statistics, read them with "
                "KVSpliceCalibrator.load(path)."
            )
        is_saved = any(os.path.isfile(path / file) for file in _SAVED_DATA_SET)
        if is_saved or (is_file and path.suffix.lower() in _TABLES):
            return self._pieces(_saved_rows(path))
        # The whole path, lest it be taken for the name of a source.
        return self._texts(load_texts(os.path.abspath(path), "calibration"))

    def _tokens(self, ids: torch.Tensor, inside: bool) -> Iterator[Piece]:
        return _token_pieces(ids)

    def _mapping(self, row: Mapping[str, Any], inside: bool) -> Iterator[Piece]:
        """A mapping of splits; a batch of tokens; or texts or chats, of one row or of several."""
        if _are_splits(row):
            return self._pieces(_one_split(row), inside)
        if "input_ids" in row:
            return _token_pieces(row["input_ids"], row.get("attention_mask"))
        if _is_message(row):
            return self._text(_content(row))
        key = next((key for key in (*_TEXT_KEYS, *_CHAT_KEYS) if key in row), None)
        if key is None:
            raise _unreadable(row, inside)
        value = row[key]
        if key in _CHAT_KEYS and isinstance(value, Mapping):  # lists of roles and of contents: `datasets` made columns
            value = [dict(zip(value, turn, strict=True)) for turn in zip_longest(*value.values())]
        return self._pieces(value)

    def _list(self, items: Sequence[Any], inside: bool) -> Iterator[Piece]:
        first = _first(items)
        if isinstance(first, Number):
            yield from _token_pieces(items)
        elif _is_message(first):
            yield self._chat(items)
        elif inside and len(items) > 1 and isinstance(first, torch.Tensor):
            raise CalibrationError(
                f"Calibration data hold a group of {len(items)} tensors without names. Give mappings with `input_ids` "
                "and, where sequences are padded, `attention_mask`."
            )
        else:
            for item in items:
                is_path = isinstance(item, str) and looks_like_path(item) and os.path.exists(item)
                yield from self._file(item) if is_path else self._pieces(item)

    def _stream(self, data: Any, inside: bool) -> Iterator[Piece]:
        """Anything else that holds items, until these surely have enough tokens: one per ten characters or so."""
        seen = 0
        for item in _items(data, inside):
            for piece in self._pieces(item):
                yield piece
                seen += piece["input_ids"].numel() if isinstance(piece, dict) else 1 + len(piece or "") // 10
            if seen >= self.max_tokens:
                return

    def _chat(self, messages: Sequence[Any]) -> str | None:
        """A conversation as one text."""
        turns = [_turn(message) for message in messages if message is not None]
        contents = [turn["content"] for turn in turns if turn["content"].strip()]
        tokenizer = tokenizer_of(self.tokenizer)
        template = next((owner for owner in (tokenizer, self.tokenizer) if getattr(owner, "chat_template", None)), None)
        if not contents or template is None:
            return "\n\n".join(contents) or None
        if template is not tokenizer:  # a processor, which knows parts only
            turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            return template.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # templates are programs, and raise what they like
            raise CalibrationError(
                f"The chat template of the tokenizer refuses a chat of {[turn['role'] for turn in turns]} "
                f"({type(error).__name__}: {error}). Give chats that it takes, or their texts."
            ) from error

    def _refuse(self, item: Any, inside: bool) -> Iterator[Piece]:
        raise _unreadable(item, inside)


# In this order: a model may be iterable, and a str is a sequence.
_READERS: tuple[tuple[Any, Callable[..., Iterator[Piece]]], ...] = (
    (tuple(kind for kinds, _ in _NOT_DATA for kind in kinds), _Reader._refuse),
    (str, _Reader._text),
    (os.PathLike, _Reader._file),
    (torch.Tensor, _Reader._tokens),
    (Mapping, _Reader._mapping),
    ((list, tuple), _Reader._list),
    (object, _Reader._stream),
)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def _unreadable(item: Any, inside: bool) -> CalibrationError:
    """What an item is, and what is needed."""
    name = type(item).__name__
    advice = next((advice for kinds, advice in _NOT_DATA if isinstance(item, kinds)), "")
    if not isinstance(item, Mapping) and not inside:
        return CalibrationError(f"Calibration data of type {name} cannot be read.{advice} Give {_ACCEPTED}.")
    keys = f" with {sorted(map(str, item))}" if isinstance(item, Mapping) else ""
    return CalibrationError(
        f"Calibration data hold a {name}{keys}.{advice} They must hold texts, mappings with `input_ids` or one of "
        f"{(*_TEXT_KEYS, *_CHAT_KEYS)}, or token ids [B, T]."
    )


def _is_missing(item: Any) -> bool:
    return item is None or (isinstance(item, float) and item != item) or type(item).__name__ in _MISSING


def _first(items: Iterable[Any]) -> Any:
    """The first item that is not missing."""
    return next((item for item in items if not _is_missing(item)), None)


def _plain(item: Any) -> Any:
    """Arrays and tables of other libraries as tensors, lists and rows."""
    if isinstance(item, (str, torch.Tensor, Mapping, list, tuple, Number)):
        return item
    if hasattr(item, "columns") and hasattr(item, "to_dict"):  # pandas: iterating it gives the names of its columns
        return item.to_dict("records")
    for method in ("to_pylist", "to_dicts"):  # pyarrow, polars
        if hasattr(item, method):
            return getattr(item, method)()
    if hasattr(item, "ids") and hasattr(item, "attention_mask"):  # what `tokenizers` returns
        return {"input_ids": item.ids, "attention_mask": item.attention_mask}
    return _tensor_or_list(np.asarray(item)) if hasattr(item, "__array__") else item


def _tensor_or_list(array: np.ndarray) -> Any:
    """An array of numbers as a tensor of its kind, of others as lists."""
    kind = array.dtype.kind
    if kind in _NO_NUMBERS:
        return array.tolist()
    if kind in "iu":
        return torch.tensor(array.astype(np.int64), dtype=torch.int64, device="cpu")
    return torch.tensor(array, dtype=torch.bool if kind == "b" else torch.float64, device="cpu")


def _items(data: Any, inside: bool) -> Iterator[Any]:
    """The items of anything that holds some."""
    if isinstance(data, DataLoader) and data.collate_fn is default_collate:
        return map(_upright, data)
    if isinstance(data, Iterable):
        return iter(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # a data set of torch: it need not say where it ends
        return (data[index] for index in range(len(data)))
    raise _unreadable(data, inside)


def _upright(batch: Any) -> Any:
    """A batch of a `DataLoader`, which turns B lists of T numbers into a list of T tensors [B]."""
    if isinstance(batch, Mapping):
        return {name: _upright(value) for name, value in batch.items()}
    is_turned = isinstance(batch, list) and all(isinstance(item, torch.Tensor) and item.dim() == 1 for item in batch)
    return torch.stack(batch, dim=1) if is_turned and batch else batch


def _saved_rows(path: Path) -> Any:
    """The rows of a file of them, or a saved data set.

    Raises:
        ConfigError: the package datasets is missing.
        CalibrationError: the file is damaged.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"Reading {path} needs the package datasets: pip install datasets.") from error
    try:
        if path.is_dir():
            return datasets.load_from_disk(str(path))
        kind = _TABLES[path.suffix.lower()]
        rows: Iterator[Any] = iter(datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True))
        return chain([next(rows, None)], rows)  # the first is read at once, for errors to be caught here
    except Exception as error:  # the readers of each kind raise what they like
        raise CalibrationError(
            f"{path} cannot be read as a data set ({type(error).__name__}: {error}). Give its rows, or plain text."
        ) from error


def _is_data_set(value: Any) -> bool:
    return hasattr(value, "column_names") and hasattr(value, "features")


def _are_splits(row: Mapping[str, Any]) -> bool:
    if row and all(map(_is_data_set, row.values())):
        return True
    is_row = any(key in row for key in ("input_ids", *_TEXT_KEYS, *_CHAT_KEYS))
    return "train" in row and not is_row and not isinstance(row["train"], (str, bytes, Number))


def _one_split(splits: Mapping[str, Any]) -> Any:
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise CalibrationError(
        f"The calibration data have the splits {sorted(map(str, splits))}, and none is called 'train'. Give one of "
        f"them: data[{next(iter(splits))!r}]."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Chats


def _is_message(item: Any) -> bool:
    """Whether an item is one message: {"role", "content"}, or {"from", "value"} as some data sets have it."""
    return isinstance(item, Mapping) and (
        ("role" in item and ("content" in item or "tool_calls" in item)) or ("from" in item and "value" in item)
    )


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts: text, images, ..."""
    content = message.get("content", message.get("value"))
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def _turn(message: Any) -> dict[str, Any]:
    """A message as chat templates expect it."""
    if not _is_message(message):
        raise _unreadable(message, inside=True)
    # Data sets fill up what some messages lack with None.
    rest = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    role = message.get("role", message.get("from"))
    return rest | {"role": _ROLES.get(role, role), "content": _content(message)}


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def _one_sequence(ids: Sequence[Any]) -> Iterator[Piece]:
    """A list of numbers as all of the data."""
    if len(ids) < _FEWEST_TOKENS:
        raise CalibrationError(
            f"Calibration data hold a {type(_first(ids)).__name__} at each of {len(ids)} places. As token ids of one "
            f"sequence they are too few: {_FEWEST_TOKENS} are needed at least, and 8,000 to 20,000 to be good."
        )
    return _token_pieces(ids)


def _token_pieces(ids: Any, mask: Any = None) -> Iterator[Piece]:
    """Token ids [B, T] or [T] as one batch; in lists that are not of one length, one batch for each."""
    ids, mask = _plain(ids), _plain(mask)
    if isinstance(ids, (list, tuple)) and ids:
        tensor = _as_tensor(ids)
        if tensor is None:
            masks = [None] * len(ids) if mask is None else mask
            if len(masks) != len(ids):
                raise CalibrationError(f"`attention_mask` has {len(masks)} rows, `input_ids` has {len(ids)}.")
            for row, its_mask in zip(ids, masks, strict=True):
                yield from _token_pieces(row, its_mask)
            return
        ids = tensor
    if _is_missing(ids) or (isinstance(ids, (list, tuple)) and not ids):
        yield None
    elif isinstance(ids, torch.Tensor):
        yield _token_batch(ids, mask)
    else:
        raise CalibrationError(
            f"`input_ids` hold a {type(ids).__name__}; they must be token ids: a tensor, an array or lists of integers."
        )


def _as_tensor(ids: Sequence[Any]) -> torch.Tensor | None:
    """Numbers, or rows of them, as one tensor; None where the rows are not all there and of one length."""
    rows = [_plain(row) for row in ids]
    if all(isinstance(row, torch.Tensor) for row in rows):
        return torch.stack(rows) if rows[0].dim() == 1 and len({row.shape for row in rows}) == 1 else None
    if not isinstance(_first(rows), Number) and not all(isinstance(row, (list, tuple)) and row for row in rows):
        return None
    try:
        array = np.asarray(rows)
    except ValueError:
        return None
    if array.dtype.kind in _NO_NUMBERS:
        odd = [type(leaf).__name__ for leaf in _leaves(rows) if not isinstance(leaf, Integral)]
        name = odd[0] if odd else "number of more than 64 bits"
        raise CalibrationError(f"Calibration data hold a {name} among token ids; these must be integers.")
    return _tensor_or_list(array)


def _leaves(rows: Iterable[Any]) -> Iterator[Any]:
    for row in rows:
        if isinstance(row, (list, tuple)):
            yield from _leaves(row)
        else:
            yield row


def _token_batch(ids: torch.Tensor, mask: Any) -> Batch | None:
    """A batch as models take it; None for a single sequence of fewer than two tokens."""
    found = f"Calibration tokens are {ids.dtype} {list(ids.shape)}"
    if ids.is_meta:
        raise CalibrationError(f"{found} on the meta device, where they have no values. Give them on another device.")
    if ids.dim() == 1:
        ids = ids[None]
    is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    too_short = ids.dim() == 2 and ids.shape[1] < 2
    if ids.dim() != 2 or not is_integer or (too_short and len(ids) > 1):
        raise CalibrationError(f"{found}; they must be int64 [B, T], with two tokens in each sequence at least.")
    if too_short:
        return None
    if mask is None:
        return {"input_ids": ids.long()}
    real = _real_tokens(mask, ids)
    rows = real.any(-1)
    return {"input_ids": ids[rows].long(), "attention_mask": real[rows].long()} if rows.any() else None


def _real_tokens(mask: Any, ids: torch.Tensor) -> torch.Tensor:
    """Which tokens of ids [B, T] are no padding, bool [B, T]."""
    mask = _as_tensor(mask) if isinstance(mask, (list, tuple)) else mask
    found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    if isinstance(mask, torch.Tensor) and mask.dim() == 1:
        mask = mask[None]
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or (mask < 0).any():
        raise CalibrationError(
            f"`attention_mask` is {found} for tokens {list(ids.shape)}; it must be of the same shape, with 1 at real "
            "tokens and 0 at padding."
        )
    return mask.to(ids.device) != 0


def _within(batch: Batch, max_tokens: int, window: int) -> list[Batch]:
    """A batch as it is, or as much of it as `max_tokens`: rows, or windows of longer rows, spread evenly over it."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.numel() <= max_tokens:
        return [batch]
    if ids.shape[1] <= max_tokens:
        return [{name: spread_evenly(tensor, max_tokens // ids.shape[1]) for name, tensor in batch.items()}]
    real = ids.flatten() if mask is None else ids[mask.bool()]
    windows = cut_windows(real, min(window, len(real)))
    return [{"input_ids": row[None]} for row in spread_evenly(windows, max(1, max_tokens // window))]


def _text_batches(texts: Sequence[str], tokenizer: Any, max_tokens: int, window: int) -> list[Batch]:
    if window < 2:
        raise ConfigError(f"`window` is {window}; a window needs two tokens at least.")
    ids = token_ids(tokenizer, texts)
    needed = min(window, _FEWEST_TOKENS)
    if len(ids) < needed:
        is_word = len(texts) == 1 and not any(map(str.isspace, texts[0]))
        instead = f", the path of a file that is there, or one of {', '.join(SOURCES)}" if is_word else ""
        raise CalibrationError(
            f"The calibration text {shorten(' ... '.join(texts), 80)!r} has {len(ids)} tokens; {needed} are needed at "
            f"least, and 8,000 to 20,000 to be good. Give more text{instead}."
        )
    if len(ids) < window:  # short text is better than none
        return [{"input_ids": ids[None]}]
    return [{"input_ids": row[None]} for row in spread_evenly(cut_windows(ids, window), max(1, max_tokens // window))]

"""What the items of calibration data are: rows of other libraries as plain ones, messages, splits, and what is no data.

Legend: `B` batch, `T` tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kvsplice_hf.errors import CalibrationError, ConfigError


TEXT_KEYS = ("text", "content")
CHAT_KEYS = ("messages", "conversations", "conversation")
# Names of the same roles in two conventions of chat data.
_ROLES = {"human": "user", "gpt": "assistant"}
# Files of rows, and what `datasets` calls their kind.
TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# The array kinds of numpy that are neither bool, integers nor floats.
NO_NUMBERS = "OSUTMmVc"
# What pandas writes for a missing value that is neither None nor a float.
_MISSING = ("NAType", "NaTType")
ACCEPTED = (
    'texts, chats, a data set with a column "text", "messages" or "input_ids", token ids [B, T], or the path of a file '
    "or folder"
)
# What is sometimes passed as data and is none: the type, and what to do instead.
NOT_DATA: tuple[tuple[tuple[type, ...], str], ...] = (
    ((bytes, bytearray, memoryview), " Decode it to a str first."),
    ((PreTrainedTokenizerBase, ProcessorMixin), " Pass it as `tokenizer`, beside the data."),
    ((nn.Module,), " It is a model; the data are what it is run over."),
    ((type,), " It is a class; give what is made with it."),
    ((Number,), ""),
)


def unreadable(item: Any, inside: bool) -> CalibrationError:
    """What an item is, and what is needed."""
    name = type(item).__name__
    advice = next((advice for kinds, advice in NOT_DATA if isinstance(item, kinds)), "")
    if not isinstance(item, Mapping) and not inside:
        return CalibrationError(f"Calibration data of type {name} cannot be read.{advice} Give {ACCEPTED}.")
    keys = f" with {sorted(map(str, item))}" if isinstance(item, Mapping) else ""
    return CalibrationError(
        f"Calibration data hold a {name}{keys}.{advice} They must hold texts, mappings with `input_ids` or one of "
        f"{(*TEXT_KEYS, *CHAT_KEYS)}, or token ids [B, T]."
    )


def is_missing(item: Any) -> bool:
    return item is None or (isinstance(item, float) and item != item) or type(item).__name__ in _MISSING


def first_present(items: Iterable[Any]) -> Any:
    """The first item that is not missing."""
    return next((item for item in items if not is_missing(item)), None)


def as_plain(item: Any) -> Any:
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
    return tensor_or_list(np.asarray(item)) if hasattr(item, "__array__") else item


def tensor_or_list(array: np.ndarray) -> Any:
    """An array of numbers as a tensor of its kind, of others as lists."""
    kind = array.dtype.kind
    if kind in NO_NUMBERS:
        return array.tolist()
    if kind in "iu":
        return torch.tensor(array.astype(np.int64), dtype=torch.int64, device="cpu")
    return torch.tensor(array, dtype=torch.bool if kind == "b" else torch.float64, device="cpu")


def items_of(data: Any, inside: bool) -> Iterator[Any]:
    """The items of anything that holds some."""
    if isinstance(data, DataLoader) and data.collate_fn is default_collate:
        return map(_upright, data)
    if isinstance(data, Iterable):
        return iter(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # a data set of torch: it need not say where it ends
        return (data[index] for index in range(len(data)))
    raise unreadable(data, inside)


def _upright(batch: Any) -> Any:
    """A batch of a `DataLoader`, which turns B lists of T numbers into a list of T tensors [B]."""
    if isinstance(batch, Mapping):
        return {name: _upright(value) for name, value in batch.items()}
    is_turned = isinstance(batch, list) and all(isinstance(item, torch.Tensor) and item.dim() == 1 for item in batch)
    return torch.stack(batch, dim=1) if is_turned and batch else batch


def _is_data_set(value: Any) -> bool:
    return hasattr(value, "column_names") and hasattr(value, "features")


def are_splits(row: Mapping[str, Any]) -> bool:
    if row and all(map(_is_data_set, row.values())):
        return True
    is_row = any(key in row for key in ("input_ids", *TEXT_KEYS, *CHAT_KEYS))
    return "train" in row and not is_row and not isinstance(row["train"], (str, bytes, Number))


def one_split(splits: Mapping[str, Any]) -> Any:
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise CalibrationError(
        f"The calibration data have the splits {sorted(map(str, splits))}, and none is called 'train'. Give one of "
        f"them: data[{next(iter(splits))!r}]."
    )


def saved_rows(path: Path) -> Any:
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
        kind = TABLES[path.suffix.lower()]
        rows: Iterator[Any] = iter(datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True))
        return chain([next(rows, None)], rows)  # the first is read at once, for errors to be caught here
    except Exception as error:  # the readers of each kind raise what they like
        raise CalibrationError(
            f"{path} cannot be read as a data set ({type(error).__name__}: {error}). Give its rows, or plain text."
        ) from error


def is_message(item: Any) -> bool:
    """Whether an item is one message: {"role", "content"}, or {"from", "value"} as some data sets have it."""
    return isinstance(item, Mapping) and (
        ("role" in item and ("content" in item or "tool_calls" in item)) or ("from" in item and "value" in item)
    )


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts: text, images, ..."""
    content = message.get("content", message.get("value"))
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def turn_of(message: Any) -> dict[str, Any]:
    """A message as chat templates expect it."""
    if not is_message(message):
        raise unreadable(message, inside=True)
    # Data sets fill up what some messages lack with None.
    rest = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    role = message.get("role", message.get("from"))
    return rest | {"role": _ROLES.get(role, role), "content": content_of(message)}

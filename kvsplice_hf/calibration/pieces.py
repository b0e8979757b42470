"""Reads calibration data as a stream of pieces: texts, token batches, and rows that hold neither.

What cannot be read is refused by its name, for the next best reading (the names of the columns, the path itself) would
be calibrated on without a word.

Legend: `B` batch, `T` tokens.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from numbers import Number
from pathlib import Path
from typing import Any

import torch

from kvsplice_hf.calibration.items import (
    CHAT_KEYS,
    NOT_DATA,
    TABLES,
    TEXT_KEYS,
    are_splits,
    as_plain,
    content_of,
    first_present,
    is_message,
    is_missing,
    items_of,
    one_split,
    saved_rows,
    turn_of,
    unreadable,
)
from kvsplice_hf.calibration.media import Media
from kvsplice_hf.calibration.tokens import Piece, one_sequence, token_pieces, with_images
from kvsplice_hf.errors import CalibrationError, ConfigError
from kvsplice_hf.text import HUB_SETS, SOURCES, load_texts, looks_like_path, tokenizer_of


_SAVED_DATA_SET = ("dataset_info.json", "dataset_dict.json")


class PieceReader:
    """Reads data as pieces.

    Every method takes an item and whether it is `inside` the data, rather than all of them.

    Args:
        tokenizer: as given to `as_batches`.
        max_tokens: streams are read until they surely hold as many.
        media: what the model takes beside text.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, media: Media) -> None:
        self.tokenizer, self.max_tokens, self.media = tokenizer, max_tokens, media

    def pieces_of_all(self, data: Any) -> Iterator[Piece]:
        """The pieces of all the data. Here alone a str may be a name, and a list of numbers is a sequence of tokens."""
        if isinstance(data, str):
            return self._named(data)
        if data is None:
            raise unreadable(data, inside=False)
        if isinstance(data, (list, tuple)) and isinstance(first_present(data), Number):
            return one_sequence(data)
        return self._pieces(data, inside=False)

    def _pieces(self, item: Any, inside: bool = True) -> Iterator[Piece]:
        item = as_plain(item)
        if is_missing(item):
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
        if is_saved or (is_file and path.suffix.lower() in TABLES):
            return self._pieces(saved_rows(path))
        # The whole path, lest it be taken for the name of a source.
        return self._texts(load_texts(os.path.abspath(path), "calibration"))

    def _tokens(self, ids: torch.Tensor, inside: bool) -> Iterator[Piece]:
        return token_pieces(ids)

    def _mapping(self, row: Mapping[str, Any], inside: bool) -> Iterator[Piece]:
        """A mapping of splits; a batch of tokens; or texts or chats, of one row or of several."""
        if are_splits(row):
            return self._pieces(one_split(row), inside)
        if "input_ids" in row:
            return with_images(token_pieces(row["input_ids"], row.get("attention_mask")), self.media.of_row(row), row)
        if is_message(row):
            return self._text(content_of(row))
        key = next((key for key in (*TEXT_KEYS, *CHAT_KEYS) if key in row), None)
        if key is None:
            raise unreadable(row, inside)
        value = row[key]
        if key in CHAT_KEYS and isinstance(value, Mapping):  # lists of roles and of contents: `datasets` made columns
            value = [dict(zip(value, turn, strict=True)) for turn in zip_longest(*value.values())]
        return self._pieces(value)

    def _list(self, items: Sequence[Any], inside: bool) -> Iterator[Piece]:
        first = first_present(items)
        if isinstance(first, Number):
            yield from token_pieces(items)
        elif is_message(first):
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
        for item in items_of(data, inside):
            for piece in self._pieces(item):
                yield piece
                seen += piece["input_ids"].numel() if isinstance(piece, dict) else 1 + len(piece or "") // 10
            if seen >= self.max_tokens:
                return

    def _chat(self, messages: Sequence[Any]) -> str | None:
        """A conversation as one text."""
        turns = [turn_of(message) for message in messages if message is not None]
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
        raise unreadable(item, inside)


# In this order: a model may be iterable, and a str is a sequence.
_READERS: tuple[tuple[Any, Callable[..., Iterator[Piece]]], ...] = (
    (tuple(kind for kinds, _ in NOT_DATA for kind in kinds), PieceReader._refuse),
    (str, PieceReader._text),
    (os.PathLike, PieceReader._file),
    (torch.Tensor, PieceReader._tokens),
    (Mapping, PieceReader._mapping),
    ((list, tuple), PieceReader._list),
    (object, PieceReader._stream),
)

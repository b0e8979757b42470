"""`PromptCache`: a folder of caches, found again by the tokens they stand for.

One file per entry, in a folder per model (its weights, settings, adapters and splice). Its name is the number of its
tokens and a digest of them. Writers take a lock; readers need none: a file appears whole, and one that is removed stays
readable to who has opened it. So a process that is killed leaves at most an unfinished file, which the next writer
removes.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvsplice_hf import upstream
from kvsplice_hf.errors import CheckpointError, ConfigError
from kvsplice_hf.patch.state import is_patched, patched_sites
from kvsplice_hf.rest.compression import check_compress
from kvsplice_hf.rest.file import PLAIN_VERSION
from kvsplice_hf.rest.row_prediction import RowPrediction
from kvsplice_hf.rest.saving import load_cache, save_cache
from kvsplice_hf.rest.whose import model_identity, text_identity


logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
# Tokens that are computed at once: logits and attention of a whole document take much memory.
_AT_ONCE = 1024


class Entry(NamedTuple):
    """One cache in the folder.

    Attributes:
        path: of its file.
        tokens: how many it stands for.
        nbytes: of the file.
        used: when it was last written or loaded, seconds since 1970.
    """

    path: Path
    tokens: int
    nbytes: int
    used: float


class PromptCache:
    """Caches of prompts on disk, by model, splice and tokens.

    Safe under several processes and threads. An entry that is damaged is removed with a warning, and computed again.

    Args:
        folder: made if it is not there.
        max_bytes: of all entries; what was not used for longest goes first. None: no limit.
        compress: of new entries, as of `save_cache`. Entries that are there are read whatever theirs is.
        prediction: as of `save_cache`, for `compress="layers"`. Entries are kept apart by it.

    Raises:
        ConfigError: `max_bytes` is not above 0, or there is no such compression.
        CheckpointError: the folder cannot be made.

    Examples:
        >>> store = PromptCache("prompts", max_bytes=10 * 2**30)  # doctest: +SKIP
        >>> inputs = tokenizer(document + question, return_tensors="pt")  # doctest: +SKIP
        >>> model.generate(**store.prepare(model, **inputs, keep=document_tokens))  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | Path,
        max_bytes: int | None = None,
        *,
        compress: str | None = None,
        prediction: RowPrediction | None = None,
    ) -> None:
        check_compress(compress, prediction)
        if max_bytes is not None and max_bytes <= 0:
            raise ConfigError(f"`max_bytes` is {max_bytes}; it must be above 0, or None for no limit.")
        self.folder, self.max_bytes, self.compress, self.prediction = Path(folder), max_bytes, compress, prediction
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"The folder of prompts cannot be made: {error}.") from error

    def prepare(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        keep: int | None = None,
        tokenizer: Any = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Arguments for `model.generate`, with a cache of as much of the prompt as there is.

        The longest entry that the prompt begins with is loaded. Where that is shorter than `keep`, the first `keep`
        tokens are completed, and stored for the next time. `generate` computes the rest.

        Args:
            model: that generates.
            input_ids: the prompt, [1, T], of one sequence.
            attention_mask: the same; no token may be masked.
            keep: how many of the first tokens are worth keeping (those of a document, without the question); None: all
                but the last one.
            tokenizer: of the prompt: entries are kept apart by tokenizer then.
            inputs: settings of `generate`, handed through.

        Returns:
            `input_ids`, `attention_mask`, the cache, and `inputs`.

        Raises:
            ConfigError: several sequences, masked tokens, images or other inputs beside tokens, a model in training
                mode, or `keep` out of range.
            CheckpointError: an entry cannot be written.
        """
        self._require_one(input_ids, attention_mask)
        _require_text_alone(model, inputs)
        longest = input_ids.shape[1] - 1  # generate needs a token to go on from
        keep = longest if keep is None else keep
        if not 0 <= keep <= longest:
            raise ConfigError(
                f"`keep` is {keep}; of a prompt of {input_ids.shape[1]} tokens 0 to {longest} can be kept, for a model "
                "goes on from at least one."
            )
        cache = self.find(model, input_ids, tokenizer=tokenizer)
        found = 0 if cache is None else int(cache.get_seq_length())
        if found < keep:
            cache = _completed(model, input_ids, found, keep, cache)
            self.add(model, cache, input_ids[:, :keep], tokenizer=tokenizer)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return {"input_ids": input_ids, "attention_mask": attention_mask, **upstream.cache_argument(cache), **inputs}

    def find(self, model: nn.Module, input_ids: torch.Tensor, *, tokenizer: Any = None) -> Cache | None:
        """The cache of the longest entry that a prompt [1, T] begins with, shorter than it; None where there is none.

        Raises:
            ConfigError: several sequences.
        """
        self._require_one(input_ids, None)
        folder = self._folder_of(model, tokenizer)
        entries = {entry.path.name: entry for entry in _entries(folder)}
        lengths = sorted({entry.tokens for entry in entries.values()} & set(range(1, input_ids.shape[1])))
        for name in reversed(list(_names(input_ids, lengths))):
            cache = self._load(model, entries[name].path, input_ids) if name in entries else None
            if cache is not None:
                return cache
        return None

    def add(self, model: nn.Module, cache: Cache, input_ids: torch.Tensor, *, tokenizer: Any = None) -> Path:
        """Store the cache of a prompt.

        Args:
            model: that has filled it.
            cache: of exactly these tokens.
            input_ids: [1, S].
            tokenizer: as of `prepare`.

        Returns:
            The file.

        Raises:
            ConfigError: several sequences, or tokens that are not those of the cache.
            CheckpointError: it cannot be written, or alone is larger than `max_bytes`.
        """
        self._require_one(input_ids, None)
        length = input_ids.shape[1]
        if int(cache.get_seq_length()) != length:
            raise ConfigError(
                f"The cache holds {int(cache.get_seq_length())} tokens, `input_ids` {length}. Give those of the cache."
            )
        folder = self._folder_of(model, tokenizer)
        path = folder / next(_names(input_ids, [length]))
        with self._writing():
            folder.mkdir(exist_ok=True)
            more: dict[str, Any] = {"compress": self.compress, "prediction": self.prediction}
            nbytes = save_cache(cache, path, model, input_ids=input_ids, tokenizer=tokenizer, **more)
            if self.max_bytes is not None and nbytes > self.max_bytes:
                path.unlink()
                raise CheckpointError(
                    f"The cache of {length} tokens takes {nbytes} bytes; all prompts in {self.folder} together may "
                    f"take {self.max_bytes}. Raise `max_bytes`."
                )
            self._make_room(path)
        return path

    def entries(self) -> list[Entry]:
        """All entries of all models, the one that was not used for longest first."""
        found = [entry for folder in self.folder.iterdir() if folder.is_dir() for entry in _entries(folder)]
        return sorted(found, key=lambda entry: entry.used)

    def clear(self) -> None:
        """Remove all entries."""
        with self._writing():
            for entry in self.entries():
                entry.path.unlink(missing_ok=True)

    def _load(self, model: nn.Module, path: Path, input_ids: torch.Tensor) -> Cache | None:
        try:
            cache = load_cache(model, path, input_ids=input_ids, prediction=self.prediction)
        except CheckpointError as error:
            # What cannot be opened is no damage: another process has made room, or made it anew just now.
            if not isinstance(error.__cause__, OSError):
                logger.warning("A stored prompt cannot be read, and is removed: %s", error)
                path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return cache

    def _make_room(self, kept: Path) -> None:
        """Remove entries until they fit, those that were not used for longest first, and what killed writers left."""
        for unfinished in self.folder.glob("*/.*.tmp"):
            unfinished.unlink(missing_ok=True)
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if self.max_bytes is None or total <= self.max_bytes:
                return
            if entry.path != kept:
                entry.path.unlink(missing_ok=True)
                total -= entry.nbytes

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with FileLock(self.folder / ".lock"):
                yield
        except OSError as error:
            raise CheckpointError(f"Nothing can be stored in {self.folder}: {error}.") from error

    def _folder_of(self, model: nn.Module, tokenizer: Any) -> Path:
        """Where entries of a model are: another splice, other weights or another tokenizer have another folder."""
        splices = [patched.splice.identity for _, patched in patched_sites(model)] if is_patched(model) else []
        text = text_identity(tokenizer)
        # Caches of other releases hold other things.
        whose = [model_identity(model), splices, text, upstream.INSTALLED, PLAIN_VERSION]
        if self.prediction is not None:  # whoever has none could not read them
            whose.append(self.prediction.identity)
        return self.folder / hashlib.sha256(json.dumps(whose, sort_keys=True).encode()).hexdigest()[:32]

    @staticmethod
    def _require_one(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
            raise ConfigError(
                f"`input_ids` is {list(input_ids.shape)}; prompts are stored one by one, [1, T]. Several sequences at "
                "once are for save_cache and load_cache."
            )
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ConfigError(
                "`attention_mask` holds masked tokens; prompts are stored without padding. Give it without."
            )


def _require_text_alone(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Refuse what the numbers in a cache depend on and its name does not tell."""
    others = sorted(name for name, value in inputs.items() if isinstance(value, torch.Tensor))
    if others:
        raise ConfigError(
            f"Prompts are stored by their tokens, and `{'`, `'.join(others)}` would change what these stand for. Store "
            "such a cache with save_cache, under a name that tells the rest."
        )
    if model.training:
        raise ConfigError("The model is in training mode, where dropout changes its caches. Call model.eval() first.")


def _entries(folder: Path) -> list[Entry]:
    found = []
    for path in folder.glob(f"*{_SUFFIX}"):
        count = path.name.partition("-")[0]
        with contextlib.suppress(OSError, ValueError):  # it went meanwhile, or is not ours
            about = path.stat()
            found.append(Entry(path, int(count), about.st_size, about.st_mtime))
    return found


def _names(input_ids: torch.Tensor, lengths: list[int]) -> Iterator[str]:
    """Names of the entries that hold the first tokens of a prompt, of ascending lengths."""
    ids, content, before = input_ids[0].to("cpu", torch.int64).contiguous(), hashlib.sha256(), 0
    for length in lengths:
        content.update(ids[before:length].numpy().tobytes())
        before = length
        yield f"{length}-{content.hexdigest()[:32]}{_SUFFIX}"


@torch.no_grad()
def _completed(model: Any, input_ids: torch.Tensor, found: int, keep: int, cache: Cache | None) -> Cache:
    """The cache of the first `keep` tokens, of one that holds the first `found`."""
    if cache is None:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for start in range(found, keep, _AT_ONCE):
        piece = input_ids[:, start : min(start + _AT_ONCE, keep)]
        model(input_ids=piece, use_cache=True, **fewer, **upstream.cache_argument(cache))
    return cache

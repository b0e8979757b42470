"""Text for training from scratch: documents of a source, a tokenizer trained on them, and blocks of tokens on disk.

Documents are split into a part to train on and a part to validate on before anything else is done with them; the
tokenizer sees the first part only. What was made once is found again by a hash of the texts, the tokenizer and the
settings; two processes that ask for the same wait for one another.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvsplice_hf import ConfigError
from kvsplice_hf.text import HUB_SETS, load_texts, spread_evenly, stream_hub_texts


logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# What separates documents within a file; scripts/research/gather_text.py writes it.
DOCUMENT_BREAK = "\n\f\n"
PARTS = ("train", "validation")
_SUFFIXES = (".txt", ".md", ".rst")
# Longer documents are cut between paragraphs, so that a book serves both parts.
_PIECE = 20_000
# Documents of a hub set without a validation split of its own that are validated on.
_HUB_VALIDATION = 2000
# A tokenizer of thousands of tokens is settled long before.
_TOKENIZER_DOCUMENTS = 100_000
_AT_ONCE = 64
# Changes with the recipes below, so that nothing made by an older release is taken for this one's.
_RECIPE = 1


@dataclass
class DataArguments:
    """What is trained on."""

    data: list[str] = field(
        default_factory=lambda: ["pydoc"],
        metadata={"help": "texts: folders, files, pydoc, tinystories, fineweb-edu, wikitext, c4"},
    )
    documents: int | None = field(default=None, metadata={"help": "at most so many documents of a named set"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "tokenizer.json, folder or hub name; none: byte-level BPE trained on the texts"}
    )
    vocab_size: int = field(default=4096, metadata={"help": "of the tokenizer that is trained"})
    validation_share: float = field(default=0.02, metadata={"help": "of local texts, kept from training"})
    validation_blocks: int = field(default=256, metadata={"help": "at most so many blocks to validate on"})
    cache: str = field(default="results/cache", metadata={"help": "folder for tokenizers and blocks of tokens"})

    def __post_init__(self) -> None:
        if isinstance(self.data, str):  # a YAML file may well name one
            self.data = [self.data]


class Source(NamedTuple):
    """A text source: what it is known by, and its documents by part ("train", "validation")."""

    key: str
    documents: Callable[[str], Iterator[str]]


class Blocks(NamedTuple):
    """Blocks of tokens, the tokenizer they are made with, and what identifies both."""

    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerFast
    key: str


def open_source(name: str, args: DataArguments) -> Source:
    """A source by its name or path.

    Raises:
        ConfigError: there is no such source, or it holds no text.
    """
    if name == "pydoc":
        halves = {"train": "calibration", "validation": "evaluation"}
        key = _digest(*load_texts(name, "calibration"), *load_texts(name, "evaluation"))
        return Source(f"pydoc {key}", lambda part: iter(load_texts(name, halves[part])))
    if name in HUB_SETS:
        return Source(f"{HUB_SETS[name]} {args.documents}", partial(_hub_documents, name, args.documents))
    files = _files_of(Path(name))
    every = round(1 / args.validation_share)
    key = _digest(*(f"{path.name} {_file_digest(path)}" for path in files))
    return Source(f"local {key} {every}", partial(_local_documents, files, every))


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(
            f"--data has {str(path)!r}, which is neither a folder nor a file, nor one of pydoc, {', '.join(HUB_SETS)}. "
            "A folder of text is made by scripts/research/gather_text.py."
        )
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    if not files:
        raise ConfigError(f"The folder {path} holds no {', '.join(_SUFFIXES)} files.")
    return files


def _local_documents(files: list[Path], every: int, part: str) -> Iterator[str]:
    """Every n-th piece is validated on; pieces are counted over all files, so that small files give some too."""
    pieces = (piece for file in files for piece in _pieces(file.read_text(encoding="utf-8", errors="replace")))
    for index, piece in enumerate(pieces):
        if (index % every == every // 2) == (part == "validation"):
            yield piece


def _pieces(text: str) -> Iterator[str]:
    for document in text.split(DOCUMENT_BREAK):
        held: list[str] = []
        size = 0
        for paragraph in document.split("\n\n"):
            if held and size + len(paragraph) > _PIECE:
                yield "\n\n".join(held)
                held, size = [], 0
            held.append(paragraph)
            size += len(paragraph) + 2
        if "".join(held).strip():
            yield "\n\n".join(held)


def _hub_documents(name: str, limit: int | None, part: str) -> Iterator[str]:
    entry = HUB_SETS[name]
    shared = entry.calibration == entry.evaluation
    split = entry.evaluation if part == "validation" else entry.calibration
    texts = stream_hub_texts(name, split, instead="pydoc or a folder of text from scripts/research/gather_text.py")
    if part == "validation":
        yield from islice(texts, _HUB_VALIDATION)
        return
    start = _HUB_VALIDATION if shared else 0
    yield from islice(texts, start, None if limit is None else start + limit)


def load_blocks(args: DataArguments, block_size: int) -> Blocks:
    """The texts as blocks of `block_size` tokens, from the cache where they are there.

    Raises:
        ConfigError: a text or the tokenizer cannot be had, or a part holds less than one block.
    """
    if not 0 < args.validation_share <= 0.5:
        raise ConfigError(f"--validation_share is {args.validation_share}; it must be above 0, and 0.5 at most.")
    sources = [open_source(name, args) for name in args.data]
    tokenizer = load_tokenizer(args, sources)
    key = _digest(*(source.key for source in sources), tokenizer.backend_tokenizer.to_str(), block_size)
    folder = _made_once(Path(args.cache) / f"blocks-{key}", partial(_pack_into, sources, tokenizer, block_size))
    parts = {}
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ConfigError(f"The {part} part of {', '.join(args.data)} is shorter than one block of {block_size}.")
        parts[part] = datasets.load_from_disk(str(folder / part)).with_format("torch")
    chosen = spread_evenly(
        torch.arange(len(parts["validation"]), dtype=torch.int64, device="cpu"), args.validation_blocks
    )
    parts["validation"] = parts["validation"].select(chosen.tolist())
    return Blocks(parts["train"], parts["validation"], tokenizer, key)


def load_tokenizer(args: DataArguments, sources: list[Source]) -> PreTrainedTokenizerFast:
    """The tokenizer that was asked for, or one trained on the training part of the sources.

    Raises:
        ConfigError: it cannot be loaded, has no end-of-text token, or the vocabulary is smaller than the bytes.
    """
    if args.tokenizer is None:
        if args.vocab_size < 257:
            raise ConfigError(f"--vocab_size is {args.vocab_size}; 256 bytes and an end of text need 257 at least.")
        key = _digest(*(source.key for source in sources), args.vocab_size)
        target = Path(args.cache) / f"tokenizer-{key}"
        path = _made_once(target, partial(_train_tokenizer, sources, args.vocab_size)) / "tokenizer.json"
        return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    if Path(args.tokenizer).suffix == ".json":
        if not Path(args.tokenizer).is_file():
            raise ConfigError(f"--tokenizer {args.tokenizer} is not there.")
        return PreTrainedTokenizerFast(tokenizer_file=args.tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    tokenizer: Any = AutoTokenizer.from_pretrained(args.tokenizer)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"The tokenizer {args.tokenizer} has no end-of-text token, which separates documents.")
    return tokenizer


def _train_tokenizer(sources: list[Source], vocab_size: int, folder: Path) -> None:
    logger.info("Training a tokenizer of %d tokens.", vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(_documents(sources, "train"), _TOKENIZER_DOCUMENTS), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def _documents(sources: Iterable[Source], part: str) -> Iterator[str]:
    for source in sources:
        yield from source.documents(part)


def _pack_into(sources: list[Source], tokenizer: Any, block_size: int, folder: Path) -> None:
    """Both parts as data sets on disk; a part without a whole block is left out."""
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    for part in PARTS:
        settings = {"sources": sources, "part": part, "tokenizer": tokenizer, "block_size": block_size}
        if next(_rows(**settings), None) is None:
            continue
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = datasets.Dataset.from_generator(_rows, features, cache_dir=scratch, gen_kwargs=settings)
            made.save_to_disk(str(folder / part))


def _rows(sources: list[Source], part: str, tokenizer: Any, block_size: int) -> Iterator[dict[str, list[int]]]:
    for block in pack(_documents(sources, part), tokenizer, block_size):
        yield {"input_ids": block}


def pack(documents: Iterable[str], tokenizer: Any, block_size: int) -> Iterator[list[int]]:
    """Documents one after the other, an end of text after each, cut into blocks; what is left at the end is dropped."""
    documents = iter(documents)
    held: list[int] = []
    while batch := list(islice(documents, _AT_ONCE)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            held += [*ids, tokenizer.eos_token_id]
        whole = len(held) - len(held) % block_size
        for start in range(0, whole, block_size):
            yield held[start : start + block_size]
        held = held[whole:]


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it is there; moved to its place whole, so that half of it is never found."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            with _quiet_datasets(), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                unfinished = Path(scratch) / "unfinished"
                unfinished.mkdir()
                make(unfinished)
                shutil.move(unfinished, folder)
    return folder


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without the bar that counts examples of an unknown number."""
    hidden = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_RECIPE, *parts]).encode()).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

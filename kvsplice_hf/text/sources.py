"""Text to measure and to calibrate on: named data sets, local files, and one that every Python carries.

Every source has two halves that never overlap, "calibration" and "evaluation". `pydoc` is the English prose of Python's
own language reference (`pydoc_data.topics`, about 370 kB of distinct prose), so that a quality figure can be had
without any download. `varied` is meant for calibration: short pieces of a novel and of a factbook, which the package
carries, of `pydoc`, and of the source code of Python's own library. The named sets come through `datasets` from the
Hugging Face hub.
"""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import torch

from kvsplice_hf.errors import ConfigError
from kvsplice_hf.text.tokenizers import tokenizer_of


SPLITS = ("calibration", "evaluation")
# `varied`: excerpts of each kind, and characters of each, about 512 tokens.
_EXCERPTS = 16
_EXCERPT_SIZE = 2300
# Herman Melville, Moby-Dick (1851), and the CIA World Factbook (a work of the United States government): both are in
# the public domain.
_VARIED_FILES = ("novel.txt", "factbook.txt")
_SMALLEST_MODULE = 12_000
_SUFFIXES = (".txt", ".md", ".rst")
# Names that end in one of these are meant as files, whether they are there or not.
_FILE_SUFFIXES = (
    *_SUFFIXES,
    *(".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".safetensors", ".pt", ".bin", ".npy", ".pdf"),
    *(".html", ".xml", ".yaml", ".py", ".gz", ".zip", ".zst"),
)
# What file systems take: bytes of one part of a path, and of all of it.
_LONGEST_PART = 255
_LONGEST_PATH = 4095
_SHOWN = 80


@dataclass(frozen=True)
class _HubSet:
    """Where a named set is, and which of its splits serves which half."""

    path: str
    name: str | None
    calibration: str
    evaluation: str


HUB_SETS = {
    "c4": _HubSet("allenai/c4", "en", "train", "validation"),
    # One split only: the halves are the even and the odd documents.
    "fineweb-edu": _HubSet("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "train"),
    "tinystories": _HubSet("roneneldan/TinyStories", None, "train", "validation"),
    "wikitext": _HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test"),
}
SOURCES = ("pydoc", "varied", *HUB_SETS)


def load_texts(source: str, split: str = "evaluation", samples: int | None = None) -> list[str]:
    """The documents of one half of a text source.

    Args:
        source: "pydoc", "varied", one of the named sets ("wikitext", "fineweb-edu", "tinystories", "c4"), or the path
            of a text file (split in its middle, between paragraphs if it has several) or of a folder of text files
            (every other file).
        split: "calibration" or "evaluation".
        samples: at most this many documents.

    Raises:
        ConfigError: the source or the split is unknown, empty, or cannot be loaded.
    """
    if split not in SPLITS:
        raise ConfigError(f"`split` is {split!r}; it must be one of {SPLITS}.")
    documents = [text for text in islice(_documents(source, split), samples) if text.strip()]
    if not documents:
        folder = f" A folder is searched for files that end in {', '.join(_SUFFIXES)}." if os.path.isdir(source) else ""
        raise ConfigError(f"The {split} half of {_shown(source)} holds no text.{folder}")
    return documents


def looks_like_path(name: str) -> bool:
    """Whether a string is the name of a file or folder, of one that is there or not, rather than a text.

    It is one line, short enough for a file system, and ends like a file or has parts but no space.
    """
    if len(name) > _LONGEST_PATH or len(name.splitlines()) != 1 or "\0" in name:
        return False
    parts = name.replace(os.sep, "/").split("/")
    if max(len(part.encode(errors="replace")) for part in parts) > _LONGEST_PART:
        return False
    return name.lower().endswith(_FILE_SUFFIXES) or (len(parts) > 1 and not any(map(str.isspace, name)))


def _documents(source: str, split: str) -> Iterator[str]:
    half = SPLITS.index(split)
    if source == "pydoc":
        yield from islice(_pydoc_topics(), half, None, 2)
    elif source == "varied":
        yield from _varied_excerpts(half)
    elif source in HUB_SETS:
        yield from _hub_documents(source, split)
    elif os.path.isdir(source):
        found = (path for path in Path(source).rglob("*") if path.suffix.lower() in _SUFFIXES)
        files = sorted(path for path in found if path.is_file())
        yield from (_read(path) for path in files[half::2])
    elif os.path.isfile(source):
        yield _half_of(_read(Path(source)), half)
    else:
        raise ConfigError(
            f"Unknown text {_shown(source)}: nothing is there by this name. It is neither a file nor a folder, nor one "
            f"of {', '.join(SOURCES)}."
        )


def _half_of(text: str, half: int) -> str:
    """The first or the second half, by paragraphs; by lines where there is but one, and by words in a single line."""
    mark = next((mark for mark in ("\n\n", "\n") if mark in text.strip()), " ")
    parts = text.split(mark)
    middle = len(parts) // 2
    return mark.join(parts[middle:] if half else parts[:middle])


def _read(path: Path) -> str:
    """A text file, whatever its encoding; bytes that are not UTF-8 are replaced.

    Raises:
        ConfigError: it cannot be read, or holds something else than text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The text file {path} cannot be read ({error}). Give one that can.") from error
    if b"\0" in content:
        raise ConfigError(
            f"{path} is no text file: it holds NUL bytes. Give plain text in UTF-8, or open the file yourself and give "
            "the texts in it."
        )
    return content.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def _shown(source: object) -> str:
    """A source as an error shows it: a text that was taken for one may be long."""
    name = str(source)
    return repr(name) if len(name) <= _SHOWN else f"{name[:_SHOWN]!r}... ({len(name)} characters)"


def _pydoc_topics() -> Iterator[str]:
    """The topics in order of their names, each paragraph only where it comes first.

    Topics quote one another ("compound" holds all of "if"), so splitting by topic alone would put the same sentences
    into both halves.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for _, text in sorted(topics.items()):
        paragraphs = {" ".join(paragraph.split()): paragraph for paragraph in text.split("\n\n")}
        new = [paragraph for key, paragraph in paragraphs.items() if key not in seen]
        seen |= paragraphs.keys()
        if new:
            yield "\n\n".join(new)


def _varied_excerpts(half: int) -> Iterator[str]:
    """Excerpts of all kinds in turn, so that every part of them is as varied as the whole."""
    folder = Path(__file__).parent / "varied"
    kinds = [(folder / name).read_text(encoding="utf-8").split("\n\f\n") for name in _VARIED_FILES]
    topics = "\n\n".join(islice(_pydoc_topics(), 0, None, 2))  # of the calibration half only
    starts = range(0, len(topics), len(topics) // _EXCERPTS)
    kinds.append([topics[start : start + _EXCERPT_SIZE] for start in starts])
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    modules = [path for path in modules if path.stat().st_size >= _SMALLEST_MODULE]
    # Some installations carry no source code; then there are three kinds.
    spread = modules[:: max(1, len(modules) // _EXCERPTS)]
    kinds.append([_middle_of(path.read_text(encoding="utf-8", errors="replace")) for path in spread])
    for group in zip_longest(*(kind[half:_EXCERPTS:2] for kind in kinds)):
        yield from (excerpt for excerpt in group if excerpt)


def _middle_of(text: str) -> str:
    start = min(len(text) // 2, _SMALLEST_MODULE // 2)
    return text[start : start + _EXCERPT_SIZE]


def _hub_documents(source: str, split: str) -> Iterator[str]:
    entry = HUB_SETS[source]
    texts = stream_hub_texts(source, getattr(entry, split), instead='"pydoc" or a local file')
    shared = entry.calibration == entry.evaluation
    yield from islice(texts, SPLITS.index(split), None, 2) if shared else texts


def stream_hub_texts(source: str, hub_split: str, instead: str) -> Iterator[str]:
    """Documents of a named set of the hub, streamed: one larger than the memory or the disk can be read in part.

    Args:
        source: one of `HUB_SETS`.
        hub_split: the hub's name of the split.
        instead: what to use offline; part of the error.

    Raises:
        ConfigError: the package datasets is missing, or the set is not to be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(f"{source!r} needs the package datasets: pip install datasets.") from error
    entry = HUB_SETS[source]
    try:
        rows: Iterator[Any] = iter(load_dataset(entry.path, entry.name, split=hub_split, streaming=True))
        first = next(rows)
    except Exception as error:  # the hub client raises many kinds; all mean that the set is not to be had
        raise ConfigError(
            f"The data set {entry.path} cannot be loaded ({type(error).__name__}: {error}). Offline, use {instead}."
        ) from error
    yield from (row["text"] for row in chain([first], rows))


def spread_evenly(windows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the windows [W, T], at most all, evenly over them from the first to the last."""
    count = min(len(windows), count)
    places = torch.linspace(0, len(windows) - 1, count, dtype=torch.float32, device="cpu").round().long()
    return windows[places.to(windows.device)]


def token_ids(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """The tokens of the texts, joined by blank lines: int64 [T], on the CPU.

    Args:
        tokenizer: of the model, or a processor that has one.
        texts: any number.

    Raises:
        ConfigError: it is no tokenizer, and has none.
    """
    # Without what is no character at all (half a surrogate pair), which tokenizers refuse.
    joined = "\n\n".join(texts).encode(errors="replace").decode()
    # Tensors that the tokenizer makes would be on the default device of the program, whatever that is.
    ids = tokenizer_of(tokenizer)(joined, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def token_windows(tokenizer: Any, texts: Sequence[str], window: int, samples: int | None = None) -> torch.Tensor:
    """The texts as token windows of one length, int64 [windows, window]; what is left over at the end is dropped.

    The windows do not overlap: every token but the first of each window is predicted exactly once, from between 1 and
    `window - 1` tokens before it.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: documents; they are joined by blank lines.
        window: tokens per window.
        samples: at most this many windows.

    Raises:
        ConfigError: the texts are shorter than one window.

    Examples:
        >>> token_windows(tokenizer, load_texts("pydoc"), window=512, samples=4).shape
        torch.Size([4, 512])
    """
    if window < 2:
        raise ConfigError(f"`window` is {window}; a window needs two tokens at least.")
    return cut_windows(token_ids(tokenizer, texts), window)[:samples]


def cut_windows(ids: torch.Tensor, window: int) -> torch.Tensor:
    """Tokens [T] as windows [windows, window]; what is left over at the end is dropped.

    Raises:
        ConfigError: they are fewer than one window.
    """
    count = len(ids) // window
    if count == 0:
        raise ConfigError(
            f"The texts have {len(ids)} tokens, less than one window of {window}. Give more text, or a smaller "
            "`window` (--window, or --block_size where a script has that)."
        )
    return ids[: count * window].view(count, window)

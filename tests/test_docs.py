"""The documentation keeps its promises: links lead somewhere, commands exist, messages are explained, code imports.

Nothing here needs a network, and only one test the packages that build the pages.
"""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import load_program

import kvsplice_hf
from kvsplice_hf import errors


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "kvsplice_hf"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TROUBLESHOOTING = DOCS / "troubleshooting.md"
PUBLIC_MODULES = ("", ".convert", ".training", ".evaluation", ".text", ".gpt2_mla")
# Rooms whose messages are not on the page, and why.
UNEXPLAINED_ROOMS = {"bench": "only programs under scripts/ raise these, and say what to do"}
# Calls that make an error or log a warning, and the section of the page that explains them.
SECTIONS = {name: name for name, member in vars(errors).items() if inspect.isclass(member)}
SECTIONS |= {"changed": "UpstreamChangedError", "warning": "Warnings"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- shape of a page


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_says_what_it_is_about_before_its_first_section(page: Path) -> None:
    title, *rest = page.read_text(encoding="utf-8").split("\n")
    assert title.startswith("# ")
    opening = next(line for line in rest if line.strip())
    assert re.match(r"[A-Z`]", opening), f"the page begins with {opening!r} instead of a sentence"


def test_every_page_is_in_the_navigation() -> None:
    def paths(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            values = entry.values() if isinstance(entry, dict) else entry
            yield from (path for value in values for path in paths(value))

    listed = set(paths(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    # README.md and CHANGELOG.md become pages when the documentation is built.
    assert listed == there | {"index.md", "changelog.md"}


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers.python", reason="building needs the extra docs")
    pytest.importorskip("material", reason="building needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "index.html").exists()


# ------------------------------------------------------------------------------------------------- links and commands


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*NAMES, "CHANGELOG.md"])
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"\b(?:scripts|configs|tests)/[\w./-]*\w", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    blocks = [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language == "python"]
    for code in blocks:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


def test_the_readme_shows_its_calls_in_code() -> None:
    blocks = [code for language, code in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert any("patch_model_with_kvsplice(model" in code for code in blocks)
    assert any("explain(model)" in code for code in blocks)
    assert any("eval_deepseek_quality.py --model" in code for code in blocks)


# ------------------------------------------------------------------------------------------------------ API reference


@pytest.mark.parametrize("suffix", PUBLIC_MODULES)
def test_every_public_name_is_in_the_api_reference(suffix: str) -> None:
    module = importlib.import_module(f"kvsplice_hf{suffix}")
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    for name in module.__all__:
        if not name.startswith("__") and name not in ("MLA_Config", "MLA_Flash", "GPT2_MLA"):  # other names of classes
            assert f"::: kvsplice_hf{suffix}.{name}\n" in pages


def test_the_api_reference_names_only_what_exists() -> None:
    for page in (DOCS / "api").glob("*.md"):
        for module, name in re.findall(r"^::: ([\w.]+)\.(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert hasattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------------------------------- troubleshooting


def text_of(node: ast.expr) -> str | None:
    """A string literal with X in the places of its values; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[srd]", "X", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(value.value) if isinstance(value, ast.Constant) else "X" for value in node.values)
    return None


def messages() -> Iterator[tuple[str, str, str]]:
    """Where each error or warning of the package is, its section, and how it begins, where that is a literal."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in UNEXPLAINED_ROOMS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called not in SECTIONS:
                continue
            # `upstream.changed` takes the module, and what it does.
            parts = node.args if called == "changed" else node.args[:1]
            message = ": ".join(text_of(part) or "X" for part in parts)
            # Some are not literals, or only put a name before what another error says.
            if not re.match(r"(Layer )?X(: X|$)", message):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", SECTIONS[called], " ".join(message.split())


def explained() -> dict[str, list[re.Pattern[str]]]:
    """The beginnings of messages on the page, by section. `...` stands for anything."""
    patterns = {}
    for section in re.split(r"^## ", TROUBLESHOOTING.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        spans = [one or two for two, one in re.findall(r"`` (.+?) ``|`([^`]+)`", " ".join(body.split()))]
        # Names and bare dots would be beginnings of anything.
        written = [span for span in spans if " " in span and re.search(r"[a-z]{2}", span)]
        patterns[title] = [re.compile(re.escape(span).replace(re.escape("..."), ".*")) for span in written]
    return patterns


def test_every_error_class_has_a_section_on_the_troubleshooting_page() -> None:
    classes = {name for name in kvsplice_hf.__all__ if name.endswith("Error")}
    assert classes - {"KVSpliceError"} <= set(explained())
    assert "`KVSpliceError`" in TROUBLESHOOTING.read_text(encoding="utf-8")


def test_every_message_of_the_package_is_on_the_troubleshooting_page() -> None:
    patterns = explained()
    missing = [
        f"under {section}: {message} ({where})"
        for where, section, message in messages()
        if not any(pattern.match(message) for pattern in patterns.get(section, []))
    ]
    assert not missing, "put the beginning of these on docs/troubleshooting.md:\n" + "\n".join(missing)


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", ["perplexity_against_bytes", "decode_against_context"])
def test_the_figures_of_a_picture_are_those_of_its_page(name: str) -> None:
    data = json.loads((DOCS / "data" / f"{name}.json").read_text(encoding="utf-8"))
    assert {"commands", "machine", "versions"} <= set(data)
    text = (ROOT / data["page"].partition("#")[0]).read_text(encoding="utf-8")
    rows = [
        {float(figure) for figure in re.findall(r"\d+(?:\.\d+)?", line.replace(",", ""))}
        for line in text.split("\n")
        if line.startswith("|")
    ]
    # The name of a codec has figures of its own, and the context of a recipe stands in an earlier row.
    for entry in data["rows"]:
        wanted = {value for key, value in entry.items() if isinstance(value, (int, float)) and key != "context"}
        wanted.discard(entry.get("windows_per_text"))
        assert any(wanted <= row for row in rows), entry


def test_the_pictures_of_the_readme_can_be_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["draw_pictures.py", "--output", str(tmp_path)])
    load_program("research/draw_pictures.py").main()
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    shown = re.findall(r"docs/images/(\w+\.svg)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert drawn == set(shown)

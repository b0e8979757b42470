"""The public face: what is exported is documented, importing changes nothing, imports run one way."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import kvsplice_hf


PACKAGE = Path(kvsplice_hf.__file__).parent
ROOT = PACKAGE.parent


def own_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kvsplice_hf":
            found.add(node.module.removeprefix("kvsplice_hf").removeprefix("."))
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "kvsplice_hf"}
    return found


def test_exports_are_sorted_and_exist() -> None:
    assert kvsplice_hf.__all__ == sorted(kvsplice_hf.__all__)
    assert all(hasattr(kvsplice_hf, name) for name in kvsplice_hf.__all__)


@pytest.mark.parametrize("name", [name for name in kvsplice_hf.__all__ if not name.startswith("__")])
def test_every_export_is_documented_and_typed(name: str) -> None:
    member = getattr(kvsplice_hf, name)
    assert member.__doc__
    assert len(member.__doc__) > 30
    if inspect.isfunction(member):
        signature = inspect.signature(member)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_importing_the_package_registers_and_patches_nothing() -> None:
    code = """
import torch, transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers import cache_utils
before = [dict(x) for x in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS,
                            cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING)]
import kvsplice_hf
after = [dict(x) for x in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS,
                           cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING)]
assert before == after
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_imports_within_the_package_have_no_cycle() -> None:
    arrows = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): own_imports(path)
        for path in PACKAGE.rglob("*.py")
    }
    reachable = {name: set(targets) for name, targets in arrows.items()}
    for _ in arrows:
        for targets in reachable.values():
            targets |= {further for target in set(targets) for further in arrows.get(target, ())}
    assert not [name for name, targets in reachable.items() if name in targets]


def test_scripts_use_public_names_only() -> None:
    for script in (ROOT / "scripts").rglob("*.py"):
        tree = ast.parse(script.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        for node in imports:
            if node.module.split(".")[0] == "kvsplice_hf":
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{script.name} imports {private}"


def test_the_repository_holds_no_pickle_and_no_weights() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    suffixes = {Path(name).suffix for name in listed.stdout.splitlines()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl", ".safetensors", ".gguf"}

"""The model card claims what was measured and nothing else, and an upload holds what `load_kvsplice` needs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build

from kvsplice_hf import PatchStateError, load_kvsplice, patch_model_with_kvsplice
from kvsplice_hf.evaluation import score_windows
from kvsplice_hf.hub import model_card, push_kvsplice_to_hub


class Hub:
    """Stands in for the Hub: keeps what is uploaded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repositories = folder, {}

    def __call__(self, token: str | None = None) -> "Hub":
        self.token = token
        return self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        self.repositories[repo_id] = private

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
        shutil.copytree(folder_path, self.folder / repo_id)
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr("kvsplice_hf.hub.HfApi", hub)
    return hub


def spliced() -> Any:
    return patch_model_with_kvsplice(build("deepseek_v3"), compression_ratio=0.5)


def test_an_upload_loads_into_a_fresh_base_model(hub: Hub) -> None:
    model, ids = spliced(), torch.arange(8, 24)[None]
    assert push_kvsplice_to_hub(model, "me/splice", private=True, token="secret") == "https://hub/me/splice"
    assert (hub.repositories, hub.token) == ({"me/splice": True}, "secret")
    fresh = load_kvsplice(build("deepseek_v3"), hub.folder / "me/splice")
    assert torch.equal(fresh(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    names = {path.name for path in (hub.folder / "me/splice").iterdir()}
    assert names == {"README.md", "kvsplice_config.json", "kvsplice_model.safetensors"}


def test_the_card_holds_the_figures_that_were_measured() -> None:
    model = spliced()
    model.config._name_or_path = "someone/base"
    scores = score_windows(model, torch.randint(8, 128, (2, 16)), progress=False).summary()
    card = model_card(model, {"speeches": scores})
    assert card.data.base_model == "someone/base"
    assert f"| speeches | 30 | {scores['original_perplexity']:.3f} |" in card.text
    assert "| 0 | 16 | 32 | 24 numbers |" in card.text
    assert "compression_ratio`: 0.5" in card.text


def test_a_card_without_figures_says_so() -> None:
    model = spliced()
    model.config._name_or_path = str(Path.cwd())
    card = model_card(model)
    assert "Nothing was measured" in card.text
    assert str(Path.cwd()) not in card.text, "a folder of this machine says nothing to others"


def test_an_unpatched_model_has_no_card() -> None:
    with pytest.raises(PatchStateError, match="not patched"):
        model_card(build("deepseek_v3"))

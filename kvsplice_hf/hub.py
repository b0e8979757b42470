"""A model card for a splice, and its way to the Hugging Face Hub."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from torch import nn

from kvsplice_hf.patch.saving import save_kvsplice
from kvsplice_hf.patch.state import find_patch, patched_sites
from kvsplice_hf.version import __version__


CARD_NAME = "README.md"


def model_card(model: nn.Module, results: Mapping[str, Mapping[str, Any]] | None = None) -> ModelCard:
    """What a splice is, how to load it, and what was measured.

    Args:
        model: a patched model.
        results: by text, what `WindowScores.summary` gives; only what is handed over here is claimed in the card.

    Raises:
        PatchStateError: the model is not patched.
    """
    base = _base_model(model)
    data = ModelCardData(base_model=base or None, library_name="kvsplice_hf", tags=["kvsplice", "kv-cache", "mla"])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# KVSplice" + (f" for {base}" if base else ""),
        "Projections that compress the latents of Multi-head Latent Attention before they are cached. The base model "
        "is not in here.",
        _usage(base or "the base model"),
        "## Settings\n\n" + _settings(model),
        "## Cache rows\n\n" + _rows(model),
        "## Measured\n\n" + _measured(results),
        f"Written by kvsplice_hf {__version__}.",
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def push_kvsplice_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload the splice of a patched model, with its card. `load_kvsplice` takes the folder that a download gives.

    Args:
        model: a patched model.
        repo_id: "user/name"; made if it is not there.
        results: measured figures for the card, see `model_card`.
        private: of a repository that is made.
        token: by default the one that `hf auth login` has kept.

    Returns:
        The address of the commit.

    Raises:
        PatchStateError: the model is not patched.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    card, api = model_card(model, results), HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_kvsplice(model, folder)
        card.save(Path(folder) / CARD_NAME)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload KVSplice"))


def _base_model(model: nn.Module) -> str:
    root, _ = find_patch(model)
    name = str(getattr(root.config, "_name_or_path", "") or "")
    return "" if Path(name).exists() else name  # a folder of this machine says nothing to others


def _usage(base: str) -> str:
    return f"""```python
from huggingface_hub import snapshot_download
from kvsplice_hf import load_kvsplice
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
load_kvsplice(model, snapshot_download("this repository"))
```"""


def _settings(model: nn.Module) -> str:
    values = find_patch(model)[1].config.to_dict()
    return "\n".join(f"- `{name}`: {value}" for name, value in values.items() if value is not None)


def _rows(model: nn.Module) -> str:
    lines = ["| layer | rank | latent | row |", "|---|---|---|---|"]
    for site, patched in patched_sites(model):
        size = patched.geometry.packed_bytes
        row = f"{size} bytes" if size is not None else f"{patched.geometry.rank + site.qk_rope_head_dim} numbers"
        latent = patched.geometry.kv_lora_rank
        lines.append(f"| {site.layer_idx} | {patched.geometry.rank} | {latent} | {row} |")
    return "\n".join(lines)


def _measured(results: Mapping[str, Mapping[str, Any]] | None) -> str:
    if not results:
        return "Nothing was measured when this card was written."
    lines = ["| text | tokens | perplexity, original | perplexity | loss | KL, nats |", "|---|---|---|---|---|---|"]
    for text, scores in results.items():
        lines.append(
            f"| {text} | {scores['tokens']} | {scores['original_perplexity']:.3f} | {scores['perplexity']:.3f} | "
            f"{scores['loss_percent']:+.2f} % | {scores['kl']:.4f} |"
        )
    return "\n".join(lines)

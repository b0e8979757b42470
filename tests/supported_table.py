"""The table of models with ordinary attention on docs/supported_models.md, made of what the contract tests run.

python tests/supported_table.py    # writes it into the page; a test fails where the two differ
"""

from pathlib import Path
from typing import Any

import torch
from ordinary_models import MULTIMODAL_MODELS, ORDINARY_MODELS, SINCE, build_multimodal, build_ordinary
from test_ordinary import KINDS, tokens

from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.tap import Attended, tapped
from kvsplice_hf.upstream import POSITION_EMBEDDINGS, forward_parameters


PAGE = Path(__file__).parent.parent / "docs" / "supported_models.md"
BEGIN, END = "<!-- ordinary models: begin -->\n", "<!-- ordinary models: end -->\n"
_HEAD = "| architecture | attention | keys | tested |\n|---|---|---|---|\n"


def table() -> str:
    """The rows of all models, as Markdown."""
    rows = [_row(name, build_ordinary(name)) for name in ORDINARY_MODELS]
    rows += [_row(name, build_multimodal(name), "text part; ") for name in MULTIMODAL_MODELS]
    return _HEAD + "".join(sorted(rows))


def written() -> str:
    """The table that is on the page."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def _row(name: str, model: Any, before: str = "") -> str:
    sites = find_sites(model)
    tested = "contract, images" if name in MULTIMODAL_MODELS else "contract"
    tested += ", modes of `generate`" * (name in KINDS) + f" (transformers {SINCE.get(name)} on)" * (name in SINCE)
    return f"| {name} | {before}{', '.join(_attention(sites))} | {_keys(model, sites)} | {tested} |\n"


def _attention(sites: list[AttentionSite]) -> list[str]:
    """What is special about the attention of a model, read from its modules."""
    first, config = sites[0], sites[0].module.config
    kinds = {1: "multi-query", first.num_heads: "multi-head"}
    found = [kinds.get(first.kv_heads, "grouped queries")]
    windows = [site.sliding_window is not None for site in sites]
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or [])
    if any(windows):
        found.append(("chunks" if chunked else "a window") + ("" if all(windows) else " in some layers"))
    if getattr(first.module, "attn_logit_softcapping", None) is not None:
        found.append("capped scores")
    if getattr(first.module, "sinks", None) is not None:
        found.append("learned sinks")
    if not all(site.stores_latent for site in sites):
        found.append("layers that read another's keys")
    return found


@torch.no_grad()
def _keys(model: Any, sites: list[AttentionSite]) -> str:
    """In which form keys can be coded: before their rotation only where the module is told of it.

    What is rotated shows: it is another number at another position.
    """
    if POSITION_EMBEDDINGS not in forward_parameters(sites[0].module):
        return "number by number"
    sites = [site for site in sites if site.stores_latent]
    seen: dict[int, list[torch.Tensor]] = {}

    def look(site: AttentionSite, found: Attended) -> Attended:
        seen.setdefault(site.layer_idx, []).append(found.key)
        return found

    places = torch.arange(6)[None]
    with tapped(sites, look):
        for start in (0, 40):
            model(tokens(1, 6) // 2 + 10, position_ids=places + start, use_cache=False)
    changed = [((one - other).abs().amax((0, 1, 2)) > 1e-5).sum().item() for one, other in seen.values()]
    partial = any(0 < count < site.qk_rope_head_dim for count, site in zip(changed, sites, strict=True))
    some = 0 in changed
    return "before their rotation" + ", which is partial" * partial + ", or as they come in layers without one" * some


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()

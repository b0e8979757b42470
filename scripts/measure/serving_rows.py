#!/usr/bin/env python
"""Which rows of an engine differ from those of transformers, and are they worse?

A model with MLA reads the same prompts in vLLM and in transformers, both with the splice of a folder, in float32. Of
each layer it says how far latents are apart, how many rows differ in any bit, and how far what these rows decode to is
from the latent that transformers has: as a ratio of squared errors, where 1 means that the rows of the engine are as
close as those of transformers. The same is said of transformers beside itself, with embeddings that are off by what
float32 makes of sums in another order. The last line of stdout is one JSON object.

It runs where vLLM is installed (`make test-vllm` makes such an environment):

    python scripts/measure/serving_rows.py --model smollm2-plain --splice splice-of-smollm2-plain
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvsplice_hf import load_kvsplice
from kvsplice_hf.bench.command_line import (
    ProgramParser,
    console,
    environment,
    finish,
    readable_errors,
    require_folder,
    results_folder,
)
from kvsplice_hf.bench.engines import Stored, disturbed_embeddings, engine, stored_of
from kvsplice_hf.code.files import read_splice_files
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.text import load_texts, token_ids
from kvsplice_hf.vllm.ordinary import is_of_heads


@dataclass
class Arguments:
    """Rows of vLLM beside those of transformers."""

    model: str = field(metadata={"help": "folder of a model with MLA, and its tokenizer"})
    splice: str = field(metadata={"help": "folder of its splice, with packed rows"})
    prompts: int = field(default=4, metadata={"help": "how many"})
    tokens: int = field(default=200, metadata={"help": "of each"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


@torch.no_grad()
def stored_by_transformers(model: Any, prompt: list[int]) -> list[Stored]:
    """What the patched model stores of a prompt, by layer."""
    latents: dict[int, torch.Tensor] = {}

    def keep(index: int, module: Any, args: Any, output: torch.Tensor) -> None:
        latents[index] = output[0].clone()

    sites = find_sites(model)
    handles = [site.module.kv_a_layernorm.register_forward_hook(partial(keep, site.layer_idx)) for site in sites]
    cache = DynamicCache(config=model.config)
    try:
        model(torch.tensor([prompt], dtype=torch.int64, device="cpu"), None, None, cache)
    finally:
        for handle in handles:
            handle.remove()
    return [Stored(cache.layers[index].keys[0, 0].clone(), latents[index]) for index in sorted(latents)]


def decoded(splice: Any, rows: torch.Tensor) -> torch.Tensor:
    """Latents [T, R] of rows [T, w]."""
    return splice.decode(splice.codec.unpack(rows)[..., : splice.value_dim])


def compared(splice: Any, ours: list[Stored], others: list[Stored]) -> dict[str, float]:
    """What two ways stored of the same tokens in one layer, all prompts together; `ours` are those of transformers."""
    rows, other_rows, latents, other_latents = (
        torch.cat([getattr(one, name) for one in group])
        for name, group in (("rows", ours), ("rows", others), ("latents", ours), ("latents", others))
    )
    differ = (rows != other_rows).any(-1)
    error, other_error = ((decoded(splice, found) - latents).square().sum(-1) for found in (rows, other_rows))
    apart = (latents - other_latents).square().sum() / latents.square().sum()
    ratio = float(other_error[differ].sum() / error[differ].sum()) if bool(differ.any()) else 1.0
    return {"apart": float(apart.sqrt()), "differ": float(differ.float().mean()), "error_ratio": ratio}


def of_prompts(found: list[list[Stored]], first: int) -> list[list[Stored]]:
    """By layer what was stored of each prompt, without the exact first tokens."""
    return [
        [Stored(one.rows[first:], one.latents[first:]) for one in of_layer] for of_layer in zip(*found, strict=True)
    ]


def make_prompts(args: Arguments) -> list[list[int]]:
    """Pieces of text, of so many tokens each.

    Raises:
        ConfigError: there is not as much text.
    """
    ids = token_ids(AutoTokenizer.from_pretrained(args.model), load_texts("varied", "evaluation"))
    step = len(ids) // args.prompts
    if step < args.tokens:
        raise ConfigError(
            f"{args.prompts} prompts of {args.tokens} tokens are more than the {len(ids)} tokens of text. Ask for less."
        )
    return [ids[index * step :][: args.tokens].tolist() for index in range(args.prompts)]


def check(args: Arguments) -> None:
    """Refuse what cannot be compared.

    Raises:
        ConfigError: folders that are not there, no prompts, or rows of something else than packed latents.
    """
    require_folder("model", args.model)
    require_folder("splice", args.splice)
    for option in ("prompts", "tokens"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option} is {getattr(args, option)}; it must be at least 1.")
    if is_of_heads(Path(args.splice)) or not read_splice_files(Path(args.splice)).config.is_packed:
        raise ConfigError(
            f"The splice in {args.splice} is not one of packed latents. Make one of a model with MLA and a budget in "
            "bytes (bytes_per_token)."
        )


def run(args: Arguments) -> dict[str, Any]:
    import vllm

    check(args)
    prompts = make_prompts(args)
    model = load_kvsplice(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval(), args.splice)
    splices = [site.module.kvsplice for site in find_sites(model)]
    sinks = read_splice_files(Path(args.splice)).config.sink_tokens
    by_transformers = of_prompts([stored_by_transformers(model, prompt) for prompt in prompts], sinks)
    with disturbed_embeddings(model):
        by_disturbed = of_prompts([stored_by_transformers(model, prompt) for prompt in prompts], sinks)
    settings = {"dtype": "float32", "max_model_len": args.tokens + 8, "kv_cache_memory_bytes": 256 << 20}
    settings |= {"enable_prefix_caching": False}
    with engine(Path(args.model), Path(args.splice), **settings) as made:
        by_engine = of_prompts([stored_of(made, prompt) for prompt in prompts], sinks)
    others = {"engine": by_engine, "disturbed": by_disturbed}
    layers = [
        {"layer": index}
        | {name: compared(splice, by_transformers[index], other[index]) for name, other in others.items()}
        for index, splice in enumerate(splices)
    ]
    return {"vllm": vllm.__version__, "layers": layers}


def table_of(report: dict[str, Any]) -> Table:
    table = Table("layer", title="beside transformers: latents apart (relative), rows that differ, squared error")
    for name in ("vLLM", "transformers, disturbed"):
        for column in ("apart", "differ", "error"):
            table.add_column(f"{name}: {column}")
    for layer in report["layers"]:
        cells = [layer[name] for name in ("engine", "disturbed")]
        texts = [(f"{cell['apart']:.1e}", f"{cell['differ']:.1%}", f"{cell['error_ratio']:.4f}x") for cell in cells]
        table.add_row(str(layer["layer"]), *texts[0], *texts[1])
    return table


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report = run(args)
    console().print(table_of(report))
    finish(report | environment(args), results_folder(args.output, "serving_rows"))


if __name__ == "__main__":
    main()

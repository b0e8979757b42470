#!/usr/bin/env python
"""Does vLLM with a splice write what the patched model writes, and how many tokens does its cache hold?

A small random DeepSeek-V3 is calibrated and saved with its splice. transformers and vLLM then continue the same
prompts greedily, in float32: with prefix caching and without, with prompts read in pieces, and in a cache so small that
requests are put off and computed again. Perplexity is computed by both. Then engines in bfloat16 say how many tokens
their cache holds in the same memory, with splices of a quarter of the bytes and without. The last line of stdout is one
JSON object.

With `--model`, the same of a real model, with MLA or with ordinary attention, on prompts of real text; and of engines
without a splice beside the model without one: of MLA with vLLM's own settings and with the one that goes around its
fault (docs/serving.md).

It runs where vLLM is installed (`make test-vllm` makes such an environment):

    python scripts/measure/serving.py
    python scripts/measure/serving.py --model smollm2-plain --statistics smollm2-plain.safetensors
    python scripts/measure/serving.py --model smollm2-llama --statistics smollm2-llama.safetensors
"""

import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from kvsplice_hf import (
    KVSpliceCalibrator,
    KVSpliceConfig,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.bench.command_line import (
    ProgramParser,
    console,
    environment,
    finish,
    readable_errors,
    require_folder,
    results_folder,
)
from kvsplice_hf.bench.engines import NOISE, counted, disturbed_embeddings, engine, loss_on, written
from kvsplice_hf.bench.first_differences import Written, write
from kvsplice_hf.bench.small_model import SMALL_SHAPE
from kvsplice_hf.text import load_texts, token_ids
from kvsplice_hf.vllm import plugin


# Ids below are left out: 0 and 1 begin and end a text.
FIRST_TOKEN = 8
SHAPE = SMALL_SHAPE | {"num_hidden_layers": 3, "first_k_dense_replace": 3, "max_position_embeddings": 2048}
LONGEST = 256
LONGEST_PROMPT = 200
PIECE = 64
# What goes around vLLM's fault with plain RoPE on CPUs.
REMEDY = {"custom_ops": [plugin.NO_OWN_ROTATION]}
# Latent and key of the only rows that vLLM's own backend for CPUs decodes.
STOCK_ROW = (512, 64)
# Tokens of a page of the stock cache: of that backend; and of the one of ordinary attention, by itself and at least.
STOCK_PAGE, STOCK_PAGE_OF_HEADS, SMALL_PAGE_OF_HEADS = 16, 128, 32


@dataclass
class Arguments:
    """Tokens, perplexity and cache of vLLM with a splice, beside those of transformers."""

    model: str | None = field(
        default=None,
        metadata={"help": "folder of a model with MLA or ordinary attention, and its tokenizer; none: random"},
    )
    statistics: str | None = field(default=None, metadata={"help": "calibration statistics of it, kept or to be kept"})
    calibration_tokens: int = field(default=8192, metadata={"help": "tokens of text that it is calibrated on"})
    prompts: int = field(default=32, metadata={"help": "how many, of 3 to 200 tokens; half of them begin alike"})
    new_tokens: int = field(default=16, metadata={"help": "tokens that each is continued by"})
    bytes_per_token: float | None = field(
        default=None, metadata={"help": "of the splice that tokens are compared with; none: a quarter of stock in bf16"}
    )
    sink_tokens: int = field(default=4, metadata={"help": "exact first tokens of each sequence of that splice"})
    block_size: int = field(default=16, metadata={"help": "tokens of a page where tokens are compared"})
    engine_mb: int = field(default=512, metadata={"help": "memory of the caches where tokens are compared, MiB"})
    cache_mb: int = field(default=64, metadata={"help": "memory of the caches whose tokens are counted, MiB"})
    output: str = field(default="results", metadata={"help": "folder for the results"})


def has_mla(config: Any) -> bool:
    return getattr(config, "kv_lora_rank", None) is not None


def stock_bytes(config: Any) -> int:
    """Bytes of what one layer keeps of a token without a splice, in bf16."""
    if has_mla(config):
        return int(2 * (config.kv_lora_rank + config.qk_rope_head_dim))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_key_value_heads * size)


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE)).float().eval().save_pretrained(folder)


def calibrated(args: Arguments, model: Any, sinks: int) -> KVSpliceCalibrator:
    """Statistics of the model: on text, or on what is random as the model is."""
    if args.model is None:
        ids = torch.randint(FIRST_TOKEN, SHAPE["vocab_size"], (40, 64), generator=torch.Generator().manual_seed(0))
        return KVSpliceCalibrator(model, sink_tokens=sinks).collect(list(ids))
    if args.statistics is not None and Path(args.statistics).exists():
        return KVSpliceCalibrator.load(args.statistics, model)
    calibration = KVSpliceCalibrator(model, sink_tokens=sinks)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration.collect("varied", tokenizer=tokenizer, max_tokens=args.calibration_tokens)
    if args.statistics is not None:
        calibration.save(args.statistics)
    return calibration


def make_splices(args: Arguments, model_folder: Path, settings: dict[str, KVSpliceConfig], folder: Path) -> None:
    """Save splices of a model under their names."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    for sinks in {config.sink_tokens for config in settings.values()}:
        calibration = calibrated(args, model, sinks)
        for name, config in settings.items():
            if config.sink_tokens == sinks:
                save_kvsplice(patch_model_with_kvsplice(model, config, calibration=calibration), folder / name)
                unpatch_model(model)


def make_prompts(args: Arguments) -> list[list[int]]:
    """Prompts of mixed lengths, random or of text; every second begins with the same tokens."""
    random, count = torch.Generator().manual_seed(1), args.prompts
    lengths = torch.randint(3, LONGEST_PROMPT, (count,), generator=random).tolist()
    if args.model is None:
        tokens = torch.randint(FIRST_TOKEN, SHAPE["vocab_size"], (count, LONGEST_PROMPT), generator=random).tolist()
    else:
        ids = token_ids(AutoTokenizer.from_pretrained(args.model), load_texts("varied", "evaluation"))
        step = (len(ids) - LONGEST_PROMPT) // count
        tokens = [ids[index * step :][:LONGEST_PROMPT].tolist() for index in range(count)]
    return [
        (tokens[0] if index % 2 else row)[: length // 2] + row[length // 2 : length]
        for index, (row, length) in enumerate(zip(tokens, lengths, strict=True))
    ]


@torch.no_grad()
def by_transformers(model: Any, prompts: list[list[int]], new_tokens: int) -> tuple[list[Written], float]:
    """What the patched model writes, and its mean loss on the prompts, nats per token."""
    texts, loss, count = [], 0.0, 0
    model.generation_config.eos_token_id = None  # all go on to the end, as those of the engine do
    for prompt in tqdm(prompts, desc="transformers", file=sys.stderr):
        ids = torch.tensor([prompt])
        texts.append(write(model, ids, new_tokens))
        scores = model(ids).logits[0, :-1].log_softmax(-1)
        loss -= scores.gather(1, ids[0, 1:, None]).sum().item()
        count += len(prompt) - 1
    return texts, loss / count


def modes_of(args: Arguments, config: Any) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Engines that are compared: whether with the splice, and their settings."""
    size = args.block_size

    def few_of(size: int) -> dict[str, int]:
        """As many pages as two of the longest prompts take."""
        return {"num_gpu_blocks_override": 1 + 2 * math.ceil((LONGEST_PROMPT + args.new_tokens) / size)}

    pieces = {"enable_prefix_caching": True, "max_num_batched_tokens": PIECE}
    found: dict[str, tuple[bool, dict[str, Any]]] = {
        f"prefix caching, prompts in pieces of {PIECE}": (True, pieces),
        "no prefix caching": (True, {"enable_prefix_caching": False, "max_num_batched_tokens": 8192}),
        "a cache of few pages": (True, {"enable_prefix_caching": True} | few_of(size)),
    }
    if args.model is None:
        return found
    if not has_mla(config):
        stock, few = {"block_size": SMALL_PAGE_OF_HEADS}, few_of(SMALL_PAGE_OF_HEADS)
        return found | {"no splice": (False, stock), "no splice, a cache of few pages": (False, stock | few)}
    if (config.kv_lora_rank, config.qk_rope_head_dim) == STOCK_ROW:
        remedy = {"compilation_config": REMEDY, "block_size": STOCK_PAGE}
        found |= {
            "no splice": (False, remedy),
            "no splice, a cache of few pages": (False, remedy | few_of(STOCK_PAGE)),
            "no splice, without the remedy for plain RoPE": (False, {"block_size": STOCK_PAGE}),
        }
    return found


def disturbed(
    model: Any, prompts: list[list[int]], expected: tuple[list[Written], float], count: int
) -> dict[str, Any]:
    """How much transformers differs from itself where embeddings are off by what rounding makes of numbers."""
    with disturbed_embeddings(model):
        other, found = by_transformers(model, prompts, count)
    tokens = [one.tokens[0].tolist() for one in other]
    row = {"mode": f"transformers itself, embeddings off by {NOISE}"}
    row |= beside(tokens, tokens, expected[0]) | {"preemptions": 0, "prefix_hits": 0}
    return row | {"perplexity": math.exp(found), "perplexity_transformers": math.exp(expected[1])}


def beside(first: list[list[int]], again: list[list[int]], expected: list[Written]) -> dict[str, Any]:
    """How many prompts were continued as by transformers, and how near the other tokens were to the same likelihood.

    The last is the largest difference that transformers has between the logarithms of the probabilities of both tokens,
    where the first one differs; nothing where none does.
    """
    gaps, same = [], []
    for found in (first, again):
        pairs = list(zip(found, expected, strict=True))
        same.append(sum(one == other.tokens[0].tolist() for one, other in pairs))
        gaps += [gap_of(one, other) for one, other in pairs if one != other.tokens[0].tolist()]
    return {"same": same[0], "same_again": same[1], "prompts": len(first), "gap": max(gaps, default=None)}


def gap_of(found: list[int], expected: Written) -> float:
    """Nats between two tokens where they differ for the first time, as transformers sees it."""
    tokens = expected.tokens[0].tolist()
    at = next(index for index, (one, other) in enumerate(zip(found, tokens, strict=True)) if one != other)
    logits = expected.logits[0, at]
    return float(logits[tokens[at]] - logits[found[at]])


def compare(args: Arguments, model_folder: Path, splice: Path) -> list[dict[str, Any]]:
    """Tokens and loss of engines beside those of transformers."""
    prompts, config = make_prompts(args), AutoConfig.from_pretrained(model_folder)
    modes = modes_of(args, config)
    rows: list[dict[str, Any]] = []
    expected: dict[bool, tuple[list[Written], float]] = {}
    for spliced in {spliced for spliced, _ in modes.values()}:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        model = load_kvsplice(model, splice) if spliced else model
        expected[spliced] = by_transformers(model, prompts, args.new_tokens)
        if spliced:
            rows.append(disturbed(model, prompts, expected[True], args.new_tokens))
        del model
    for name, (spliced, settings) in modes.items():
        common = {"dtype": "float32", "block_size": args.block_size, "max_num_seqs": 32}
        common |= {"kv_cache_memory_bytes": args.engine_mb << 20} | settings_of(model_folder, spliced)
        with engine(model_folder, splice if spliced else None, **(common | settings)) as made:
            first = written(made, prompts, args.new_tokens)
            again = written(made, prompts, args.new_tokens)
            texts, loss = expected[spliced]
            row = {"mode": name} | beside(first, again, texts)
            row |= {
                "preemptions": counted(made, "num_preemptions"),
                "prefix_hits": counted(made, "prefix_cache_hits"),
                "perplexity": math.exp(loss_on(made, prompts)),
                "perplexity_transformers": math.exp(loss),
            }
        rows.append(row)
    return rows


def settings_of(model_folder: Path, spliced: bool) -> dict[str, Any]:
    """What engines are told where nothing else is asked for."""
    found: dict[str, Any] = {"max_model_len": LONGEST}
    if not spliced and has_mla(AutoConfig.from_pretrained(model_folder)):  # which reads every dtype in this release
        found["attention_config"] = {"backend": "CPU_MLA"}
    return found


def count_tokens(args: Arguments, model_folder: Path, splices: Path) -> list[dict[str, Any]]:
    """How many tokens fit into the cache of engines."""
    stock = STOCK_PAGE if has_mla(AutoConfig.from_pretrained(model_folder)) else STOCK_PAGE_OF_HEADS
    cases: dict[str, dict[str, Any]] = {"stock": {"block_size": stock}}
    for size in (16, 256, 512):
        cases[f"a quarter of the bytes, 4 exact tokens, pages of {size}"] = {"block_size": size}
    # The length of sequences is then that of the model, from which the plug-in chooses.
    cases["the same, pages as the plug-in chooses them"] = {"max_model_len": None}
    rows = []
    for name, asked in cases.items():
        splice = None if name == "stock" else splices / "exact"
        settings = {"dtype": "bfloat16", "kv_cache_memory_bytes": args.cache_mb << 20}
        settings |= settings_of(model_folder, splice is not None) | asked
        with engine(model_folder, splice, **settings) as made:
            cache = made.llm_engine.vllm_config.cache_config
            row = {"cache": name, "page": cache.block_size, "blocks": cache.num_gpu_blocks}
            rows.append(row | {"tokens": cache.num_gpu_blocks * cache.block_size})
    for row in rows:
        row["times_stock"] = row["tokens"] / rows[0]["tokens"]
    return rows


def tables_of(report: dict[str, Any]) -> list[Table]:
    tokens = Table(
        "vLLM with",
        "same as transformers",
        "asked again",
        "nats between other tokens",
        "preempted",
        "tokens from prefixes",
        "perplexity",
        "transformers",
    )
    for row in report["tokens"]:
        same, again = (f"{row[key]} of {row['prompts']}" for key in ("same", "same_again"))
        gap = "" if row["gap"] is None else f"{row['gap']:.4f}"
        perplexities = (f"{row[key]:.4f}" for key in ("perplexity", "perplexity_transformers"))
        tokens.add_row(row["mode"], same, again, gap, str(row["preemptions"]), str(row["prefix_hits"]), *perplexities)
    cache = Table("cache", "tokens of a page", "pages", "tokens", "times stock")
    for row in report["cache"]:
        cache.add_row(
            row["cache"], str(row["page"]), str(row["blocks"]), f"{row['tokens']:,}", f"{row['times_stock']:.3f}"
        )
    return [tokens, cache]


def splices_of(args: Arguments, config: Any) -> dict[str, KVSpliceConfig]:
    """The splice that tokens are compared with, and one whose rows have a quarter of the bytes beside exact tokens."""
    stock = stock_bytes(config)
    compared = stock / 4 if args.bytes_per_token is None else args.bytes_per_token
    return {
        "compared": KVSpliceConfig(bytes_per_token=compared, sink_tokens=args.sink_tokens, allocation="global"),
        "exact": KVSpliceConfig(bytes_per_token=stock / 4 + 4 * stock / 4096, sink_tokens=4, allocation="layer"),
    }


def run(args: Arguments) -> dict[str, Any]:
    import vllm

    if args.model is not None:
        require_folder("model", args.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model" if args.model is None else Path(args.model)
        if args.model is None:
            make_model(model)
        make_splices(args, model, splices_of(args, AutoConfig.from_pretrained(model)), folder)
        report = {"vllm": vllm.__version__, "tokens": compare(args, model, folder / "compared")}
        return report | {"cache": count_tokens(args, model, folder)}


def main() -> None:
    (args,) = ProgramParser(Arguments).parse_args_into_dataclasses()
    with readable_errors():
        report = run(args)
    for table in tables_of(report):
        console().print(table)
    finish(report | environment(args), results_folder(args.output, "serving"))


if __name__ == "__main__":
    main()

"""Loading a model that is to be converted to MLA, and what the conversion cost.

Legend: `W` windows, `T` tokens of a window.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvsplice_hf.bench.command_line import DEMO, LoadedModel, parse_dtype, require_folder
from kvsplice_hf.demo import load_original_demo_model


# Positions whose logits are held at a time.
_HEAD_TOKENS = 256


def load_original(name: str, dtype: str) -> LoadedModel:
    """The model of a folder, hub name or GGUF file; "demo" is SmolLM2-135M as it is, from an installed package.

    Raises:
        ConfigError: the dtype is unknown, or the name is the path of a folder that is not there.
        UnsupportedError: the packages of the embedded default are missing.
        OSError: there is no such model.
    """
    if name == DEMO:
        return LoadedModel(*load_original_demo_model(torch.float32 if dtype == "auto" else parse_dtype(dtype)))
    path = Path(name)
    if path.suffix != ".gguf":
        require_folder("model", name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return LoadedModel(model.eval(), AutoTokenizer.from_pretrained(name))
    # GGUF weights are unpacked on loading; "auto" has no meaning for them.
    dtype = "float32" if dtype == "auto" else dtype
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return LoadedModel(model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))


@torch.no_grad()
def compare(original: PreTrainedModel, converted: PreTrainedModel, windows: torch.Tensor) -> dict[str, Any]:
    """What the conversion cost on some text, without a cache.

    Args:
        original: the model as it was.
        converted: the same as MLA.
        windows: token ids, int64 [W, T].

    Returns:
        Perplexities before and after; the change in percent, with its standard error over windows (None for one window)
        and by stretches of 1024 positions; the mean divergence of the next-token distributions, nats.
    """
    losses, divergence = [], 0.0
    for window in tqdm(windows, desc="evaluation", file=sys.stderr):
        ids, labels = window[None].to(original.device), window[1:, None].to(original.device)
        states = [
            model.get_decoder()(ids, use_cache=False).last_hidden_state[0, :-1] for model in (original, converted)
        ]
        loss = []
        # The head in pieces: logits of a long window over a large vocabulary would be gigabytes.
        split = [tensor.split(_HEAD_TOKENS) for tensor in (*states, labels)]
        for *pieces, label in zip(*split, strict=True):
            heads = (model.get_output_embeddings() for model in (original, converted))
            before, after = (F.log_softmax(head(p).float(), -1) for head, p in zip(heads, pieces, strict=True))
            divergence += F.kl_div(after, before, reduction="sum", log_target=True).item()
            loss.append(-torch.cat([before.gather(1, label), after.gather(1, label)], 1).cpu().double())
        losses.append(torch.cat(loss))
    nll = torch.stack(losses)  # [W, T - 1, 2]
    before, after = nll.mean((0, 1)).tolist()
    change = nll[..., 1] - nll[..., 0]
    stderr = (change.mean(1).std() / math.sqrt(len(change))).item() if len(change) > 1 else None
    return {
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(after),
        "perplexity_change_percent": 100 * math.expm1(after - before),
        "perplexity_change_stderr_percent": None if stderr is None else 100 * stderr,
        "perplexity_change_percent_by_1024_positions": [
            100 * math.expm1(part.mean().item()) for part in change.split(1024, dim=1)
        ],
        "kl_nats": divergence / change.numel(),
    }

"""Text that a model writes itself, for calibration without data."""

import sys
from typing import Any

import torch
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from kvsplice_hf.calibration.collect import Batch
from kvsplice_hf.calibration.data import WINDOW
from kvsplice_hf.calibration.media import Media
from kvsplice_hf.weights.offload import input_device


_SAMPLE_BATCH = 16


class _Progress(BaseStreamer):
    """Moves a progress bar on by the tokens that `generate` hands over, the first ones included."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def put(self, value: torch.Tensor) -> None:
        self.bar.update(value.numel())

    def end(self) -> None:
        pass


def sample_from_model(model: Any, max_tokens: int, window: int = WINDOW, seed: int = 0) -> list[Batch]:
    """Text that the model itself writes: temperature 1, after a random first token. Needs no data at all.

    Args:
        model: a causal language model; spliced or not, it is run as it is.
        max_tokens: about how many tokens, in whole sequences.
        window: tokens per sequence.
        seed: of the first tokens and of the sampling; the global generators are left as they were.
    """
    count = max(1, max_tokens // window)
    device = input_device(model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    placeholders = [token for token in Media.of(model).placeholders if token < vocabulary]  # no image comes with them
    known = torch.tensor(sorted(set(range(vocabulary)) - set(placeholders)), dtype=torch.int64, device=device)
    batches: list[Batch] = []
    devices = [device] if device.type == "cuda" else []
    bar = tqdm(total=count * window, desc="sampling text", unit=" tokens", file=sys.stderr)
    with bar, torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, count, _SAMPLE_BATCH):
            size = (min(_SAMPLE_BATCH, count - start), 1)
            first = known[torch.randint(len(known), size, dtype=torch.int64, device=device)]
            ids = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                # A sequence that ended would go on with padding.
                min_new_tokens=window - 1,
                max_new_tokens=window - 1,
                pad_token_id=0,
                suppress_tokens=placeholders or None,
                streamer=_Progress(bar),
            )
            batches.extend({"input_ids": row[None].cpu()} for row in ids)
    return batches

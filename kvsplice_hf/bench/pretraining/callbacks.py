"""What watches a training from scratch: a clock that ends it, and samples of what the model writes.

Legend: `T` tokens of a prompt.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Clock(TrainerCallback, ExportableState):
    """Seconds of training, over all parts of a run that was cut off; ends it when they are used up.

    Args:
        limit: seconds, or None.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit, self.seconds = limit, 0.0
        self._last: float | None = None

    @property
    def share(self) -> float:
        """How much of the time is used up, 0 where there is no limit."""
        return 0.0 if self.limit is None else self.seconds / self.limit

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        was_running = self._last is not None
        self._synchronise()
        self._tick()
        self._last = None
        try:
            yield
        finally:
            self._synchronise()
            self._last = time.perf_counter() if was_running else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"limit": self.limit}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        self.seconds = kept.get("attributes", {}).get("seconds", 0.0)
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tick()
        if args.world_size > 1:  # the learning rate and the end must be the same everywhere
            shared = torch.tensor([self.seconds], dtype=torch.float32, device=args.device)
            dist.broadcast(shared, src=0)
            self.seconds = shared.item()
        if self.limit is not None and self.seconds >= self.limit:
            control.should_training_stop = control.should_evaluate = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._synchronise()
        self._tick()
        self._last = None

    def _tick(self) -> None:
        if self._last is not None:
            now = time.perf_counter()
            self.seconds, self._last = self.seconds + now - self._last, now

    def _synchronise(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class SampleCallback(TrainerCallback):
    """Text that the model writes at each evaluation, into `samples.jsonl` and to TensorBoard.

    The random state of the training is left alone, so that a run with samples is the same as one without.

    Args:
        tokenizer: the model's.
        prompts: token ids, int64 [samples, T].
        tokens: how many to write.
        others: the callbacks of the `Trainer`, among them the one that writes for TensorBoard, if there is.
    """

    def __init__(self, tokenizer: Any, prompts: torch.Tensor, tokens: int, others: list[TrainerCallback]) -> None:
        self._tokenizer, self._prompts, self._tokens, self._others = tokenizer, prompts, tokens, others

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        texts = self._write(model)
        with (Path(args.output_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "samples": texts}) + "\n")
        for writer in (getattr(other, "tb_writer", None) for other in self._others):
            if writer is not None:
                writer.add_text("samples", "\n\n".join(texts), state.global_step)

    @torch.no_grad()
    def _write(self, model: Any) -> list[str]:
        prompts, training = self._prompts.to(model.device), model.training
        model.eval()
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(0)
            written = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=self._tokens,
                do_sample=True,
                temperature=0.8,
                top_k=50,
                pad_token_id=self._tokenizer.eos_token_id,
            )
        model.train(training)
        return self._tokenizer.batch_decode(written)

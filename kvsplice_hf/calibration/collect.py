"""Runs a model over calibration tokens and gathers statistics where `expand_kv` receives latents.

That place is right for every architecture: some rescale the latent after its norm, some share it between layers.
Gradients are those of the log-likelihood of labels that are sampled from the model's own predictions, so that their
second moment is the Fisher information: to second order, an error e of a latent costs e^T F e / 2 nats of divergence
(Martens, New insights and perspectives on the natural gradient method, 2014).

Legend: `B` batch, `T` tokens, `H` heads, `R` kv_lora_rank, `P` qk_rope_head_dim, `N` qk_nope_head_dim, `K` sink tokens.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kvsplice_hf import upstream
from kvsplice_hf.cache.exact import exact_in_full_sequence
from kvsplice_hf.calibration.gradients import gradients_of_packed
from kvsplice_hf.calibration.media import OF_TEXT, Media
from kvsplice_hf.calibration.readers import ReaderRecorder
from kvsplice_hf.calibration.statistics import LayerStatistics, Statistics
from kvsplice_hf.code.keys import angle_columns, one_rotation, turns_of
from kvsplice_hf.errors import CalibrationError, KVSpliceError, PatchStateError, UnsupportedError
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import is_patched
from kvsplice_hf.patch.tap import Attended, tapped
from kvsplice_hf.upstream import POSITION_EMBEDDINGS
from kvsplice_hf.weights.linear import input_dtype
from kvsplice_hf.weights.offload import input_device
from kvsplice_hf.weights.packed import decompress, packed_layers
from kvsplice_hf.weights.sharding import sum_of_processes


logger = logging.getLogger(__name__)

METRICS = ("fisher", "readers", "pca")
_GOLDEN_RATIO = 0.6180339887498949

# `input_ids` [B, T], with `attention_mask` [B, T] where sequences are padded, and what belongs to their images.
Batch = dict[str, torch.Tensor]


def has_images(batch: Batch) -> bool:
    """Whether a batch holds more than text: images, videos or sound."""
    return not OF_TEXT.issuperset(batch)


class Collector:
    """Statistics of the MLA layers of an unpatched model.

    Args:
        model: the model; it is run as it is, and left as it was.
        metric: "fisher" also runs backward passes, "readers" also looks at queries, "pca" at latents only.
        layer_pattern: see `KVSpliceConfig`.
        sink_tokens: K; the first real tokens of a sequence, stored exactly later on, are left out.
        seed: of the sampled labels and rows.
        count_images: whether tokens that stand for parts of images count as well.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: str,
        layer_pattern: str | None,
        sink_tokens: int,
        seed: int,
        count_images: bool = True,
    ) -> None:
        decompress(model)
        self.model, self.metric, self.sink_tokens, self.count_images = model, metric, sink_tokens, count_images
        self.media = Media.of(model)
        self.sites = [site for site in find_sites(model, layer_pattern) if site.stores_latent]
        ordinary = next((site for site in self.sites if site.kv_heads), None)
        if metric == "readers" and ordinary is not None:
            raise UnsupportedError(
                f'metric="readers" looks at what kv_b_proj reads, and {ordinary.name} has ordinary attention. Use '
                'metric="fisher", or metric="pca", which needs no gradients.'
            )
        self.readers = ReaderRecorder(self.sites) if metric == "readers" else None
        self.statistics: Statistics = {}
        self.reset_statistics()
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
        self.max_positions = _usable_positions(self.sites[0].module.config.get_text_config(decoder=True))
        self.has_rotated_keys = any(
            site.qk_rope_head_dim and (not site.kv_heads or _is_told_of_rotation(site.module)) for site in self.sites
        )
        # Real tokens that are not sinks of the batch that is running, bool [B, T].
        self._counted: torch.Tensor | None = None
        # How the module that is running rotates its keys, as the model hands it over.
        self._embeddings: Any = None

    def reset_statistics(self) -> None:
        """Start again from no token."""
        self.statistics = {
            part: LayerStatistics.empty(site.kv_lora_rank, site.qk_rope_head_dim)
            for site in self.sites
            for part in site.all_parts
        }

    @torch.inference_mode(False)  # in it there are no gradients, and what is counted could not be added to outside
    def run(self, batches: Sequence[Batch], progress: bool = True) -> None:
        """Count token batches.

        Raises:
            CalibrationError: `require_runnable`; or tokens that the model does not know, or predictions that are not
                finite.
            PatchStateError: the model is patched.
        """
        require_runnable(self.model, self.metric)
        vocabulary = getattr(self.model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
        for batch in batches:
            ids = batch["input_ids"]
            _require_known(ids[~self.media.places(ids)], vocabulary)  # placeholders need no embedding
        device = input_device(self.model)
        with _prepared(self.model, self.metric == "fisher"), self._recording():
            for index, batch in enumerate(tqdm(batches, desc="calibrating", file=sys.stderr, disable=not progress)):
                batch = {name: _usable(tensor, device) for name, tensor in batch.items()}
                if not has_images(batch):  # some models give images positions along three axes: theirs are taken
                    batch["position_ids"] = self._positions(batch, index)
                self._run_batch(batch)

    def _positions(self, batch: Batch, index: int) -> torch.Tensor:
        """Positions [B, T], the sequences spread over the whole context.

        Rotary attention sees differences of positions only, so the model computes the same anywhere. But rotated keys
        do depend on where they are: seen at the first few hundred positions alone, those of low frequency would cover
        a part of their circle, and overflow their codes on the rest. Without rotated keys there is nothing to spread,
        and where positions are learned, sequences that begin in the middle are unlike any that the model has seen.
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        positions = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device).expand(ids.shape)
        if mask is not None:
            positions = (mask.bool().cumsum(-1) - 1).clamp(min=0)
        room = max(0, self.max_positions - ids.shape[1]) if self.has_rotated_keys else 0
        # The golden ratio spreads any number of sequences evenly, without knowing how many will come.
        order = torch.arange(len(ids), dtype=torch.float32, device="cpu") + index * len(ids)
        offsets = (room * ((order * _GOLDEN_RATIO) % 1.0)).long()
        return positions + offsets[:, None].to(ids.device)

    def _run_batch(self, batch: Batch) -> None:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        sinks = exact_in_full_sequence(mask, ids.shape[1], self.sink_tokens, ids.device)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self._counted = (real & ~sinks).expand(ids.shape)
        if not self.count_images:
            self._counted = self._counted & ~self.media.places(ids)
        if self.metric != "fisher":
            with torch.no_grad():
                # Nothing needs the predictions.
                self.model(**batch, use_cache=False, **({"logits_to_keep": 1} if predicts(self.model) else {}))
            return
        with torch.enable_grad():
            logits = self.model(**batch, use_cache=False).logits
            predicted = real & self.media.predicted(ids)
            logits = logits[predicted.to(logits.device)]  # [tokens, vocabulary]
            if not torch.isfinite(logits.detach()).all():
                raise CalibrationError(
                    "The model's predictions on the calibration text are not finite. Load it in bfloat16 or float32."
                )
            _sampled_likelihood(logits, self.generator).backward()

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        if self.readers is not None:
            self.readers.attach(lambda: self._counted)
        hooks = []
        for site in self.sites:
            see = functools.partial(self._see_embeddings, upstream.forward_parameters(site.module))
            hooks.append(site.module.register_forward_pre_hook(see, with_kwargs=True))
            if not site.kv_heads:
                site.module.expand_kv = functools.partial(self._record, site)
        try:
            with tapped([site for site in self.sites if site.kv_heads], self._record_heads):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for site in self.sites:
                if not site.kv_heads:
                    del site.module.expand_kv
            self._embeddings = None
            if self.readers is not None:
                self.readers.detach(self.statistics)
            self._counted = None

    def _see_embeddings(self, parameters: tuple[str, ...], module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        self._embeddings = one_rotation(upstream.argument(parameters, POSITION_EMBEDDINGS, args, kwargs))

    def _turns(self, site: AttentionSite, batch: int) -> torch.Tensor | None:
        """How the keys of a layer that count were rotated, [tokens, F]; None where that is not known."""
        rope_dim = site.qk_rope_head_dim
        columns = angle_columns(self._embeddings, rope_dim) if rope_dim else None
        for part in site.parts:
            self.statistics[part].see_columns(columns)
        if columns is None:
            return None
        turns = turns_of(self._embeddings, columns)
        return select_counted(turns.expand(batch, -1, -1)[:, None], self._counted)

    def _record(self, site: AttentionSite, latent: torch.Tensor, k_rot: torch.Tensor) -> Any:
        return type(site.module).expand_kv(site.module, *self._count(site, latent, k_rot))

    def _record_heads(self, site: AttentionSite, seen: Attended) -> Attended:
        """Count keys [B, K, T, d] and values [B, K, T, v] of a layer with ordinary attention, and hand them on."""
        found = seen.key.shape[1], seen.key.shape[-1], seen.value.shape[-1]
        if found != (site.kv_heads, site.qk_rope_head_dim, site.kv_lora_rank):
            raise CalibrationError(
                f"{site.name} computes {found[0]} key heads of {found[1]} numbers and values of {found[2]}, where "
                f"{(site.kv_heads, site.qk_rope_head_dim, site.kv_lora_rank)} were expected from its projections."
            )
        value, key = self._count(site, seen.value, seen.key)
        return seen._replace(key=key, value=value)

    def _count(
        self, site: AttentionSite, latent: torch.Tensor, k_rot: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count latents and rotated keys, a head of both for each part of the layer, and gradients once they come.

        Returns:
            Both, to go on with: gradients reach them.
        """
        counted, turns = self._counted, self._turns(site, latent.shape[0])
        first = site.all_parts.index(site.parts[0])
        if torch.is_grad_enabled():
            latent, k_rot = (x if x.requires_grad else x.detach().requires_grad_() for x in (latent, k_rot))
        # Each process reads the whole latent with heads of its own, and the gradient that comes back through
        # `kv_b_proj` is that of all; the one of the rotated key is not. (Key heads are whole where they are.)
        reading = None if site.kv_heads else site.share
        for head, part in enumerate(site.all_parts, start=-first):
            layer = self.statistics[part]
            pick = functools.partial(select_counted, counted=counted, head=head)
            if part not in site.parts:
                layer.pass_over(len(select_counted(latent.detach(), counted)), self.generator)
                continue
            if torch.is_grad_enabled():
                latent.register_hook(lambda g, layer=layer, pick=pick: layer.add_gradients(pick(g)))
                if site.qk_rope_head_dim:
                    k_rot.register_hook(
                        lambda g, layer=layer, pick=pick: layer.add_rot_gradients(
                            pick(sum_of_processes(g, reading)), turns
                        )
                    )
            layer.add_rows(pick(latent.detach()), pick(k_rot.detach()), self.generator, turns)
        return latent, k_rot


def _is_told_of_rotation(module: Any) -> bool:
    return POSITION_EMBEDDINGS in upstream.forward_parameters(module)


def predicts(model: Any) -> bool:
    """Whether the model has an output layer."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def require_runnable(model: Any, metric: str) -> None:
    """Refuse a model that cannot be calibrated by this metric, before any time is spent on it.

    Raises:
        CalibrationError: the model is not loaded; or "fisher", which needs gradients of predictions, and the model
            makes no predictions or was loaded in `torch.inference_mode`.
    """
    if input_device(model).type == "meta":
        raise CalibrationError(
            f"The weights of this {type(model).__name__} are not loaded (meta device). Load the model before "
            "calibrating it."
        )
    if metric != "fisher":
        return
    if not predicts(model):
        raise CalibrationError(
            f'metric="fisher" needs predictions, and a {type(model).__name__} has no output layer. Calibrate '
            'the causal language model that it is part of, or use metric="readers".'
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise CalibrationError(
            'metric="fisher" needs gradients, and this model was loaded or moved inside torch.inference_mode, whose '
            "tensors have none for good. Load it outside (torch.no_grad is as good for generation), or calibrate it "
            'with KVSpliceCalibrator(model, metric="readers"), which needs no gradients.'
        )


def usable_metric(model: Any, metric: str, layer_pattern: str | None = None) -> str:
    """`metric`, or one that needs no gradients where packed layers of the model stop them, with a warning that says so.

    Tried on a few tokens of a model with packed layers; others are not run. What is wrong with the model itself is left
    to be said when it is calibrated.
    """
    if metric != "fisher" or is_patched(model) or not packed_layers(model):
        return metric
    tried = Collector(model, metric, layer_pattern, sink_tokens=0, seed=0)
    try:
        tried.run([{"input_ids": torch.zeros(1, 4, dtype=torch.int64, device="cpu")}], progress=False)
        missing = [part for part, layer in tried.statistics.items() if not layer.fisher.any()]
        reason = f"none reach layer {missing[0]}" if missing else ""
    except (KVSpliceError, torch.OutOfMemoryError):
        return metric
    except Exception as error:  # each library has its own for what it cannot do
        reason = f"{type(error).__name__}: {error}"
    if not reason:
        return metric
    instead = "pca" if any(site.kv_heads for site in tried.sites) else "readers"
    logger.warning(
        "No gradients pass the quantised layers of this %s (%s). It is calibrated with metric=%r, which needs none and "
        "loses more at the same bytes. Calibrate the model before it is quantised, and give the statistics as "
        '`calibration`, for metric="fisher".',
        type(model).__name__,
        reason,
        instead,
    )
    return instead


def _require_known(ids: torch.Tensor, vocabulary: int | None) -> None:
    """Refuse token ids [tokens] that the embeddings lack: on a GPU the look-up would end the process."""
    if not ids.numel():
        return
    lowest, highest = (int(end) for end in ids.aminmax())
    if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
        raise CalibrationError(
            f"The calibration tokens are from {lowest} to {highest}, and the model knows those from 0 to "
            f"{'...' if vocabulary is None else vocabulary - 1}. They are of another tokenizer, or hold labels: give "
            "the token ids of this model."
        )


def _usable(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of a batch on the device; as a copy if it was made in inference mode, for autograd may keep it."""
    tensor = tensor.to(device)
    return tensor.clone() if tensor.is_inference() else tensor


def _usable_positions(config: Any) -> int:
    """How many positions there are before RoPE changes its frequencies."""
    limit = int(getattr(config, "max_position_embeddings", 0) or 0)
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") in ("dynamic", "longrope"):
        limit = min(limit, int(parameters.get("original_max_position_embeddings") or limit))
    return limit


def select_counted(rows: torch.Tensor, counted: torch.Tensor | None, head: int = 0) -> torch.Tensor:
    """The counted tokens [tokens, n] of a head of rows [B, K, T, n]."""
    rows = rows[:, head]
    return rows.flatten(0, 1) if counted is None else rows[counted.to(rows.device)]


def _sampled_likelihood(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Log-likelihood of labels drawn from the predictions themselves, summed over tokens."""
    log_probabilities = logits.float().log_softmax(-1)
    # Inverse transform sampling with noise from the CPU: the same draw on every device.
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float32, device="cpu").to(logits.device)
    cumulated = log_probabilities.detach().exp().cumsum(-1)
    labels = (cumulated < uniform * cumulated[:, -1:]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return log_probabilities.gather(1, labels).sum()


@contextlib.contextmanager
def _prepared(model: Any, with_gradients: bool) -> Iterator[None]:
    """The model in evaluation mode, and for gradients without those of parameters; as it was afterwards."""
    if is_patched(model) or any("expand_kv" in vars(module) for module in model.modules()):
        raise PatchStateError("The model is patched. Calibrate before patching, or call unpatch_model(model) first.")
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _gradients_of_activations(model) if with_gradients else contextlib.nullcontext():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def _gradients_of_activations(model: Any) -> Iterator[None]:
    """Gradients from the embeddings on, so that they reach the first layer without touching any parameter."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with gradients_of_packed(model, input_dtype(embeddings, torch.float32)):
            yield
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)

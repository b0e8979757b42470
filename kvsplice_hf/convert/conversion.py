"""`convert_to_mla`, and the order of its steps."""

from collections.abc import Iterable, Sequence

import torch
from transformers import DeepseekV3ForCausalLM, PreTrainedModel
from transformers.utils.logging import tqdm

from kvsplice_hf.convert.lowrank import compress, latent_statistics
from kvsplice_hf.convert.plain import build_plain_model, narrowing_of, plain_slots, require_plain
from kvsplice_hf.convert.rotation import LayerRotation, Slot, choose_slots, every_pair, fit_queries, virtual_heads
from kvsplice_hf.convert.sampling import LayerActivations, activations, capture_inputs
from kvsplice_hf.convert.source import SourceModel, read_source
from kvsplice_hf.convert.target import build_model, layer_weights
from kvsplice_hf.errors import ConfigError


_SEED = 0


@torch.no_grad()
def convert_to_mla(
    model: PreTrainedModel,
    *,
    rope_dim: int | str = 64,
    kv_lora_rank: int | None = None,
    calibration: torch.Tensor | Iterable[torch.Tensor] | None = None,
    plain: bool = False,
) -> DeepseekV3ForCausalLM:
    """Turn a RoPE model with grouped-query or multi-head attention into a stock MLA model, in closed form.

    The result is a plain `DeepseekV3ForCausalLM`: `save_pretrained` and `from_pretrained` need nothing of this package.
    It has the dtype, device and mode of `model`, which is left as it is; they share no memory.

    Args:
        model: a loaded causal language model of type Llama, Mistral or Qwen2.
        rope_dim: P, the numbers per token that go on rotating. "all" keeps every rotation: exact, but nothing is saved.
        kv_lora_rank: R, the width of the latent; one of its channels is a constant. By default all that is needed:
            2 (G d/2 - P/2) + G d + 1.
        calibration: token ids without padding, [B, T], or several such batches. A few thousand tokens, in sequences as
            long as those that matter. Not needed where nothing is approximated.
        plain: whether the result is to have no biases and the default RoPE, as engines need it that serve DeepSeek
            (vLLM). It loses more. P then divides the head size, and R is the hidden size unless it is given; engines
            are made for P = 64 and R = 512.

    Returns:
        The new model.

    Raises:
        UnsupportedError: the model cannot be converted, or not to the plain form; the message names every obstacle.
        ConfigError: a size is out of its range, or calibration text is missing or cannot be used.

    Examples:
        >>> tokens = tokenizer(text, return_tensors="pt").input_ids[:, :4096].view(2, 2048)
        >>> mla = convert_to_mla(model, rope_dim=64, calibration=tokens)
        >>> mla.save_pretrained("my-model-mla")
    """
    source = read_source(model)
    if plain:
        require_plain(source, rope_dim, kv_lora_rank)
    count = _slot_count(source, rope_dim)
    if not plain:
        _check_rank(source, count, kv_lora_rank)
    sequences = _sequences(source, calibration)
    exact = count == _pair_count(source)
    if not sequences and (plain or not (exact and kv_lora_rank is None)):
        raise ConfigError(
            f"rope_dim={rope_dim!r} with kv_lora_rank={kv_lora_rank} and plain={plain} is an approximation, which is "
            "fitted to text, and `calibration` is None. Pass token ids [B, T] of a few thousand tokens; only "
            "rope_dim='all' without kv_lora_rank and plain needs none."
        )
    inputs = _inputs(source, sequences) if sequences else [[] for _ in source.layers]
    generator = torch.Generator().manual_seed(_SEED)
    slots, rotations = _rotations(source, inputs, count, generator, plain_slots(source, 2 * count) if plain else None)
    layers, narrowings = [], []
    for layer, hidden, rotation in zip(tqdm(source.layers, desc="converting layers"), inputs, rotations, strict=True):
        weights = layer_weights(source, layer, rotation, slots)
        if plain:
            statistics = latent_statistics(source, layer, activations(source, layer, hidden), weights, generator)
            rank = source.config.hidden_size if kv_lora_rank is None else kv_lora_rank
            narrowings.append(narrowing_of(source, layer, hidden, weights, statistics, rank))
        elif kv_lora_rank is not None and kv_lora_rank - 1 < len(weights.latent):
            sample = activations(source, layer, hidden)
            statistics = latent_statistics(source, layer, sample, weights, generator)
            weights = compress(layer, weights, statistics, kv_lora_rank - 1)
        layers.append(weights)
    if plain:
        return build_plain_model(source, layers, narrowings, slots)
    return build_model(source, layers, slots)


def _rotations(
    source: SourceModel,
    inputs: Sequence[list[torch.Tensor]],
    count: int,
    generator: torch.Generator,
    given: list[Slot] | None,
) -> tuple[list[Slot], list[LayerRotation]]:
    """The pairs that go on rotating, `given` or chosen, and how the heads of each layer read them and the others."""
    if count == _pair_count(source):
        slots, rotation = every_pair(source)
        return slots, [rotation] * len(source.layers)

    def samples(description: str) -> Iterable[list[LayerActivations]]:
        for layer, hidden in zip(tqdm(source.layers, desc=description), inputs, strict=True):
            yield activations(source, layer, hidden)

    virtual = [virtual_heads(source, sample, generator) for sample in samples("virtual heads")]
    slots = given if given is not None else choose_slots([layer.cost for layer in virtual], count)
    rotations = [
        fit_queries(source, sample, layer, slots, generator)
        for layer, sample in zip(virtual, samples("fitting queries"), strict=True)
    ]
    return slots, rotations


def _inputs(source: SourceModel, sequences: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    training = source.model.training
    source.model.eval()
    try:
        return capture_inputs(source, sequences)
    finally:
        source.model.train(training)


def _pair_count(source: SourceModel) -> int:
    return len(source.inv_freq) * source.num_key_heads


def _slot_count(source: SourceModel, rope_dim: int | str) -> int:
    """P / 2."""
    everything = 2 * _pair_count(source)
    if rope_dim == "all":
        return everything // 2
    if not isinstance(rope_dim, int) or isinstance(rope_dim, bool) or rope_dim % 2 or not 2 <= rope_dim <= everything:
        raise ConfigError(
            f"`rope_dim` is {rope_dim!r}; it must be 'all' or an even number from 2 to {everything}, the numbers that "
            f"{source.num_key_heads} key heads of {source.head_dim} rotate."
        )
    return rope_dim // 2


def _check_rank(source: SourceModel, count: int, rank: int | None) -> None:
    full = 2 * (_pair_count(source) - count) + source.num_key_heads * source.head_dim + 1
    if rank is not None and not (isinstance(rank, int) and 2 <= rank <= full):
        raise ConfigError(
            f"`kv_lora_rank` is {rank!r}; it must be between 2 and {full}, the full latent of keys without rotation, "
            "values and a constant."
        )


def _sequences(source: SourceModel, calibration: torch.Tensor | Iterable[torch.Tensor] | None) -> list[torch.Tensor]:
    """The calibration text as single sequences [T]."""
    if calibration is None:
        return []
    batches = [calibration] if isinstance(calibration, torch.Tensor) else list(calibration)
    for batch in batches:
        if not isinstance(batch, torch.Tensor) or batch.dim() != 2 or batch.dtype not in (torch.int32, torch.int64):
            found = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, torch.Tensor) else type(batch).__name__
            raise ConfigError(f"`calibration` holds {found}; it must hold token ids, int64 [B, T].")
        if batch.shape[1] < 2 or batch.numel() == 0:
            raise ConfigError(f"`calibration` holds a batch {list(batch.shape)}; sequences need two tokens at least.")
        if not 0 <= int(batch.min()) <= int(batch.max()) < source.config.vocab_size:
            raise ConfigError(
                f"`calibration` holds ids from {int(batch.min())} to {int(batch.max())}, outside the vocabulary of "
                f"{source.config.vocab_size}. Use the tokenizer of this model, and leave padding out."
            )
    return [sequence for batch in batches for sequence in batch]

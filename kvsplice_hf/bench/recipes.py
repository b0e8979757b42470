"""Recipes: what is done to a model before it is measured, and the cache that it is given."""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import Cache

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice
from kvsplice_hf.bench.quantisation import is_installed
from kvsplice_hf.config import DEFAULT_CODEC, ROWS_CODEC
from kvsplice_hf.errors import ConfigError


# The recipe that all others are compared with.
STOCK = "stock"
_PACKED_SHARE = 0.25
# More numbers than any key has.
_WHOLE = 1 << 16
_CALIBRATION_WINDOW = 512
# What the calibrator asks for, per dimension of the latent.
_CALIBRATION_TOKENS_PER_DIMENSION = 4


def _static_cache(config: PreTrainedConfig, length: int) -> Cache:
    return StaticCache(config=config, max_cache_len=length)


def _fp8_cache(config: PreTrainedConfig, length: int) -> Cache:
    return QuantizedCache("fp8", config)


def _quanto_cache(config: PreTrainedConfig, length: int) -> Cache:
    try:
        return QuantizedCache("quanto", config)
    except ImportError as error:
        raise ConfigError(f'The recipe "stock quanto" needs optimum-quanto: {" ".join(str(error).split())}') from None


def _dynamic_cache(config: PreTrainedConfig, length: int) -> Cache:
    return DynamicCache(config=config)


@dataclass(frozen=True)
class Recipe:
    """What is done to the model, and the cache it is given.

    Args:
        config: of the splice.
        is_packed: packed codes of a quarter of the stock bytes in bf16; they need calibration.
        keys, key_block, codec: of those, see `KVSpliceConfig`.
        make_cache: from the model's config and the greatest length; each cache layer is spliced when it is used.
        needs: a module that may not be installed.
    """

    config: KVSpliceConfig | None = None
    is_packed: bool = False
    keys: str = "unrotated"
    key_block: int | None = None
    codec: str = DEFAULT_CODEC
    make_cache: Callable[[PreTrainedConfig, int], Cache] = _dynamic_cache
    needs: str | None = None

    @property
    def can_run(self) -> bool:
        """Whether what it needs is installed."""
        return self.needs is None or is_installed(self.needs)

    @property
    def is_spliced(self) -> bool:
        return self.is_packed or self.config is not None

    @property
    def has_default_cache(self) -> bool:
        """Whether `generate` makes this cache by itself."""
        return self.make_cache is _dynamic_cache


RECIPES: Mapping[str, Recipe] = {
    STOCK: Recipe(),
    "stock static": Recipe(make_cache=_static_cache),
    "stock fp8": Recipe(make_cache=_fp8_cache),
    "stock quanto": Recipe(make_cache=_quanto_cache, needs="optimum.quanto"),
    "full rank": Recipe(KVSpliceConfig(compression_ratio=1.0, init="identity")),
    "rank R/2": Recipe(KVSpliceConfig(compression_ratio=0.5, init="orthogonal")),
    "packed 4x": Recipe(is_packed=True),
    "packed 4x, whole key bases": Recipe(is_packed=True, key_block=_WHOLE),
    "packed 4x, key blocks of 16": Recipe(is_packed=True, key_block=16),
    "packed 4x, key blocks of 2": Recipe(is_packed=True, key_block=2),
    "packed 4x, rotated keys": Recipe(is_packed=True, keys="rotated"),
    "packed 4x, as in 0.2": Recipe(is_packed=True, keys="rotated", codec=ROWS_CODEC),
}


def runnable_recipes() -> list[str]:
    """Those that need nothing that is not installed."""
    return [name for name, recipe in RECIPES.items() if recipe.can_run]


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the language model."""
    return model.config.get_text_config(decoder=True)


def state_shapes(config: PreTrainedConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and numbers of the two tensors that a stock cache layer gets of each token."""
    if getattr(config, "kv_lora_rank", None):
        return (1, config.kv_lora_rank), (1, config.qk_rope_head_dim)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    return (heads, width), (heads, width)


def row_numbers(config: PreTrainedConfig) -> int:
    """Numbers that a stock cache layer stores of each token."""
    return sum(heads * width for heads, width in state_shapes(config))


def random_tokens(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    """Token ids that the model knows, int64 [*shape]."""
    return torch.randint(text_config(model).vocab_size, shape, dtype=torch.int64, device=model.device)


def apply_recipe(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Patch the model by a recipe.

    Packed codes take their widths from calibration: on random tokens, as few as the calibrator accepts, and by the size
    of the latents alone. What the codes lose does not matter here; how many of them there are, of which widths, does.
    """
    if recipe.config is not None:
        patch_model_with_kvsplice(model, recipe.config)
    if recipe.is_packed:
        config = text_config(model)
        bytes_per_token = _PACKED_SHARE * 2 * row_numbers(config)
        calibrator = KVSpliceCalibrator(model, metric="pca")
        # The first tokens of each window are exact and not counted.
        tokens = _CALIBRATION_TOKENS_PER_DIMENSION * state_shapes(config)[0][1]
        count = -(-tokens // (_CALIBRATION_WINDOW - KVSpliceConfig(bytes_per_token=bytes_per_token).sink_tokens))
        windows = random_tokens(model, count, _CALIBRATION_WINDOW)
        calibrator.collect(list(windows.split(1)), max_tokens=windows.numel(), progress=False)
        splice = KVSpliceConfig(
            bytes_per_token=bytes_per_token,
            allocation="layer",
            keys=recipe.keys,
            key_block=recipe.key_block,
            codec=recipe.codec,
        )
        patch_model_with_kvsplice(model, splice, calibration=calibrator)
    return model


def patched_models(model: PreTrainedModel, names: Sequence[str]) -> dict[str, PreTrainedModel]:
    """A model per recipe, all on the same weights."""
    progress = tqdm(names, desc="patching", file=sys.stderr)
    return {name: apply_recipe(shared_copy(model), RECIPES[name]) for name in progress}


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another model on the same parameters: patching one leaves the other as it is, and costs the splice alone."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})

"""Other ways to make the rows of an MLA cache smaller, simulated: what comes back after quantising, and what it takes.

A row is what one token leaves in the cache of one layer: the latent (R numbers) and the rotated key (P numbers). A
`Rival` says how many bytes its row takes, packed and with all scales, and turns rows into what would be read back.
Constants of a layer (means, bases, codebooks) are not counted, as they do not grow with the context; what belongs to a
sequence is, spread over its tokens.

Every rival has a standardised variant, with the mean and the spread of each channel taken out before and put back
after: MLA latents have channels of very different size, and folding that into the weights is free.

Legend: `B` batch, `T` tokens, `R` kv_lora_rank, `P` qk_rope_head_dim, `r` rank, `N`, `V` head sizes, `H` heads.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Fp8QuantizedLayer,
    HQQQuantizedLayer,
    QuantoQuantizedLayer,
)

from kvsplice_hf.errors import ConfigError, PatchStateError
from kvsplice_hf.patch.layers import MLASite, find_mla_sites


# Tokens at the start of every sequence that no rival touches, and that calibration leaves out: attention sinks.
EXACT_TOKENS = 4

_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
# Below this share of the widest channel, or of the channel's own mean, a spread is rounding noise. Dividing by it would
# blow that noise up to the size of the other channels, whose scales it shares.
_SMALLEST_SPREAD = 1e-4
_SMALLEST_SPREAD_OF_MEAN = 1e-5


@dataclass
class LayerStatistics:
    """What calibration knows about the rows of one layer; all fp32.

    Attributes:
        mean: of the latent, [R].
        covariance: of the latent, [R, R].
        rot_scale: root mean square of each number of the rotated key, [P].
        kv_b_weight: the matrix that `kv_b_proj` multiplies by, which reads the latent, [H * (N + V), R].
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    rot_scale: torch.Tensor
    kv_b_weight: torch.Tensor

    @property
    def spread(self) -> torch.Tensor:
        """Standard deviations [R], none of them so small that dividing by it amplifies rounding."""
        spread = self.covariance.diagonal().clamp_min(0).sqrt()
        smallest = torch.maximum(_SMALLEST_SPREAD * spread.max(), _SMALLEST_SPREAD_OF_MEAN * self.mean.abs())
        return torch.where(spread > smallest, spread, smallest).clamp_min(torch.finfo(torch.float32).tiny)

    def standardised(self) -> "LayerStatistics":
        """Those of the latent with mean 0 and spread 1 in every channel."""
        spread = self.spread
        return LayerStatistics(
            torch.zeros_like(self.mean),
            self.covariance / spread / spread[:, None],
            torch.ones_like(self.rot_scale),
            self.kv_b_weight * spread,
        )


def _fitted(default: Any) -> Any:
    """A field that `Rival.fit` sets."""
    return field(default=default, init=False, repr=False, compare=False)


@dataclass(kw_only=True)
class Rival(ABC):
    """A codec for rows. `fit` gives a copy that knows a layer; that one codes.

    Attributes:
        rot_bits: 16 keeps the rotated key in bf16; 8 stores integers with one bf16 scale per token.
        is_standardised: take mean and spread of each channel out first.
        tokens: coded tokens of a sequence, over which bytes that belong to the sequence are spread.
    """

    rot_bits: int = 16
    is_standardised: bool = False
    tokens: int = 1024

    # Whether a standardised variant makes sense at all.
    has_standardised_variant: ClassVar[bool] = True
    _centre: torch.Tensor | float = _fitted(0.0)
    _spread: torch.Tensor | float = _fitted(1.0)
    _rot_spread: torch.Tensor | float = _fitted(1.0)

    @property
    def name(self) -> str:
        return self.label + ("" if self.rot_bits == 16 else f"-k{self.rot_bits}")

    @property
    @abstractmethod
    def label(self) -> str:
        """Name without what is said about the rotated key."""

    @abstractmethod
    def latent_bytes(self, latent_dim: int) -> float:
        """Bytes of the latent, per token and layer."""

    @abstractmethod
    def code(self, latent: torch.Tensor) -> torch.Tensor:
        """What is read back of latents [..., T, R], fp32."""

    def learn(self, statistics: LayerStatistics) -> None:  # noqa: B027  most rivals need nothing
        """Take from the statistics what `code` needs. They are standardised where the latents will be."""

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> float:
        """Bytes of a row, packed, with its scales and its rotated key, per token and layer."""
        rot = 2 * rope_dim if self.rot_bits == 16 or rope_dim == 0 else math.ceil(rope_dim * self.rot_bits / 8) + 2
        return self.latent_bytes(latent_dim) + rot

    def fit(self, statistics: LayerStatistics) -> Self:
        """A copy for the layer that has these statistics."""
        fitted = copy(self)
        if self.is_standardised:
            fitted._centre, fitted._spread = statistics.mean, statistics.spread
            widest = statistics.rot_scale.max() if len(statistics.rot_scale) else 0.0
            fitted._rot_spread = statistics.rot_scale.clamp_min(max(float(widest) * _SMALLEST_SPREAD, 1e-30))
            statistics = statistics.standardised()
        fitted.learn(statistics)
        return fitted

    def round_trip(self, latent: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as they would be read back: latents [..., T, R] and rotated keys [..., T, P], same shapes and dtypes."""
        decoded = self.code((latent.float() - self._centre) / self._spread) * self._spread + self._centre
        return decoded.to(latent.dtype), self._code_rot(k_rot.float()).to(k_rot.dtype)

    def _code_rot(self, k_rot: torch.Tensor) -> torch.Tensor:
        if self.rot_bits == 16 or k_rot.shape[-1] == 0:
            return _bf16(k_rot)
        return _symmetric(k_rot / self._rot_spread, self.rot_bits) * self._rot_spread


@dataclass(kw_only=True)
class Stock(Rival):
    """bf16, as it comes."""

    has_standardised_variant: ClassVar[bool] = False
    label: ClassVar[str] = "bf16"

    def latent_bytes(self, latent_dim: int) -> float:
        return 2 * latent_dim

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return _bf16(latent)


@dataclass(kw_only=True)
class Fp8Rows(Rival):
    """e4m3 numbers with one fp32 scale per group: the FP8 rows of serving engines (656 B at R = 512, P = 64)."""

    group: int = 128

    @property
    def label(self) -> str:
        return f"fp8-g{self.group}"

    def latent_bytes(self, latent_dim: int) -> float:
        return latent_dim + 4 * math.ceil(latent_dim / self.group)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return _in_groups(latent, self.group, _fp8_group)


@dataclass(kw_only=True)
class NvFp4(Rival):
    """e2m1 numbers in blocks of 16 with an e4m3 scale each, and one fp32 scale per layer."""

    block: int = 16
    label: ClassVar[str] = "nvfp4"
    _outer: torch.Tensor | float = _fitted(1.0)

    def latent_bytes(self, latent_dim: int) -> float:
        return math.ceil(latent_dim / 2) + math.ceil(latent_dim / self.block)

    def learn(self, statistics: LayerStatistics) -> None:
        # The largest block scale stands for a number 16 deviations out. Being generous costs nothing: e4m3 is as fine
        # at a small scale as at a large one.
        largest = (statistics.mean.abs() + 16 * statistics.covariance.diagonal().clamp_min(0).sqrt()).max()
        self._outer = (largest / (_E4M3_MAX * _E2M1_MAX)).clamp_min(1e-30)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return _in_groups(latent / self._outer, self.block, _nvfp4_block) * self._outer


@dataclass(kw_only=True)
class RotatedLloydMax(Rival):
    """A random rotation, then the best levels for a Gaussian, with one bf16 norm per token (as TurboQuant does)."""

    bits: int = 4
    _rotation: Any = _fitted(None)

    @property
    def label(self) -> str:
        return f"rotated-lloyd{self.bits}"

    def latent_bytes(self, latent_dim: int) -> float:
        return math.ceil(latent_dim * self.bits / 8) + 2

    def learn(self, statistics: LayerStatistics) -> None:
        self._rotation = random_rotation(len(statistics.mean)).to(statistics.mean)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        levels = lloyd_max_levels(self.bits).to(latent)
        norm = _bf16(latent.norm(dim=-1, keepdim=True)) / math.sqrt(latent.shape[-1])
        turned = latent @ self._rotation / _not_zero(norm)
        nearest = levels[torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)]
        return (nearest * norm) @ self._rotation.T


@dataclass(kw_only=True)
class IntegerPerToken(Rival):
    """Integers in groups of neighbouring channels of a token, with a bf16 scale and zero per group."""

    bits: int = 4
    group: int = 32

    @property
    def label(self) -> str:
        return f"int{self.bits}-g{self.group}"

    def latent_bytes(self, latent_dim: int) -> float:
        return math.ceil(latent_dim * self.bits / 8) + 4 * math.ceil(latent_dim / self.group)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return _in_groups(latent, self.group, functools.partial(_affine, bits=self.bits))


@dataclass(kw_only=True)
class IntegerPerChannel(Rival):
    """Integers with a bf16 scale and zero per channel and group of tokens, as KIVI codes keys.

    Tokens that do not fill a group stay in bf16. KIVI also keeps the last tokens before each query exact; here, as for
    all others, a query reads every token as it is stored in the end.
    """

    bits: int = 4
    group: int = 32

    @property
    def label(self) -> str:
        return f"kivi{self.bits}-t{self.group}"

    def latent_bytes(self, latent_dim: int) -> float:
        whole = self.tokens // self.group * self.group
        row = math.ceil(latent_dim * self.bits / 8) + 4 * latent_dim / self.group
        return (whole * row + (self.tokens - whole) * 2 * latent_dim) / self.tokens

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        whole = latent.shape[-2] // self.group * self.group
        channels = latent[..., :whole, :].transpose(-1, -2)
        coded = _in_groups(channels, self.group, functools.partial(_affine, bits=self.bits)).transpose(-1, -2)
        return torch.cat([coded, _bf16(latent[..., whole:, :])], dim=-2)


@dataclass(kw_only=True)
class Truncation(Rival):
    """The r strongest coordinates in bf16, in a basis that is the same for all tokens.

    Attributes:
        share: r / R.
    """

    share: float = 0.5
    _basis: Any = _fitted(None)
    _mean: torch.Tensor | float = _fitted(0.0)

    def rank(self, latent_dim: int) -> int:
        return max(1, round(self.share * latent_dim))

    def latent_bytes(self, latent_dim: int) -> float:
        return 2 * self.rank(latent_dim)

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        return _bf16((latent - self._mean) @ self._basis) @ self._basis.T + self._mean


@dataclass(kw_only=True)
class PcaTruncation(Truncation):
    """The coordinates in which the latents vary most."""

    @property
    def label(self) -> str:
        return f"pca-{self.share:g}"

    def learn(self, statistics: LayerStatistics) -> None:
        self._mean = statistics.mean
        self._basis = _top_eigenvectors(statistics.covariance, self.rank(len(statistics.mean)))


@dataclass(kw_only=True)
class WeightTruncation(Truncation):
    """The right singular vectors of `kv_b_proj` with the largest values: no data needed."""

    @property
    def label(self) -> str:
        return f"weight-svd-{self.share:g}"

    def learn(self, statistics: LayerStatistics) -> None:
        # The right singular vectors of W are the eigenvectors of W^T W, which is as small as the latent.
        weight = statistics.kv_b_weight.double()
        self._basis = _top_eigenvectors(weight.T @ weight, self.rank(weight.shape[1])).float()


@dataclass(kw_only=True)
class PromptTruncation(Truncation):
    """The strongest directions of the sequence itself, stored with it in bf16 (as xKV does, one layer at a time)."""

    @property
    def label(self) -> str:
        return f"prompt-svd-{self.share:g}"

    def latent_bytes(self, latent_dim: int) -> float:
        rank = self.rank(latent_dim)
        return 2 * rank + 2 * rank * latent_dim / self.tokens

    def code(self, latent: torch.Tensor) -> torch.Tensor:
        rows = latent.double()
        basis = _top_eigenvectors(rows.transpose(-1, -2) @ rows, self.rank(latent.shape[-1])).float()
        return _bf16(latent @ basis) @ _bf16(basis).transpose(-1, -2)


def _table() -> dict[str, Rival]:
    small = [
        NvFp4(),
        *(RotatedLloydMax(bits=bits) for bits in (4, 3, 2)),
        *(IntegerPerToken(bits=bits) for bits in (4, 2)),
        *(IntegerPerChannel(bits=bits) for bits in (4, 2)),
    ]
    rivals = [
        Stock(),
        Fp8Rows(group=128),
        Fp8Rows(group=64),
        *small,
        # The rotated key in bf16 would be half of what is left, so that every small rival may store it in 8 bits.
        *(replace(rival, rot_bits=8) for rival in small),
        *(PcaTruncation(share=share) for share in (0.75, 0.5, 0.25)),
        *(WeightTruncation(share=share) for share in (0.75, 0.5, 0.25)),
        *(PromptTruncation(share=share) for share in (0.5, 0.25, 0.125)),
    ]
    return {rival.name: rival for rival in rivals}


@dataclass(frozen=True)
class CacheBackend:
    """A `QuantizedCache` of transformers, given the latents and rotated keys of MLA as its keys and values.

    It holds no token exact, and what it returns at the first update is what it was given. Those with integers keep up
    to 128 of the last tokens as they came; when there are more, they quantise all tokens anew.
    """

    backend: str

    @property
    def name(self) -> str:
        return f"transformers-{self.backend}"

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> float:
        """Bytes of a row, counted in the tensors of a layer that holds `_COUNTED_ROWS` of them.

        Scales and zero points count as bf16, what they would be in a bf16 model. Rows in the residual window, which
        some backends keep as they came, do not count.
        """
        layer = self._layer()
        shape = 1, 1, _COUNTED_ROWS
        layer.update(torch.randn(*shape, latent_dim), torch.randn(*shape, rope_dim))
        tensors = _tensors_in((layer._quantized_keys, layer._quantized_values))
        return sum(tensor.numel() * min(tensor.itemsize, 2) for tensor in tensors) / _COUNTED_ROWS

    def make_cache(self, config: PreTrainedConfig) -> Cache:
        return QuantizedCache(self.backend, config)

    def why_not(self) -> str | None:
        """Why it cannot run here, or None."""
        try:
            self._layer()
        except ImportError as error:
            return " ".join(str(error).split())
        return None

    def _layer(self) -> BaseQuantizedLayer:
        """An empty layer of such a cache."""
        return _CACHE_LAYERS[self.backend]()


_CACHE_LAYERS: Mapping[str, Callable[[], BaseQuantizedLayer]] = {
    "fp8": Fp8QuantizedLayer,
    "quanto": QuantoQuantizedLayer,
    "hqq": HQQQuantizedLayer,
}
_COUNTED_ROWS = 1024


def _tensors_in(holder: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that hold the numbers of quantised ones, in whatever they are wrapped."""
    if isinstance(holder, torch.Tensor) and hasattr(holder, "__tensor_flatten__"):
        names, _ = holder.__tensor_flatten__()
        holder = [getattr(holder, name) for name in names]
    if isinstance(holder, torch.Tensor):
        yield holder
    elif isinstance(holder, Mapping | tuple | list):
        for part in holder.values() if isinstance(holder, Mapping) else holder:
            yield from _tensors_in(part)


RIVALS: Mapping[str, Rival] = _table()
CACHE_BACKENDS: Mapping[str, CacheBackend] = {
    backend.name: backend for backend in map(CacheBackend, ("fp8", "quanto", "hqq"))
}


@functools.cache
def lloyd_max_levels(bits: int) -> torch.Tensor:
    """The 2**bits levels with the least squared error for a unit Gaussian, ascending, fp32."""
    levels = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64)
    outside = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(3000):
        edges = torch.cat([-outside, (levels[1:] + levels[:-1]) / 2, outside])
        density, below = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(edges)
        levels = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return levels.float()


@functools.cache
def random_rotation(size: int) -> torch.Tensor:
    """An orthogonal matrix, the same at every call, [size, size]."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(gaussian).Q.float()


def round_to_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with either sign, ties to the even code, saturating."""
    size = numbers.abs().clamp_max(_E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (size / step).round() * step * numbers.sign()


def round_to_e4m3(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 number, saturating."""
    # Clamped first: whether the cast itself saturates or gives NaN depends on the release of torch.
    return numbers.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()


def _bf16(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.bfloat16().float()


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    """Scales to divide by: where one is 0, all it scales is 0 as well, and any other will do."""
    return torch.where(scale == 0, 1.0, scale)


def _in_groups(numbers: torch.Tensor, size: int, quantise: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`quantise` for [..., groups, size] along the last dimension; the last group may be shorter."""
    width = numbers.shape[-1]
    whole = width // size
    parts = []
    if whole:
        parts.append(quantise(numbers[..., : whole * size].unflatten(-1, (whole, size))).flatten(-2))
    if width > whole * size:
        parts.append(quantise(numbers[..., None, whole * size :]).flatten(-2))
    return torch.cat(parts, dim=-1) if parts else numbers


def _fp8_group(numbers: torch.Tensor) -> torch.Tensor:
    scale = _not_zero(numbers.abs().amax(-1, keepdim=True) / _E4M3_MAX)
    return round_to_e4m3(numbers / scale) * scale


def _nvfp4_block(numbers: torch.Tensor) -> torch.Tensor:
    scale = round_to_e4m3(numbers.abs().amax(-1, keepdim=True) / _E2M1_MAX)
    return round_to_e2m1(numbers / _not_zero(scale)) * scale


def _affine(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers between the smallest and the largest of a group, with a bf16 scale and zero."""
    low, high, top = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True), 2**bits - 1
    zero, scale = _bf16(low), _bf16((high - low) / top)
    return ((numbers - zero) / _not_zero(scale)).round().clamp(0, top) * scale + zero


def _symmetric(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed integers with one bf16 scale along the last dimension."""
    top = 2 ** (bits - 1) - 1
    scale = _bf16(numbers.abs().amax(-1, keepdim=True) / top)
    return (numbers / _not_zero(scale)).round().clamp(-top, top) * scale


def _top_eigenvectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors [..., R, r] of symmetric matrices [..., R, R], those of the largest values."""
    vectors = torch.linalg.eigh(matrix.double()).eigenvectors
    return vectors[..., -rank:].flip(-1).to(matrix.dtype)


@contextmanager
def replaced_expand_kv(model: nn.Module, make: Callable[[MLASite], Callable[..., Any]]) -> Iterator[None]:
    """Inside, `expand_kv` of every MLA module of a model is what `make` gives for its site; then as before.

    Raises:
        PatchStateError: an instance has an `expand_kv` of its own already, as patched models do.
    """
    sites = find_mla_sites(model)
    taken = [site.name for site in sites if "expand_kv" in vars(site.module)]
    if taken:
        raise PatchStateError(f"{', '.join(taken)} has an `expand_kv` of its own. Unpatch the model first.")
    try:
        for site in sites:
            site.module.expand_kv = make(site)
        yield
    finally:
        for site in sites:
            vars(site.module).pop("expand_kv", None)


class _Moments:
    """Running sums over the rows of one layer. fp64: differences of large sums follow."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Any = 0.0
        self.second: Any = 0.0
        self.rot_second: Any = 0.0

    def add(self, latent: torch.Tensor, k_rot: torch.Tensor) -> None:
        rows, rot = latent.double().flatten(0, -2), k_rot.double().flatten(0, -2)
        self.count += len(rows)
        self.first = self.first + rows.sum(0)
        self.second = self.second + rows.T @ rows
        self.rot_second = self.rot_second + rot.square().sum(0)

    def statistics(self, kv_b_weight: torch.Tensor) -> LayerStatistics:
        mean = self.first / self.count
        covariance = self.second / self.count - torch.outer(mean, mean)
        rot_scale = (self.rot_second / self.count).sqrt()
        return LayerStatistics(mean.float(), covariance.float(), rot_scale.float(), kv_b_weight.detach().float())


def _expand_and_add(
    module: Any, moments: _Moments, latent: torch.Tensor, k_rot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    moments.add(latent[..., EXACT_TOKENS:, :], k_rot[..., EXACT_TOKENS:, :])
    return type(module).expand_kv(module, latent, k_rot)


@torch.no_grad()
def collect_statistics(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[int, LayerStatistics]:
    """Statistics of every layer that caches a latent, by `layer_idx`, without the first tokens of every sequence.

    Args:
        model: an unpatched model.
        batches: token ids [B, T], run one after the other without a cache; nothing but sums is kept.

    Raises:
        ConfigError: no sequence is longer than the tokens that are left out.
        PatchStateError: the model is patched.
    """
    sites = [site for site in find_mla_sites(model) if site.stores_latent]
    moments = {site.layer_idx: _Moments() for site in sites}

    def make(site: MLASite) -> Callable[..., Any]:
        # A layer that expands the latent of another one adds nothing to what is known about it.
        mine = moments[site.layer_idx] if site.stores_latent else _Moments()
        return functools.partial(_expand_and_add, site.module, mine)

    device = next(model.parameters()).device
    with replaced_expand_kv(model, make):
        for batch in batches:
            model(batch.to(device), use_cache=False)
    if not all(layer.count for layer in moments.values()):
        raise ConfigError(f"Calibration needs sequences of more than {EXACT_TOKENS} tokens.")
    return {site.layer_idx: moments[site.layer_idx].statistics(_matrix_of(site, device)) for site in sites}


def _matrix_of(site: MLASite, device: torch.device) -> torch.Tensor:
    """What `kv_b_proj` multiplies by, [H * (N + V), R]: asked of the module, as its weight may be packed or adapted."""
    unit = torch.eye(site.kv_lora_rank, dtype=site.dtype, device=device)
    project = site.module.kv_b_proj
    return (project(unit) - project(torch.zeros_like(unit[:1]))).T


def _expand_read_back(
    module: Any, rival: Rival, latent: torch.Tensor, k_rot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # The first tokens are kept from the rival altogether, so that they spoil no group of tokens and no basis.
    coded = rival.round_trip(latent[..., EXACT_TOKENS:, :], k_rot[..., EXACT_TOKENS:, :])
    latent, k_rot = (
        torch.cat([exact[..., :EXACT_TOKENS, :], rest], dim=-2)
        for exact, rest in zip((latent, k_rot), coded, strict=True)
    )
    return type(module).expand_kv(module, latent, k_rot)


@contextmanager
def simulated(model: nn.Module, rival: Rival, statistics: Mapping[int, LayerStatistics]) -> Iterator[None]:
    """Inside, a model that runs without a cache reads all rows but those of the first tokens as `rival` stores them.

    Raises:
        PatchStateError: the model is patched.
    """
    fitted = {layer_idx: rival.fit(layer) for layer_idx, layer in statistics.items()}

    def make(site: MLASite) -> Callable[..., Any]:
        return functools.partial(_expand_read_back, site.module, fitted[(site.source or site).layer_idx])

    with replaced_expand_kv(model, make):
        yield

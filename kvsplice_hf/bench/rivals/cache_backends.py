"""The quantised caches of transformers, as they are."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Fp8QuantizedLayer,
    HQQQuantizedLayer,
    QuantoQuantizedLayer,
)


@dataclass(frozen=True)
class CacheBackend:
    """A `QuantizedCache` of transformers; of MLA it is given latents and rotated keys as its keys and values.

    It holds no token exact, and what it returns at the first update is what it was given. Those with integers keep up
    to 128 of the last tokens as they came; when there are more, they quantise all tokens anew.
    """

    backend: str
    bits: int | None = None  # None: what the backend takes by itself

    @property
    def name(self) -> str:
        return f"transformers-{self.backend}" + ("" if self.bits is None else str(self.bits))

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> float:
        """Bytes of a row, counted in the tensors of a layer that holds `_COUNTED_ROWS` of them.

        Scales and zero points count as bf16, what they would be in a bf16 model. Rows in the residual window, which
        some backends keep as they came, do not count.
        """
        layer = self._layer()
        shape = 1, 1, _COUNTED_ROWS
        latents, rotated = (
            torch.randn(*shape, size, dtype=torch.float32, device="cpu") for size in (latent_dim, rope_dim)
        )
        layer.update(latents, rotated)
        tensors = _tensors_in((layer._quantized_keys, layer._quantized_values))
        return sum(tensor.numel() * min(tensor.itemsize, 2) for tensor in tensors) / _COUNTED_ROWS

    def make_cache(self, config: PreTrainedConfig) -> Cache:
        return QuantizedCache(self.backend, config, **self._settings)

    def why_not(self) -> str | None:
        """Why it cannot run here, or None."""
        try:
            self._layer()
        except ImportError as error:
            return " ".join(str(error).split())
        return None

    def _layer(self) -> BaseQuantizedLayer:
        """An empty layer of such a cache."""
        return _CACHE_LAYERS[self.backend](**self._settings)

    @property
    def _settings(self) -> dict[str, int]:
        return {} if self.bits is None else {"nbits": self.bits}


_CACHE_LAYERS: Mapping[str, Callable[..., BaseQuantizedLayer]] = {
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


CACHE_BACKENDS: Mapping[str, CacheBackend] = {
    backend.name: backend
    for backend in (CacheBackend("fp8"), CacheBackend("quanto"), CacheBackend("quanto", 2), CacheBackend("hqq"))
}

"""`SplineSplice`: a splice that bends each number of a latent by a monotone spline before it projects.

`BentKeyProjection` does the same with keys before their rotation.

That is the geometry of `kvsplice_hf.geometry` as a transform of the splice: `z = B^T (spline(c) - mean)`, and
`c_hat = spline^-1(B z + mean)`. A spline does not fold into the weights around it, so that attention cannot run on such
codes: each step decodes them.

Legend: `R` kv_lora_rank, or numbers of a value; `r` spliced rank, `n` knots, `P` numbers of a key, `p` of its code.
"""

from typing import Any

import torch

from kvsplice_hf.code.keys import KeyProjection
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.geometry import FixedSpline


class BentKeyProjection(KeyProjection):
    """As `KeyProjection`, of keys that went through a spline once their rotation was undone.

    Args:
        rope_dim: P, even.
        rank: p.
        knots: n, of the spline of each number.

    Attributes:
        bending: the spline; see `SplineSplice`.
    """

    def __init__(self, rope_dim: int, rank: int, *, knots: int, **factory: Any) -> None:
        super().__init__(rope_dim, rank, **factory)
        self.bending = FixedSpline(rope_dim, knots, self.mean.device)

    def from_key(self, key: torch.Tensor) -> torch.Tensor:
        """See `KeyProjection.from_key`."""
        return super().from_key(self.bending(key))

    def to_key(self, codes: torch.Tensor) -> torch.Tensor:
        """See `KeyProjection.to_key`."""
        return self.bending.inverse(super().to_key(codes))


class SplineSplice(LearnedKVSplice):
    """As `LearnedKVSplice`, of latents that went through a spline, and back through its inverse.

    Args:
        latent_dim: R.
        rank: r.
        knots: n, of the spline of each number.
        device, dtype: of the parameters; the spline stays in float32.

    Attributes:
        bending: the spline. Calibration sets it, and nothing trains it.

    Raises:
        ConfigError: `rank` is not between 1 and `latent_dim`, or there are fewer than two knots.

    Examples:
        >>> splice = SplineSplice(64, 16, knots=7)
        >>> splice.decode(splice.encode(torch.randn(1, 1, 7, 64))).shape
        torch.Size([1, 1, 7, 64])
    """

    is_affine = False

    def __init__(
        self,
        latent_dim: int,
        rank: int,
        *,
        knots: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(latent_dim, rank, device=device, dtype=dtype)
        self.bending = FixedSpline(latent_dim, knots, device)

    def _meaning(self) -> list[torch.Tensor]:
        return [*super()._meaning(), *(tensor for one in self._bendings() for tensor in (one.knots, one.slopes))]

    def _bendings(self) -> list[FixedSpline]:
        """Those of latents, and of keys where they have some."""
        return [self.bending, *([self.keys.bending] if isinstance(self.keys, BentKeyProjection) else [])]

    def encode(self, latent: torch.Tensor, key_code: torch.Tensor | None = None) -> torch.Tensor:
        """See `LearnedKVSplice.encode`. The spline computes in float32."""
        return super().encode(self.bending(latent), key_code).to(latent.dtype)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """See `LearnedKVSplice.decode`."""
        return self.bending.inverse(super().decode(codes)).to(codes.dtype)

    def require_codec_here(self) -> None:
        """Check that the knots, and the tables of a codec, are on a device.

        Raises:
            UnsupportedError: accelerate offloads buffers, and with them these.
        """
        super().require_codec_here()
        if any(bending.knots.is_meta for bending in self._bendings()):
            raise UnsupportedError(
                "The knots of the splines are on the meta device: accelerate offloads buffers. Dispatch the model with "
                "offload_buffers=False; they are a few kilobytes per layer."
            )


def new_splice(
    config: KVSpliceConfig,
    latent_dim: int,
    rank: int,
    *,
    predicted_from: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LearnedKVSplice:
    """A splice of the kind that the settings name, not initialised. Arguments as of `LearnedKVSplice`.

    Raises:
        ConfigError: `rank` is not between 1 and `latent_dim`.
    """
    if config.transform == "spline":
        return SplineSplice(latent_dim, rank, knots=config.knots, device=device, dtype=dtype)
    return LearnedKVSplice(
        latent_dim,
        rank,
        use_layernorm=config.use_layernorm,
        predicted_from=predicted_from,
        device=device,
        dtype=dtype,
    )

"""How a splice starts: the ways to set its two matrices where no calibration does."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import ConfigError


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Within this context tensors are made that can be trained later on, also where the caller is in inference mode."""
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


@torch.no_grad()
def initialise_(splice: LearnedKVSplice, method: str, reader_weight: torch.Tensor | None = None) -> None:
    """Set `compress` to the transpose of an orthonormal basis [R, r], and `expand` to that basis.

    Args:
        splice: the module to initialise, in place.
        method: "svd" keeps the r directions of the latent that `kv_b_proj` reads most strongly (the right singular
            vectors of its weight: the best rank-r approximation for white latents, Eckart-Young); "orthogonal" takes
            random ones (seeded, the global generator is not touched); "identity" the first r dimensions.
        reader_weight: the weight of `kv_b_proj`, [H * (N + V), R]; needed by "svd" only.

    Raises:
        ConfigError: an unknown method, or "svd" without `reader_weight`.
    """
    R, r = splice.latent_dim, splice.rank
    if method == "svd":
        if reader_weight is None:
            raise ConfigError('The initialisation "svd" needs the weight of kv_b_proj.')
        # The right singular vectors of W, from the R x R Gram matrix: W has many more rows than columns.
        weight = reader_weight.cpu().double()
        basis = torch.linalg.eigh(weight.T @ weight).eigenvectors.flip(-1)[:, :r]
    elif method == "orthogonal":
        basis = torch.empty(R, r, dtype=torch.float64, device="cpu")
        nn.init.orthogonal_(basis, generator=torch.Generator().manual_seed(0))
    elif method == "identity":
        basis = torch.eye(R, r, dtype=torch.float64, device="cpu")
    else:
        raise ConfigError(f'Unknown initialisation {method!r}; known: "svd", "orthogonal", "identity".')
    splice.compress.weight.copy_(basis.T)
    splice.expand.weight.copy_(basis)

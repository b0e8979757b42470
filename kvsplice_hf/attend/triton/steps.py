"""A decode step on rows that lie in pages: the attention kernel reads them there, PyTorch does the small rest.

The projections are folded into queries and output as in `patch.absorbed`, for one token of each sequence:

    query on codes  =  expand^T W_UK^T q
    output          =  W_UV (share of all rows (expand mixed + mu) + shares of exact latents)

Exact tokens and learned sinks are scored beside the rows, and put together with them by the log-sum-exp of these.
Nothing waits for the device.

Legend: as in `attend.backend`, and `r` numbers of a row that values are read from.
"""

import torch
import torch.nn.functional as F

from kvsplice_hf.attend.backend import Paging, Step
from kvsplice_hf.attend.triton.calls import attend_packed, attend_rows
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.projection import SpliceWeights
from kvsplice_hf.errors import ConfigError


def decode(step: Step) -> torch.Tensor:
    """The attention output of one new token per sequence, [B, 1, H, V], in the dtype of the query.

    Raises:
        ConfigError: rows without pages, rows of another codec, or shapes, dtypes and strides other than those of a
            `Step`.
        UnsupportedError: a CPU tensor outside the interpreter, or one that needs gradients.
    """
    if step.paging is None:
        raise ConfigError("Got rows without pages; this decode step reads rows by a table of pages.")
    query = step.query[:, :, 0]
    heads, dtype = query.shape[1], query.dtype
    by_head = step.weight.detach().to(dtype).view(heads, -1, step.weight.shape[-1])
    key, value = by_head.split([by_head.shape[1] - step.v_dim, step.v_dim], dim=1)
    nope, rotated = query.split([key.shape[1], query.shape[-1] - key.shape[1]], dim=-1)
    on_latents = torch.einsum("bhn,hnr->bhr", nope, key)
    expand, offset = (part.to(dtype) for part in _folded(step.projection))
    mixed, lse = _on_rows(step, step.paging, torch.cat([on_latents @ expand, rotated], dim=-1), expand.shape[1])
    mixed = mixed.to(dtype) @ expand.T + offset
    latents, others = None, _sinks(step, on_latents, offset)
    if step.exact is not None:
        latents, keys = _exact(step, step.paging, expand.shape)
        tokens = torch.cat([latents - offset, keys], dim=-1)
        scores = (torch.cat([on_latents, rotated], dim=-1) @ tokens.transpose(1, 2)).float() * step.scaling
        assert step.positions is not None
        absent = (step.positions < 0) | (step.positions >= step.paging.lengths[:, None])
        others = [scores.masked_fill(absent[:, None], float("-inf")), *others]
    if others:
        shares = torch.softmax(torch.cat([lse[..., None], *others], dim=-1), dim=-1).to(dtype)
        mixed = mixed * shares[..., :1]
        if latents is not None:
            mixed = mixed + shares[..., 1 : 1 + latents.shape[1]] @ latents
    return torch.einsum("bhr,hvr->bhv", mixed, value)[:, None]


def _folded(weights: SpliceWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes are multiplied by to be latents, [R, r], and what is added, [R]; see `LearnedKVSplice.fold`."""
    if weights.scale is None or weights.shift is None:
        assert weights.offset is not None
        return weights.expand, weights.offset
    scale = F.softplus(weights.scale.float())
    return weights.expand / scale[:, None], -weights.shift.float() / scale


def _on_rows(step: Step, paging: Paging, query: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [B, H, r] and log-sum-exp [B, H] over the rows that are not kept exactly."""
    hidden = None if step.positions is None else step.positions.contiguous()
    if step.codec is None:
        return attend_rows(query, step.rows, value_dim, scaling=step.scaling, paging=paging, hidden=hidden)
    if not isinstance(step.codec, RowCodec):
        raise ConfigError(f"Got rows of the codec {step.codec.kind!r}; the kernels read those of {RowCodec.kind!r}.")
    return attend_packed(
        query,
        step.rows,
        step.codec,
        value_dim,
        scaling=step.scaling,
        keys=step.keys,
        paging=paging,
        hidden=hidden,
    )


def _exact(step: Step, paging: Paging, sizes: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact latents [B, K, R] and rotated keys [B, K, P], for a projection [R, r].

    Rows of numbers hold keys exactly, packed ones do not: those lie behind the latents.
    """
    assert step.exact is not None
    assert step.positions is not None
    exact, (latent_dim, value_dim) = step.exact.to(step.query.dtype), sizes
    if step.codec is not None:
        return exact[..., :latent_dim], exact[..., latent_dim:]
    size = step.rows.shape[1]
    place = step.positions.clamp(min=0).minimum(paging.lengths[:, None] - 1)
    rows = step.rows[paging.table.long().gather(1, place // size), place % size]
    return exact, rows[..., value_dim:].to(exact.dtype)


def _sinks(step: Step, on_latents: torch.Tensor, offset: torch.Tensor) -> list[torch.Tensor]:
    """Scores of learned sinks, float32 [B, H, 1], less what every other score leaves out; or nothing."""
    if step.sinks is None:
        return []
    constant = (on_latents.float() @ offset.float()) * step.scaling
    return [(step.sinks.float() - constant)[..., None]]

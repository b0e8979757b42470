"""How strongly a layer reads each direction of its latent, from forward passes alone.

An error e of the latent of a token that gets attention p changes the output of head h by p W_O[h] W_UV[h] e through its
value, and through its logit by p (v - mean v) W_O[h] times scaling * q . W_UK[h] e. Summed over heads, with queries and
values taken as independent, the squared change is e^T M e times p^2 with

    M = sum over h of  A_h^T A_h + spread_h scaling^2 W_UK[h]^T E[q q^T] W_UK[h],    A_h = W_O[h] W_UV[h],

and spread_h = tr(A_h Sigma A_h^T), the variance of the values. What of p depends on the layer is not known from forward
passes, so that readers of different layers are comparable only in their shape.

Legend: `B` batch, `T` tokens, `H` heads, `D` hidden size, `R`, `P`, `N`, `V` as elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.calibration.statistics import LayerStatistics, Statistics
from kvsplice_hf.errors import UnsupportedError
from kvsplice_hf.patch.absorbed import split_weight
from kvsplice_hf.patch.attention import attend_expanded
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.mla import effective_weight
from kvsplice_hf.patch.names import WRAPPED_ATTENTION
from kvsplice_hf.weights.linear import linear_map
from kvsplice_hf.weights.processes import gathered


_NAME_PREFIX = "kvsplice_readers_"
_RECORDER_ATTRIBUTE = "_kvsplice_query_moments"


class QueryMoments:
    """Sum of q q^T over the counted tokens of one attention module, by head, float64 [H, N + P, N + P]."""

    def __init__(self, counted: Callable[[], torch.Tensor | None]) -> None:
        self.counted = counted
        self.total: torch.Tensor | None = None
        self.tokens = 0

    def add(self, query: torch.Tensor) -> None:
        """Count queries [B, H, T, N + P]."""
        by_token = query.detach().transpose(1, 2).float()
        counted = self.counted()
        chosen = by_token.flatten(0, 1) if counted is None else by_token[counted.to(query.device)]
        with torch.autocast(query.device.type, enabled=False):
            moments = torch.einsum("thn,thm->hnm", chosen, chosen).cpu().double()
        self.total = moments if self.total is None else self.total + moments
        self.tokens += len(chosen)


class ReaderRecorder:
    """Watches the queries of the given layers while a model runs.

    Args:
        sites: layers that store a latent.

    Raises:
        UnsupportedError: the attention function of the model does not show its queries.
    """

    def __init__(self, sites: Sequence[AttentionSite]) -> None:
        self.sites = sites
        self._before: dict[str, str] = {}
        for site in sites:
            base = site.module.config._attn_implementation
            if base not in WRAPPED_ATTENTION:
                raise UnsupportedError(
                    f'metric="readers" watches the queries of {WRAPPED_ATTENTION} attention; {site.name} uses '
                    f'{base!r}. Load the model with attn_implementation="sdpa", or use metric="fisher".'
                )

    def attach(self, counted: Callable[[], torch.Tensor | None]) -> None:
        """Start. `counted` tells which tokens of the running batch count, bool [B, T]."""
        _register()
        for site in self.sites:
            setattr(site.module, _RECORDER_ATTRIBUTE, QueryMoments(counted))
            base = site.module.config._attn_implementation
            if not base.startswith(_NAME_PREFIX):  # modules usually share one config
                self._before[site.name] = base
                site.module.config._attn_implementation_internal = _NAME_PREFIX + base

    def detach(self, statistics: Statistics) -> None:
        """Stop, and add what was seen to the statistics."""
        for site in self.sites:
            if site.name in self._before:
                site.module.config._attn_implementation_internal = self._before[site.name]
            moments: QueryMoments = vars(site.module).pop(_RECORDER_ATTRIBUTE)
            if moments.total is not None:
                _add_readers(site, moments, statistics[site.layer_idx])
        self._before.clear()


def _register() -> None:
    for base in WRAPPED_ATTENTION:
        upstream.register_attention_function(_NAME_PREFIX + base, _RecordingAttention(base), base)


class _RecordingAttention:
    """The attention function `base` that shows its queries to the module's recorder."""

    def __init__(self, base: str) -> None:
        self.base = base

    def __call__(self, module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder = vars(module).get(_RECORDER_ATTRIBUTE)
        if recorder is not None:
            recorder.add(query)
        return attend_expanded(module, query, *args, base=self.base, **kwargs)


def _add_readers(site: AttentionSite, moments: QueryMoments, layer: LayerStatistics) -> None:
    """Add M and its counterpart for the rotated keys, times the number of tokens."""
    module, N = site.module, site.qk_nope_head_dim
    weights = split_weight(effective_weight(site).cpu().double(), N, site.v_head_dim)
    heads = len(weights.key)
    output = linear_map(module.o_proj, heads * site.v_head_dim, site.dtype).cpu().double()
    output = output.view(output.shape[0], heads, -1)
    second = moments.total / moments.tokens * module.scaling**2  # type: ignore[operator]
    if site.share is not None:  # of the heads of each process
        second = torch.cat(gathered(second, site.share.mesh.get_group()))
    covariance = layer.covariance
    readers = torch.zeros_like(layer.readers)
    rot = torch.zeros_like(layer.rot_readers)
    for head in range(heads):
        through_value = output[:, head] @ weights.value[head]  # [D, R]
        gram = through_value.T @ through_value
        spread = (gram * covariance).sum()
        readers += gram + spread * weights.key[head].T @ second[head, :N, :N] @ weights.key[head]
        rot += spread * second[head].diagonal()[N:]
    layer.readers += layer.count * readers
    layer.rot_readers += layer.count * rot

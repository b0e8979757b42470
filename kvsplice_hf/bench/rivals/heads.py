"""Rivals on ordinary attention: keys as they are after their rotation and values, each key head by itself.

`simulated_heads` and `collect_head_statistics` are to ordinary attention what `simulated` and `collect_statistics` are
to MLA. What `Rival.code` takes for a latent is here the key or the value of one head.

Legend: `B` batch, `T` tokens, `H` query heads, `K` key heads, `G` = H / K, `d`, `v` numbers of a key and of a value.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from kvsplice_hf.bench.rivals.base import Rival
from kvsplice_hf.bench.rivals.statistics import EXACT_TOKENS, LayerStatistics, Moments, require_counted
from kvsplice_hf.code.heads import HeadKey
from kvsplice_hf.errors import PatchStateError, UnsupportedError
from kvsplice_hf.patch.alone import computes_alone
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.patch.state import is_patched
from kvsplice_hf.patch.tap import Attended, tapped


class HeadStatistics(NamedTuple):
    """What calibration knows about a key head.

    Attributes:
        keys: of keys after their rotation. Its `kv_b_weight` is a square root of the second moment C of the queries
            that read them, [d, d].
        values: its `kv_b_weight` is one of the second moment of values, each weighted by k^T C k for its key k, [v, v].
    """

    keys: LayerStatistics
    values: LayerStatistics


class _HeadMoments:
    """Running sums over one key head; fp64."""

    def __init__(self) -> None:
        self.keys, self.values = Moments(), Moments()
        self.queries: torch.Tensor | float = 0.0
        self.weighted: torch.Tensor | float = 0.0

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Count queries [B, G, T, d], keys [B, T, d] and values [B, T, v], without the first tokens."""
        key, value = key[:, EXACT_TOKENS:], value[:, EXACT_TOKENS:]
        self.keys.add(key, key[..., :0])
        self.values.add(value, value[..., :0])
        queries = query[:, :, EXACT_TOKENS:].double().flatten(0, -2)
        moment = queries.T @ queries
        keys, values = key.double().flatten(0, -2), value.double().flatten(0, -2)
        weights = ((keys @ moment) * keys).sum(-1, keepdim=True)
        self.queries = self.queries + moment
        self.weighted = self.weighted + values.T @ (weights * values)

    def statistics(self) -> HeadStatistics:
        return HeadStatistics(
            self.keys.statistics(_square_root(self.queries)), self.values.statistics(_square_root(self.weighted))
        )


def _square_root(moment: torch.Tensor | float) -> torch.Tensor:
    """W with W^T W = M, up to the scale of M."""
    assert isinstance(moment, torch.Tensor)
    values, vectors = torch.linalg.eigh(moment / moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def _ordinary_sites(model: nn.Module) -> list[AttentionSite]:
    """The layers with ordinary attention of an unpatched model.

    Raises:
        PatchStateError: the model is patched.
        UnsupportedError: a layer computes attention by itself, where its queries cannot be seen.
    """
    if is_patched(model):
        raise PatchStateError("The model is patched. Unpatch the model first.")
    sites = [site for site in find_sites(model) if site.kv_heads]
    alone = [site.name for site in sites if computes_alone(type(site.module))]
    if alone:
        raise UnsupportedError(f"{', '.join(alone)} computes attention by itself, where other codecs cannot be put in.")
    return sites


@torch.no_grad()
def collect_head_statistics(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[HeadKey, HeadStatistics]:
    """Statistics of every key head, without the first tokens of every sequence.

    Args:
        model: an unpatched model.
        batches: token ids [B, T], run one after the other without a cache; nothing but sums is kept.

    Raises:
        ConfigError: no sequence is longer than the tokens that are left out.
        PatchStateError: the model is patched.
        UnsupportedError: the attention function of the model cannot be stood in for.
    """
    sites = _ordinary_sites(model)
    moments = {HeadKey(site.layer_idx, head): _HeadMoments() for site in sites for head in range(site.kv_heads)}

    def count(site: AttentionSite, seen: Attended) -> Attended:
        assert seen.query is not None  # see `_ordinary_sites`
        queries = seen.query.chunk(site.kv_heads, dim=1)
        for head, query in enumerate(queries):
            moments[HeadKey(site.layer_idx, head)].add(query, seen.key[:, head], seen.value[:, head])
        return seen

    device = next(model.parameters()).device
    with tapped(sites, count):
        for batch in batches:
            model(batch.to(device), use_cache=False)
    require_counted(head.keys for head in moments.values())
    return {part: head.statistics() for part, head in moments.items()}


@contextmanager
def simulated_heads(model: nn.Module, rival: Rival, statistics: Mapping[HeadKey, HeadStatistics]) -> Iterator[None]:
    """Inside, a model that runs without a cache attends to keys and values as `rival` stores them.

    Those of the first 4 tokens are exact, and those that the rival itself keeps exact (`Rival.first`, `Rival.recent`).

    Raises:
        PatchStateError: the model is patched.
        UnsupportedError: the attention function of the model cannot be stood in for.
    """
    sites = _ordinary_sites(model)
    fitted = {part: (rival.fit(head.keys), rival.for_values.fit(head.values)) for part, head in statistics.items()}

    def read_back(site: AttentionSite, seen: Attended) -> Attended:
        parts = [fitted[HeadKey(site.layer_idx, head)] for head in range(site.kv_heads)]
        coded = seen._replace(
            key=_coded(seen.key, [keys for keys, _ in parts]),
            value=_coded(seen.value, [values for _, values in parts]),
        )
        if not rival.first and not rival.recent:
            return coded
        return _with_exact_window(seen, coded, rival.first, rival.recent)

    with tapped(sites, read_back):
        yield


def _coded(states: torch.Tensor, codecs: list[Rival]) -> torch.Tensor:
    """States [B, K, T, n] as they are read back, the first tokens exact."""
    # The first tokens are kept from the rival altogether, so that they spoil no group of tokens.
    rest = [codec.read_back(states[:, head, EXACT_TOKENS:]) for head, codec in enumerate(codecs)]
    return torch.cat([states[:, :, :EXACT_TOKENS], torch.stack(rest, dim=1)], dim=2)


def _with_exact_window(seen: Attended, coded: Attended, first: int, recent: int) -> Attended:
    """Every key twice, coded and exact; the mask lets each query see one of the two.

    Exact are the first tokens of a sequence and the most recent ones of each query, itself among them.
    """
    assert seen.query is not None  # see `_ordinary_sites`
    queries, keys = seen.query.shape[2], seen.key.shape[2]
    place = torch.arange(keys, dtype=torch.int64, device=seen.key.device)
    distance = place[keys - queries :, None] - place
    visible = seen.mask if seen.mask is not None else (distance >= 0)[None, None]
    is_exact = (distance < recent) | (place < first)
    hidden = False if visible.dtype == torch.bool else torch.finfo(visible.dtype).min
    mask = torch.cat([visible.masked_fill(is_exact, hidden), visible.masked_fill(~is_exact, hidden)], dim=-1)
    return Attended(
        seen.query, torch.cat([coded.key, seen.key], dim=2), torch.cat([coded.value, seen.value], dim=2), mask
    )

"""Fisher information layer by layer: of attention probabilities and of latents, and what compressing a layer costs.

The Fisher information of a categorical distribution p with respect to its logits is diag(p) - p p^T: how much the
distribution changes when the scores do. Averaged over queries it says how many directions of the scores matter. That of
a latent is the second moment of the gradients of the log-likelihood, which calibration collects.

Legend: `W` windows, `T` tokens of a window, `H` heads, `L` layers, `R` size of a latent.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from scipy import stats
from tqdm import tqdm

from kvsplice_hf import ConfigError, KVSpliceCalibrator, KVSpliceConfig
from kvsplice_hf.calibration.holdout import divergence, log_probabilities
from kvsplice_hf.calibration.layers import predicted_losses
from kvsplice_hf.calibration.splices import make_splices
from kvsplice_hf.code.heads import PartKey, layer_of
from kvsplice_hf.patch.apply import patched_for_a_moment, sites_to_patch
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.weights.offload import input_device


# How many directions the research counts.
TOP = 16
# Below so many layers all orders are counted, which are 5,040 at most.
_FEW = 8


class Spectrum(NamedTuple):
    """Figures of a positive matrix.

    Attributes:
        dimension: its size.
        trace: sum of its eigenvalues.
        top_share: share of the trace that the `TOP` largest hold; 1 where there are no more.
        effective_rank: exp of the entropy of the normalised eigenvalues (Roy and Vetterli, EUSIPCO 2007).
    """

    dimension: int
    trace: float
    top_share: float
    effective_rank: float


def spectrum_of(matrix: torch.Tensor) -> Spectrum:
    """The figures of a symmetric matrix [n, n] without negative eigenvalues; rounding may have made some."""
    values = torch.linalg.eigvalsh(matrix.double()).clamp(min=0).flip(-1)
    trace = values.sum()
    shares = values / trace.clamp(min=torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return Spectrum(len(matrix), trace.item(), shares[:TOP].sum().item(), entropy.exp().item())


@contextlib.contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Attention functions that hand out their probabilities."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def attention_fisher(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """Mean of diag(p) - p p^T over all queries, a tensor [H, T, T] for each layer, float32 on the CPU.

    Args:
        model: a causal language model, not patched.
        windows: token ids, int64 [W, T].

    Raises:
        ConfigError: the model hands out no attention probabilities.
    """
    total: list[torch.Tensor] = []
    with _eager_attention(model):
        for window in tqdm(windows.split(1), "attention"):
            output = model(window.to(input_device(model)), use_cache=False, output_attentions=True, logits_to_keep=1)
            if not output.attentions or any(p is None for p in output.attentions):
                raise ConfigError(f"A {type(model).__name__} hands out no attention probabilities (output_attentions).")
            found = [_fisher_of(p[0].float().cpu()) / len(windows) for p in output.attentions]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return total


def _fisher_of(p: torch.Tensor) -> torch.Tensor:
    """Mean of diag(p) - p p^T over the rows of probabilities [H, T, T]."""
    return torch.diag_embed(p.mean(1)) - p.transpose(1, 2) @ p / p.shape[1]


def latent_fisher(calibrator: KVSpliceCalibrator) -> dict[PartKey, torch.Tensor]:
    """The Fisher information per token of each latent, or of the values of each key head, float64 [R, R].

    Raises:
        ConfigError: the statistics hold none.
    """
    if calibrator.metric != "fisher":
        raise ConfigError(
            f"These statistics are of metric {calibrator.metric!r} and hold no Fisher information. Collect them with "
            'metric="fisher".'
        )
    return {part: layer.fisher / layer.count for part, layer in calibrator.statistics.items()}


class OneLayerCosts(NamedTuple):
    """What compressing single layers costs, nats per token, by cache layer index.

    Attributes:
        predicted: by calibration, before anything is run.
        measured: KL divergence from the original with that layer compressed alone.
    """

    predicted: dict[int, float]
    measured: dict[int, float]


class LayerCosts:
    """Measures a model with some of its layers compressed.

    Args:
        model: a model, not patched.
        calibrator: its statistics.
        config: the budget of a compressed layer.
        windows: what divergence is measured on, token ids, int64 [W, T].

    Raises:
        CalibrationError: the statistics are of another model.
        ConfigError: a setting does not fit the model.
    """

    def __init__(
        self, model: Any, calibrator: KVSpliceCalibrator, config: KVSpliceConfig, windows: torch.Tensor
    ) -> None:
        self.model, self.calibrator, self.config = model, calibrator, config
        self.sites = sites_to_patch(model, config)
        stores = [site for site in self.sites if site.stores_latent]
        calibrator.require_model(stores, model)
        self.parts = [part for site in stores for part in site.all_parts]
        self.stock_bytes = {site.layer_idx: 2 * site.whole_row_dim for site in stores}
        self._batches = [{"input_ids": window} for window in windows.split(1)]
        self._stock = log_probabilities(model, self._batches)

    @property
    def layers(self) -> list[int]:
        """Cache layer indices, ascending."""
        return sorted(self.stock_bytes)

    def one_by_one(self) -> OneLayerCosts:
        """Each layer compressed alone, to the same bytes."""
        everywhere = replace(self.config, layers="all", allocation="layer")
        fits, _ = self.calibrator.fit(everywhere, self.parts)
        measured = {}
        for layer in tqdm(self.layers, "layers"):
            of_layer = {part: fit for part, fit in fits.items() if layer_of(part) == layer}
            measured[layer] = self._divergence([layer], replace(self.config, layers=(layer,)), of_layer)
        return OneLayerCosts(predicted_losses(self.calibrator, self.parts, self.config), measured)

    def of(self, layers: Sequence[int], config: KVSpliceConfig | None = None) -> float:
        """KL divergence, nats per token, of the model with these layers compressed, which compete for their bytes."""
        config = replace(config or self.config, layers=tuple(layers), allocation="global")
        chosen = [part for part in self.parts if layer_of(part) in layers]
        return self._divergence(layers, config, self.calibrator.fit(config, chosen)[0])

    def bytes_with(self, layers: Sequence[int]) -> float:
        """Bytes per token and layer, on average over all layers, with these compressed and the rest as they come."""
        compressed = sum(self._budget(layer) for layer in layers)
        kept = sum(size for layer, size in self.stock_bytes.items() if layer not in layers)
        return (compressed + kept) / len(self.stock_bytes)

    def _budget(self, layer: int) -> float:
        row_dim = self.stock_bytes[layer] // 2
        return self.config.row_budget(row_dim) + self.config.exact_bytes(row_dim)

    def _divergence(self, layers: Sequence[int], config: KVSpliceConfig, fits: dict[PartKey, Any]) -> float:
        sites = [site for site in self.sites if _owner(site) in layers]
        with patched_for_a_moment(self.model, sites, make_splices(sites, config, fits), config):
            return divergence(self._stock, log_probabilities(self.model, self._batches))


def _owner(site: AttentionSite) -> int:
    """The layer whose cache a site reads."""
    return (site.source or site).layer_idx


class RankCorrelation(NamedTuple):
    """Spearman's rank correlation over layers.

    Attributes:
        rho: from -1 to 1; None where one of the two is the same for all layers.
        p_value: of no correlation, two-sided; of few layers exact, by all their orders.
    """

    rho: float | None
    p_value: float | None


def rank_correlation(predictor: Sequence[float], cost: Sequence[float]) -> RankCorrelation:
    """How well the order of one agrees with that of the other."""
    if len(set(predictor)) < 2 or len(set(cost)) < 2:
        return RankCorrelation(None, None)
    found = stats.spearmanr(predictor, cost)
    p_value = found.pvalue
    if len(cost) < _FEW:  # for which the approximation is none: scipy gives 0 where four layers have one order
        p_value = stats.permutation_test(
            (list(predictor),),
            lambda order: stats.spearmanr(order, cost).statistic,
            permutation_type="pairings",
        ).pvalue
    return RankCorrelation(float(found.statistic), float(p_value))

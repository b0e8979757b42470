"""The closed form: for each layer, the basis in which an error costs its square.

With Sigma the covariance of the latent, mu its mean, and M how much an error of each direction costs, minimise
E (c - c_hat)^T M (c - c_hat). With U the eigenvectors of M^(1/2) Sigma M^(1/2), the vector z = U^T M^(1/2) (c - mu) has
uncorrelated coordinates whose squared errors add up to the cost, and the eigenvalues are the costs of dropping them.
Dropping the last ones is the best linear code of a rank; giving bits to coordinates is reverse water-filling (Cover and
Thomas, Elements of Information Theory, section 10.3.3).

Keys are solved in the same way, before their rotation. Two ways to pair their numbers are in use among models, and
undoing the wrong one would mix what does not belong together, which costs more to code: the one is taken that costs
least, by the sum of the logarithms of the costs of its coordinates (reverse water-filling spends bits by those). Where
no rotation was seen, or coding rotated keys costs less, rows hold them as they are.

Costs are nats of divergence per token (for the Fisher metric), halves included.

Legend: `R` kv_lora_rank, `P` qk_rope_head_dim, `F` = P / 2, `M` sampled rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvsplice_hf.calibration.statistics import PAIRINGS, LayerStatistics
from kvsplice_hf.code.codecs import codec_class
from kvsplice_hf.code.keys import not_turned
from kvsplice_hf.config import KVSpliceConfig


# Share of the metric's own diagonal mixed into it. Off-diagonal estimates from a few thousand tokens are noisy, and the
# basis follows them; chosen on held-out text (docs/calibration.md).
SHRINKAGE = 0.2
# A rotation that the model tells of is undone unless keys as they come cost clearly less, in logarithms of variance per
# number: where nothing is to be won either way, samples decide by chance.
_MARGIN = 0.1
_FLOOR = 1e-4  # of the mean diagonal: directions nobody was seen to read still cost something, and M is invertible


class Basis(NamedTuple):
    """A linear map to uncorrelated coordinates, half of whose squared error is its cost; float64.

    Attributes:
        encode: C, [n, n], rows by descending variance.
        decode: D = C^-1, [n, n].
        variance: of the coordinates, [n].
    """

    encode: torch.Tensor
    decode: torch.Tensor
    variance: torch.Tensor


@dataclass
class LayerSolution:
    """One layer in its best basis, float64 on the CPU.

    Attributes:
        mean: mu, [R].
        encode: C, [R, R], rows by descending cost: z = C (c - mu - predict y), where y is the code of its key.
        decode: D = C^-1, [R, R].
        predict: what of a latent follows from the code of its key, [R, P]; None where it is coded by itself.
        cost: nats per token if a coordinate is dropped, [R + P]; those of the key last, in the order of `key_encode`.
        key_mean: [P].
        key_encode: the same as `encode` for keys, [P, P]: before their rotation, where there are `pairs`.
        key_decode: its inverse.
        pairs: which numbers of a key are rotated together, int64 [3, F], as `code.keys.Pairs`; None where rows are to
            hold keys as they come, each of whose numbers is then a coordinate of its own.
        codes: sampled rows in this basis, [M, R + P]; half of a squared error in it is its cost.
        exact_latent, exact_key: whether rows are to hold it as it comes, in bf16.
    """

    mean: torch.Tensor
    encode: torch.Tensor
    decode: torch.Tensor
    predict: torch.Tensor | None
    cost: torch.Tensor
    key_mean: torch.Tensor
    key_encode: torch.Tensor
    key_decode: torch.Tensor
    pairs: torch.Tensor | None
    codes: torch.Tensor
    exact_latent: bool = False
    exact_key: bool = False

    @property
    def latent_dim(self) -> int:
        return len(self.mean)

    @property
    def rope_dim(self) -> int:
        return len(self.key_mean)


class KindOfRows(NamedTuple):
    """What of the settings a solution depends on.

    Attributes:
        unrotated: whether keys may be coded before their rotation.
        predicted: whether latents are to be predicted from the codes of such keys.
        key_block: how many numbers of a key share a basis, those of neighbouring frequencies; None: all.
        exact_latent, exact_key: see `LayerSolution`.
    """

    unrotated: bool = True
    predicted: bool = False
    exact_latent: bool = False
    exact_key: bool = False
    key_block: int | None = None

    @classmethod
    def of(cls, config: KVSpliceConfig) -> "KindOfRows":
        unrotated, exact_latent = config.keys == "unrotated", config.values == "exact"
        predicted = unrotated and not exact_latent and config.is_packed and codec_class(config.codec).keys_apart
        return cls(unrotated, predicted, exact_latent, config.keys == "exact", config.key_block)


_PLAIN = KindOfRows()


def solve_layer(
    statistics: LayerStatistics, metric: str, shrinkage: float = SHRINKAGE, *, rows: KindOfRows = _PLAIN
) -> LayerSolution:
    """The solution of one layer.

    Args:
        statistics: of the layer.
        metric: "fisher", "readers" or "pca".
        shrinkage: see `SHRINKAGE`.
        rows: what is stored.
    """
    return solve_together([statistics], metric, shrinkage, rows=rows)[0]


def solve_together(
    parts: Sequence[LayerStatistics], metric: str, shrinkage: float = SHRINKAGE, *, rows: KindOfRows = _PLAIN
) -> list[LayerSolution]:
    """The solutions of the key heads of a layer, whose keys are all held in one way; arguments as in `solve_layer`."""
    forms = cheapest([key_forms(part, metric, shrinkage, rows.unrotated, rows.key_block) for part in parts])
    return [_solve(part, metric, shrinkage, rows, form) for part, form in zip(parts, forms, strict=True)]


def _solve(
    statistics: LayerStatistics, metric: str, shrinkage: float, rows: KindOfRows, form: "KeyForm"
) -> LayerSolution:
    matrix = latent_metric(statistics, metric, shrinkage)
    pairing, pairs, keys = form
    key_mean = statistics.rot_sum[pairing] / statistics.count
    key_codes = (statistics.sampled_keys(pairing) - key_mean) @ keys.encode.T
    latents = statistics.rows[:, : statistics.latent_dim].double() - statistics.mean
    covariance, predict = statistics.covariance, None
    if rows.predicted and pairs is not None:
        predict, explained = _prediction(statistics, pairing, keys)
        covariance, latents = covariance - explained, latents - key_codes @ predict.T
    basis = (
        _own_basis(covariance, matrix)
        if rows.exact_latent
        else _basis_of(_shrunk(covariance, statistics.count), matrix)
    )
    return LayerSolution(
        mean=statistics.mean,
        encode=basis.encode,
        decode=basis.decode,
        predict=predict,
        cost=torch.cat([basis.variance, keys.variance]) / 2,
        key_mean=key_mean,
        key_encode=keys.encode,
        key_decode=keys.decode,
        pairs=pairs,
        codes=torch.cat([latents @ basis.encode.T, key_codes], dim=-1),
        exact_latent=rows.exact_latent,
        exact_key=rows.exact_key,
    )


def _prediction(statistics: LayerStatistics, pairing: int, keys: Basis) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear map from codes of keys to latents that errs least, [R, P], and what it explains of them, [R, R]."""
    key_mean = statistics.rot_sum[pairing] / statistics.count
    cross = statistics.cross[pairing] / statistics.count - torch.outer(statistics.mean, key_mean)
    covariance = statistics.rot_outer[pairing] / statistics.count - torch.outer(key_mean, key_mean)
    cross, of_codes = cross @ keys.encode.T, keys.encode @ covariance @ keys.encode.T
    floor = _FLOOR * of_codes.diagonal().mean() + 1e-30
    ridge = of_codes + floor * torch.eye(len(of_codes), dtype=torch.float64, device="cpu")
    predict = torch.linalg.solve(ridge, cross.T).T
    # Of the covariance of what is left, all that is not that of the latents.
    explained = predict @ cross.T + cross @ predict.T - predict @ of_codes @ predict.T
    return predict, explained


def _basis_of(covariance: torch.Tensor, metric: torch.Tensor) -> Basis:
    """The basis in which an error of vectors with this covariance, [n, n], costs its square by the metric, [n, n]."""
    strength, vectors = torch.linalg.eigh(metric)
    root = vectors * strength.sqrt() @ vectors.T
    inverse_root = vectors / strength.sqrt() @ vectors.T
    variance, directions = torch.linalg.eigh(root @ covariance @ root)
    variance, directions = variance.flip(-1).clamp(min=0), directions.flip(-1)
    return Basis(directions.T @ root, inverse_root @ directions, variance)


def _basis_in_blocks(covariance: torch.Tensor, metric: torch.Tensor, pairs: torch.Tensor, size: int | None) -> Basis:
    """The same for keys, of whose numbers `size` share a basis: of neighbouring pairs, int64 [3, F]; None: all."""
    if size is None or size >= len(covariance):
        return _basis_of(covariance, metric)
    encode, decode = torch.zeros_like(covariance), torch.zeros_like(covariance)
    variance = covariance.new_zeros(len(covariance), dtype=covariance.dtype)
    done = 0
    for block in pairs[:2].split(size // 2, dim=1):
        index, rows = block.flatten(), torch.arange(done, done + block.numel(), dtype=torch.int64, device="cpu")
        basis = _basis_of(covariance[index][:, index], metric[index][:, index])
        encode[rows[:, None], index], decode[index[:, None], rows] = basis.encode, basis.decode
        variance[rows] = basis.variance
        done += len(index)
    order = variance.argsort(descending=True)
    return Basis(encode[order], decode[:, order], variance[order])


class KeyForm(NamedTuple):
    """One way to hold keys in rows.

    Attributes:
        pairing: of `PAIRINGS`, whose statistics count.
        pairs: as of `LayerSolution`.
        basis: of the keys.
    """

    pairing: int
    pairs: torch.Tensor | None
    basis: Basis

    @property
    def cost(self) -> float:
        """What its coordinates cost in bits, up to a factor and a constant."""
        floor = 1e-9 * self.basis.variance.max() + 1e-300
        cost = float(self.basis.variance.clamp(min=floor).log().sum())
        as_they_come = self.pairing == 0 and self.pairs is not None
        return cost + _MARGIN * len(self.basis.variance) if as_they_come else cost


def key_forms(
    statistics: LayerStatistics,
    metric: str,
    shrinkage: float = SHRINKAGE,
    unrotated: bool = True,
    key_block: int | None = None,
) -> list[KeyForm]:
    """The ways to hold the keys of a layer: number by number as they come; and if `unrotated`, in bases of their own.

    The latter before their rotation, paired in either way, and as they come, for layers that do not rotate them. Each
    basis is of `key_block` numbers, as in `KindOfRows`.
    """
    forms = [KeyForm(0, None, _rotated_basis(statistics, metric))]
    if not unrotated or len(statistics.columns) == 0:
        return forms
    for pairing in (*range(1, len(PAIRINGS)), 0):
        mean = statistics.rot_sum[pairing] / statistics.count
        covariance = statistics.rot_outer[pairing] / statistics.count - torch.outer(mean, mean)
        costs = _key_metric(statistics, pairing, metric, shrinkage)
        pairs = torch.stack(statistics.pairs(pairing)) if pairing else not_turned(statistics.columns)
        basis = _basis_in_blocks(_shrunk(covariance, statistics.count), costs, pairs, key_block)
        forms.append(KeyForm(pairing, pairs, basis))
    return forms


def cheapest(layers: Sequence[Sequence[KeyForm]]) -> list[KeyForm]:
    """The forms of layers, or of key heads, that are all to have the same one: those that together cost least."""
    choices = list(zip(*layers, strict=True))
    best = min(choices, key=lambda forms: sum(form.cost for form in forms)) if len(choices) > 1 else choices[0]
    return list(best)


def _rotated_basis(statistics: LayerStatistics, metric: str) -> Basis:
    """Rotated keys as they are, each number by itself: rotation leaves little that two of them have in common."""
    weight = torch.ones_like(statistics.rot_sum[0])
    if metric != "pca":
        fisher = statistics.rot_fisher[0].diagonal()
        weight = (fisher if metric == "fisher" else statistics.rot_readers) / statistics.count + 1e-30
    mean = statistics.rot_sum[0] / statistics.count
    covariance = statistics.rot_outer[0] / statistics.count - torch.outer(mean, mean)
    return _own_basis(covariance, torch.diag(weight))


def _own_basis(covariance: torch.Tensor, metric: torch.Tensor) -> Basis:
    """Each number by itself; arguments as of `_basis_of`, of which the diagonals are read."""
    weight = metric.diagonal()
    return Basis(torch.diag(weight.sqrt()), torch.diag(1 / weight.sqrt()), covariance.diagonal().clamp(min=0) * weight)


def latent_metric(statistics: LayerStatistics, metric: str, shrinkage: float = SHRINKAGE) -> torch.Tensor:
    """M [R, R], positive definite: an error e of a latent costs e^T M e / 2 nats (for the Fisher metric)."""
    if metric == "pca":
        # k_rot is scored against as it is, a latent through weights of unit size more or less: count them alike.
        return torch.eye(statistics.latent_dim, dtype=torch.float64, device="cpu")
    total = statistics.fisher if metric == "fisher" else statistics.readers
    return _shrunk_metric(total / statistics.count, shrinkage)


def _key_metric(statistics: LayerStatistics, pairing: int, metric: str, shrinkage: float) -> torch.Tensor:
    """Its counterpart for keys before their rotation, [P, P]."""
    if metric == "pca":
        return torch.eye(statistics.rope_dim, dtype=torch.float64, device="cpu")
    if metric == "fisher":
        return _shrunk_metric(statistics.rot_fisher[pairing] / statistics.count, shrinkage)
    # Queries meet a key at all distances, which turns its two numbers of a pair into one another.
    first, second, _ = statistics.pairs(pairing)
    weight = statistics.rot_readers / statistics.count
    weight[first] = weight[second] = (weight[first] + weight[second]) / 2
    return torch.diag(weight + _FLOOR * weight.mean() + 1e-30)


def _shrunk_metric(matrix: torch.Tensor, shrinkage: float) -> torch.Tensor:
    diagonal = matrix.diagonal()
    matrix = (1 - shrinkage) * matrix + shrinkage * torch.diag(diagonal)
    floor = _FLOOR * diagonal.mean() + 1e-30
    return matrix + floor * torch.eye(len(matrix), dtype=torch.float64, device="cpu")


def _shrunk(covariance: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Sigma, its off-diagonal part shrunk where there are few tokens for its dimensions."""
    share = min(1.0, len(covariance) / float(count) / 10)
    return (1 - share) * covariance + share * torch.diag(covariance.diagonal())

"""The closed form: for each layer, the basis in which an error costs its square.

With Sigma the covariance of the latent, mu its mean, and M how much an error of each direction costs, minimise
E (c - c_hat)^T M (c - c_hat). With U the eigenvectors of M^(1/2) Sigma M^(1/2), the vector z = U^T M^(1/2) (c - mu) has
uncorrelated coordinates whose squared errors add up to the cost, and the eigenvalues are the costs of dropping them.
Dropping the last ones is the best linear code of a rank; giving bits to coordinates is reverse water-filling (Cover and
Thomas, Elements of Information Theory, section 10.3.3).

Costs are nats of divergence per token (for the Fisher metric), halves included.

Legend: `R` kv_lora_rank, `P` qk_rope_head_dim, `M` sampled rows.
"""

from dataclasses import dataclass

import torch

from kvsplice_hf.calibration.statistics import LayerStatistics


# Share of the metric's own diagonal mixed into it. Off-diagonal estimates from a few thousand tokens are noisy, and the
# basis follows them; chosen on held-out text (docs/calibration.md).
SHRINKAGE = 0.2
_FLOOR = 1e-4  # of the mean diagonal: directions nobody was seen to read still cost something, and M is invertible


@dataclass
class LayerSolution:
    """One layer in its best basis, float64 on the CPU.

    Attributes:
        mean: mu, [R].
        encode: C, [R, R], rows by descending cost: z = C (c - mu).
        decode: D = C^-1, [R, R].
        cost: nats per token if a coordinate is dropped, [R + P]; those of k_rot last, in their own order.
        rot_mean: [P].
        rot_weight: cost of a squared error of k_rot, twice over (the diagonal of its metric), [P].
        codes: sampled rows in this basis, [M, R + P]; half of a squared error in it is its cost.
    """

    mean: torch.Tensor
    encode: torch.Tensor
    decode: torch.Tensor
    cost: torch.Tensor
    rot_mean: torch.Tensor
    rot_weight: torch.Tensor
    codes: torch.Tensor

    @property
    def latent_dim(self) -> int:
        return len(self.mean)


def solve_layer(statistics: LayerStatistics, metric: str, shrinkage: float = SHRINKAGE) -> LayerSolution:
    """The solution of one layer for `metric` "fisher", "readers" or "pca"."""
    matrix, rot_weight = _metric(statistics, metric, shrinkage)
    strength, basis = torch.linalg.eigh(matrix)
    root = basis * strength.sqrt() @ basis.T
    inverse_root = basis / strength.sqrt() @ basis.T
    variance, directions = torch.linalg.eigh(root @ _shrunk_covariance(statistics) @ root)
    variance, directions = variance.flip(-1).clamp(min=0), directions.flip(-1)
    encode = directions.T @ root
    rot_mean = statistics.rot_sum / statistics.count
    rot_variance = (statistics.rot_square / statistics.count - rot_mean.square()).clamp(min=0)
    latents, k_rot = statistics.rows.double().split([statistics.latent_dim, statistics.rope_dim], dim=-1)
    codes = torch.cat([(latents - statistics.mean) @ encode.T, (k_rot - rot_mean) * rot_weight.sqrt()], dim=-1)
    return LayerSolution(
        mean=statistics.mean,
        encode=encode,
        decode=inverse_root @ directions,
        cost=torch.cat([variance, rot_variance * rot_weight]) / 2,
        rot_mean=rot_mean,
        rot_weight=rot_weight,
        codes=codes,
    )


def _metric(statistics: LayerStatistics, metric: str, shrinkage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """M [R, R], positive definite, and the diagonal of its counterpart for k_rot, [P]."""
    if metric == "pca":
        # k_rot is scored against as it is, a latent through weights of unit size more or less: count them alike.
        matrix = torch.eye(statistics.latent_dim, dtype=torch.float64, device="cpu")
        return matrix, torch.ones_like(statistics.rot_sum)
    total, rot = {
        "fisher": (statistics.fisher, statistics.rot_fisher),
        "readers": (statistics.readers, statistics.rot_readers),
    }[metric]
    matrix = total / statistics.count
    diagonal = matrix.diagonal()
    matrix = (1 - shrinkage) * matrix + shrinkage * torch.diag(diagonal)
    floor = _FLOOR * diagonal.mean() + 1e-30
    unit = torch.eye(len(matrix), dtype=torch.float64, device="cpu")
    return matrix + floor * unit, rot / statistics.count + 1e-30


def _shrunk_covariance(statistics: LayerStatistics) -> torch.Tensor:
    """Sigma, its off-diagonal part shrunk where there are few tokens for R dimensions."""
    covariance = statistics.covariance
    share = min(1.0, statistics.latent_dim / float(statistics.count) / 10)
    return (1 - share) * covariance + share * torch.diag(covariance.diagonal())

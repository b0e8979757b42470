"""Steps of an optimiser measured in nats: parameters are moved in the coordinates that calibration found.

An optimiser like Adam moves every number by about its learning rate, whether that costs much or nothing. Calibration
knows what it costs: in its basis, half of a squared error is its divergence in nats (`calibration.solve`). So each
parameter P is taken as P0 + A X B, where A and B are such that a change x of one entry of X costs at most x^2 / 2 nats
per token, and about that in directions that matter. The optimiser works on X. As the map is linear, X need not be kept:
gradients are mapped before a step, and the change is mapped back after it.

Legend: `R` kv_lora_rank, `P` qk_rope_head_dim, `r` and `p` numbers of the codes of latent and key.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kvsplice_hf.calibration.calibrator import KVSpliceCalibrator
from kvsplice_hf.calibration.solve import LayerSolution
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import TrainingError
from kvsplice_hf.training.parameters import splices_of


# Share of the mean that is added to all eigenvalues of what steps are measured by (damping: Martens and Grosse, arXiv
# 1503.05671). A direction that few tokens showed to cost anything would otherwise be given steps without bound; but all
# tokens take such a step together, and then it does cost.
_DAMPING = 0.1
_LEAST_SIGMA = 1e-4  # of the numbers of a code, relative to the largest


class Coordinates(NamedTuple):
    """P = P0 + left X right, of a matrix; P = P0 + left x, of a vector.

    Attributes:
        left: matrix, or vector for a diagonal one.
        right: matrix; None for the identity.
    """

    left: torch.Tensor
    right: torch.Tensor | None = None

    def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """That of X, of that of P."""
        return self._map(gradient, transposed=True)

    def change(self, change: torch.Tensor) -> torch.Tensor:
        """That of P, of that of X."""
        return self._map(change, transposed=False)

    def _map(self, of: torch.Tensor, transposed: bool) -> torch.Tensor:
        if self.left.ndim == 1:
            of = self.left * of if of.ndim == 1 else self.left[:, None] * of
        else:
            of = (self.left.T if transposed else self.left) @ of
        if self.right is None:
            return of
        return of @ (self.right.T if transposed else self.right)


class CalibratedSteps:
    """Makes an optimiser take its steps in the coordinates of calibration.

    `transform_scale` is not trained: what it does, a row of `expand` and a column of `compress` do as well.

    Args:
        model: a patched model.
        calibration: statistics of it.
        config: the settings of its patch.

    Raises:
        PatchStateError: the model is not patched.
        TrainingError: the model is spread over processes, or its codes are normalised (LayerNorm).
    """

    def __init__(self, model: nn.Module, calibration: KVSpliceCalibrator, config: KVSpliceConfig) -> None:
        self.coordinates: dict[nn.Parameter, Coordinates] = {}
        self.frozen: list[nn.Parameter] = []
        self._before: dict[nn.Parameter, torch.Tensor] = {}
        for layer_idx, splice in splices_of(model).items():
            _require_plain(splice)
            self._add(splice, calibration.solution(layer_idx, config))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the steps of an optimiser mapped, from now on."""
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    def _add(self, splice: LearnedKVSplice, solution: LayerSolution) -> None:
        self.frozen.append(splice.transform_scale)
        scale = F.softplus(splice.transform_scale.detach()).cpu().double()
        sigmas, R = (2 * solution.cost).sqrt(), solution.latent_dim
        latent = _Space(solution.encode / scale, scale[:, None] * solution.decode, sigmas[:R])
        kept = latent.worth_of(splice.expand.weight[:, : splice.rank])
        self._set(splice.expand.weight, latent.written)
        self._set(splice.transform_shift, latent.written)
        self._set(splice.compress.weight, 1 / kept, latent.read)
        if splice.keys is None:  # rows hold them in their own units
            kept_keys = 1 / solution.key_decode.diagonal()
        else:
            key = _Space(solution.key_encode, solution.key_decode, sigmas[R:])
            kept_keys = key.worth_of(splice.keys.expand.weight)
            self._set(splice.keys.expand.weight, key.written)
            self._set(splice.keys.mean, key.written)
            self._set(splice.keys.compress.weight, 1 / kept_keys, key.read)
        if splice.codec is not None:
            for steps in splice.codec.parameters():
                self._set(steps, 1 / torch.cat([kept, kept_keys]))

    def _set(self, parameter: nn.Parameter, left: torch.Tensor, right: torch.Tensor | None = None) -> None:
        self.coordinates[parameter] = Coordinates(left.to(parameter), None if right is None else right.to(parameter))

    @torch.no_grad()
    def _before_step(self) -> None:
        for parameter in self.frozen:
            parameter.grad = None
        for parameter, coordinates in self.coordinates.items():
            if parameter.grad is not None:
                self._before[parameter] = parameter.detach().clone()
                parameter.grad = coordinates.gradient(parameter.grad)

    @torch.no_grad()
    def _after_step(self) -> None:
        for parameter, before in self._before.items():
            parameter.copy_(before + self.coordinates[parameter].change(parameter - before))
        self._before.clear()


def _require_plain(splice: LearnedKVSplice) -> None:
    if hasattr(splice.expand.weight, "to_local"):
        raise TrainingError(
            "The splice is spread over processes (FSDP), and steps in the coordinates of calibration need whole "
            "matrices. Train without `calibration`, or in one process per whole model."
        )
    if splice.code_norm is not None:
        raise TrainingError(
            "The codes of this splice are normalised (use_layernorm), which calibration knows nothing of. Train "
            "without `calibration`."
        )
    if not splice.is_affine:
        raise TrainingError(
            'The latents of this splice go through splines (transform="spline"), which statistics for steps know '
            "nothing of. Train without `calibration`."
        )


class _Space:
    """Vectors of n numbers, latents or keys, as calibration sees them.

    Args:
        encode, decode: to and from coordinates half of whose squared error is its cost, [n, n].
        sigmas: of these coordinates, [n].

    Attributes:
        written: maps changes that cost alike to changes of what is decoded, [n, n].
        read: maps what is encoded to numbers of one size, [n, n].
    """

    def __init__(self, encode: torch.Tensor, decode: torch.Tensor, sigmas: torch.Tensor) -> None:
        self._encode = encode
        self.written = _inverse_root(encode.T @ encode)
        self.read = _inverse_root(decode * sigmas.square() @ decode.T)

    def worth_of(self, expand: torch.Tensor) -> torch.Tensor:
        """The root of twice the cost of a unit of each number of a code [k], of `expand` [n, k]."""
        sizes = (self._encode @ expand.detach().cpu().double()).norm(dim=0)
        return sizes.clamp(min=_LEAST_SIGMA * float(sizes.max()) + 1e-30)


def _inverse_root(matrix: torch.Tensor) -> torch.Tensor:
    strength, vectors = torch.linalg.eigh(matrix)
    strength = strength.clamp(min=0) + _DAMPING * strength.mean() + 1e-30
    return vectors / strength.sqrt() @ vectors.T

"""Which parts of the keys go on rotating, and how queries read the others.

At one frequency the G key heads form a complex vector K in C^G; RoPE multiplies it by a phase. Any complex matrix
commutes with a phase, so K can be rewritten in G "virtual heads" Z = mix K first. Ordered by what losing their rotation
costs, few of them carry nearly all of it: those stay rotating ("slots", shared by all heads as MLA's k_rot), the others
become part of the latent and are read at their mean rotation.

A pair is one (frequency, virtual head). Legend: see the package.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvsplice_hf.convert.sampling import LayerActivations, PairSample, draw_pairs, queries_per_sequence
from kvsplice_hf.convert.source import SourceModel


Slot = tuple[int, int]  # (frequency, virtual head)

# Added to the diagonal of the normal equations, relative to it: pulls the fit to its closed-form start. Chosen on
# held-out text among 0.001, 0.01, 0.1 and 0.3.
RIDGE = 0.1
_SMALLEST_QUERY_ENERGY = 1e-6  # relative; keeps the metric of key heads that nobody reads invertible


@dataclass
class VirtualHeads:
    """The virtual heads of one layer.

    Attributes:
        mix: Z = mix K, complex128 [F, G, G].
        unmix: its inverse, complex128 [F, G, G].
        cost: mean squared error of the unscaled logits if the pair stops rotating, float64 [F, G], descending in G.
        mean_turn: mean of exp(i * frequency * distance), as which a pair without rotation is read, complex128 [H, F].
    """

    mix: torch.Tensor
    unmix: torch.Tensor
    cost: torch.Tensor
    mean_turn: torch.Tensor


@dataclass
class LayerRotation:
    """How the heads of one layer read the virtual heads.

    With q a query pair and z a virtual head as real 2-vectors, the logit is the sum of q^T `read` z over the pairs; a
    slot's z is meant as rotated by the distance.

    Attributes:
        mix: see `VirtualHeads`.
        read: float64 [H, F, G, 2, 2].
    """

    mix: torch.Tensor
    read: torch.Tensor


def every_pair(source: SourceModel) -> tuple[list[Slot], LayerRotation]:
    """All pairs as slots, and the key heads as they are: exact, and the same for all layers."""
    frequencies, groups = len(source.inv_freq), source.num_key_heads
    slots = [(frequency, group) for frequency in range(frequencies) for group in range(groups)]
    mix = torch.eye(groups, dtype=torch.complex128, device="cpu").expand(frequencies, groups, groups)
    return slots, LayerRotation(mix, _exact_read(source, mix))


@torch.no_grad()
def virtual_heads(
    source: SourceModel, sequences: Sequence[LayerActivations], generator: torch.Generator
) -> VirtualHeads:
    """The virtual heads of a layer: eigenvectors of what the keys lose when they stop rotating, as queries see it.

    For head h and frequency w the loss of key vector K at distance s is |q|^2 |K_g (exp(iws) - c)|^2 / 2, c being the
    mean turn; averaged over pairs it is a Hermitian G x G matrix. Key heads are weighed by the energy of their queries.
    """
    frequencies, groups, heads = len(source.inv_freq), source.num_key_heads, source.num_heads
    energy = torch.zeros(heads, frequencies, dtype=torch.float64, device="cpu")
    loss = torch.zeros(frequencies, groups, groups, dtype=torch.complex128, device="cpu")
    mean_turn = torch.zeros(heads, frequencies, dtype=torch.complex128, device="cpu")
    for head in range(heads):
        energy[head], still, turning = _key_moments(source, sequences, head, generator)
        own = head // source.heads_per_key
        turn = turning[:, own, own] / still[:, own, own].real.clamp(min=1e-30)
        mean_turn[head] = turn
        turned = turn.conj()[:, None, None] * turning
        residual = (1 + turn.abs() ** 2)[:, None, None] * still - turned - turned.mH
        loss += residual / energy[head].clamp(min=1e-30)[:, None, None] / heads
    metric = energy.view(groups, -1, frequencies).sum(1).T  # [F, G]
    metric = torch.maximum(metric, _SMALLEST_QUERY_ENERGY * metric.mean(-1, keepdim=True)) + 1e-30
    size = metric.mean(-1)  # taken out of the transform, so that virtual heads are as large as keys
    root = (metric / size[:, None]).sqrt()
    cost, vectors = torch.linalg.eigh(root[:, :, None] * loss * root[:, None, :])
    cost, vectors = cost.flip(-1).clamp(min=0), vectors.flip(-1)
    return VirtualHeads(
        mix=vectors.mH * root[:, None, :],
        unmix=vectors / root[:, :, None],
        cost=cost * size[:, None] / (2 * heads),
        mean_turn=mean_turn,
    )


def choose_slots(costs: Sequence[torch.Tensor], count: int) -> list[Slot]:
    """The pairs that go on rotating, ordered by frequency: those with the largest cost, summed over layers.

    All layers of a stock model share one list of frequencies; at each frequency a layer has virtual heads of its own.

    Args:
        costs: `VirtualHeads.cost` [F, G] of each layer.
        count: P / 2.
    """
    total = torch.stack(list(costs)).sum(0)
    groups = total.shape[1]
    chosen = total.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return sorted((pair // groups, pair % groups) for pair in chosen)


@torch.no_grad()
def fit_queries(
    source: SourceModel,
    sequences: Sequence[LayerActivations],
    virtual: VirtualHeads,
    slots: Sequence[Slot],
    generator: torch.Generator,
) -> LayerRotation:
    """How each head reads the virtual heads: least squares on the logits, a real 2 x 2 matrix per slot and frequency.

    The start is `closed_form_start`. From there the matrices are fitted together, so that what still rotates makes up
    for what no longer does.
    """
    matrix_of = _matrix_of(virtual, slots)
    start = closed_form_start(source, virtual, slots)
    read = torch.empty(*start.shape, 2, 2, dtype=torch.float64, device="cpu")
    for head in range(source.num_heads):
        matrices = _fit_head(source, sequences, virtual.mix, start[head], slots, matrix_of, head, generator)
        read[head] = matrices[matrix_of] @ _turn_matrix(start[head])
    return LayerRotation(virtual.mix, read)


def closed_form_start(source: SourceModel, virtual: VirtualHeads, slots: Sequence[Slot]) -> torch.Tensor:
    """How heads read the virtual heads before any fit: slots exactly, all else at its mean turn. Complex [H, F, G]."""
    own = torch.arange(source.num_heads, dtype=torch.int64, device="cpu") // source.heads_per_key
    exact = virtual.unmix[:, own].transpose(0, 1)
    rotates = _matrix_of(virtual, slots) < len(slots)
    return torch.where(rotates, exact, virtual.mean_turn.conj()[:, :, None] * exact)


def closed_form_queries(source: SourceModel, virtual: VirtualHeads, slots: Sequence[Slot]) -> LayerRotation:
    """`closed_form_start` as it is: what `fit_queries` is compared with."""
    return LayerRotation(virtual.mix, _turn_matrix(closed_form_start(source, virtual, slots)))


def _matrix_of(virtual: VirtualHeads, slots: Sequence[Slot]) -> torch.Tensor:
    """Which matrix a pair goes through, [F, G]: its own for a slot, one per frequency for all that do not rotate."""
    frequencies, groups = virtual.cost.shape
    matrix_of = (len(slots) + torch.arange(frequencies, dtype=torch.int64, device="cpu"))[:, None].repeat(1, groups)
    for index, slot in enumerate(slots):
        matrix_of[slot] = index
    return matrix_of


def _fit_head(
    source: SourceModel,
    sequences: Sequence[LayerActivations],
    mix: torch.Tensor,
    start: torch.Tensor,
    slots: Sequence[Slot],
    matrix_of: torch.Tensor,
    head: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """The matrices of one head, float64 [slots + F, 2, 2], from the weighted normal equations over its pairs.

    Args:
        source, sequences, slots, head, generator: see `fit_queries`.
        mix: Z = mix K, [F, G, G].
        start: what z is multiplied by at the start, complex [F, G].
        matrix_of: index of the matrix that a pair goes through, [F, G].
    """
    device = sequences[0].keys.device
    frequency_of = torch.tensor([*(f for f, _ in slots), *range(len(mix))], dtype=torch.long, device=device)
    transform = (start[:, :, None] * mix).to(device, torch.complex64)
    columns = 4 * len(frequency_of)
    gram = torch.zeros(columns, columns, dtype=torch.float64, device="cpu")
    moment = torch.zeros(columns, dtype=torch.float64, device="cpu")
    counts = queries_per_sequence([len(sequence.queries) for sequence in sequences])
    for sequence, count in zip(sequences, counts, strict=True):
        sample = draw_pairs(source, sequence, head, count, generator)
        heads = torch.einsum("fgk,tkf->tfg", transform, sequence.keys).flatten(1)
        keys = heads.new_zeros(len(heads), len(frequency_of)).index_add_(1, matrix_of.flatten().to(device), heads)
        keys = keys[sample.key_index]  # [n, m, slots + F]
        keys[..., : len(slots)] *= turns(sample, source.inv_freq[[f for f, _ in slots]]).conj()
        queries = torch.view_as_real(sequence.queries[sample.query_index, head][:, frequency_of])
        features = queries[:, None, :, :, None] * torch.view_as_real(keys)[..., None, :]  # [n, m, slots + F, 2, 2]
        missing = sample.logits - (features[..., 0, 0] + features[..., 1, 1]).sum(-1)
        root = sample.weight.sqrt()
        design = (sample.centred(features.flatten(2)) * root[..., None]).flatten(0, 1)
        target = (sample.centred(missing) * root).flatten()
        gram += (design.T @ design).cpu()
        moment += (design.T @ target).cpu()
    diagonal = gram.diagonal()
    gram += torch.diag(RIDGE * diagonal + 1e-6 * diagonal.mean() + 1e-30)
    return torch.eye(2, dtype=torch.float64, device="cpu") + torch.linalg.solve(gram, moment).view(-1, 2, 2)


def _exact_read(source: SourceModel, unmix: torch.Tensor) -> torch.Tensor:
    """`LayerRotation.read` of the source: q conj(unmix_g z), where g is the key head that the query head reads."""
    own = torch.arange(source.num_heads, dtype=torch.int64, device="cpu") // source.heads_per_key
    return _turn_matrix(unmix[:, own].transpose(0, 1))


def _turn_matrix(factor: torch.Tensor) -> torch.Tensor:
    """Real 2 x 2 matrices [..., 2, 2] of multiplication by complex numbers [...]."""
    rows = torch.stack([factor.real, -factor.imag, factor.imag, factor.real], -1)
    return rows.unflatten(-1, (2, 2))


def _key_moments(
    source: SourceModel, sequences: Sequence[LayerActivations], head: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means over the pairs of one head: |q|^2 [F], |q|^2 K K^H and |q|^2 exp(iws) K K^H, both [F, G, G]."""
    counts = queries_per_sequence([len(sequence.queries) for sequence in sequences])
    shape = (len(source.inv_freq), source.num_key_heads, source.num_key_heads)
    energy = torch.zeros(shape[0], dtype=torch.float64, device="cpu")
    still = torch.zeros(shape, dtype=torch.complex128, device="cpu")
    turning = torch.zeros(shape, dtype=torch.complex128, device="cpu")
    for sequence, count in zip(sequences, counts, strict=True):
        sample = draw_pairs(source, sequence, head, count, generator)
        power = sequence.queries[sample.query_index, head].abs() ** 2  # [n, F]
        weight = sample.weight[..., None] * power[:, None]  # [n, m, F]
        keys = sequence.keys[sample.key_index].flatten(0, 1).permute(2, 0, 1)  # [F, n * m, G]
        turn = turns(sample, source.inv_freq)
        moment = keys.mT @ (weight.flatten(0, 1).T[..., None] * keys.conj())
        still += moment.cpu()
        turning += (keys.mT @ ((weight * turn).flatten(0, 1).T[..., None] * keys.conj())).cpu()
        energy += power.sum(0).cpu()
    total = sum(counts)
    return energy / total, still / total, turning / total


def turns(sample: PairSample, frequencies: torch.Tensor) -> torch.Tensor:
    """exp(i * frequency * distance), complex [n, m, frequencies]."""
    angle = sample.distance[..., None] * frequencies.to(sample.distance)
    return torch.polar(torch.ones_like(angle), angle)

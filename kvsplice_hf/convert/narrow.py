"""A narrower latent behind a norm that has no constant channel to hold it still.

RMSNorm divides a latent by its own size, so a latent of fewer channels is divided by something else than the wide one
was. Here that is made up for without a bias, which engines do not take. The vector u that is to be narrowed has a norm
of its own that hardly varies: hidden states behind their norm, or a latent behind its norm. A latent with orthonormal
rows has the size of the part of u that it holds, so what it holds beside the directions that are read is chosen to make
up most of the rest. How many of the channels are given to that is what costs least on the sample, the loss of
directions and the unsteadiness of the norm counted together. Two ways to hold m directions are compared: the numbers
that say most of what is read of u, which are one thing, and the space in which what they bring back lies, which is
another and holds more of the length of u.

Legend: `n` numbers of u, `T` sampled tokens, `k` directions of u that anything reads, `m` channels that are read.
"""

from dataclasses import dataclass

import torch


# Of the largest eigenvalue of a metric: below, nobody reads a direction.
_UNREAD = 1e-12
# transformers adds 1e-6 to the mean square of a latent, engines what the configuration says. A power of two is exact.
SCALE = 32.0
# Of the second moments of channels, added to them where the reading is fitted.
RIDGE = 0.01
# A cost at which no other latent is looked for.
_NOTHING = 1e-4
# Shares of the channels that are tried for keeping the norm steady.
_SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)


@dataclass(frozen=True)
class Narrowing:
    """A latent in the place of u: `norm(encode u)`, multiplied by `gain` where a channel is read; `decode` reads it.

    Attributes:
        encode: orthonormal rows, [rank, n].
        decode: [n, m]; the channels behind the first m are not read.
        gain: close to what the norm divides by.
        cost: what an error costs on the sample, as a share of what all of u costs.
        unsteadiness: relative standard deviation of what the norm divides by, where it should be constant.
    """

    encode: torch.Tensor
    decode: torch.Tensor
    gain: float
    cost: float
    unsteadiness: float

    @property
    def read(self) -> int:
        return self.decode.shape[1]

    @property
    def gains(self) -> torch.Tensor:
        """Of the norm, [rank]. What is not read is 0 in the latent."""
        gains = torch.zeros(len(self.encode), dtype=torch.float64, device="cpu")
        gains[: self.read] = self.gain
        return gains

    @property
    def projection(self) -> torch.Tensor:
        """`encode`, so large that what the norm adds to a mean square is nothing, [rank, n]."""
        return SCALE * self.encode

    def reading(self, expand: torch.Tensor) -> torch.Tensor:
        """The weights that read the latent, [.., rank], in the place of those that read u, [.., n]."""
        unread = expand.new_zeros(len(expand), len(self.encode) - self.read, dtype=torch.float64)
        return torch.cat([expand @ self.decode, unread], dim=1)


@dataclass(frozen=True)
class Sample:
    """What u is like.

    Attributes:
        vectors: float64 [T, n]. Their norms should vary little.
        share: how much each of them counts, [T]; sums to 1.
        root: M^(1/2) [n, k], M being the metric: an error e of u costs e^T M e.
    """

    vectors: torch.Tensor
    share: torch.Tensor
    root: torch.Tensor

    @property
    def second(self) -> torch.Tensor:
        """E u u^T, [n, n]."""
        return self.vectors.T @ (self.share[:, None] * self.vectors)

    def power(self, errors: torch.Tensor) -> float:
        """What errors cost, given as what is read of them, [T, k]."""
        return (self.share * errors.square().sum(-1)).sum().item()


@torch.no_grad()
def narrow(vectors: torch.Tensor, share: torch.Tensor, metric: torch.Tensor, rank: int) -> Narrowing:
    """The latent of `rank` channels that costs least.

    Args:
        vectors, share: see `Sample`.
        metric: M, [n, n].
        rank: of the latent, at most n.
    """
    strength, directions = torch.linalg.eigh(metric)
    known = strength > _UNREAD * strength[-1].clamp(min=1e-300)
    sample = Sample(vectors, share, directions[:, known] * strength[known].sqrt())
    inverse = directions[:, known] / strength[known].sqrt()
    second = sample.second
    axes = torch.linalg.eigh(sample.root.T @ second @ sample.root).eigenvectors.flip(-1)
    encode, decode = axes.T @ sample.root.T, inverse @ axes
    most = min(len(encode), rank)
    counts = sorted({max(1, min(most, rank - round(portion * rank))) for portion in _SHARES}, reverse=True)
    best: Narrowing | None = None
    for count in counts:
        rows, turned = _orthonormal(encode[:count], second)
        rows, reads = _filled(rows, second, rank), decode[:, :count] @ turned
        # Where all directions are held, channels that hold the norm have nothing to tell.
        found = _fitted(sample, rows, reads, refit=count < len(encode))
        if count < len(encode):
            rows, _ = _orthonormal(encode[:count] @ second, second)
            held = (rows @ second * rows).sum(-1).clamp(min=1e-12 * second.diagonal().sum())
            other = _fitted(sample, _filled(rows, second, rank), second @ rows.T / held, refit=True)
            found = min(found, other, key=lambda narrowing: narrowing.cost)
        if best is not None and found.cost >= best.cost:
            break  # the more channels hold the norm, the fewer hold what is read
        best = found
        if best.cost < _NOTHING:
            break
    assert best is not None
    return best


def _orthonormal(vectors: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows [m, n] that span `vectors`, [m, n], and what brings these back: vectors = turned rows.

    Channels have no correlation: what rounding leaves of each is then small beside what is read of it.
    """
    rows, mix = torch.linalg.qr(vectors.T)  # vectors = mix^T rows^T
    turn = torch.linalg.eigh(rows.T @ second @ rows).eigenvectors.flip(-1)
    return (rows @ turn).T, mix.T @ turn


def _filled(rows: torch.Tensor, second: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal rows, [rank, n]: those given, [m, n], and others that hold most of what is left of u."""
    if rank == len(rows):
        return rows
    rest = second - rows.T @ (rows @ second)
    rest = rest - (rest @ rows.T) @ rows
    spare = torch.linalg.eigh((rest + rest.T) / 2).eigenvectors.flip(-1)[:, : rank - len(rows)].T
    spare = spare - (spare @ rows.T) @ rows
    return torch.cat([rows, torch.linalg.qr(spare.T)[0].T])


def _fitted(sample: Sample, rows: torch.Tensor, decode: torch.Tensor, refit: bool) -> Narrowing:
    """How the normed latent is read: `decode` times what makes up for the norm; fitted further to the sample."""
    latent = sample.vectors @ rows.T
    size = latent.square().mean(-1).sqrt()
    mean = (sample.share * size).sum()
    spread = ((sample.share * (size - mean).square()).sum().sqrt() / mean).item()
    normed, wanted = latent / size[:, None], sample.vectors @ sample.root
    read = normed[:, : decode.shape[1]] @ (decode.T @ sample.root)
    gain = ((sample.share * (wanted * read).sum(-1)).sum().item()) / max(sample.power(read), 1e-300)
    missing = wanted - gain * read
    if refit:
        decode, missing = _refitted(sample, gain * normed, decode, missing)
    return Narrowing(rows, decode, gain, sample.power(missing) / max(sample.power(wanted), 1e-300), spread)


def _refitted(
    sample: Sample, latent: torch.Tensor, decode: torch.Tensor, missing: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares from all channels, [T, rank], to what `decode` leaves of u; the new map and what it leaves."""
    rest = sample.vectors - latent[:, : decode.shape[1]] @ decode.T
    weighted = sample.share[:, None] * latent
    gram = latent.T @ weighted
    gram = gram + torch.diag(RIDGE * gram.diagonal() + 1e-9 * gram.diagonal().mean())
    change = torch.linalg.solve(gram, weighted.T @ rest).T  # [n, rank]
    whole = torch.nn.functional.pad(decode, (0, latent.shape[1] - decode.shape[1])) + change
    return whole, missing - latent @ (change.T @ sample.root)

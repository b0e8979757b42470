"""A narrower latent: the joint low-rank approximation of [keys without rotation; values] that readers notice least.

With covariance S of the latent over tokens, weighed by the attention they get, and M how strongly each direction is
read, the code minimising the mean of e^T M e has the top eigenvectors U of M^(1/2) S M^(1/2): encode with
U^T M^(1/2), decode with M^(-1/2) U. Means need no room in the latent: softmax ignores that of the keys, and that of the
values is a bias of the output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvsplice_hf.convert.sampling import LayerActivations, draw_pairs, queries_per_sequence
from kvsplice_hf.convert.source import SourceModel
from kvsplice_hf.convert.target import LayerWeights


_FLOOR = 1e-8  # of the mean eigenvalue of M: directions that nobody reads stay invertible


@dataclass
class LatentStatistics:
    """What is known of the latent of one layer, float64 on the CPU.

    Attributes:
        mean: [L], under the attention weights.
        covariance: S, [L, L].
        readers: M, [L, L].
        share: of all attention, what each token gets; [tokens], sums to 1.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    readers: torch.Tensor
    share: torch.Tensor


@torch.no_grad()
def latent_statistics(
    source: SourceModel,
    layer: Any,
    sequences: Sequence[LayerActivations],
    weights: LayerWeights,
    generator: torch.Generator,
) -> LatentStatistics:
    """Covariance of the latent, and its readers: logits through the queries, outputs through `o_proj`.

    A value error e changes the output of head h by p W_O[h] e, a logit error by p (v - mean v) W_O[h] times it, p being
    the attention weight. So logits count as much as the values they would mix differ.
    """
    mass, query_moments = _attention_statistics(source, sequences, generator)
    latent = torch.cat([_latents(weights, sequence.inputs) for sequence in sequences])
    share = (mass / mass.sum(0)).mean(-1)
    mean = share @ latent
    centred = latent - mean
    covariance = centred.T @ (share[:, None] * centred)
    output = layer.self_attn.o_proj.weight.detach().cpu().double()
    output = output.view(output.shape[0], source.num_heads, -1)
    still, size = weights.expand_key.shape[1], weights.query.shape[1]
    readers = torch.zeros_like(covariance)
    for head in range(source.num_heads):
        values = output[:, head] @ weights.expand_value[head]  # [D, L]
        spread = ((values.T @ values) * covariance).sum()
        queries = weights.query[head, :still] / math.sqrt(size)
        moment = queries @ query_moments[head] @ queries.T
        readers += values.T @ values
        readers += spread * weights.expand_key[head].T @ moment @ weights.expand_key[head]
    return LatentStatistics(mean, covariance, readers, share)


def compress(layer: Any, weights: LayerWeights, statistics: LatentStatistics, rank: int) -> LayerWeights:
    """The weights with a latent of `rank` channels (the constant one not counted)."""
    floor = _FLOOR * statistics.readers.diagonal().mean() + 1e-30
    strength, basis = torch.linalg.eigh(statistics.readers)
    strength = strength.clamp(min=0) + floor
    root = basis * strength.sqrt() @ basis.T
    directions = torch.linalg.eigh(root @ statistics.covariance @ root).eigenvectors.flip(-1)[:, :rank]
    encode = directions.T @ root
    decode = (basis / strength.sqrt() @ basis.T) @ directions
    # Rows of unit length: the scale of a code is free, and this one keeps codes about as large as latents.
    scale = encode.norm(dim=1)
    encode, decode = encode / scale[:, None], decode * scale
    output = layer.self_attn.o_proj.weight.detach().cpu().double()
    mean_values = (weights.expand_value @ statistics.mean).flatten()
    return replace(
        weights,
        latent=encode @ weights.latent,
        latent_bias=encode @ (weights.latent_bias - statistics.mean),
        expand_key=weights.expand_key @ decode,
        expand_value=weights.expand_value @ decode,
        output_bias=weights.output_bias + output @ mean_values,
    )


def _latents(weights: LayerWeights, inputs: torch.Tensor) -> torch.Tensor:
    return inputs.cpu().double() @ weights.latent.T + weights.latent_bias


def _attention_statistics(
    source: SourceModel, sequences: Sequence[LayerActivations], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that each token gets from each head [tokens, H], and second moments of the queries [H, d, d]."""
    counts = queries_per_sequence([len(sequence.queries) for sequence in sequences])
    masses, moments = (
        [],
        torch.zeros(source.num_heads, source.head_dim, source.head_dim, dtype=torch.float64, device="cpu"),
    )
    for sequence, count in zip(sequences, counts, strict=True):
        mass = torch.zeros(len(sequence.queries), source.num_heads, dtype=torch.float64, device="cpu")
        for head in range(source.num_heads):
            sample = draw_pairs(source, sequence, head, count, generator)
            mass[:, head].index_add_(0, sample.key_index.flatten().cpu(), sample.weight.flatten().cpu().double())
            queries = sequence.queries[sample.query_index, head]
            queries = torch.cat([queries.real, queries.imag], -1).cpu().double()
            moments[head] += queries.T @ queries
        masses.append(mass)
    return torch.cat(masses), moments / sum(counts)

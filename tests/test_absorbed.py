"""Absorbed attention on codes is ordinary attention on the decoded latents."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch

from kvsplice_hf import LearnedKVSplice
from kvsplice_hf.attend import reference as streaming
from kvsplice_hf.cache.exact import UNFILLED, ExactTokens
from kvsplice_hf.cache.rows import CompressedLatent
from kvsplice_hf.patch.absorbed import absorbed_attention


B, H, R, RANK, P, N, V, K = 2, 3, 12, 5, 4, 6, 7, 3
SCALING = 0.3
# Absolute and relative, by dtype. Outputs are up to 15 in absolute value.
TOLERANCE = {torch.float32: (2e-5, 0.0), torch.bfloat16: (0.1, 0.03)}


@dataclass
class Problem:
    """Queries, stored rows and weights of one call."""

    query: torch.Tensor
    latent: CompressedLatent
    weight: torch.Tensor


def make_problem(queries: int, keys: int, dtype: torch.dtype, exact: bool = True, static: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(queries * 100 + keys)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    splice = LearnedKVSplice(R, RANK, dtype=dtype)
    with torch.no_grad():
        for parameter in splice.parameters():
            parameter.copy_(0.6 * random(*parameter.shape))
    # The second row of the batch is padded by two tokens; its last slot, and one of the first row's, hold nothing.
    positions = torch.tensor([[0, 1, -2], [2, 3, UNFILLED]]) if exact else None
    tokens = None if positions is None else ExactTokens(random(B, K, R), positions)
    first = keys - queries
    latent = CompressedLatent(
        random(B, 1, keys, RANK + P), splice, tokens, queries, torch.tensor(first) if static else first
    )
    return Problem(random(B, H, queries, N + P), latent, 0.5 * random(H * (N + V), R))


def reference(
    problem: Problem, visible: torch.Tensor, bias: torch.Tensor | None = None, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64 on expanded keys and values, with a boolean mask [B, 1, T, S]."""
    latent = problem.latent.latent()[:, 0].double()
    by_head = problem.weight.double().view(H, N + V, R)
    k_nope = torch.einsum("bsr,hnr->bhsn", latent, by_head[:, :N])
    k_rot = problem.latent.k_rot.double().expand(-1, H, -1, -1)
    values = torch.einsum("bsr,hvr->bhsv", latent, by_head[:, N:])
    scores = problem.query.double() @ torch.cat([k_nope, k_rot], -1).transpose(2, 3) * SCALING
    scores = (scores if bias is None else scores + bias).masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, H, 1, 1).expand(B, -1, scores.shape[2], -1)], dim=-1)
    weights = scores.softmax(-1)[..., : latent.shape[1]]
    return (weights @ values).transpose(1, 2), weights


def causal(queries: int, keys: int, window: int | None = None) -> torch.Tensor:
    ahead = torch.arange(keys)[None] - (torch.arange(queries)[:, None] + keys - queries)
    visible = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
    return visible[None, None].expand(B, -1, -1, -1)


def padding(keys: int) -> torch.Tensor:
    mask = torch.ones(B, keys, dtype=torch.long)
    mask[1, :2] = 0
    return mask


def check(problem: Problem, expected: tuple[torch.Tensor, torch.Tensor], **settings: object) -> None:
    mask = settings.pop("mask", None)
    output, attention = absorbed_attention(
        problem.query, problem.latent, problem.weight, V, mask, SCALING, return_weights=True, **settings
    )
    absolute, relative = TOLERANCE[problem.query.dtype]
    torch.testing.assert_close(output.double(), expected[0], atol=absolute, rtol=relative)
    assert attention is not None
    torch.testing.assert_close(attention.double(), expected[1], atol=absolute, rtol=relative)


SHAPES = [(1, 1), (1, 9), (3, 9), (9, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_without_a_mask_attention_is_causal(queries: int, keys: int, exact: bool, dtype: torch.dtype) -> None:
    problem = make_problem(queries, keys, dtype, exact=exact)
    check(problem, reference(problem, causal(queries, keys)))


@pytest.mark.parametrize("kind", ["bool", "additive", "two-dimensional"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (3, 9), (6, 9)])
def test_masks_of_every_kind_are_heeded(queries: int, keys: int, kind: str) -> None:
    problem = make_problem(queries, keys, torch.float32)
    visible = causal(queries, keys) & padding(keys).bool()[:, None, None]
    masks = {
        "bool": visible,
        "additive": torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min),
        "two-dimensional": padding(keys),
    }
    check(problem, reference(problem, visible), mask=masks[kind])


def test_a_bias_that_is_not_a_mask_is_added_to_the_scores_of_exact_tokens_too() -> None:
    problem = make_problem(3, 9, torch.float32)
    bias = torch.randn(B, 1, 3, 9, generator=torch.Generator().manual_seed(0))
    check(problem, reference(problem, torch.ones(B, 1, 3, 9, dtype=torch.bool), bias), mask=bias)


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (3, 9), (9, 9)])
def test_a_sliding_window_is_applied_where_the_mask_does_not_hold_it(queries: int, keys: int) -> None:
    problem = make_problem(queries, keys, torch.float32)
    visible = causal(queries, keys, window=4)
    check(problem, reference(problem, visible), sliding_window=4)
    mask = padding(keys)
    mask[1, 0] = 1  # so that every query sees a key
    check(problem, reference(problem, visible & mask.bool()[:, None, None]), sliding_window=4, mask=mask)


@pytest.mark.parametrize("queries", [1, 3])
def test_unfilled_rows_of_a_static_cache_are_not_seen(queries: int) -> None:
    filled, capacity = 6, 9
    problem = make_problem(queries, capacity, torch.float32, static=True)
    problem.latent.first_row = torch.tensor(filled - queries)
    visible = torch.zeros(B, 1, queries, capacity, dtype=torch.bool)
    visible[..., :filled] = causal(queries, filled)
    check(problem, reference(problem, visible))


@pytest.mark.parametrize(("queries", "selected"), list(product([1, 3], [2, 5, 9])))
def test_only_the_rows_that_an_indexer_selected_are_read(queries: int, selected: int) -> None:
    keys = 9
    problem = make_problem(queries, keys, torch.float32)
    generator = torch.Generator().manual_seed(selected)
    order = torch.rand(B, queries, keys, generator=generator).argsort(-1)
    # Every query selects row 4, which is visible and not exact, so that no query is left with nothing to see.
    order = torch.cat([torch.full((B, queries, 1), 4), order[order != 4].view(B, queries, keys - 1)], dim=-1)
    indices = order[..., :selected]
    visible = causal(queries, keys) & padding(keys).bool()[:, None, None]
    chosen = torch.zeros(B, queries, keys, dtype=torch.bool).scatter_(-1, indices, True)[:, None]
    check(problem, reference(problem, visible & chosen), mask=visible, indices=indices.int())
    check(problem, reference(problem, causal(queries, keys) & chosen), indices=indices.int())


def test_learned_sinks_share_the_softmax() -> None:
    """They do not carry the constant that the scores on codes leave out, so it must be made up for."""
    problem = make_problem(3, 9, torch.float32)
    assert problem.latent.splice.fold()[1].abs().max() > 0.1
    sinks = torch.tensor([-1.0, 0.5, 2.0])
    check(problem, reference(problem, causal(3, 9), sinks=sinks), learned_sinks=sinks)


def test_rows_are_worked_off_in_blocks_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(9, 9, torch.float32)
    visible = causal(9, 9) & padding(9).bool()[:, None, None]
    expected = reference(problem, visible | torch.eye(9, dtype=torch.bool))
    monkeypatch.setattr(streaming, "_MAX_SCORES", 1)
    monkeypatch.setattr(streaming, "_SMALLEST_BLOCK", 2)
    check(problem, expected, mask=visible | torch.eye(9, dtype=torch.bool))


def test_a_query_that_sees_nothing_does_not_become_nan() -> None:
    problem = make_problem(3, 9, torch.float32)
    mask = causal(3, 9).clone()
    mask[1] = False
    output, _ = absorbed_attention(problem.query, problem.latent, problem.weight, V, mask, SCALING)
    assert output.isfinite().all()


def test_gradients_are_those_of_the_expanded_path() -> None:
    problem = make_problem(3, 9, torch.float64)
    parameters = list(problem.latent.splice.parameters())[:1] + list(problem.latent.splice.expand.parameters())
    visible = causal(3, 9)
    expected = torch.autograd.grad(reference(problem, visible)[0].square().sum(), parameters)
    output, _ = absorbed_attention(problem.query, problem.latent, problem.weight, V, None, SCALING)
    for found, wanted in zip(torch.autograd.grad(output.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

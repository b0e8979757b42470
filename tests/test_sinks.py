"""The first real tokens of a sequence are found from any mask, in any chunks, and are put back where they belong."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import build
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from kvsplice_hf.cache.exact import (
    UNFILLED,
    ExactTokens,
    empty_exact_tokens,
    exact_in_full_sequence,
    fill_exact_tokens,
    overlay_exact,
)
from kvsplice_hf.upstream import cache_argument


TOKENS, R = 12, 3
CPU = torch.device("cpu")
# Left padding per row: none, less and more than the first chunk, all but one token, and nothing but padding.
PADS = (0, 2, 5, 11, 12)
CHUNKS = {
    "one_shot": (12,),
    "token_by_token": (1,) * 12,
    "threes": (3, 3, 3, 3),
    "prefill_then_tokens": (7, 1, 1, 1, 1, 1),
}

# Makes the mask that an attention module gets for the tokens from `start` to `stop`, from the padding of each row.
MaskMaker = Callable[[torch.Tensor, int, int], torch.Tensor | None]


def real(pads: torch.Tensor, stop: int) -> torch.Tensor:
    return torch.arange(stop) >= pads[:, None]


def full_2d(pads: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return real(pads, stop).long()


def new_2d(pads: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return real(pads, stop)[:, start:].long()


def boolean_4d(pads: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    causal = torch.arange(stop) <= torch.arange(start, stop)[:, None]
    return causal[None, None] & real(pads, stop)[:, None, None]


def additive_4d(dtype: torch.dtype) -> MaskMaker:
    def make(pads: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        visible = boolean_4d(pads, start, stop)
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    return make


def of_transformers(attention: str) -> MaskMaker:
    """The real thing: what the modelling code of transformers makes for this attention function."""
    config = build("deepseek_v3").config
    config._attn_implementation = attention

    def make(pads: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
        cache = DynamicCache()
        if start:
            cache.update(torch.zeros(len(pads), 1, start, 1), torch.zeros(len(pads), 1, start, 1), 0)
        return create_causal_mask(
            config=config,
            inputs_embeds=torch.zeros(len(pads), stop - start, 1),
            attention_mask=real(pads, stop).long(),
            **cache_argument(cache),
            position_ids=torch.arange(start, stop)[None],
        )

    return make


def no_mask(pads: torch.Tensor, start: int, stop: int) -> None:
    return None


MASKS: dict[str, MaskMaker] = {
    "2d_full_length": full_2d,
    "2d_new_tokens": new_2d,
    "4d_bool": boolean_4d,
    "4d_fp32": additive_4d(torch.float32),
    "4d_bf16": additive_4d(torch.bfloat16),
    "4d_fp16": additive_4d(torch.float16),
}


def latents_of(batch: int, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(batch, tokens, R, generator=torch.Generator().manual_seed(0))


def filled(latents: torch.Tensor, pads: torch.Tensor, make: MaskMaker, chunks: tuple[int, ...], K: int) -> ExactTokens:
    exact = empty_exact_tokens(len(pads), K, R, latents.dtype, CPU)
    start = 0
    for size in chunks:
        stop = start + size
        exact = fill_exact_tokens(exact, latents[:, start:stop], make(pads, start, stop), start)
        start = stop
    return exact


def assert_first_real_tokens(exact: ExactTokens, latents: torch.Tensor, pads: torch.Tensor, K: int) -> None:
    for row, pad in enumerate(pads.tolist()):
        expected = list(range(pad, min(pad + K, TOKENS)))
        slots = len(expected)
        assert exact.positions[row].tolist() == expected + [UNFILLED] * (K - slots)
        assert torch.equal(exact.latents[row, :slots], latents[row, expected])


@pytest.mark.parametrize("K", [1, 4, 20])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_the_first_real_tokens_of_each_row_are_kept_whatever_the_mask_and_the_chunks(
    make: MaskMaker, chunks: tuple[int, ...], K: int
) -> None:
    pads = torch.tensor(PADS)
    latents = latents_of(len(PADS))
    assert_first_real_tokens(filled(latents, pads, make, chunks, K), latents, pads, K)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_masks_that_transformers_makes_are_understood(attention: str, chunks: tuple[int, ...]) -> None:
    pads = torch.tensor(PADS)
    latents = latents_of(len(PADS))
    exact = filled(latents, pads, of_transformers(attention), chunks, 4)
    assert_first_real_tokens(exact, latents, pads, 4)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_without_a_mask_every_token_is_real(chunks: tuple[int, ...]) -> None:
    pads = torch.zeros(2, dtype=torch.long)
    latents = latents_of(2)
    assert_first_real_tokens(filled(latents, pads, no_mask, chunks, 4), latents, pads, 4)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_padding_between_tokens_takes_no_slot(chunks: tuple[int, ...]) -> None:
    # Turns of a chat that were padded one by one leave such rows.
    is_real = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]])
    exact = filled(latents_of(2), torch.zeros(2), lambda _, start, stop: is_real[:, :stop], chunks, 4)
    assert exact.positions.tolist() == [[1, 4, 5, 7], [0, 11, UNFILLED, UNFILLED]]
    marked = exact_in_full_sequence(is_real, TOKENS, 4, CPU)
    assert [row.nonzero().flatten().tolist() for row in marked] == [[1, 4, 5, 7], [0, 11]]


def test_a_mask_of_one_row_is_that_of_the_whole_batch() -> None:
    pads = torch.tensor([2, 2, 2])
    latents = latents_of(3)
    exact = filled(latents, pads, lambda pads, *span: boolean_4d(pads[:1], *span), (5, 7), 4)
    assert_first_real_tokens(exact, latents, pads, 4)


def test_the_first_row_of_a_call_may_be_a_tensor() -> None:
    empty = empty_exact_tokens(1, 2, R, torch.float32, CPU)
    exact = fill_exact_tokens(empty, latents_of(1, 3), None, torch.tensor(7))
    assert exact.positions.tolist() == [[7, 8]]


@pytest.mark.parametrize("K", [1, 4, 20])
@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_a_call_without_cache_marks_the_tokens_that_a_cache_would_keep(make: MaskMaker, K: int) -> None:
    pads = torch.tensor(PADS)
    exact = filled(latents_of(len(PADS)), pads, full_2d, (5, 7), K)
    kept = torch.zeros(len(PADS), TOKENS, dtype=torch.bool)
    for row, positions in enumerate(exact.positions.tolist()):
        kept[row, [p for p in positions if p != UNFILLED]] = True
    marked = exact_in_full_sequence(make(pads, 0, TOKENS), TOKENS, K, CPU)
    assert torch.equal(marked, kept)


def test_without_cache_and_mask_the_first_tokens_are_marked() -> None:
    marked = exact_in_full_sequence(None, 5, 2, CPU)
    assert marked.tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("lengths", [(12,), (5, 7), (1, 1, 4, 6), (3, 2, 1, 6)], ids=str)
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_every_packed_sequence_has_first_tokens_of_its_own(lengths: tuple[int, ...], additive: bool) -> None:
    K = 2
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & (sequence[:, None] == sequence)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    expected = [index < K for length in lengths for index in range(length)]
    assert exact_in_full_sequence(mask[None, None], TOKENS, K, CPU).tolist() == [expected]


# Positions of two slots in a row of 5 stored tokens, and the rows at which latents must appear: slot by row.
PLACES = {
    "both": ((1, 4), {1: 0, 4: 1}),
    "out_of_order": ((3, 0), {3: 0, 0: 1}),
    "second_unfilled": ((2, UNFILLED), {2: 0}),
    "first_left_the_window": ((-1, 0), {0: 1}),
    "only_the_second_beyond_the_end": ((4, 5), {4: 0}),
    "both_left_the_window": ((-2, -1), {}),
    "none_filled": ((UNFILLED, UNFILLED), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_latents_are_put_at_their_places_and_nothing_else_changes(dtype: torch.dtype) -> None:
    # All cases as rows of one batch: a row must not see another row's places.
    exact = ExactTokens(latents_of(len(PLACES), 2), torch.tensor([places for places, _ in PLACES.values()]))
    decoded = latents_of(len(PLACES), 5)[:, None].mul(100).to(dtype)
    expected = decoded.clone()
    for row, (_, slots) in enumerate(PLACES.values()):
        for position, slot in slots.items():
            expected[row, 0, position] = exact.latents[row, slot].to(dtype)
    result = overlay_exact(decoded, exact)
    assert torch.equal(result, expected)
    assert result.dtype == dtype


@pytest.mark.parametrize("places", [places for places, _ in PLACES.values()], ids=list(PLACES))
def test_each_latent_gets_the_gradient_of_its_place_once(places: tuple[int, int]) -> None:
    exact_latents = latents_of(1, 2).requires_grad_()
    decoded = latents_of(1, 5)[:, None].requires_grad_()
    overlaid = overlay_exact(decoded * 1, ExactTokens(exact_latents, torch.tensor([places])))
    weight = latents_of(1, 5).exp()[:, None]
    (overlaid * weight).sum().backward()
    expected_decoded, expected_exact = weight.clone(), torch.zeros(1, 2, R)
    for slot, position in enumerate(places):
        if 0 <= position < 5:
            expected_exact[0, slot] = weight[0, 0, position]
            expected_decoded[0, 0, position] = 0
    torch.testing.assert_close(decoded.grad, expected_decoded)
    assert exact_latents.grad is not None
    torch.testing.assert_close(exact_latents.grad, expected_exact)


@pytest.mark.parametrize(
    ("dropped", "length", "expected"),
    [
        (0, 5, [0, 4, UNFILLED]),
        (2, 3, [-2, 2, UNFILLED]),
        (0, 4, [0, UNFILLED, UNFILLED]),
        (0, 0, [UNFILLED, UNFILLED, UNFILLED]),
        (5, 0, [-5, -1, UNFILLED]),
    ],
    ids=["nothing", "front", "end", "all_from_the_end", "all_from_the_front"],
)
def test_tokens_that_left_at_the_front_stay_seen_and_those_cut_at_the_end_do_not(
    dropped: int, length: int, expected: list[int]
) -> None:
    exact = ExactTokens(latents_of(1, 3), torch.tensor([[0, 4, UNFILLED]]))
    shifted = exact.shifted(dropped, length)
    assert shifted.positions.tolist() == [expected]
    assert torch.equal(shifted.latents, exact.latents)
    assert shifted.valid(length).tolist() == [[0 <= position < length for position in expected]]
    # What counts as seen decides whether later tokens are still among the first.
    free = sum(position == UNFILLED for position in expected)
    refilled = fill_exact_tokens(shifted, latents_of(1, 4), None, length)
    assert (refilled.positions != shifted.positions).sum() == free

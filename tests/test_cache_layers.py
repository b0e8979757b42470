"""A spliced cache layer does what the stock layer does, on codes: same rows, same order, same lengths, less memory."""

import copy
import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_models import build
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from kvsplice_hf.cache.dynamic import SplicedDynamicLayer, SplicedIndexedLayer, SplicedSlidingWindowLayer
from kvsplice_hf.cache.exact import UNFILLED
from kvsplice_hf.cache.layers import splice_cache_layer
from kvsplice_hf.cache.rows import CompressedLatent, RowGeometry
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.cache.static import SplicedStaticIndexedLayer, SplicedStaticLayer, SplicedStaticSlidingWindowLayer
from kvsplice_hf.code.initialise import initialise_
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import CacheMismatchError
from kvsplice_hf.manage.sizes import cache_nbytes


TOLERANCE = 1e-5
R, P = 6, 2
WINDOW, CAPACITY, INDEXER_DIM = 5, 64, 3


@dataclass(frozen=True)
class Kind:
    """A kind of cache layer: the stock class, ours, and what can be done with it."""

    stock: type
    spliced: type
    kwargs: dict[str, int] = field(default_factory=dict, hash=False)
    records_past: bool = False

    @property
    def is_static(self) -> bool:
        return issubclass(self.stock, StaticLayer)

    @property
    def is_indexed(self) -> bool:
        return hasattr(self.stock, "update_indexer")


KINDS = {
    "dynamic": Kind(DynamicLayer, SplicedDynamicLayer),
    "indexed": Kind(DynamicIndexedLayer, SplicedIndexedLayer),
    "window": Kind(DynamicSlidingWindowLayer, SplicedSlidingWindowLayer, {"sliding_window": WINDOW}),
    # As in assisted decoding: the window keeps its past until it is cropped.
    "recording_window": Kind(
        DynamicSlidingWindowLayer, SplicedSlidingWindowLayer, {"sliding_window": WINDOW}, records_past=True
    ),
    "static": Kind(StaticLayer, SplicedStaticLayer, {"max_cache_len": CAPACITY}),
    "static_indexed": Kind(StaticIndexedLayer, SplicedStaticIndexedLayer, {"max_cache_len": CAPACITY}),
    "static_window": Kind(
        StaticSlidingWindowLayer,
        SplicedStaticSlidingWindowLayer,
        {"max_cache_len": CAPACITY, "sliding_window": WINDOW},
    ),
    "static_wide_window": Kind(
        StaticSlidingWindowLayer,
        SplicedStaticSlidingWindowLayer,
        {"max_cache_len": CAPACITY, "sliding_window": CAPACITY},
    ),
}
GROWING = ("dynamic", "indexed")
DYNAMIC = ("dynamic", "indexed", "window", "recording_window")
STATIC = ("static", "static_indexed", "static_window", "static_wide_window")
# Since 5.24; a window must not have closed over what it is to give back.
CROPPABLE = (*DYNAMIC, *(name for name in STATIC if name != "static_window" and hasattr(StaticLayer, "crop")))


def stock_reset_empties() -> bool:
    """Whether a stock layer that grows is empty after `reset`: not before 5.18."""
    layer = DynamicLayer()
    layer.update(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3))
    layer.reset()
    return layer.get_seq_length() == 0


STOCK_RESET_EMPTIES = stock_reset_empties()


@dataclass(frozen=True)
class Variant:
    """Sizes of the rows, and the left padding of each row of the batch."""

    rank: int
    sink_tokens: int
    rope_dim: int = P
    pads: tuple[int, ...] = (0, 0, 0)


VARIANTS = {
    "full_rank": Variant(rank=R, sink_tokens=0),
    "full_rank_with_sinks": Variant(rank=R, sink_tokens=2),
    # Where the round trip loses something, an exact token that is missing or misplaced shows.
    "half_rank": Variant(rank=3, sink_tokens=2),
    "half_rank_padded": Variant(rank=3, sink_tokens=2, pads=(0, 1, 4)),
    "one_dimension_without_rope": Variant(rank=1, sink_tokens=3, rope_dim=0),
}


def make_splice(rank: int, latent_dim: int = R) -> LearnedKVSplice:
    splice = LearnedKVSplice(latent_dim, rank)
    initialise_(splice, "identity")
    return splice.requires_grad_(False)


def make_layer(kind: Kind, variant: Variant, splice: LearnedKVSplice | None = None) -> Any:
    geometry = RowGeometry(R, variant.rank, variant.rope_dim, variant.sink_tokens)
    return kind.spliced(geometry, make_splice(variant.rank) if splice is None else splice, **kind.kwargs)


def tokens(count: int, batch: int = 2, seed: int = 0, rope_dim: int = P) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [B, 1, T, R] and rotated keys [B, 1, T, P]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 1, count, R, generator=generator),
        torch.randn(batch, 1, count, rope_dim, generator=generator),
    )


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpickled(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


class Twins:
    """A stock layer that holds raw latents and a spliced one that holds their codes, put through the same operations.

    The stock layer's values carry, beside the rotated keys, a flag that says whether a token is among the first of its
    row. So what the spliced layer ought to return can be told from what the stock one does, row by row: the latent
    itself where the flag is set, what the round trip leaves of it elsewhere.
    """

    def __init__(self, kind: Kind, variant: Variant) -> None:
        self.variant = variant
        self.splice = make_splice(variant.rank)
        self.stock = kind.stock(**kind.kwargs)
        self.spliced = make_layer(kind, variant, self.splice)
        if kind.records_past:
            self._on_both(lambda layer: layer.activate_past_recording())
        self.pads = torch.tensor(variant.pads)
        self.length = 0
        self.generator = torch.Generator().manual_seed(0)
        self.check_lengths()

    def _on_both(self, operation: Callable[[Any], None]) -> None:
        operation(self.stock)
        operation(self.spliced)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def feed(self, count: int, chunk: int) -> None:
        while count > 0:
            self._update(min(count, chunk))
            count -= chunk

    def _update(self, count: int) -> None:
        batch, positions = len(self.pads), torch.arange(self.length, self.length + count)
        latents, k_rot = self._random(batch, 1, count, R), self._random(batch, 1, count, self.variant.rope_dim)
        rank = positions - self.pads[:, None]
        is_first = ((rank >= 0) & (rank < self.variant.sink_tokens))[:, None, :, None]
        keys, values = self.stock.update(latents, torch.cat([k_rot, is_first.float()], dim=-1))
        if self.variant.pads != (0, 0, 0):
            self.spliced.attention_mask = (torch.arange(self.length + count) >= self.pads[:, None]).long()
        found, found_k_rot = self.spliced.update(latents, k_rot)
        self.length += count

        expected = torch.where(values[..., -1:] == 1, keys, self.splice(keys))
        filled = slice(min(self.length, keys.shape[2]))  # what a crop left behind them in a static layer is nobody's
        torch.testing.assert_close(found.latent()[:, :, filled], expected[:, :, filled], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found.k_rot, values[..., :-1], atol=TOLERANCE, rtol=0)
        assert torch.equal(found_k_rot, found.k_rot)
        assert found.new_tokens == count
        first = int(found.first_row)
        assert torch.equal(keys[:, :, first : first + count], latents)
        if hasattr(self.stock, "update_indexer"):
            indexer_keys = self._random(batch, count, INDEXER_DIM)
            expected = self.stock.update_indexer(indexer_keys)
            assert torch.equal(self.spliced.update_indexer(indexer_keys), expected)
        self.check_lengths()

    def check_lengths(self) -> None:
        assert int(self.spliced.get_seq_length()) == int(self.stock.get_seq_length()) == self.length
        assert self.spliced.get_max_length() == self.stock.get_max_length()
        for new_tokens in (1, 3, 2 * WINDOW):
            assert self.spliced.get_mask_sizes(new_tokens) == self.stock.get_mask_sizes(new_tokens)

    def crop(self, count: int) -> None:
        if isinstance(self.stock, DynamicSlidingWindowLayer) and not self.stock.record_past and self.length >= WINDOW:
            for layer in (self.stock, self.spliced):
                with pytest.raises(RuntimeError, match="does not track past states"):
                    layer.crop(-count)
            return
        self._on_both(lambda layer: layer.crop(-count))
        self.length -= count
        self.check_lengths()

    def reorder(self, *rows: int) -> None:
        index = torch.tensor(rows)
        self._on_both(lambda layer: layer.reorder_cache(index))
        self.pads = self.pads[index]

    def repeat(self, times: int) -> None:
        self._on_both(lambda layer: layer.batch_repeat_interleave(times))
        self.pads = self.pads.repeat_interleave(times)

    def select(self, *rows: int) -> None:
        index = torch.tensor(rows)
        self._on_both(lambda layer: layer.batch_select_indices(index))
        self.pads = self.pads[index]

    def reset(self) -> None:
        if not STOCK_RESET_EMPTIES and isinstance(self.stock, DynamicLayer):
            pytest.skip("the stock layer of this release is not empty after a reset")
        self._on_both(lambda layer: layer.reset())
        self.length = 0
        self.check_lengths()

    def offload(self) -> None:
        self._on_both(lambda layer: layer.offload())
        self._on_both(lambda layer: layer.prefetch())
        self.check_lengths()

    def copy(self) -> None:
        self.stock, self.spliced = copy.deepcopy(self.stock), copy.deepcopy(self.spliced)
        self.check_lengths()

    def save(self) -> None:
        self.stock, self.spliced = unpickled(pickled(self.stock)), unpickled(pickled(self.spliced))
        self.spliced.splice = self.splice  # as the hook of the attention module does at each call
        self.check_lengths()


Program = tuple[tuple[Any, ...], ...]

ANY_LAYER: dict[str, Program] = {
    "one_shot": (("feed", 13, 13),),
    "token_by_token": (("feed", 13, 1),),
    "chunks_of_three": (("feed", 13, 3),),
    "turns_of_a_chat": (("feed", 4, 4), ("feed", 3, 1), ("feed", 9, 9), ("feed", 2, 1), ("feed", 3, 3)),
    "beams": (
        ("feed", 6, 6),
        ("reorder", 2, 0, 0),
        ("feed", 1, 1),
        ("reorder", 1, 1, 2),
        ("reorder", 2, 1, 0),
        ("feed", 2, 1),
    ),
    "beams_within_the_sinks": (
        ("feed", 1, 1),
        ("reorder", 1, 2, 0),
        ("feed", 1, 1),
        ("reorder", 0, 2, 2),
        ("feed", 6, 2),
    ),
    "reset_and_refill": (("feed", 7, 7), ("reset",), ("feed", 8, 3)),
    "reset_before_use": (("reset",), ("feed", 3, 1), ("reset",), ("feed", 1, 1), ("reset",), ("feed", 9, 9)),
    "offloaded_between_steps": (
        ("offload",),
        ("feed", 2, 2),
        ("offload",),
        ("feed", 4, 4),
        ("offload",),
        ("feed", 2, 1),
    ),
    "copied": (("copy",), ("feed", 1, 1), ("copy",), ("feed", 5, 1), ("copy",), ("feed", 3, 3)),
    "saved": (("save",), ("feed", 1, 1), ("save",), ("feed", 5, 1), ("save",), ("feed", 3, 3)),
}
CROPS: dict[str, Program] = {
    "cropped": (("feed", 4, 4), ("crop", 2), ("feed", 4, 2)),
    "cropped_by_nothing": (("feed", 4, 4), ("crop", 0), ("feed", 2, 1)),
    "cropped_within_the_sinks": (("feed", 3, 3), ("crop", 2), ("feed", 1, 1), ("crop", 1), ("feed", 5, 2)),
    "cropped_to_nothing": (("feed", 4, 2), ("crop", 4), ("feed", 5, 1)),
    "cropped_beyond_the_window": (("feed", 9, 9), ("crop", 3), ("feed", 2, 1), ("crop", 2), ("feed", 4, 4)),
    "speculated": (("feed", 2, 2), *(("feed", 4, 4), ("crop", 3), ("feed", 1, 1), ("crop", 0)) * 4),
    "cropped_after_a_copy": (("feed", 4, 4), ("copy",), ("crop", 3), ("save",), ("feed", 6, 1)),
}
DYNAMIC_ONLY: dict[str, Program] = {
    "repeated": (("feed", 3, 3), ("repeat", 2), ("feed", 4, 1), ("reorder", 5, 4, 3, 0, 0, 2), ("feed", 1, 1)),
    "selected": (("feed", 3, 3), ("select", 2, 0), ("feed", 4, 1), ("select", 1), ("feed", 5, 3)),
    "repeated_in_the_sinks": (("feed", 1, 1), ("repeat", 2), ("select", 4, 0, 5), ("feed", 7, 1)),
}


def programs(kind: str) -> dict[str, Program]:
    return ANY_LAYER | (CROPS if kind in CROPPABLE else {}) | (DYNAMIC_ONLY if kind in DYNAMIC else {})


CASES = [
    pytest.param(KINDS[kind], variant, program, id=f"{kind}-{variant_name}-{name}")
    for kind in KINDS
    for variant_name, variant in VARIANTS.items()
    for name, program in programs(kind).items()
]


@pytest.mark.parametrize(("kind", "variant", "program"), CASES)
def test_a_spliced_layer_holds_what_the_stock_layer_holds(kind: Kind, variant: Variant, program: Program) -> None:
    twins = Twins(kind, variant)
    for operation, *arguments in program:
        getattr(twins, operation)(*arguments)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind_name", KINDS)
def test_a_spliced_layer_holds_what_the_stock_layer_holds_after_any_operations(kind_name: str, seed: int) -> None:
    kind, draw = KINDS[kind_name], random.Random(seed)
    twins = Twins(kind, draw.choice(list(VARIANTS.values())))
    operations = ["feed", "feed", "feed", "reorder", "reset", "offload", "copy", "save"]
    operations += ["crop", "crop"] if kind_name in CROPPABLE else []
    operations += [] if kind.is_static else ["repeat", "select"]
    for _ in range(25):
        operation = draw.choice(operations)
        rows, stored = len(twins.pads), twins.length
        arguments: list[int] = []
        if operation == "feed":
            room = CAPACITY - stored if kind.is_static else CAPACITY
            arguments = [min(draw.randint(1, 8), room), draw.choice([1, 2, 3, 8])]
        elif stored == 0 and operation in ("crop", "repeat", "select", "reorder"):
            continue  # stock layers do not change the batch of a layer that is empty
        elif operation == "crop":
            arguments = [draw.randint(0, min(stored, twins.stock.keys.shape[-2]))]
        elif operation == "repeat":
            arguments = [2 if rows <= 3 else 1]
        elif operation == "select":
            arguments = draw.choices(range(rows), k=draw.randint(1, rows))
        elif operation == "reorder":
            arguments = draw.choices(range(rows), k=rows)
        print(operation, *arguments)  # shown when the test fails
        getattr(twins, operation)(*arguments)


class CountingSplice(LearnedKVSplice):
    """Counts the tokens that it encodes."""

    encoded = 0

    def encode(self, latent: torch.Tensor, key_code: torch.Tensor | None = None) -> torch.Tensor:
        self.encoded += latent.shape[2]
        return super().encode(latent, key_code)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_token_is_encoded_once(kind: Kind) -> None:
    splice = CountingSplice(R, 3)
    layer = make_layer(kind, VARIANTS["half_rank"], splice)
    fed = 0
    for count in (4, 1, 1, 6, 1):
        layer.update(*tokens(count))
        layer.reorder_cache(torch.tensor([1, 0]))
        fed += count
        assert splice.encoded == fed


def allocated_rows(layer: Any) -> int:
    return layer.keys.untyped_storage().nbytes() // (layer.keys.shape[0] * layer.keys.shape[-1] * layer.keys.itemsize)


@torch.no_grad()
def test_five_thousand_steps_move_the_rows_a_few_times() -> None:
    layer = make_layer(KINDS["dynamic"], VARIANTS["half_rank"])
    address, moves, token = 0, 0, tokens(1, batch=1)
    for _ in range(5000):
        layer.update(*token)
        # The old rows are still there while they are copied, so a move shows as another address.
        moves += address != layer.keys.data_ptr()
        address = layer.keys.data_ptr()
    assert layer.get_seq_length() == 5000
    assert moves < 20


@torch.no_grad()
def test_a_long_cache_has_little_room_to_spare() -> None:
    layer = make_layer(KINDS["dynamic"], VARIANTS["half_rank"])
    prompt, token = tokens(2000, batch=1), tokens(1, batch=1)
    while layer.get_seq_length() < 20_000:
        layer.update(*prompt)
        layer.update(*token)
        stored = layer.get_seq_length()
        assert stored <= allocated_rows(layer) <= stored + stored // 8 + 1024
    assert allocated_rows(layer) > stored  # room for the next step


@torch.no_grad()
def test_a_prompt_in_one_shot_takes_no_room_to_spare() -> None:
    layer = make_layer(KINDS["dynamic"], VARIANTS["half_rank"])
    layer.update(*tokens(100))
    assert allocated_rows(layer) == 100


LETS_GO_OF_THE_BUFFER: dict[str, Callable[[Any], None]] = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "offload": lambda layer: layer.offload(),
    "prefetch": lambda layer: layer.prefetch(),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("operation", LETS_GO_OF_THE_BUFFER.values(), ids=LETS_GO_OF_THE_BUFFER)
@pytest.mark.parametrize("kind", [KINDS[name] for name in GROWING], ids=GROWING)
@torch.no_grad()
def test_rows_that_moved_elsewhere_do_not_keep_the_old_buffer_alive(
    kind: Kind, operation: Callable[[Any], None]
) -> None:
    layer = make_layer(kind, VARIANTS["half_rank"])
    for _ in range(3):
        layer.update(*tokens(1))
    assert layer._buffer is not None
    operation(layer)
    assert layer._buffer is None


@pytest.mark.parametrize("kind", [KINDS[name] for name in DYNAMIC], ids=DYNAMIC)
@torch.no_grad()
def test_a_reset_dynamic_layer_holds_no_memory(kind: Kind) -> None:
    cache = Cache(layers=[make_layer(kind, VARIANTS["half_rank"])])
    for _ in range(2):
        cache.update(*tokens(3), 0)
    assert cache_nbytes(cache, allocated=True) > 0
    cache.reset()
    assert cache_nbytes(cache, allocated=True) == 0


def exact_tokens(layer: Any) -> list[list[int]]:
    return layer.exact.positions.tolist()


@pytest.mark.parametrize("kind", [KINDS[name] for name in DYNAMIC], ids=DYNAMIC)
@torch.no_grad()
def test_cropping_frees_the_slots_of_exact_tokens_that_were_cut(kind: Kind) -> None:
    layer = make_layer(kind, Variant(rank=3, sink_tokens=3))
    latents, k_rot = tokens(4, batch=1)
    layer.update(latents, k_rot)
    assert exact_tokens(layer) == [[0, 1, 2]]
    layer.crop(-2)
    assert exact_tokens(layer) == [[0, 1, UNFILLED]]
    again, again_k_rot = tokens(2, batch=1, seed=1)
    layer.update(again, again_k_rot)
    assert exact_tokens(layer) == [[0, 1, 2]]
    assert torch.equal(layer.exact.latents, torch.cat([latents[:, 0, :2], again[:, 0, :1]], dim=1))
    layer.crop(-4)
    assert exact_tokens(layer) == [[UNFILLED] * 3]


@pytest.mark.parametrize("kind_name", ["window", "static_window"])
@torch.no_grad()
def test_exact_tokens_leave_with_the_window_and_no_later_token_takes_their_slots(kind_name: str) -> None:
    kind = KINDS[kind_name]
    # A dynamic window stores one row less than a static one: it leaves out the row that the next token pushes out.
    stored = WINDOW if kind.is_static else WINDOW - 1
    layer = make_layer(kind, Variant(rank=3, sink_tokens=2))
    for fed in range(1, 4 * WINDOW):
        latent, _ = layer.update(*tokens(1, batch=1, seed=fed))
        left = max(fed - stored, 0)
        assert exact_tokens(layer) == [[-left, 1 - left if fed > 1 else UNFILLED]]
        left = fed - latent.rows.shape[2] if fed > WINDOW else 0
        assert latent.exact is not None
        assert latent.exact.positions.tolist() == [[-left, 1 - left if fed > 1 else UNFILLED]]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_mask_serves_one_call(kind: Kind) -> None:
    layer = make_layer(kind, Variant(rank=3, sink_tokens=3))
    layer.attention_mask = torch.tensor([[0, 0, 1]])
    layer.update(*tokens(3, batch=1))
    assert exact_tokens(layer) == [[2, UNFILLED, UNFILLED]]
    latent, _ = layer.update(*tokens(3, batch=1, seed=1))
    assert latent.exact is not None
    assert latent.exact.positions.tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("kind", [KINDS[name] for name in STATIC], ids=STATIC)
@torch.no_grad()
def test_static_layers_change_in_place(kind: Kind) -> None:
    layer = make_layer(kind, VARIANTS["half_rank"])

    def addresses() -> list[int]:
        return [tensor.data_ptr() for tensor in (layer.keys, layer.cumulative_length, *layer.exact)]

    layer.update(*tokens(3))
    before = addresses()
    for count in (1, 4, 1, 1):  # 4 more fill the window
        layer.update(*tokens(count))
        assert addresses() == before
    layer.reset()
    assert addresses() == before
    assert exact_tokens(layer) == [[UNFILLED] * 2] * 2
    layer.update(*tokens(2))
    assert addresses() == before


@torch.no_grad()
def test_early_initialisation_sizes_buffers_by_the_row_and_not_by_the_head() -> None:
    splice, geometry = make_splice(3), RowGeometry(R, 3, P, 2)
    cache = Cache(layers=[kind.stock(**kind.kwargs) for kind in KINDS.values()])
    layers: list[Any] = [splice_cache_layer(cache, index, geometry, splice) for index in range(len(KINDS))]
    cache.early_initialization(batch_size=2, num_heads=4, head_dim=24, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.is_initialized
    for index, layer in enumerate(layers):
        latents, k_rot = tokens(3)
        assert layer.keys.shape[:2] == (2, 1)
        assert layer.keys.shape[-1] == geometry.row_dim
        assert int(layer.get_seq_length()) == 0
        latent, found_k_rot = cache.update(latents, k_rot, index)
        assert torch.equal(latent.latent()[:, :, :2], latents[:, :, :2])
        torch.testing.assert_close(latent.latent()[:, :, 2], splice(latents)[:, :, 2], atol=TOLERANCE, rtol=0)
        assert torch.equal(found_k_rot[:, :, :3], k_rot)


@pytest.mark.parametrize(
    ("heads", "key_width", "value_width"),
    [(4, R, P), (1, R + 1, P), (1, R, P + 1), (1, 3, P), (4, 24, 16)],
    ids=["heads", "latent", "rotated_key", "codes_instead_of_latents", "expanded"],
)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_tensors_of_other_shapes_are_refused_with_both_sizes(
    kind: Kind, heads: int, key_width: int, value_width: int
) -> None:
    layer = make_layer(kind, VARIANTS["half_rank"])
    phrase = rf"\({heads}, {key_width}\) and values of width {value_width}; .* \(1, {R}\) and rotated keys of width {P}"
    with pytest.raises(CacheMismatchError, match=phrase):
        layer.update(torch.zeros(2, heads, 3, key_width), torch.zeros(2, heads, 3, value_width))
    assert not layer.is_initialized


GEOMETRY = RowGeometry(R, 3, P, 2)


@torch.no_grad()
def test_a_lazily_built_cache_gets_its_layers_when_they_are_asked_for() -> None:
    cache, splice = DynamicCache(), make_splice(3)
    layer = splice_cache_layer(cache, 2, GEOMETRY, splice)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, DynamicLayer, SplicedDynamicLayer]
    assert cache.layers[2] is layer
    assert isinstance(cache.update(*tokens(3), 2)[0], CompressedLatent)
    assert cache.get_seq_length(2) == 3


@pytest.mark.parametrize("kind_name", KINDS)
@torch.no_grad()
def test_an_empty_stock_layer_is_replaced_by_the_spliced_one_of_its_kind(kind_name: str) -> None:
    kind, splice = KINDS[kind_name], make_splice(3)
    # Empty is also a layer that was used and then reset.
    used = kind.stock(**kind.kwargs)
    used.update(*tokens(3))
    used.reset()
    if not STOCK_RESET_EMPTIES and not kind.is_static:
        used = kind.stock(**kind.kwargs)
    recording = kind.stock(**kind.kwargs)
    if kind.records_past:
        recording.activate_past_recording()
    cache = Cache(layers=[used, recording])
    for index in range(2):
        layer: Any = splice_cache_layer(cache, index, GEOMETRY, splice)
        assert cache.layers[index] is layer
        assert type(layer) is kind.spliced
        assert (layer.geometry, layer.splice) == (GEOMETRY, splice)
        assert layer.get_max_length() == recording.get_max_length()
        assert layer.get_mask_sizes(9) == recording.get_mask_sizes(9)
    assert getattr(layer, "record_past", False) == kind.records_past


@torch.no_grad()
def test_a_spliced_layer_stays_and_gets_the_projection_at_hand() -> None:
    cache, old, new = DynamicCache(), make_splice(3), make_splice(3)
    layer = splice_cache_layer(cache, 0, GEOMETRY, old)
    cache.update(*tokens(3), 0)
    assert splice_cache_layer(cache, 0, GEOMETRY, new) is layer
    assert layer.splice is new
    assert layer.get_seq_length() == 3


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_layer_of_another_geometry_is_replaced_only_while_it_is_empty(kind: Kind) -> None:
    cache, other = Cache(layers=[kind.stock(**kind.kwargs)]), RowGeometry(R, 4, P, 2)
    first: Any = splice_cache_layer(cache, 0, GEOMETRY, make_splice(3))
    if kind.records_past:
        first.activate_past_recording()
    splice = make_splice(4)
    layer: Any = splice_cache_layer(cache, 0, other, splice)
    assert (type(layer), layer.geometry) == (kind.spliced, other)
    assert getattr(layer, "record_past", False) == kind.records_past
    cache.update(*tokens(3), 0)
    with pytest.raises(CacheMismatchError, match=r"Cache layer 0 holds rows of .*rank=4.*; the model has .*rank=3"):
        splice_cache_layer(cache, 0, GEOMETRY, make_splice(3))
    assert cache.layers[0] is layer
    assert layer.splice is splice
    cache.reset()
    assert splice_cache_layer(cache, 0, GEOMETRY, make_splice(3)).geometry == GEOMETRY


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_stock_layer_with_tokens_is_refused_and_left_alone(kind: Kind) -> None:
    stock = kind.stock(**kind.kwargs)
    stock.update(*tokens(3))
    cache = Cache(layers=[stock])
    with pytest.raises(CacheMismatchError, match="Cache layer 0 already holds 3 tokens stored without the splice"):
        splice_cache_layer(cache, 0, GEOMETRY, make_splice(3))
    assert cache.layers == [stock]


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this release has no fp8 cache")
def test_a_quantised_layer_is_refused_although_it_is_a_dynamic_one() -> None:
    cache = QuantizedCache(backend="fp8", config=build("deepseek_v3").config)
    assert isinstance(cache.layers[0], DynamicLayer)
    with pytest.raises(
        CacheMismatchError, match="Cache layer 0 is a Fp8QuantizedLayer, which cannot hold spliced rows"
    ):
        splice_cache_layer(cache, 0, GEOMETRY, make_splice(3))
    assert not isinstance(cache.layers[0], SplicedLayerMixin)


def test_a_cache_with_too_few_layers_is_refused() -> None:
    cache = StaticCache(build("deepseek_v3").config, max_cache_len=8)
    with pytest.raises(CacheMismatchError, match="2 layers"):
        splice_cache_layer(cache, 2, GEOMETRY, make_splice(3))


@pytest.mark.parametrize("chunk", [WINDOW, 2, 1])
@pytest.mark.parametrize("kind", [KINDS[name] for name in DYNAMIC], ids=DYNAMIC)
def test_gradients_flow_through_stored_rows_as_if_there_were_no_cache(kind: Kind, chunk: int) -> None:
    splice = make_splice(3).requires_grad_(True)
    latents, k_rot = (tensor.requires_grad_() for tensor in tokens(WINDOW))
    leaves = (latents, k_rot, *splice.parameters())

    def gradients(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Not linear, so that a row with a wrong value has a wrong gradient as well.
        return torch.autograd.grad(latent.pow(3).sum() + rotated.pow(3).sum(), leaves)

    is_first = torch.arange(WINDOW)[:, None] < 2
    expected = gradients(torch.where(is_first, latents, splice(latents)), k_rot)
    layer = make_layer(kind, VARIANTS["half_rank"], splice)
    for start in range(0, WINDOW, chunk):
        stop = start + chunk
        found, found_k_rot = layer.update(latents[:, :, start:stop], k_rot[:, :, start:stop])
    for mine, reference in zip(gradients(found.latent(), found_k_rot), expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("trained_tokens", [4, 1, 0], ids=["all", "prompt", "none"])
def test_what_was_read_at_a_step_can_be_differentiated_after_later_steps(trained_tokens: int) -> None:
    layer = make_layer(KINDS["dynamic"], VARIANTS["half_rank"])
    query = torch.ones(2, 1, 1, 3, requires_grad=True)
    inputs = [tokens(1, seed=step) for step in range(4)]
    for latents, _ in inputs[:trained_tokens]:
        latents.requires_grad_()
    scores = [query @ layer.update(*pair)[0].codes.mT for pair in inputs]
    torch.cat(scores, dim=-1).sum().backward()
    # Each token is read once at its own step and once at every later one.
    codes = [layer.splice.encode(latents).detach() for latents, _ in inputs]
    expected = sum((4 - step) * code for step, code in enumerate(codes))
    assert query.grad is not None
    torch.testing.assert_close(query.grad, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", [KINDS[name] for name in GROWING], ids=GROWING)
def test_a_cache_filled_in_inference_mode_can_be_continued_outside_it(kind: Kind) -> None:
    layer = make_layer(kind, VARIANTS["half_rank"])
    with torch.inference_mode():
        for _ in range(3):
            layer.update(*tokens(1))
    with torch.no_grad():
        latent, _ = layer.update(*tokens(1))
    assert latent.rows.shape[2] == 4


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_copied_cache_goes_its_own_way_with_the_same_projection(kind: Kind) -> None:
    cache, splice = Cache(layers=[kind.stock(**kind.kwargs)]), make_splice(3)
    splice_cache_layer(cache, 0, GEOMETRY, splice)
    cache.update(*tokens(2), 0)
    cache.update(*tokens(1), 0)
    twin = copy.deepcopy(cache)
    assert twin.layers[0].splice is cache.layers[0].splice is splice
    # Both go on from the same prompt, one after the other, as with a prompt that is computed once.
    alone = copy.deepcopy(cache)
    expected = alone.update(*tokens(1, seed=7), 0)[0].latent().clone()
    twin.update(*tokens(1, seed=8), 0)
    assert torch.equal(cache.update(*tokens(1, seed=7), 0)[0].latent(), expected)


def test_a_cache_copied_along_with_its_projection_refers_to_the_copy() -> None:
    cache, splice = DynamicCache(), make_splice(3)
    splice_cache_layer(cache, 0, GEOMETRY, splice)
    copied_splice, copied_cache = copy.deepcopy((splice, cache))
    assert copied_splice is not splice
    assert copied_cache.layers[0].splice is copied_splice


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_pickled_cache_carries_neither_weights_nor_masks(kind: Kind) -> None:
    cache, splice = Cache(layers=[kind.stock(**kind.kwargs)]), make_splice(3)
    for parameter in splice.parameters():
        parameter.uniform_(1, 2)
    layer = splice_cache_layer(cache, 0, GEOMETRY, splice)
    cache.update(*tokens(3), 0)
    layer.attention_mask = torch.full((2, 7), 123456789)
    content = pickled(cache)
    assert layer.keys.numpy().tobytes()[:16] in content  # the rows are there, and found in this way
    for parameter in splice.parameters():
        assert parameter.numpy().tobytes()[:16] not in content
    assert layer.attention_mask.numpy().tobytes()[:16] not in content
    assert unpickled(content).layers[0].attention_mask is None
    assert layer.splice is splice


@torch.no_grad()
def test_a_compressed_latent_reports_the_shape_of_its_codes_and_moves_whole() -> None:
    layer = make_layer(KINDS["dynamic"], VARIANTS["half_rank"])
    latent, _ = layer.update(*tokens(4))
    assert latent.shape == (2, 1, 4, 3)
    moved = latent.to("meta")
    assert moved.rows.device.type == moved.exact.latents.device.type == moved.exact.positions.device.type == "meta"
    assert (moved.splice, moved.new_tokens, moved.first_row) == (latent.splice, 4, 0)

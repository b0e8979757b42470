"""C++ on all key heads of a layer in one call: what PyTorch computes head by head."""

import shutil
from typing import Any, NamedTuple

import pytest
import torch

from kvsplice_hf import LearnedKVSplice, RowCodec, TrellisCodec
from kvsplice_hf.attend import choice
from kvsplice_hf.attend import heads as heads_choice
from kvsplice_hf.attend.backend import HeadsStep
from kvsplice_hf.attend.native import heads as native
from kvsplice_hf.attend.native.backend import NativeBackend
from kvsplice_hf.attend.native.reading import read_heads
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.heads import CompressedHeads, exact_heads, round_trip
from kvsplice_hf.cache.turns import Turns
from kvsplice_hf.code.heads import HeadSplices, turns_for
from kvsplice_hf.code.keys import KeyProjection, half_pairs
from kvsplice_hf.errors import ConfigError, UnsupportedError


pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
LOWEST = torch.finfo(torch.float32).min


class Kind(NamedTuple):
    """How the heads of a layer are coded.

    `coded_keys`: before their rotation, in a basis; otherwise number by number. `block`: numbers that share that basis.
    """

    coded_keys: bool = True
    predicted: bool = True
    trellis: bool = True
    block: int = 64
    widths: tuple[int, ...] = (4, 6, 3, 0, 7, 1, 5)
    merged: bool = False


KINDS = {
    "as calibration makes them": Kind(),
    "blocks of 2": Kind(block=2),
    "values by themselves": Kind(predicted=False),
    "rounded": Kind(trellis=False, predicted=False),
    "some numbers as they are": Kind(widths=(16, 4, 3, 16, 8, 5)),
    "keys number by number": Kind(coded_keys=False, predicted=False),
    "merged": Kind(merged=True),
}
# Sequences, key heads, queries of each, numbers of a value and of a key, stored rows.
SIZES = {
    "grouped": (1, 3, 3, 64, 64, 300),
    "batch": (3, 2, 2, 16, 24, 70),
    "one head": (1, 1, 7, 32, 16, 600),
    "own keys": (2, 5, 1, 8, 8, 129),
    "one row": (1, 2, 2, 16, 16, 1),
}


def splice_of(kind: Kind, value: int, key: int, seed: int) -> LearnedKVSplice:
    """One head; of each other widths, so that no two have the same."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    shifted = kind.widths[seed % len(kind.widths) :] + kind.widths[: seed % len(kind.widths)]
    widths = torch.tensor([shifted[index % len(shifted)] for index in range(value + key)])
    if kind.coded_keys:
        kept = widths > 0
    else:
        kept = torch.cat([widths[:value] > 0, torch.ones(key, dtype=torch.bool)])
    rank, coded = int(kept[:value].sum()), int(kept[value:].sum())
    predicted = coded if kind.predicted else 0
    splice = LearnedKVSplice(value, rank, predicted_from=predicted)
    dim = rank + coded
    with torch.no_grad():
        splice.transform_shift.copy_(random(value) / 4)
        splice.transform_scale.copy_(random(value) / 4)
        splice.compress.weight.copy_(random(rank, value) / value**0.5)
        splice.expand.weight.copy_(random(value, rank + predicted) / value**0.5)
    make = TrellisCodec if kind.trellis else RowCodec
    sigmas = 0.5 + torch.rand(rank, generator=generator)
    splice.codec = make(widths[kept], 1 + torch.rand(dim, generator=generator), random(dim) / 4, sigmas, None)
    if kind.coded_keys:
        splice.keys = KeyProjection(key, coded)
        pairs = half_pairs(torch.arange(key // 2))
        number = torch.arange(key) % (key // 2) * 2 // kind.block
        column = torch.arange(coded) * key // coded // kind.block
        expand = random(key, coded) / key**0.5 * (number[:, None] == column)
        with torch.no_grad():
            splice.keys.mean.copy_(random(key) / 4)
            splice.keys.compress.weight.copy_(random(coded, key) / key**0.5)
            splice.keys.expand.weight.copy_(expand)
            splice.keys.pairs.copy_(pairs)
    if kind.merged:
        splice.merge()
    return splice


class Layer(NamedTuple):
    """Key heads, the states that were stored, and their rows."""

    splices: HeadSplices
    values: torch.Tensor
    keys: torch.Tensor
    turns: torch.Tensor | None
    rows: torch.Tensor
    query: torch.Tensor

    def compressed(self, exact: ExactTokens | None = None) -> CompressedHeads:
        turns = None
        if self.turns is not None:
            batch, _, count, _ = self.turns.shape
            slots = torch.arange(batch * count, dtype=torch.int32).view(batch, count)
            turns = Turns(self.turns.flatten(0, 2).T.contiguous(), slots)
        return CompressedHeads(self.rows, self.splices, exact, 1, self.rows.shape[2] - 1, self.query.dtype, None, turns)


def layer_of(kind: Kind, size: str, dtype: torch.dtype = torch.float32) -> Layer:
    batch, heads, group, value, key, count = SIZES[size]
    splices = HeadSplices([splice_of(kind, value, key, seed) for seed in range(heads)]).to(dtype).eval()
    generator = torch.Generator().manual_seed(9)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    # As models hand them over: heads side by side in a projection's output.
    values = random(batch, count, heads, value).transpose(1, 2)
    keys = random(batch, count, heads, key).transpose(1, 2)
    turns = None
    if kind.coded_keys:
        turns = torch.randint(0, 64, (batch, 1, count, key // 2), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        parts = zip(splices, splices.split(values, keys), strict=True)
        rows = torch.cat([head.rows(*part, turns_for(head, turns)) for head, part in parts], dim=-1)
    return Layer(splices, values, keys, turns, rows, random(batch, heads * group, 1, key))


def step_of(layer: Layer, compressed: CompressedHeads, **more: Any) -> HeadsStep:
    exact = compressed.exact
    given = {
        "query": layer.query,
        "rows": compressed.rows,
        "splices": layer.splices,
        "identity": "",
        "turns": compressed.turns,
        "exact": None if exact is None else exact.latents,
        "positions": None if exact is None else exact.positions,
        "bias": None,
        "sinks": None,
        "scaling": layer.query.shape[-1] ** -0.5,
    }
    return HeadsStep(**(given | more))


def decoded(step: HeadsStep) -> torch.Tensor:
    with torch.no_grad():
        return native.decode_heads(step, native.prepare_heads(step.splices, ""))


def read_by_pytorch(compressed: CompressedHeads) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [B, K, S, d] and values [B, K, S, v], head by head."""
    with torch.no_grad():
        keys, values = [head.k_rot for head in compressed.heads], [head.latent() for head in compressed.heads]
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def by_softmax(layer: Layer, compressed: CompressedHeads, bias: Any = None, sinks: Any = None) -> torch.Tensor:
    """[B, 1, H, v], over all keys and values as PyTorch reads them, in double precision."""
    keys, values = (tensor.double() for tensor in read_by_pytorch(compressed))
    group = layer.query.shape[1] // keys.shape[1]
    keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (keys, values))
    scores = layer.query.double() @ keys.transpose(2, 3) * layer.query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[:, None]
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(scores.shape[0], -1, -1, 1)], dim=-1)
    shares = torch.softmax(scores, dim=-1)[..., : keys.shape[2]]
    return (shares @ values).transpose(1, 2)


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Float32 results, within a share of the largest number."""
    assert found.dtype is torch.float32
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).abs().max()) <= share * float(expected.abs().max())


def tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype is torch.float32 else 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_over_all_heads_is_softmax_over_what_their_rows_hold(kind: str, size: str, dtype: torch.dtype) -> None:
    layer = layer_of(KINDS[kind], size, dtype)
    compressed = layer.compressed()
    assert_near(decoded(step_of(layer, compressed)), by_softmax(layer, compressed), tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["as calibration makes them", "keys number by number"])
def test_exact_tokens_padding_and_sinks_count(kind: str, dtype: torch.dtype) -> None:
    layer = layer_of(KINDS[kind], "batch", dtype)
    batch, count = layer.rows.shape[0], layer.rows.shape[2]
    positions = torch.tensor([[0, 1, 5], [7, 8, 9], [2, 3, 2**31 - 1]])[:batch]  # the last slot is not filled
    states = exact_heads(layer.values, layer.keys)[:, 0]
    latents = states.gather(1, positions.clamp(max=count - 1)[..., None].expand(-1, -1, states.shape[-1])) * 2
    compressed = layer.compressed(ExactTokens(latents, positions))
    bias = torch.zeros(batch, 1, count)
    bias[1, :, :7] = LOWEST
    bias[0, :, 20:30] = -1.5
    sinks = torch.linspace(-2, 3, layer.query.shape[1])
    found = decoded(step_of(layer, compressed, bias=bias, sinks=sinks))
    assert_near(found, by_softmax(layer, compressed, bias, sinks), tolerance(dtype))
    without = decoded(step_of(layer, layer.compressed()))
    assert (found - without).abs().max() > 0.01  # all of them matter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_back_as_pytorch_reads_them(kind: str, size: str, dtype: torch.dtype) -> None:
    layer = layer_of(KINDS[kind], size, dtype)
    compressed = layer.compressed()
    with torch.no_grad():
        found = read_heads(native.prepare_heads(layer.splices, ""), layer.rows, compressed.turns, dtype)
    for states, expected in zip(found, read_by_pytorch(compressed), strict=True):
        assert states.dtype is dtype
        assert states.shape == expected.shape
        assert (states - expected).abs().max() <= tolerance(dtype) / 3 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_reads_exact_tokens_in_their_places(dtype: torch.dtype) -> None:
    layer = layer_of(Kind(), "batch", dtype)
    positions = torch.tensor([[0, 1, 5], [7, 8, 9], [2, 3, 2**31 - 1]])
    states = exact_heads(layer.values, layer.keys)[:, 0]
    kept = states.gather(1, positions.clamp(max=states.shape[1] - 1)[..., None].expand(-1, -1, states.shape[-1])) * 2
    compressed = layer.compressed(ExactTokens(kept, positions))
    with torch.no_grad():
        keys, values = compressed.keys_and_values()
    expected_keys, expected_values = read_by_pytorch(compressed)
    assert torch.equal(values[1, :, 7:10], 2 * layer.values[1, :, 7:10])
    assert (keys - expected_keys).abs().max() <= tolerance(dtype) / 3 * expected_keys.abs().max()
    assert (values - expected_values).abs().max() <= tolerance(dtype) / 3 * expected_values.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache_states_come_back_as_with_one(kind: str) -> None:
    layer = layer_of(KINDS[kind], "batch")
    with torch.no_grad():
        values, keys = round_trip(layer.splices, layer.values, layer.keys, layer.turns)
        known = native.prepare_heads(layer.splices, "")
        rows = native.encode_heads(known, layer.values, layer.keys, layer.turns)
        with_cache = layer._replace(rows=rows).compressed().keys_and_values()
    assert torch.equal(keys, with_cache[0])
    assert torch.equal(values, with_cache[1])


def test_without_a_cache_gradients_go_through_pytorch() -> None:
    layer = layer_of(Kind(), "batch")
    values = layer.values.clone().requires_grad_()
    with_gradient, _ = round_trip(layer.splices, values, layer.keys, layer.turns)
    with_gradient.sum().backward()
    assert values.grad is not None
    assert values.grad.abs().max() > 0
    assert next(iter(layer.splices)).expand.weight.grad is not None


def test_rows_of_other_sizes_are_not_read() -> None:
    layer = layer_of(Kind(), "batch")
    known, turns = native.prepare_heads(layer.splices, ""), layer.compressed().turns
    for rows in (layer.rows[..., 1:], layer.rows[:, 0], layer.rows.float(), layer.rows[:, :, :0]):
        with pytest.raises(ConfigError, match="key heads of"):
            read_heads(known, rows, turns, torch.float32)
    with pytest.raises(ConfigError, match="float16"):
        read_heads(known, layer.rows, turns, torch.float16)
    with pytest.raises(ConfigError, match="rotations"):
        read_heads(known, layer.rows, None, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_are_coded_as_pytorch_codes_them(kind: str, size: str, dtype: torch.dtype) -> None:
    layer = layer_of(KINDS[kind], size, dtype)
    with torch.no_grad():
        known = native.prepare_heads(layer.splices, "")
        rows = native.encode_heads(known, layer.values, layer.keys, layer.turns)
    assert rows.shape == layer.rows.shape
    start = 0
    for head in layer.splices:
        assert head.codec is not None
        found, expected = (part[..., start : start + head.codec.row_bytes] for part in (rows, layer.rows))
        start += head.codec.row_bytes
        # Of two paths along a trellis that are nearly as close either may be taken; bf16 decides by its last digit.
        assert (found != expected).float().mean() < (0.02 if dtype is torch.float32 else 0.3)
        scale = head.codec.unpack(expected).abs().amax()
        error = (head.codec.unpack(found) - head.codec.unpack(expected)).square().mean().sqrt()
        assert error < (0.05 if dtype is torch.float32 else 0.2) * scale


def test_one_thread_and_several_compute_the_same() -> None:
    layer = layer_of(KINDS["as calibration makes them"], "one head")
    step, threads = step_of(layer, layer.compressed()), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(decoded(step))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert_near(other, found[0], 1e-5)


@pytest.mark.parametrize("write", ["in place", "behind the back of autograd", "another tensor"])
def test_what_is_written_to_the_splices_is_seen_at_the_next_step(write: str) -> None:
    layer = layer_of(KINDS["as calibration makes them"], "batch")
    step = step_of(layer, layer.compressed())
    before = decoded(step)
    for head in layer.splices:
        assert head.keys is not None
        for weight in (head.keys.expand.weight, head.transform_scale):
            with torch.no_grad():
                if write == "in place":
                    weight.mul_(1.5)
                elif write == "another tensor":
                    weight.data = weight.data * 1.5
                else:
                    weight.data.mul_(1.5)
    found = decoded(step)
    assert (found - before).abs().max() > 0.01
    assert_near(found, by_softmax(layer, layer.compressed()), 1e-4)


def test_a_splice_in_the_place_of_another_is_seen_at_the_next_step() -> None:
    layer = layer_of(KINDS["as calibration makes them"], "batch")
    decoded(step_of(layer, layer.compressed()))
    other = layer_of(KINDS["blocks of 2"], "batch")
    layer.splices.heads = other.splices.heads
    other = other._replace(splices=layer.splices, query=layer.query)
    assert_near(decoded(step_of(other, other.compressed())), by_softmax(other, other.compressed()), 1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda splices: splices.half(), "float16"),
        (lambda splices: setattr(next(iter(splices)), "code_norm", torch.nn.LayerNorm(3)), "normalise"),
        (lambda splices: splices.to("meta"), "meta"),
    ],
    ids=["half precision", "a norm", "meta"],
)
def test_heads_that_the_library_does_not_read_are_refused_with_a_reason(change: Any, reason: str) -> None:
    splices = layer_of(KINDS["as calibration makes them"], "batch").splices
    change(splices)
    with pytest.raises(UnsupportedError, match=reason):
        native.prepare_heads(splices, "another")


def test_heads_that_only_pytorch_reads_are_left_to_it() -> None:
    """A gain of their own for keys that values are predicted from."""
    layer = layer_of(KINDS["as calibration makes them"], "batch")
    for head in layer.splices:
        codec: Any = head.codec
        key_sigmas = torch.ones(codec.row_dim - len(codec.sigmas))
        head.codec = type(codec)(codec.widths, codec.scales, codec.centres, codec.sigmas, key_sigmas)
    with pytest.raises(UnsupportedError, match="shares a gain"):
        native.prepare_heads(layer.splices, "")
    step, expected = step_of(layer, layer.compressed()), torch.zeros(3, 1, 4, 16)
    with torch.no_grad():
        assert heads_choice.decode_heads(step, lambda: expected) is expected
        assert "shares a gain" in str(heads_choice.refusal_of_heads([step.query], layer.splices))


@pytest.mark.parametrize(
    "change",
    [
        lambda step: {"rows": step.rows[..., :-1]},
        lambda step: {"rows": step.rows[:1]},
        lambda step: {"query": step.query[..., :-2]},
        lambda step: {"query": step.query[:, :-1]},
        lambda step: {"turns": None},
        lambda step: {"turns": (step.turns[0], step.turns[1][:, :-1])},
        lambda step: {"turns": (step.turns[0][:-1], step.turns[1])},
        lambda step: {"sinks": torch.zeros(3)},
        lambda step: {"bias": torch.zeros(1, 1, 3)},
        lambda step: {"exact": torch.zeros(3, 2, 5), "positions": torch.zeros(3, 2, dtype=torch.int64)},
    ],
)
def test_tensors_that_would_be_read_beyond_are_refused(change: Any) -> None:
    layer = layer_of(KINDS["as calibration makes them"], "batch")
    step = step_of(layer, layer.compressed())
    with pytest.raises(ConfigError):
        decoded(step._replace(**change(step)))


def test_states_that_do_not_fit_are_refused() -> None:
    layer = layer_of(KINDS["as calibration makes them"], "batch")
    known = native.prepare_heads(layer.splices, "")
    for values, keys, turns in (
        (layer.values[:, :1], layer.keys, layer.turns),
        (layer.values[..., :-1], layer.keys, layer.turns),
        (layer.values, layer.keys, None),
        (layer.values, layer.keys[:, :, :-1], layer.turns),
    ):
        with pytest.raises(ConfigError):
            native.encode_heads(known, values, keys, turns)


def test_a_step_whose_result_differs_is_left_to_pytorch(monkeypatch: Any, caplog: Any) -> None:
    layer = layer_of(KINDS["as calibration makes them"], "batch")
    step = step_of(layer, layer.compressed())
    monkeypatch.setattr(choice, "_verdicts", {})
    monkeypatch.setattr(NativeBackend, "decode_heads", lambda self, step, known: native.decode_heads(step, known) + 1)
    expected = by_softmax(layer, layer.compressed()).float()
    with torch.no_grad():
        found = heads_choice.decode_heads(step, lambda: expected)
        again = heads_choice.decode_heads(step, lambda: expected)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert "decode_heads" in caplog.text

"""Attention over all key heads of a layer in one call, in PyTorch and in Triton; devices as in `test_kernels`."""

from typing import Any, NamedTuple

import pytest
import torch


pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from test_coded_key_kernels import random  # noqa: E402
from test_kernels import DTYPES, LOWEST, WIDTH_PATTERNS, assert_same, on_devices, pass_in_the_interpreter  # noqa: E402
from test_ordinary import packed, tokens  # noqa: E402
from test_ordinary import step_by_step as step_by_step_of  # noqa: E402

from kvsplice_hf import ConfigError, RowCodec, UnsupportedError  # noqa: E402
from kvsplice_hf.attend import choice as dispatch  # noqa: E402
from kvsplice_hf.attend import reference  # noqa: E402
from kvsplice_hf.attend.backend import CodedKeys, HeadRows  # noqa: E402
from kvsplice_hf.attend.triton import backend as triton_backend  # noqa: E402
from kvsplice_hf.attend.triton import calls as kernels  # noqa: E402
from kvsplice_hf.attend.triton import head_tables  # noqa: E402
from kvsplice_hf.attend.triton.calls import attend_heads  # noqa: E402
from kvsplice_hf.code import trellis  # noqa: E402
from kvsplice_hf.code.keys import (  # noqa: E402
    TURN_STEPS,
    Pairs,
    half_pairs,
    neighbour_pairs,
    not_turned,
    redo_turns,
)
from kvsplice_hf.code.trellis import TrellisCodec  # noqa: E402


SLOTS = 50
GAINS = {"none": (False, False), "of values": (True, False), "two": (True, True)}
CODECS: dict[str, type[RowCodec]] = {"plain": RowCodec, "trellis": TrellisCodec}
WIDTHS = ("odd fields", "every width", "four bits", "raw numbers", "whole bytes")


@pytest.mark.skipif(kernels.interpreted(), reason="this is the process that it starts")
def test_the_kernels_pass_these_tests_in_the_interpreter() -> None:
    pass_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def _packed_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are compared with takes nothing of theirs."""
    monkeypatch.setattr(trellis, "_fastest", trellis.closest_codes)


class Layer(NamedTuple):
    """A layer of the table. Its key heads differ in ranks, in widths and, where `gains` is "mixed", in gains.

    Attributes:
        group: G.
        size: d, and the most numbers of a value's code.
        heads: K.
        batch, rows: B and S.
        codec: a name of `CODECS`.
        gains: a name of `GAINS`, or "mixed".
        predicted: whether values are decoded from the codes of keys as well; "some": those of every other head.
        pairs: which numbers of a key are turned together.
    """

    group: int = 3
    size: int = 16
    heads: int = 3
    batch: int = 2
    rows: int = 70
    codec: str = "plain"
    gains: str = "of values"
    predicted: bool | str = False
    pairs: str = "halves"

    def codec_of(self, head: int) -> RowCodec:
        r, p = self.size - head % 3, self.size - 2 * (head % 2)
        widths = torch.tensor((WIDTH_PATTERNS[WIDTHS[head % len(WIDTHS)]] * (r + p))[: r + p])
        scales = torch.where(widths == 0, 0.0, 2 + random(r + p, seed=10 + head).abs())  # may be anything at width 0
        gains = list(GAINS.values())[head % 3] if self.gains == "mixed" else GAINS[self.gains]
        of_value, of_key = (torch.ones(size if has else 0) for size, has in zip((r, p), gains, strict=True))
        centres = 0.3 * random(r + p, seed=20 + head)
        return CODECS[self.codec](widths, scales, centres, 0.7 * of_value, 1.3 * of_key)

    def pairs_of(self, head: int) -> torch.Tensor:
        columns = torch.arange(self.size // 2)
        if self.pairs == "partial":
            return half_pairs(torch.where(columns < self.size // 4, columns, -1))
        made = {"halves": half_pairs, "neighbours": neighbour_pairs, "none": not_turned}
        return (neighbour_pairs if self.pairs == "mixed" and head % 2 else made.get(self.pairs, half_pairs))(columns)

    def value_dim(self, head: int, codec: RowCodec) -> int:
        predicted = head % 2 == 0 if self.predicted == "some" else bool(self.predicted)
        return codec.row_dim if predicted else self.size - head % 3

    def make(self, device: str, dtype: torch.dtype = torch.float32) -> list[HeadRows]:
        """Rows of all heads side by side, in a larger buffer."""
        angles = torch.randint(0, TURN_STEPS, (self.size // 2, SLOTS + 9), generator=torch.Generator().manual_seed(3))
        slots = torch.randint(0, SLOTS, (self.batch, self.rows + 2), generator=torch.Generator().manual_seed(4))
        if self.pairs in ("partial", "none"):
            angles[self.pairs_of(0)[2] < 0] = 0
        table = angles.to(torch.uint8).to(device)[:, 4 : 4 + SLOTS]
        of_rows = slots.to(torch.int32).to(device)[:, : self.rows]
        codecs = [self.codec_of(head) for head in range(self.heads)]
        sizes = [codec.row_bytes for codec in codecs]
        buffer = torch.full((self.batch, self.rows + 3, sum(sizes)), 255, dtype=torch.uint8)
        made = []
        for head, (codec, part) in enumerate(zip(codecs, buffer.split(sizes, dim=-1), strict=True)):
            part[:, : self.rows] = codec.pack(self.numbers(head, codec))
        for head, (codec, part) in enumerate(zip(codecs, buffer.to(device).split(sizes, dim=-1), strict=True)):
            p = codec.row_dim - (self.size - head % 3)
            expand = (random(self.size, p, seed=40 + head) / p**0.5).to(dtype).to(device)
            mean, pairs = random(self.size, seed=50 + head).to(dtype).to(device), self.pairs_of(head).to(device)
            keys = CodedKeys(expand, mean, pairs, table, of_rows)
            made.append(HeadRows(part[:, : self.rows], codec.to(device), self.value_dim(head, codec), keys))
        return made

    def numbers(self, head: int, codec: RowCodec) -> torch.Tensor:
        """Values and keys that differ in size from row to row."""
        sizes = random(2, self.batch, self.rows, 1, seed=60 + head).clamp(-1, 1).exp()
        r = self.size - head % 3
        value, key = random(self.batch, self.rows, codec.row_dim, seed=70 + head).split([r, codec.row_dim - r], -1)
        return torch.cat([value * sizes[0], key * sizes[1]], -1)

    def query(self, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        query = random(self.batch, self.heads * self.group, self.size, seed=7) / (2 * self.size**0.5)
        return query.to(dtype).to(device)


def step_by_step(
    query: torch.Tensor, heads: list[HeadRows], bias: torch.Tensor | None = None, scaling: float = 1.0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every row unpacked, every key turned, one softmax."""
    found = []
    for part, (rows, codec, value_dim, keys) in zip(query.float().chunk(len(heads), dim=1), heads, strict=True):
        assert isinstance(codec, RowCodec)
        numbers = codec.unpack(rows)
        key = numbers[..., value_dim:]
        if keys is not None:
            key = numbers[..., keys.start(codec) :] @ keys.expand.float().T + keys.mean.float()
            key = redo_turns(key, keys.turns().permute(1, 2, 0), Pairs(*keys.pairs))
        scores = scaling * part.double() @ key.double().transpose(1, 2)
        scores = scores if bias is None else scores + bias[:, None].double()
        mixed = torch.softmax(scores, -1) @ numbers[..., :value_dim].double()
        found.append((mixed.float(), torch.logsumexp(scores, -1).float()))
    return found


def assert_all_same(found: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(tuple(one), tuple(other), dtype)


LAYERS = [
    *(Layer(group=group, size=size) for group in (1, 3, 4) for size in (16, 64)),
    *(Layer(codec="trellis", gains=gains) for gains in (*GAINS, "mixed")),
    *(Layer(gains=gains, predicted="some") for gains in (*GAINS, "mixed")),
    *(
        Layer(size=64, heads=2, codec="trellis", gains="two", predicted=predicted)
        for predicted in (True, False, "some")
    ),
    *(Layer(pairs=pairs) for pairs in ("neighbours", "mixed", "partial", "none")),
    # One head of all queries, more queries than a block; all patterns of widths; one row; a value of two chunks.
    Layer(group=21, heads=1),
    Layer(heads=7, group=1, batch=1),
    Layer(rows=1, batch=3),
    Layer(group=2, size=150, heads=2, batch=1, rows=20, gains="two", predicted=True),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_pytorch_scores_keys_and_mixes_values(layer: Layer) -> None:
    heads, query = layer.make("cpu"), layer.query("cpu")
    bias = masked((layer.batch, layer.rows), "cpu")
    found = reference.attend_heads(query, heads, bias, scaling=0.8)
    assert_all_same(found, step_by_step(query, heads, bias, 0.8))


def masked(shape: tuple[int, int], device: str) -> torch.Tensor:
    """A bias that hides the first rows, as in left padding, in each sequence another number of them."""
    bias = random(*shape, seed=5)
    for sequence, line in enumerate(bias):
        line[: shape[1] // (3 + sequence)] = LOWEST
    return bias.to(device)


@on_devices("layer", [(layer,) for layer in LAYERS])
def test_all_heads_of_a_layer_are_read_as_pytorch_reads_them(device: str, layer: Layer) -> None:
    heads, query = layer.make(device), layer.query(device)
    assert_all_same(attend_heads(query, heads, scaling=0.8), step_by_step(query, heads, scaling=0.8))


@on_devices("dtype", [(dtype,) for dtype in DTYPES[1:]])
def test_queries_and_bases_may_be_of_any_type(device: str, dtype: torch.dtype) -> None:
    layer = Layer(size=64, gains="two", predicted="some")
    heads, query = layer.make(device, dtype), layer.query(device, dtype)
    assert_all_same(attend_heads(query, heads), step_by_step(query, heads), dtype)


@on_devices("splits, batches", [(1, 2), (3, 2), (5, 1), (9, 2), (None, None)])
def test_splits_and_biases_change_nothing_else(device: str, splits: int | None, batches: int | None) -> None:
    layer = Layer(rows=300, predicted="some", gains="mixed")
    heads, query = layer.make(device), layer.query(device)
    bias = None if batches is None else masked((batches, layer.rows), device)
    expected = step_by_step(query, heads, bias)
    assert_all_same(attend_heads(query, heads, bias, splits), expected)
    if bias is not None:
        assert_all_same(attend_heads(query, heads, bias.T.contiguous().T, splits), expected)


@on_devices("", [()])
def test_without_a_row_nothing_is_mixed(device: str) -> None:
    layer = Layer(rows=2)
    heads: Any = layer.make(device)
    slots = heads[0].keys.slots[:, :0]
    heads = [head._replace(rows=head.rows[:, :0], keys=head.keys._replace(slots=slots)) for head in heads]
    for mixed, lse in attend_heads(layer.query(device), heads):
        assert (mixed == 0).all()
        assert (lse == -torch.inf).all()


@on_devices("", [()])
def test_what_is_kept_is_made_anew_when_a_parameter_has_changed(device: str) -> None:
    layer = Layer(predicted=True, gains="two")
    heads, query = layer.make(device), layer.query(device)

    def agrees() -> None:
        assert_all_same(attend_heads(query, heads), step_by_step(query, heads))

    agrees()
    last: Any = heads[-1]
    last.codec.scales.mul_(1.5)
    agrees()
    last.codec.centres.add_(0.1)
    agrees()
    last.keys.expand.mul_(0.5)
    agrees()
    last.keys.mean.data = last.keys.mean + 1
    agrees()
    heads[-1] = last._replace(keys=last.keys._replace(expand=2 * last.keys.expand))
    agrees()
    before: Any = heads[0].codec
    before.widths.copy_(before.widths.flip(0))  # as loading does
    before._add_tables()
    agrees()


@on_devices("", [()])
def test_what_is_kept_is_used_as_long_as_nothing_changes_and_goes_with_its_layer(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(head_tables, "_make", lambda *args, make=head_tables._make: made.append(1) or make(*args))
    before = len(head_tables._kept)
    heads, query = Layer().make(device), Layer().query(device)
    for _ in range(3):
        attend_heads(query, heads)
    assert len(made) == 1
    assert len(head_tables._kept) == before + 1
    del heads
    assert len(head_tables._kept) == before


@on_devices("", [()])
def test_tensors_of_inference_mode_are_read_anew_each_time(device: str) -> None:
    """Nobody counts how often these were written to."""
    with torch.inference_mode():
        heads, query = Layer().make(device), Layer().query(device)
        attend_heads(query, heads)
        codec: Any = heads[1].codec
        codec.scales.mul_(1.5)
        assert_all_same(attend_heads(query, heads), step_by_step(query, heads))


@on_devices("", [()])
def test_calls_are_served_by_the_kernel_of_all_heads(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(triton_backend, "_triton_kernels", lambda: kernels)
    layer = Layer(predicted="some", codec="trellis")
    heads, query = layer.make(device), layer.query(device)
    expected = step_by_step(query, heads, scaling=0.5)
    for _ in range(2):  # the first call is computed both ways
        assert_all_same(dispatch.attend_heads(query, heads, None, scaling=0.5), expected)
    assert list(dispatch._verdicts.values()) == [True]
    assert next(iter(dispatch._verdicts))[0] == "attend_heads"


@on_devices("name", [("llama",), ("gpt_oss",), ("glm4",)])
def test_a_patched_model_takes_its_steps_by_the_kernel(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With learned sinks, exact tokens, windows, and keys of which half is turned."""
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(triton_backend, "_triton_kernels", lambda: kernels)
    ids = tokens(2, 15).to(device)
    found = [
        step_by_step_of(packed(name, **settings).to(device), ids)[0] for settings in ({}, {"attention": "expanded"})
    ]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    served = {kind[0]: verdict for kind, verdict in dispatch._verdicts.items()}
    assert served["attend_heads"] is True
    assert "attend" not in served


def without_keys(heads: list[HeadRows]) -> list[HeadRows]:
    """The same rows, as if their keys had been coded number by number."""
    return [HeadRows(rows, codec, codec.row_dim - 16, None) for rows, codec, _, _ in heads]  # type: ignore[attr-defined]


@on_devices("", [()])
def test_keys_that_were_coded_number_by_number_are_left_to_pytorch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_verdicts", {})
    layer = Layer(heads=1)
    heads, query = without_keys(layer.make(device)), layer.query(device)
    assert_all_same(dispatch.attend_heads(query, heads, None, scaling=1.0), step_by_step(query, heads))
    assert dispatch._verdicts == {}
    with pytest.raises(ConfigError, match=r"key head 0 .* no keys that were coded before their rotation"):
        attend_heads(query, heads)


def test_a_wrong_kernel_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    layer = Layer()
    heads, query = layer.make("cpu"), layer.query("cpu")

    class Wrong:
        calls = 0

        def kernels_available(self, device: torch.device) -> bool:
            return True

        def attend_heads(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return [(mixed + 1, lse) for mixed, lse in reference.attend_heads(*args, **kwargs)]

    wrong = Wrong()
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(triton_backend, "_triton_kernels", lambda: wrong)
    monkeypatch.setattr(triton_backend, "_IN_INTERPRETER", True)
    for _ in range(3):
        found = dispatch.attend_heads(query, heads, None, scaling=1.0)
        assert_all_same(found, step_by_step(query, heads))
    assert wrong.calls == 1
    assert "attend_heads" in caplog.text
    assert "differs from that of PyTorch" in caplog.text


def test_gradients_of_queries_and_keys_are_those_of_the_decoded_rows() -> None:
    layer = Layer(predicted="some", gains="two")
    heads = layer.make("cpu")
    gradients = []
    for attend in (lambda query: dispatch.attend_heads(query, heads, None, scaling=1.0), lambda q: unpacked(q, heads)):
        query = layer.query("cpu").requires_grad_()
        expands = [head.keys.expand.requires_grad_() for head in heads if head.keys is not None]
        total = sum((mixed.square().sum() + lse.sum() for mixed, lse in attend(query)), torch.zeros(()))
        gradients.append(torch.autograd.grad(total, [query, *expands]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def unpacked(query: torch.Tensor, heads: list[HeadRows]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return step_by_step(query, heads)


def along_a_trellis(codec: RowCodec) -> RowCodec:
    tables = (codec.widths, codec.scales, codec.centres, codec.sigmas, codec.key_sigmas)
    return TrellisCodec(*tables)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a query of other heads": (lambda q, h: (q[:, 1:], h), ConfigError, r"\[2, 8, 16\] for 3 key heads"),
    "a query of another size": (lambda q, h: (q[..., 1:], h), ConfigError, "queries of 15 numbers for keys of 16"),
    "a query of another batch": (lambda q, h: (q[:1], h), ConfigError, r"needed \[1, S, bytes\]"),
    "a query of integers": (lambda q, h: (q.long(), h), ConfigError, "queries torch.int64"),
    "rows that were copied": (
        lambda q, h: (q, [h[0], h[1]._replace(rows=h[1].rows.clone()), h[2]]),
        ConfigError,
        "key head 1 that do not lie beside",
    ),
    "rows in another order": (lambda q, h: (q, [h[0], h[2], h[1]]), ConfigError, "do not lie beside"),
    "rows of numbers": (
        lambda q, h: (q, [h[0], h[1]._replace(rows=h[1].rows.float()), h[2]]),
        ConfigError,
        "torch.float32 .* of key head 1",
    ),
    "angles of another table": (
        lambda q, h: (q, [h[0], h[1]._replace(keys=h[1].keys._replace(table=h[1].keys.table.clone())), h[2]]),
        ConfigError,
        "another table of angles",
    ),
    "slots of fewer rows": (
        lambda q, h: (q, [p._replace(keys=p.keys._replace(slots=h[0].keys.slots[:, 1:])) for p in h]),
        ConfigError,
        r"needed int32 \[2, 70\]",
    ),
    "a basis that is elsewhere": (
        lambda q, h: (q, [*h[:2], h[2]._replace(keys=h[2].keys._replace(expand=h[2].keys.expand.to("meta")))]),
        ConfigError,
        "one device",
    ),
    "codecs of two kinds": (
        lambda q, h: (q, [h[0], h[1]._replace(codec=along_a_trellis(h[1].codec)), h[2]]),
        ConfigError,
        "in a layer; needed one",
    ),
    "a value of another size": (lambda q, h: (q, [h[0]._replace(value_dim=9), *h[1:]]), ConfigError, "needed 9 of a"),
    "a query that needs gradients": (
        lambda q, h: (q.requires_grad_(), h),
        UnsupportedError,
        "requires gradients",
    ),
}


@on_devices("kind", [(kind,) for kind in WRONG])
def test_what_does_not_fit_is_refused(device: str, kind: str) -> None:
    change, error, phrase = WRONG[kind]
    query, heads = change(Layer().query(device), Layer().make(device))
    with pytest.raises(error, match=phrase):
        attend_heads(query, heads)


def test_wide_keys_in_float32_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernel would hold next to nothing in registers."""
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setattr(kernels, "kernels_available", lambda device: True)
    layer = Layer(size=130, heads=1, rows=3, group=1)
    with pytest.raises(ConfigError, match="float32 queries of 130 numbers; .* at most 128"):
        attend_heads(layer.query("cpu"), layer.make("cpu"))


@on_devices("bias", [(torch.zeros(2, 69),), (torch.zeros(3, 70),), (torch.zeros(2, 70, dtype=torch.float64),)])
def test_a_bias_of_another_shape_or_type_is_refused(device: str, bias: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"Got a bias .*needed float32 \[2 or 1, 70\]"):
        attend_heads(Layer().query(device), Layer().make(device), bias.to(device))

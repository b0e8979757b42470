"""Triton kernels on rows in pages, by a table, against the same rows side by side; devices as in `test_kernels`."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


pytest.importorskip("triton", reason="the kernels need triton, which is not installed")

from test_coded_key_kernels import Shape, keys_for, random, unpacked  # noqa: E402
from test_kernels import DTYPES, assert_same, on_devices, pass_in_the_interpreter  # noqa: E402
from test_kernels import reference as attention_of_numbers  # noqa: E402
from test_rows_in_pages import POSITIONS, Stored  # noqa: E402
from test_trellis_triton import Rows  # noqa: E402
from test_vllm import MODELS, ROWS, save_spliced  # noqa: E402

from kvsplice_hf import ConfigError  # noqa: E402
from kvsplice_hf.attend import choice  # noqa: E402
from kvsplice_hf.attend.backend import CodedKeys, Paging, Step  # noqa: E402
from kvsplice_hf.attend.triton import calls as kernels  # noqa: E402
from kvsplice_hf.attend.triton import steps  # noqa: E402
from kvsplice_hf.attend.triton.calls import attend_packed, attend_rows  # noqa: E402
from kvsplice_hf.code import trellis  # noqa: E402
from kvsplice_hf.code.codec import RowCodec  # noqa: E402
from kvsplice_hf.patch.absorbed import absorbed_attention, step_of  # noqa: E402
from kvsplice_hf.vllm import pages as pages_module  # noqa: E402
from kvsplice_hf.vllm.pages import attend_pages  # noqa: E402
from kvsplice_hf.vllm.splices import served_layer  # noqa: E402


@pytest.mark.skipif(kernels.interpreted(), reason="this is the process that it starts")
def test_the_kernels_pass_these_tests_in_the_interpreter() -> None:
    pass_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def _searched_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are compared with takes nothing of theirs."""
    monkeypatch.setattr(trellis, "_fastest", trellis.closest_codes)


SHAPE = Shape(batch=4, queries=5, rows=90)
# Less than a page, a whole one, and many; the last one ends within a block of rows.
ENDS = (1, 16, 37, 90)
PAGES = (1, 7, 16, 48, 128)


class Form(NamedTuple):
    """How rows are made, and read.

    Attributes:
        codec, widths, gains: as in `test_trellis_triton`; None: rows are numbers.
        coded: whether keys were coded before their rotation.
        whole: whether the codes of keys are part of the values.
    """

    codec: str | None
    widths: str = "odd fields"
    gains: str = "a gain of values"
    coded: bool = False
    whole: bool = False


FORMS = {
    "numbers": Form(None),
    "plain": Form("plain"),
    "every width": Form("plain", "every width", "no gains"),
    "trellis": Form("trellis"),
    "coded keys": Form("plain", gains="two gains", coded=True),
    "coded keys, one gain": Form("plain", coded=True),
    "trellis, coded keys": Form("trellis", gains="two gains", coded=True),
    "trellis, predicted": Form("trellis", gains="two gains", coded=True, whole=True),
}


class Call:
    """A call on rows of a form: side by side as `numbers` [B, S, n], and in shuffled pages with a gap behind each."""

    def __init__(self, device: str, form: Form, page: int, dtype: torch.dtype = torch.float32) -> None:
        shape, self.form, self.codec, self.keys = SHAPE, form, None, None
        rows = random(shape.batch, shape.rows, shape.rank + shape.numbers, seed=9).to(device)
        if form.codec is None:
            rows = rows.to(dtype)
            self.numbers = rows
        else:
            codec: RowCodec = Rows(shape, form.codec, form.widths, form.gains).make(device)
            self.codec, rows = codec, codec.pack(rows)
            self.numbers = codec.unpack(rows)
        self.rank = shape.rank + (shape.numbers if form.whole else 0)
        if form.coded:
            assert self.codec is not None
            self.keys = keys_for(shape, device)
            self.numbers = unpacked(rows, self.codec, self.keys, shape.rank)
            if form.whole:
                code = self.codec.unpack(rows)[..., shape.rank :]
                self.numbers = torch.cat([self.numbers[..., : shape.rank], code, self.numbers[..., shape.rank :]], -1)
        n = self.numbers.shape[-1]
        self.query = (random(shape.batch, shape.queries, n, seed=7) / n**0.5).to(dtype).to(device)
        self._put_into_pages(rows, page)

    def _put_into_pages(self, rows: torch.Tensor, page: int) -> None:
        batch, count, width = rows.shape
        each, generator = -(-count // page), torch.Generator().manual_seed(3)
        stride, total = page * width + 5, batch * each
        memory = torch.zeros(total * stride + 3, dtype=rows.dtype, device=rows.device)
        if rows.dtype == torch.uint8:
            memory.fill_(255)
        self.pages = memory.as_strided((total, page, width), (stride, width, 1), 3)
        order = torch.randperm(total, generator=generator).view(batch, each).to(rows.device)
        # Part of a wider table, as those of an engine are.
        self.table = torch.nn.functional.pad(order, (0, 3), value=10_000)[:, :each]
        place = torch.arange(count, device=rows.device)
        self.pages[self.table[:, place // page], place % page] = rows
        self.paging = Paging(self.table, torch.tensor(ENDS, device=rows.device))

    def found(self, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given = {"paging": self.paging, **more}
        if self.codec is None:
            return attend_rows(self.query, self.pages, self.rank, **given)
        return attend_packed(self.query, self.pages, self.codec, self.rank, keys=self.keys, **given)

    def assert_right(self, found: tuple[torch.Tensor, torch.Tensor], hidden: Any = None) -> None:
        for entry, end in enumerate(ENDS):
            left = [row for row in range(end) if hidden is None or row not in hidden[entry].tolist()]
            part = slice(entry, entry + 1)
            mixed, lse = (of_all[part] for of_all in found)
            if not left:
                assert (mixed == 0).all()
                assert (lse == -torch.inf).all()
                continue
            rows = self.numbers[part, left]
            assert_same((mixed, lse), attention_of_numbers(self.query[part], rows, self.rank), self.query.dtype)


@on_devices("form, page", [*itertools.product(FORMS, (7,)), *itertools.product(("plain", "coded keys"), PAGES)])
def test_rows_in_pages_are_mixed_as_those_side_by_side(device: str, form: str, page: int) -> None:
    call = Call(device, FORMS[form], page)
    call.assert_right(call.found())


@on_devices("form, splits", [("numbers", 3), ("numbers", 9), ("plain", 3), ("trellis, predicted", 3)])
def test_shares_of_rows_in_pages_do_not_matter(device: str, form: str, splits: int) -> None:
    call = Call(device, FORMS[form], 16)
    call.assert_right(call.found(splits=splits))


@on_devices("form, dtype", [*itertools.product(("numbers", "coded keys"), DTYPES[1:])])
def test_rows_in_pages_are_read_by_queries_of_any_type(device: str, form: str, dtype: torch.dtype) -> None:
    call = Call(device, FORMS[form], 16, dtype)
    call.assert_right(call.found())


@on_devices("form, splits", [*itertools.product(FORMS, (None,)), ("trellis", 3)])
def test_hidden_rows_are_left_out(device: str, form: str, splits: int | None) -> None:
    call = Call(device, FORMS[form], 16)
    # All rows there are; some that are not there; one in the middle; a row twice.
    hidden = torch.tensor([[0, 7, 99], [0, 1, -1], [20, 21, 36], [89, 89, 0]], device=device)
    call.assert_right(call.found(hidden=hidden, splits=splits), hidden)


@on_devices("form", [("plain",), ("coded keys",)])
def test_nothing_beside_the_pages_is_read_whatever_the_table_holds(device: str, form: str) -> None:
    call = Call(device, FORMS[form], 16)
    call.table[3, :2] = torch.tensor([-5, 2**31 + 7], device=device)
    ends = torch.tensor([1, 16, 37, 10_000], device=device)
    mixed, lse = call.found(paging=Paging(call.table, ends))
    assert torch.isfinite(mixed[:3]).all()
    assert lse.shape == call.query.shape[:2]


def short(call: Call) -> dict[str, Any]:
    return {"paging": Paging(call.table, call.paging.lengths[:2])}


WRONG: dict[str, tuple[Any, str]] = {
    "a table of floats": (lambda c: {"paging": Paging(c.table.float(), c.paging.lengths)}, "needed integers"),
    "a table of other sequences": (lambda c: {"paging": Paging(c.table[:2], c.paging.lengths)}, "needed integers"),
    "lengths of other sequences": (short, "needed integers"),
    "a table with gaps": (lambda c: {"paging": Paging(c.table.repeat(1, 2)[:, ::2], c.paging.lengths)}, "side by side"),
    "lengths beside pages": (lambda c: {"lengths": c.paging.lengths.int()}, "neither bias nor lengths"),
    "a table elsewhere": (lambda c: {"paging": Paging(c.table.to("meta"), c.paging.lengths)}, "on meta"),
    "more rows than can be": (lambda c: {"paging": Paging(c.table[:, :1].expand(-1, 1 << 27), c.paging.lengths)}, "by"),
    "hidden rows of another type": (lambda c: {"hidden": c.table.int()}, "Got hidden rows"),
    "hidden rows of other sequences": (lambda c: {"hidden": c.table[:2].contiguous()}, "Got hidden rows"),
    "no hidden rows": (lambda c: {"hidden": c.table[:, :0].contiguous()}, "Got hidden rows"),
}


@on_devices("kind", [(kind,) for kind in WRONG])
def test_what_does_not_fit_is_refused(device: str, kind: str) -> None:
    changes, phrase = WRONG[kind]
    call = Call(device, FORMS["plain"], 16)
    with pytest.raises(ConfigError, match=phrase):
        call.found(**changes(call))


@on_devices("", [()])
def test_slots_of_other_sequences_are_refused(device: str) -> None:
    call = Call(device, FORMS["coded keys"], 16)
    assert call.keys is not None
    call.keys = CodedKeys(*call.keys[:4], call.keys.slots[:2])
    with pytest.raises(ConfigError, match=r"needed int32 \[4, S\]"):
        call.found()


# Decode steps of layers as an engine has them.


# Fewer than exact first tokens, less than a page, a whole block of rows, many pages.
FEW_LENGTHS = (1, 2, 30, 64, 101)


def stored_by_pytorch(monkeypatch: pytest.MonkeyPatch, layer: Any, page: int, lengths: tuple[int, ...]) -> Stored:
    """Packing in the interpreter would take most of the time of these tests."""
    with monkeypatch.context() as patch:
        patch.setattr(choice, "_WITHOUT_KERNELS", True)
        return Stored(*layer, page, lengths)


def step_in_pages(stored: Stored, group: Any) -> Step:
    layer = stored.layer
    rows = stored.pages.rows.view(layer.geometry.row_dtype(layer.dtype))
    states = pages_module._states(stored.pages, layer, group, rows)
    new = stored.query[group.queries].transpose(1, 2)
    step = step_of(new, states, stored.weight, stored.value_dim, None, 0.3, None)
    return step._replace(paging=group.paging)


def side_by_side(stored: Stored, group: Any, sinks: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    new = stored.query[group.queries].transpose(1, 2)
    states = pages_module._gathered(stored.pages, stored.layer, group)
    with monkeypatch.context() as patch:
        patch.setattr(choice, "_WITHOUT_KERNELS", True)
        return absorbed_attention(new, states, stored.weight, stored.value_dim, group.mask, 0.3, learned_sinks=sinks)[0]


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """By model and kind of rows, those that tests asked for."""
    made: dict[tuple[str, str], Any] = {}

    class Made(dict):  # type: ignore[type-arg]
        def __missing__(self, key: tuple[str, str]) -> Any:
            folder: Path = tmp_path_factory.mktemp("splice")
            model = save_spliced(folder, key[0], ROWS[key[1]])
            self[key] = model, served_layer(folder, 1, model.config, POSITIONS, torch.float32)
            return self[key]

    return Made(made)


LAYERS = [*itertools.product(MODELS, ROWS)]


@on_devices("model, rows", LAYERS)
@torch.no_grad()
def test_a_decode_step_on_pages_is_that_on_rows_side_by_side(
    device: str, model: str, rows: str, layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("the layers of these tests lie on the CPU")
    page = 8 if model == "deepseek_v2" else 48
    stored = stored_by_pytorch(monkeypatch, layers[model, rows], page, FEW_LENGTHS)
    assert any(len(set(group.paging.lengths.tolist())) > 1 for group in stored.groups)
    for group in stored.groups:
        expected = side_by_side(stored, group, None, monkeypatch)
        torch.testing.assert_close(steps.decode(step_in_pages(stored, group)), expected, rtol=1e-4, atol=1e-4)


@on_devices("rows", [("numbers, exact tokens",), ("bytes",), ("bytes, exact tokens",)])
@torch.no_grad()
def test_learned_sinks_take_their_share(device: str, rows: str, layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if device != "cpu":
        pytest.skip("the layers of these tests lie on the CPU")
    stored = stored_by_pytorch(monkeypatch, layers["deepseek_v3", rows], 16, (1, 30, 50))
    sinks = torch.linspace(-1, 2, stored.query.shape[1])
    for group in stored.groups:
        found = steps.decode(step_in_pages(stored, group)._replace(sinks=sinks))
        torch.testing.assert_close(found, side_by_side(stored, group, sinks, monkeypatch), rtol=1e-4, atol=1e-4)


@on_devices("rows", [("numbers, exact tokens",), ("bytes, exact tokens",)])
@torch.no_grad()
def test_a_decode_step_of_an_engine_copies_no_rows(
    device: str, rows: str, layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("the layers of these tests lie on the CPU")
    # Long enough to be cheaper absorbed.
    stored = stored_by_pytorch(monkeypatch, layers["deepseek_v3", rows], 16, (150, 201, 180))
    arguments = (stored.pages, stored.layer, stored.query, stored.weight, stored.value_dim, 0.3, stored.groups)
    monkeypatch.setattr(choice, "_verdicts", {})
    attend_pages(*arguments)  # the first time the kernel is compared with PyTorch, on gathered rows
    (kind,) = [kind for kind in choice._verdicts if kind[0] == "decode"]
    assert kind[-1] == "Triton"
    assert choice._verdicts[kind]
    expected = attend_pages(*arguments)

    def refused(*args: Any) -> None:
        raise AssertionError("rows were gathered")

    monkeypatch.setattr(pages_module, "_gathered", refused)
    assert torch.equal(attend_pages(*arguments), expected)


@on_devices("", [()])
def test_a_step_without_pages_is_refused(device: str, layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if device != "cpu":
        pytest.skip("the layers of these tests lie on the CPU")
    stored = stored_by_pytorch(monkeypatch, layers["deepseek_v3", "bytes"], 16, (30,))
    with pytest.raises(ConfigError, match="Got rows without pages"):
        steps.decode(step_in_pages(stored, stored.groups[0])._replace(paging=None))

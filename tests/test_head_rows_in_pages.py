"""A decode step in C++ on the rows of all key heads where they lie in pages gives the bits of rows side by side."""

from typing import Any

import pytest
import torch
from test_rows_in_pages import CORRUPTED, LENGTHS, POSITIONS, all_at_once
from test_vllm_heads import ROWS, save_spliced, small

from kvsplice_hf.attend import choice
from kvsplice_hf.attend.backend import HeadsStep
from kvsplice_hf.attend.native import heads as native
from kvsplice_hf.attend.native import library
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.heads import step_of_heads
from kvsplice_hf.vllm import heads as heads_module
from kvsplice_hf.vllm.batches import batch_of
from kvsplice_hf.vllm.heads import ServedHeads, attend_heads_in_pages, store_heads
from kvsplice_hf.vllm.ordinary import served_heads
from kvsplice_hf.vllm.pages import pages_of


pytestmark = pytest.mark.skipif(library.load_library() is None, reason="the C++ code cannot be compiled here")

PACKED = [name for name, settings in ROWS.items() if "bits" in settings]
HEADS, SIZE, SCALING = 4, 32, 0.3


class Stored:
    """Sequences of random tokens in shuffled pages of a layer; what is behind their ends is not zero."""

    def __init__(self, layer: ServedHeads, page: int, lengths: tuple[int, ...] = LENGTHS) -> None:
        random = torch.Generator().manual_seed(0)
        each = -(-max(lengths) // page)
        width, stride = layer.row_bytes, layer.page_bytes(page)
        memory = torch.randint(0, 256, ((each * len(lengths) + 1) * stride,), generator=random, dtype=torch.uint8)
        cache = memory.as_strided((each * len(lengths), page, width), (stride, width, 1), stride)
        self.pages, self.layer = pages_of(cache, layer), layer
        table = torch.randperm(len(cache), generator=random)[: each * len(lengths)].view(len(lengths), each).int()
        for row, length in enumerate(lengths):
            positions = torch.arange(length)
            key, value = torch.randn(2, length, layer.geometry.heads, SIZE, generator=random)
            slots = table[row, positions // page].long() * page + positions % page
            store_heads(self.pages, layer, key, value, slots, positions)
            table[row, -(-length // page) :] = 10_000  # no page: what is behind a sequence is not looked at
        self.query = torch.randn(len(lengths), HEADS, SIZE, generator=random)
        self.groups = batch_of(list(range(len(lengths) + 1)), list(lengths), table, page).groups
        self.all_at_once = all_at_once(lengths, table, page)

    def step(self, group: Any) -> HeadsStep:
        states = heads_module._states(self.pages, self.layer, group, self.pages.rows)
        step = step_of_heads(self.query[group.queries].transpose(1, 2), states, None, SCALING, None)
        return step._replace(paging=group.paging)

    def side_by_side(self, group: Any) -> HeadsStep:
        states = heads_module._gathered(self.pages, self.layer, group)
        return step_of_heads(self.query[group.queries].transpose(1, 2), states, group.mask, SCALING, None)

    def decoded(self, step: HeadsStep) -> torch.Tensor:
        return native.decode_heads(step, native.prepare_heads(self.layer.splice, self.layer.identity))

    def attended(self) -> torch.Tensor:
        return attend_heads_in_pages(self.pages, self.layer, self.query, SCALING, self.groups)


@pytest.fixture(scope="module", params=PACKED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ServedHeads:
    folder = tmp_path_factory.mktemp("splice")
    model = save_spliced(small("llama"), folder, ROWS[request.param])
    return served_heads(folder, 1, model.config, POSITIONS, torch.float32)


@pytest.mark.parametrize("page", [8, 16, 48, 256])
@torch.no_grad()
def test_rows_in_pages_give_the_bits_of_rows_side_by_side(served: ServedHeads, page: int) -> None:
    stored = Stored(served, page)
    assert any(len(set(group.paging.lengths.tolist())) > 1 for group in stored.groups)
    for group in (*stored.groups, stored.all_at_once):
        found = stored.decoded(stored.step(group))
        assert torch.isfinite(found).all()
        assert torch.equal(found, stored.decoded(stored.side_by_side(group)))


@torch.no_grad()
def test_a_decode_step_of_an_engine_copies_no_rows(served: ServedHeads, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(served, 16)
    expected = stored.attended()  # the first time C++ is compared with PyTorch, on gathered rows

    def refused(*args: Any) -> None:
        raise AssertionError("rows were gathered")

    monkeypatch.setattr(heads_module, "_gathered", refused)
    assert torch.equal(stored.attended(), expected)


@torch.no_grad()
def test_without_the_library_rows_are_gathered(served: ServedHeads, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(served, 16)
    by_library = stored.attended()
    monkeypatch.setattr(choice, "_WITHOUT_KERNELS", True)
    torch.testing.assert_close(stored.attended(), by_library, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CORRUPTED)
@torch.no_grad()
def test_nothing_is_read_outside_of_the_pages(case: str, served: ServedHeads) -> None:
    stored = Stored(served, 16, (40, 40))
    assert len(stored.groups) == 1
    step = stored.step(stored.groups[0])
    with pytest.raises(ConfigError, match=r"Got (pages|sequences of)"):
        stored.decoded(step._replace(paging=CORRUPTED[case](step.paging, step.rows)))

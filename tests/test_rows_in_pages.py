"""A decode step in C++ on packed rows where they lie in pages gives the bits of the same rows side by side."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vllm import LONGEST, MODELS, ROWS, save_spliced

from kvsplice_hf.attend import choice
from kvsplice_hf.attend.backend import Paging, Step
from kvsplice_hf.attend.native import calls, library
from kvsplice_hf.cache.pages import Request
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.patch.absorbed import step_of
from kvsplice_hf.patch.sites import find_sites
from kvsplice_hf.vllm import pages as pages_module
from kvsplice_hf.vllm.batches import Group, _group, batch_of
from kvsplice_hf.vllm.pages import Pages, ServedLayer, attend_pages, pages_of, store
from kvsplice_hf.vllm.splices import served_layer


pytestmark = pytest.mark.skipif(library.load_library() is None, reason="the C++ code cannot be compiled here")

PACKED = [name for name, settings in ROWS.items() if "bits" in settings]
# Of the tiny models: shorter than the exact first tokens, less than a page, many pages, whole tiles of 64 rows.
LENGTHS = (1, 2, 3, 30, 31, 64, 60, 201, 190, 1)
POSITIONS = 256


def all_at_once(lengths: tuple[int, ...], table: torch.Tensor, page: int) -> Group:
    """One new token of each sequence, whatever their lengths; engines put those together that are about as long."""
    ends = [*itertools.accumulate(lengths, initial=0)]
    requests = [Request(row, 1, ends[row], length) for row, length in enumerate(lengths)]
    return _group(requests, table, page)


class Stored:
    """Sequences of random tokens in shuffled pages of a layer; what is behind their ends is not zero."""

    def __init__(self, model: Any, layer: ServedLayer, page: int, lengths: tuple[int, ...] = LENGTHS) -> None:
        site = find_sites(model)[1]
        random = torch.Generator().manual_seed(0)
        each = -(-max(lengths) // page)
        width, stride = layer.row_bytes, layer.page_bytes(page)
        memory = torch.randint(0, 256, ((each * len(lengths) + 1) * stride,), generator=random, dtype=torch.uint8)
        cache = memory.as_strided((each * len(lengths), page, width), (stride, width, 1), stride)
        self.pages: Pages = pages_of(cache, layer)
        self.layer, self.lengths = layer, lengths
        self.table = torch.randperm(len(cache), generator=random)[: each * len(lengths)].view(len(lengths), each).int()
        for row, length in enumerate(lengths):
            positions = torch.arange(length)
            latent = torch.randn(length, site.kv_lora_rank, generator=random)
            k_rot = torch.randn(length, site.qk_rope_head_dim, generator=random)
            slots = self.table[row, positions // page].long() * page + positions % page
            store(self.pages, layer, latent, k_rot, slots, positions)
            self.table[row, -(-length // page) :] = 10_000  # no page: what is behind a sequence is not looked at
        size = site.qk_nope_head_dim + site.qk_rope_head_dim
        self.query = torch.randn(len(lengths), site.num_heads, size, generator=random)
        self.weight, self.value_dim = site.module.kv_b_proj.weight, site.v_head_dim
        starts = list(range(len(lengths) + 1))
        self.groups = batch_of(starts, list(lengths), self.table, page).groups
        self.all_at_once = all_at_once(lengths, self.table, page)

    def step(self, group: Any) -> Step:
        new = self.query[group.queries].transpose(1, 2)
        states = pages_module._states(self.pages, self.layer, group, self.pages.rows)
        step = step_of(new, states, self.weight, self.value_dim, None, 0.3, None)
        return step._replace(paging=group.paging)

    def side_by_side(self, group: Any) -> torch.Tensor:
        new = self.query[group.queries].transpose(1, 2)
        states = pages_module._gathered(self.pages, self.layer, group)
        step = step_of(new, states, self.weight, self.value_dim, group.mask, 0.3, None)
        return calls.decode(step)


@pytest.fixture(scope="module", params=[(name, rows) for name in MODELS for rows in PACKED], ids="-".join)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ServedLayer]:
    name, rows = request.param
    folder: Path = tmp_path_factory.mktemp("splice")
    model = save_spliced(folder, name, ROWS[rows])
    return model, served_layer(folder, 1, model.config, POSITIONS, torch.float32)


@pytest.mark.parametrize("page", [8, 16, 48, 256])
@torch.no_grad()
def test_rows_in_pages_give_the_bits_of_rows_side_by_side(served: tuple[Any, ServedLayer], page: int) -> None:
    stored = Stored(*served, page)
    assert any(len(set(group.paging.lengths.tolist())) > 1 for group in stored.groups)
    for group in (*stored.groups, stored.all_at_once):
        found = calls.decode(stored.step(group))
        assert torch.isfinite(found).all()
        assert torch.equal(found, stored.side_by_side(group))


@torch.no_grad()
def test_a_decode_step_of_an_engine_copies_no_packed_rows(
    served: tuple[Any, ServedLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Stored(*served, 16, (150, 201, 180))  # long enough to be cheaper absorbed

    def attended() -> torch.Tensor:
        return attend_pages(
            stored.pages, stored.layer, stored.query, stored.weight, stored.value_dim, 0.3, stored.groups
        )

    expected = attended()  # the first time C++ is compared with PyTorch, on gathered rows

    def refused(*args: Any) -> None:
        raise AssertionError("rows were gathered")

    monkeypatch.setattr(pages_module, "_gathered", refused)
    assert torch.equal(attended(), expected)


@torch.no_grad()
def test_without_the_library_rows_are_gathered(
    served: tuple[Any, ServedLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Stored(*served, 16)
    arguments = (stored.pages, stored.layer, stored.query, stored.weight, stored.value_dim, 0.3, stored.groups)
    by_library = attend_pages(*arguments)
    monkeypatch.setattr(choice, "_WITHOUT_KERNELS", True)
    torch.testing.assert_close(attend_pages(*arguments), by_library, rtol=1e-4, atol=1e-4)


CORRUPTED: dict[str, Any] = {
    "a page that is not there": lambda paging, rows: Paging(paging.table + len(rows), paging.lengths),
    "a page below the first": lambda paging, rows: Paging(paging.table - len(rows), paging.lengths),
    "more rows than pages": lambda paging, rows: Paging(paging.table, paging.lengths + 10_000),
    "an empty sequence": lambda paging, rows: Paging(paging.table, paging.lengths * 0),
    "a table of int32": lambda paging, rows: Paging(paging.table.int(), paging.lengths),
    "lengths of fewer sequences": lambda paging, rows: Paging(paging.table, paging.lengths[:1]),
}


@pytest.mark.parametrize("case", CORRUPTED)
@torch.no_grad()
def test_nothing_is_read_outside_of_the_pages(case: str, served: tuple[Any, ServedLayer]) -> None:
    stored = Stored(*served, 16, (40, 40))
    assert len(stored.groups) == 1
    step = stored.step(stored.groups[0])
    with pytest.raises(ConfigError, match=r"Got (pages|sequences of)"):
        calls.decode(step._replace(paging=CORRUPTED[case](step.paging, step.rows)))


def test_positions_of_the_tables_reach_as_far_as_the_longest_sequence() -> None:
    assert max(LENGTHS) <= POSITIONS
    assert LONGEST <= POSITIONS

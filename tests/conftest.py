"""Shared settings: the lanes, one thread per worker (the suite runs two), quiet libraries."""

from collections.abc import Iterator

import pytest
import torch
from byte_tokenizer import byte_tokenizer, trained_model
from lanes import LANES, is_in_lane
from transformers.utils import logging


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lane", choices=LANES, default=None, help="fast, full or slow; by default all tests named")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lane = config.getoption("--lane")
    if lane is None:
        return
    left_out = [item for item in items if not is_in_lane(item, lane)]
    items[:] = [item for item in items if is_in_lane(item, lane)]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_single_threaded() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test runs with each of these numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained tiny model with its tokenizer, as any user's folder."""
    folder = tmp_path_factory.mktemp("model")
    trained_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)

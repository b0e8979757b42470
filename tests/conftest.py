"""Shared settings: one thread per worker (the suite runs two), quiet libraries."""

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_single_threaded() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

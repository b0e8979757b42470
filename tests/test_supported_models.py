"""The page of supported models lists what the contract tests run."""

import pytest
from ordinary_models import MULTIMODAL_MODELS, ORDINARY_MODELS, REFUSED_MODELS
from packaging.version import Version
from supported_table import PAGE, table, written

from kvsplice_hf.upstream import INSTALLED, NEWEST_TESTED


def test_the_table_of_ordinary_models_is_that_of_the_contract_tests() -> None:
    if Version(INSTALLED) != Version(NEWEST_TESTED):
        pytest.skip("the page is written for the newest release that all tests pass on")
    assert written() == table(), "run python tests/supported_table.py"


def test_every_model_of_the_contract_tests_has_a_row() -> None:
    for name in [*ORDINARY_MODELS, *MULTIMODAL_MODELS]:
        assert f"| {name} |" in written()


def test_models_that_are_refused_are_named() -> None:
    text = PAGE.read_text(encoding="utf-8").lower()
    assert all(name in text for name in REFUSED_MODELS)

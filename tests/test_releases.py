"""The matrix over releases of transformers says what passed, what was skipped and why, and what failed."""

import sys
from pathlib import Path
from typing import Any

import pytest
from programs import SCRIPTS, load_program

from kvsplice_hf import upstream


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/><testcase classname="tests.test_a" name="two"/>
<testcase classname="tests.test_a" name="three"><skipped message="has no hy_v4"/></testcase>
<testcase classname="tests.test_a" name="four"><skipped message="has no hy_v4"/></testcase>
<testcase classname="tests.test_b" name="five"><failure message="no">trace</failure></testcase>
<testcase classname="tests.test_c" name=""><error message="collection failure">trace</error></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def releases() -> Any:
    return load_program("measure/releases.py")


def test_a_report_is_counted_with_reasons_and_names(releases: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT, "utf-8")
    row = releases.Row("5.0.0")
    releases.read_report(row, path)
    assert (row.passed, row.failed, row.skipped) == (2, 2, {"has no hy_v4": 2})
    assert row.failures == ["tests.test_b::five", "tests.test_c::"]
    assert not row.is_good


def test_a_release_on_which_nothing_ran_is_not_good(releases: Any) -> None:
    assert not releases.Row("5.0.0").is_good
    assert not releases.Row("5.0.0", passed=3, problem="pytest ended with 2").is_good
    assert releases.Row("5.0.0", passed=3).is_good


def test_a_release_that_the_index_does_not_have_is_a_row_and_no_traceback(
    releases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[Any], **kwargs: Any) -> Any:
        raise releases.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(releases.subprocess, "run", fail)
    monkeypatch.setattr(releases.venv, "create", lambda home, clear: (Path(home) / "lib").mkdir(parents=True))
    monkeypatch.setattr(releases.sysconfig, "get_path", lambda name, vars=None: str(tmp_path))
    row = releases.check("1.2.3", releases.Arguments(), tmp_path)
    assert "pip ended with 1" in row.problem
    assert not row.is_good


def test_the_matrix_holds_the_ends_of_what_is_supported_and_every_test_file_that_it_names(releases: Any) -> None:
    assert releases.RELEASES[0] == upstream.MIN_TRANSFORMERS
    assert upstream.MIN_TRANSFORMERS_DSA in releases.RELEASES
    assert releases.RELEASES[-1] == upstream.NEWEST_TESTED
    assert len(releases.RELEASES) >= 6
    assert all((SCRIPTS.parent / "tests" / f"test_{name}.py").exists() for name in releases.CONTRACT)
    assert f'RELEASES="{releases.RELEASES[0]} {releases.RELEASES[-2]}"' in (SCRIPTS.parent / ".ci" / "run").read_text()
    assert sys.version_info >= (3, 11)

"""What scripts share: the packages it needs, and cells of tables where nothing was measured."""

import ast
import configparser
import importlib.util
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from programs import SCRIPTS, assert_figures_only, load_program
from rich.console import Console
from rich.table import Table

import kvsplice_hf.bench
from kvsplice_hf import UnsupportedError
from kvsplice_hf.bench.peak_memory import memory_table
from kvsplice_hf.bench.tables import number, ratio, with_error


ROOT = SCRIPTS.parent
PROGRAMS = sorted(str(path.relative_to(SCRIPTS)) for path in SCRIPTS.rglob("*.py"))
BENCH = ROOT / "kvsplice_hf" / "bench"


# Packages


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "yaml" else find(name, *args))
    with pytest.raises(UnsupportedError, match=r"pyyaml, not installed .* pip install 'kvsplice_hf\[bench\]'"):
        importlib.reload(kvsplice_hf.bench)
    monkeypatch.undo()
    importlib.reload(kvsplice_hf.bench)


def declared() -> set[str]:
    """Packages that the package and its extra `bench` ask for."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    lines = setup["options"]["install_requires"].split() + extras["bench"].split()
    for nested in re.findall(r"kvsplice_hf\[(.*)\]", extras["bench"]):
        lines += [line for extra in nested.split(",") for line in extras[extra].split()]
    return {re.split(r"[^a-z0-9-]", line.lower())[0] for line in lines}


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def test_what_scripts_import_is_the_package_or_asked_for_by_its_extra() -> None:
    distributions = packages_distributions()
    # tokenizers comes with transformers, triton with the extra `gpu`, lm-eval with `tasks`, vllm with `make test-vllm`
    # and brings prometheus-client. For developers grimp comes with import-linter.
    allowed = declared() | {
        "kvsplice-hf",
        "tokenizers",
        "numpy",
        "triton",
        "lm-eval",
        "grimp",
        "vllm",
        "prometheus-client",
    }
    for path in (*SCRIPTS.rglob("*.py"), *BENCH.rglob("*.py")):
        foreign = imported(path) - set(sys.stdlib_module_names) - {"kvsplice_hf"}
        for name in foreign:
            # Of what is not installed, for it comes by an extra of its own, the package is taken to have the same name.
            packages = {package.lower().replace("_", "-") for package in distributions.get(name, [name])}
            assert packages & allowed, f"{path.relative_to(ROOT)} imports {name}, which setup.cfg does not ask for"


def test_the_packages_that_are_looked_for_are_asked_for() -> None:
    assert set(kvsplice_hf.bench._MODULES.values()) <= declared()


# Tables


def test_a_figure_that_was_not_measured_is_no_number() -> None:
    assert (number(None), number(float("nan")), number(1.234, ".1f")) == ("not measured", "not finite", "1.2")
    assert ratio(3.0, 2.0) == "1.50x"
    assert {ratio(0, 2.0), ratio(2.0, 0), ratio(None, 2.0), ratio(2.0, None)} == {"not measured"}
    assert with_error(1.0, None) == "1.000"
    assert with_error(1.0, 0.5, "+.2f") == "+1.00 ± 0.50"


def printed(table: Table) -> str:
    console = Console(width=400, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    assert_figures_only(capture.get())
    return capture.get()


SPEEDS: dict[str, Any] = {"prefill_tokens_per_s": 9.0, "decode_tokens_per_s": 3.0, "cache_bytes": 8}
UNKNOWN_LOSS = {"loss_percent": None, "loss_stderr_percent": None, "kl_nats": None}
LAYER = {"layer": 0, "rank": 4, "kv_lora_rank": 8, "row_bytes": None, "widths": None, "scale": None, "shift": None}
NO_RUN = {"arm": "spliced", "seeds": 1, "loss": 1.0, "loss_interval": None, "cache_bytes_per_token": 4.0}


def peak_memory_of_a_cpu(program: ModuleType) -> str:
    rows = [{"batch_size": 1, "seq_len": 2, "original": SPEEDS, "spliced": SPEEDS}]
    return printed(program.table_of([*rows, {"batch_size": 8, "seq_len": 2, "error": "out of memory"}]))


def perplexity_that_is_not_checked(program: ModuleType) -> str:
    scores = {"perplexity": 2.0, "original_perplexity": 2.0, "loss_percent": 0.0, "kl": 0.0, "top1_agreement": 1.0}
    errors = {"perplexity_stderr": None, "original_perplexity_stderr": None}
    check = {"no_cache_difference": None, "cache_check": "not measured"}
    return printed(program.table_of([{"budget": {}, "bytes_ratio": 1.0, **scores, **errors, **check}]))


def loss_that_is_not_finite(program: ModuleType) -> str:
    row = {"name": "", "what": "", "bytes_per_token": 1.0, "bytes_ratio": 1.0, "texts": {"pydoc": UNKNOWN_LOSS}}
    return printed(program.table_of([row], ["pydoc"]))


def conversion_of_one_window(program: ModuleType) -> str:
    perplexity = {"perplexity_after": 2.0, "perplexity_before": 2.0, "perplexity_change_percent": 0.0, "kl_nats": 0.0}
    row = {"name": "", "kv_lora_rank": 4, **perplexity, "perplexity_change_stderr_percent": None, "conversion_s": 1.0}
    return printed(program.table_of("steps", [row]))


def conversion_without_evaluation(program: ModuleType) -> str:
    sizes = {"bytes_per_token_before": 8.0, "bytes_per_token_after": 4.0, "qk_rope_head_dim": 2, "kv_lora_rank": 4}
    return printed(program.summary({"evaluation_tokens": 0, **sizes}))


def splice_that_is_not_finite(program: ModuleType) -> str:
    return printed(program.table_of([{**LAYER, "not_finite": 1, "candidates": [], "relative_error": None}], ""))


SETTING = {"recipe": "rank R/2", "batch_size": 1, "context": 64}
TIMES = {"decode_s": [1.0], "prefill_s": [1.0], "times_bound": [2.0], "moved_bytes": 8, "cache_bytes": 4}


def recipe_without_stock(program: ModuleType) -> str:
    return printed(program.table_of([SETTING | TIMES]))


def memory_without_stock(program: ModuleType) -> str:
    return printed(memory_table([SETTING | {"peak_bytes": 8}], {"peak_bytes": "peak"}, "peak_bytes"))


def operator_of_another_recipe(program: ModuleType) -> str:
    rows = [SETTING | {"recipe": name, "operators_ms": {name: 1.0}, "total_ms": 1.0} for name in ("stock", "rank R/2")]
    (table,) = program.tables_of(rows, 2)
    return printed(table)


def arm_that_was_not_trained(program: ModuleType) -> str:
    row = {**NO_RUN, "difference": None, "difference_interval": None, "tokens_per_second": None, "tokens": None}
    assert program.trained_on([row]) == ""
    table = Table(*program._HEAD)
    table.add_row(*program.cells_of(row))
    return printed(table)


def quantised_model_without_packed_rows(program: ModuleType) -> str:
    return printed(program.table_of([{"model": "demo", "quantisation": "none", "exact": "32 of 32"}]))


def quantised_step_of_one_round(program: ModuleType) -> str:
    row: dict[str, Any] = {"quantisation": "none"}
    for name in (program.STOCK, program.PACKED):
        row[name] = {part: [0.5] for part in (*program.PARTS, "step")}
    program.add_ratios([row])
    return printed(program.table_of([row]))


def servers_that_were_too_fast_to_be_watched(program: ModuleType) -> str:
    row = {"page": 16, "tokens": 32, "running_most": 0, "running_mean": None, "cache_used_most": 0.0, "preemptions": 0}
    row |= {"seconds": 1.0, "output_tokens_per_s": 1.0, "tokens_per_s": 1.0} | dict.fromkeys(program.TIMES, 1.0)
    return printed(program.table_of({program.STOCK: row, program.SPLICED: row}))


def geometry_without_perplexity(program: ModuleType) -> str:
    row = {"name": "PCA", "k": 8, "error": 0.5, "error_of_fit": 0.4, "fit_s": 1.0, "texts": None}
    return printed(program.table_of([row | {"bent": 0, "parts": 9}], ["pydoc"]))


def correlation_over_one_layer(program: ModuleType) -> str:
    nothing = {name: {"rho": None, "p_value": None} for name in program.PREDICTORS}
    _, table, _ = program.tables_of([], nothing, [])
    return printed(table)


def release_that_was_not_installed(program: ModuleType) -> str:
    console = Console(width=160, file=None)
    with pytest.MonkeyPatch.context() as patch, console.capture() as capture:
        patch.setattr(program, "Console", lambda width: console)
        program.show([program.Row("1.2.3", problem="not installed")])
    assert_figures_only(capture.get())
    return capture.get()


def groups_of_one_budget(program: ModuleType) -> str:
    scores = {"loss_percent": None, "loss_stderr_percent": None, "kl_nats": 0.1}
    rows = [{"name": "groups of 1", "group": 1, "bytes": 193.0, "bits_saved": 0.0, **scores}]
    nbytes = {1: program.bytes_at_equal_loss(rows, 1)}
    report = {"results": rows, "bytes_at_equal_loss": nbytes, "time_ratio": {}, "arguments": {"groups": [1]}}
    return "".join(map(printed, program.tables(report)))


def coder_that_is_not_installed(program: ModuleType) -> str:
    times = {"encode_s": None, "decode_s": None}
    packed = {"coder": "packed rows", "bytes_per_token_and_layer": 2.0, **times}
    return printed(program.table_of([packed, {"coder": "zstandard", "bytes_per_token_and_layer": None, **times}]))


# What a program says where a figure is missing.
MISSING = {
    "analyze_fisher.py": (correlation_over_one_layer, "all the same"),
    "benchmark_deepseek_kvsplice.py": (peak_memory_of_a_cpu, "not measured"),
    "eval_deepseek_quality.py": (perplexity_that_is_not_checked, "not measured"),
    "research/ablate_calibration.py": (loss_that_is_not_finite, "not finite"),
    "research/ablate_conversion.py": (conversion_of_one_window, "+0.000 %"),
    "research/report.py": (arm_that_was_not_trained, "spliced"),
    "measure/codecs.py": (loss_that_is_not_finite, "not finite"),
    "measure/cross_layer.py": (groups_of_one_budget, "not measured"),
    "measure/decode.py": (recipe_without_stock, "not measured"),
    "measure/generation.py": (recipe_without_stock, "not measured"),
    "measure/memory.py": (memory_without_stock, "not measured"),
    "measure/prefill.py": (recipe_without_stock, "not measured"),
    "measure/profile_step.py": (operator_of_another_recipe, "not called"),
    "measure/quantised.py": (quantised_model_without_packed_rows, "not measured"),
    "measure/quantised_decode.py": (quantised_step_of_one_round, "1.00x (100%, 100% to 100%)"),
    "measure/releases.py": (release_that_was_not_installed, "not measured"),
    "measure/row_coders.py": (coder_that_is_not_installed, "not measured"),
    "measure/serving_load.py": (servers_that_were_too_fast_to_be_watched, "not measured"),
    "measure/step_memory.py": (memory_without_stock, "not measured"),
    "research/spline_geometry.py": (geometry_without_perplexity, "not measured"),
    "run/convert_to_mla.py": (conversion_without_evaluation, "0.500x"),
    "run/inspect_kvsplice.py": (splice_that_is_not_finite, "not finite"),
}
# All that these print has been measured, or they end before.
NEVER_MISSING = {
    "measure/benchmark_calibration.py",
    "measure/caches_at_rest.py",
    "measure/drift.py",
    "measure/predicted_rows.py",
    "measure/processes.py",
    "measure/profile_training.py",
    "measure/questions.py",
    "measure/retrieval.py",
    "measure/serving.py",
    "measure/serving_rows.py",
    "research/compare_spectra.py",
    "research/gather_text.py",
    "research/study_transform.py",
    "research/study_tuning.py",
    "run/demo.py",
    "run/finetune_kvsplice.py",
    "run/reduce_rank.py",
    "run/train_gpt2_mla.py",
}


@pytest.mark.parametrize("path", MISSING)
def test_a_table_says_where_a_figure_is_missing(path: str) -> None:
    render, words = MISSING[path]
    assert words in render(load_program(path))


def test_every_program_with_a_table_is_looked_at() -> None:
    with_tables = {path for path in PROGRAMS if re.search(r"[Tt]able\(", (SCRIPTS / path).read_text("utf-8"))}
    assert with_tables == {*MISSING, *NEVER_MISSING}


# The list of programs


def test_the_list_of_programs_names_each_and_no_other() -> None:
    named = re.findall(r"scripts/([\w/]+\.(?:py|sh))", (SCRIPTS / "README.md").read_text("utf-8"))
    programs = {*PROGRAMS, *(path.name for path in SCRIPTS.glob("*.sh"))} - {"deepseek_kvsplice_plugin.py"}
    assert sorted(named) == sorted(programs), "each once"

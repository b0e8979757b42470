"""Nothing depends on the defaults of the process: every allocation says its dtype and its device."""

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import calibrated
from tiny_models import build, tiny_batch

import kvsplice_hf
from kvsplice_hf import (
    KVSpliceCalibrator,
    KVSpliceConfig,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
)
from kvsplice_hf.attend.choice import encode
from kvsplice_hf.attend.native import calls as native
from kvsplice_hf.attend.native import tables
from kvsplice_hf.attend.reference import attend_packed
from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.initialise import initialise_
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import ConfigError


PACKAGE = Path(kvsplice_hf.__file__).parent
FACTORIES = {
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "tensor",
    "eye",
    "linspace",
    "rand",
    "randn",
    "randint",
    "randperm",
}
# Parameters of a model are made as those of PyTorch's own layers are: as the process says.
PARAMETERS_OF_MODELS = ("gpt2_mla/attention.py", "gpt2_mla/modeling.py", "gpt2_mla/reciprocal.py")


def factory_calls() -> Iterator[tuple[str, ast.Call]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            function = getattr(node, "func", None)
            is_torch = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
            if is_torch and function.value.id == "torch" and function.attr in FACTORIES:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def test_every_allocation_of_the_package_names_dtype_and_device() -> None:
    wanting = []
    for place, call in factory_calls():
        names = {keyword.arg for keyword in call.keywords}
        is_parameter = place.startswith(PARAMETERS_OF_MODELS) and not names
        if not ({"dtype", "device"} <= names or None in names or is_parameter):
            wanting.append(f"{place} torch.{call.func.attr}")
    assert wanting == []


def test_float64_is_not_asked_for_on_a_device_that_may_have_none() -> None:
    """Values go to the CPU first: Apple's GPUs have no float64."""
    wrong = re.compile(r"\.double\(\)\.cpu\(\)|\.to\(\"cpu\", (dtype=)?torch\.float64\)|to\(torch\.float64\)\.cpu")
    found = [path.name for path in PACKAGE.rglob("*.py") if wrong.search(path.read_text("utf-8"))]
    assert found == []


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


ODD_DEFAULTS = [
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float64, None),
    (torch.float32, "meta"),
    (torch.bfloat16, "meta"),
]
odd_defaults = pytest.mark.parametrize(("dtype", "device"), ODD_DEFAULTS, ids=lambda value: str(value))


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def tensor(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def codec() -> RowCodec:
    widths = tensor([8, 7, 6, 5, 4, 3, 2, 1, 0, 16, 8, 4, 16, 2], torch.int64)
    return RowCodec(widths, 1.5 + random(14).abs(), 0.1 * random(14, seed=1), 0.5 + random(10, seed=2).abs())


def a_codec() -> Any:
    made, rows = codec(), random(3, 1, 70, 14)
    packed = made.pack(rows)
    return packed, made.unpack(packed), made.round_trip(rows), made.codes(packed), made.column_scales, made.base


def attention_on_packed_rows() -> Any:
    made = codec()
    packed, query = made.pack(random(2, 70, 14)), random(2, 6, 14, seed=3)
    return attend_packed(query, packed, made, 10)


def attention_in_cpp() -> Any:
    made, query = codec(), random(2, 6, 14, seed=3)
    rows, bias = random(2, 70, 14), random(2, 3, 70, seed=4)
    return (
        *native.attend_rows(query, rows, 10, bias),
        *native.attend_rows(query.bfloat16(), rows.bfloat16(), 10),
        *native.attend_packed(query, native.encode_pack(rows, made), made, 10, bias),
        native.encode_pack(rows, made),
    )


def a_splice() -> Any:
    splice = LearnedKVSplice(12, 5, dtype=torch.float32, device="cpu")
    initialise_(splice, "svd", random(40, 12))
    with torch.no_grad():
        latent, k_rot = random(1, 1, 9, 12), random(1, 1, 9, 4, seed=1)
        return splice.encode(latent), encode(splice, latent, k_rot), *splice.round_trip(latent, k_rot)


STATISTICS: list[KVSpliceCalibrator] = []


def fits_of_all_budgets() -> Any:
    found = []
    for settings in ({"bits": 4.0}, {"bits": 3.0, "allocation": "layer"}, {"rank": 9}):
        fits, report = STATISTICS[0].fit(KVSpliceConfig(**settings))
        for fit in fits.values():
            found += [fit.transform_scale, fit.transform_shift, fit.compress, fit.expand]
            found += [] if fit.codec is None else list(fit.codec.state_dict().values())
        found += report.spectra
    return found


COMPUTATIONS = [a_codec, attention_on_packed_rows, attention_in_cpp, a_splice, fits_of_all_budgets]


@odd_defaults
@pytest.mark.parametrize("compute", COMPUTATIONS, ids=lambda compute: compute.__name__)
def test_the_defaults_of_the_process_change_no_bit(
    compute: Callable[[], Any], dtype: torch.dtype, device: str | None
) -> None:
    if not STATISTICS:
        STATISTICS.append(calibrated(build("deepseek_v3")))
    STATISTICS[0]._solutions.clear()
    STATISTICS[0]._distortions.clear()
    expected = compute()
    STATISTICS[0]._solutions.clear()
    STATISTICS[0]._distortions.clear()
    tables._gains.cache_clear()
    with defaults(dtype, device):
        found = compute()
    tables._gains.cache_clear()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.device == other.device
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_a_model_generates_the_same_under_another_default_dtype(
    dtype: torch.dtype, packed: bool, model_dtype: torch.dtype, tmp_path: Path
) -> None:
    def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        config = KVSpliceConfig(bits=4.0, sink_tokens=2) if packed else KVSpliceConfig(compression_ratio=0.5)
        patch_model_with_kvsplice(model, config, calibration=statistics if packed else None)
        save_kvsplice(model, tmp_path)
        load_kvsplice(model, tmp_path)
        ids, mask = tiny_batch("deepseek_v3")
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        return logits, model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)

    models = [build("deepseek_v3", model_dtype) for _ in range(2)]
    statistics = calibrated(models[0]) if packed else None
    expected = run(models[0])
    with defaults(dtype, None):
        found = run(models[1])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def handed_over_wrongly() -> dict[str, Callable[[], Any]]:
    """Calls of the C++ code with what it would read beyond, or read as something else."""
    query, rows, made = random(2, 6, 14), random(2, 70, 14), codec()
    packed = made.pack(rows)

    def broken(**changes: torch.Tensor) -> RowCodec:
        other = codec()
        for name, value in changes.items():
            other._buffers[name] = value
        return other

    return {
        "rows in fp16": lambda: native.attend_rows(query, rows.half(), 10),
        "rows on another device": lambda: native.attend_rows(query, rows.to("meta"), 10),
        "rows with a stride": lambda: native.attend_rows(query, random(2, 70, 28)[..., ::2], 10),
        "rows of other sequences": lambda: native.attend_rows(query, rows[:1], 10),
        "more values than numbers": lambda: native.attend_rows(query, rows, 15),
        "a bias for other rows": lambda: native.attend_rows(query, rows, 10, random(2, 3, 69)),
        "a bias on another device": lambda: native.attend_rows(query, rows, 10, random(2, 3, 70).to("meta")),
        "packed rows of another width": lambda: native.attend_packed(query, packed[..., :-1], made, 10),
        "a codec in bf16": lambda: native.attend_packed(query, packed, broken(scales=made.scales.bfloat16()), 10),
        "a codec on another device": lambda: native.attend_packed(query, packed, made_on_meta(), 10),
        "a codec with short tables": lambda: native.attend_packed(query, packed, broken(centres=made.centres[:-1]), 10),
        "a codec with strides": lambda: native.encode_pack(rows, broken(centres=random(28)[::2])),
        "a codec with 32-bit indices": lambda: native.encode_pack(rows, broken(column_index=made.column_index.int())),
    }


def made_on_meta() -> RowCodec:
    made = codec()
    return made.to("meta")


@pytest.mark.parametrize("case", handed_over_wrongly())
def test_the_library_is_not_called_with_what_it_would_misread(case: str) -> None:
    if not native.kernels_available("cpu"):
        pytest.skip("no compiler at hand")
    with pytest.raises(ConfigError):
        handed_over_wrongly()[case]()


def test_tables_of_a_codec_that_moved_are_looked_at_again() -> None:
    if not native.kernels_available("cpu"):
        pytest.skip("no compiler at hand")
    made, rows, query = codec(), random(2, 70, 14), random(2, 6, 14)
    packed = native.encode_pack(rows, made)
    before = native.attend_packed(query, packed, made, 10)
    made.scales.data = made.scales.data.clone()  # the same tensor, elsewhere
    assert torch.equal(native.attend_packed(query, packed, made, 10)[0], before[0])
    made.train_steps()
    assert torch.equal(native.attend_packed(query, packed, made, 10)[0], before[0])
    with torch.no_grad():
        made.scales.mul_(2)
    torch.testing.assert_close(
        native.attend_packed(query, packed, made, 10)[0],
        attend_packed(query, packed, made, 10).mixed,
        atol=1e-4,
        rtol=0,
    )
    made.scales.data = made.scales.data.half()
    with pytest.raises(ConfigError):
        native.attend_packed(query, packed, made, 10)


@pytest.mark.parametrize(("batch", "queries", "count"), [(0, 6, 70), (2, 0, 70), (2, 6, 0), (0, 0, 0)])
def test_nobody_attending_or_nothing_to_attend_to_is_no_error(batch: int, queries: int, count: int) -> None:
    if not native.kernels_available("cpu"):
        pytest.skip("no compiler at hand")
    made = codec()
    for mixed, sizes in (
        native.attend_rows(random(batch, queries, 14), random(batch, count, 14), 10),
        native.attend_packed(random(batch, queries, 14), made.pack(random(batch, count, 14)), made, 10),
    ):
        assert mixed.shape == (batch, queries, 10)
        assert sizes.shape == (batch, queries)
        assert not mixed.any()
        assert (sizes == float("-inf")).all()
    assert native.encode_pack(random(batch, 0, 14), made).shape == (batch, 0, made.row_bytes)

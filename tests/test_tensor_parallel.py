"""A model that tensor parallelism divides among processes does what it does in one, and each process has its heads."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from ordinary_models import build_ordinary
from packaging.version import Version
from processes import in_processes, needs_gloo
from safetensors.torch import load_file
from tiny_models import TINY_MODELS, build
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

import kvsplice_hf.calibration.auto
from kvsplice_hf import (
    CalibrationError,
    CheckpointError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    PatchStateError,
    UnsupportedError,
    cache_nbytes,
    explain,
    get_kv_cache_size,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.patch.names import PATCH_ATTRIBUTE
from kvsplice_hf.patch.state import patched_sites, splice_parts_of
from kvsplice_hf.training import KVSpliceTrainer, KVSpliceTrainingArguments, freeze_all_but_kvsplice
from kvsplice_hf.training.trainer import require_whole_sequences
from kvsplice_hf.upstream import cache_argument, cache_of
from kvsplice_hf.weights.sharding import require_known_sharding


DIVIDES = Version(transformers.__version__) >= Version("5.23")
pytestmark = needs_gloo
needs_division = pytest.mark.skipif(not DIVIDES, reason="weights divided by this release are not DTensors")

SINKS, PROMPT, NEW = 2, 12, 10
# What differs from the tiny models of the tables. Latents: heads divided; heads whole, experts divided. Key heads:
# alone, with norms and experts, with a window on some layers.
LATENT, ORDINARY = ["deepseek_v2", "deepseek_v3"], ["llama", "qwen3_moe", "gemma3_text"]
CALIBRATED = ["deepseek_v2", "llama", "deepseek_v3"]
# Those that two processes run one after the other; the second ones in the slow lane.
DIVIDED, OTHERS = ["deepseek_v2", "llama"], ["deepseek_v3", "qwen3_moe", "gemma3_text"]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
BUDGETS: dict[str, dict[str, Any]] = {name: {"bytes_per_token": 28} for name in LATENT} | {"llama": {"bits": 4.0}}
slow = {name: pytest.param(name, marks=pytest.mark.slow) for name in OTHERS}
every_model = pytest.mark.parametrize("name", [slow.get(name, name) for name in DIVIDED + OTHERS])
every_calibrated = pytest.mark.parametrize("name", [slow.get(name, name) for name in CALIBRATED])


def tokens(batch: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(8, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


def make(name: str, **changes: Any) -> Any:
    return build(name) if name in TINY_MODELS else build_ordinary(name, **HEADS | changes)


def config_of(name: str, **settings: Any) -> KVSpliceConfig:
    return KVSpliceConfig(**BUDGETS.get(name, {"bits": 5.0}), sink_tokens=SINKS, **settings)


def calibrated(model: Any, metric: str = "fisher") -> KVSpliceCalibrator:
    return KVSpliceCalibrator(model, metric=metric, sink_tokens=SINKS).collect(list(tokens(24, 32)), progress=False)


def loaded(folder: Path, **settings: Any) -> Any:
    """The model of a folder, divided among the processes where there are several."""
    if not settings and dist.is_initialized():
        settings = {"tp_plan": "auto"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


@torch.no_grad()
def said(model: Any) -> list[list[int]]:
    ids = tokens(2, PROMPT)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist()


def said_together(model: Any) -> list[list[int]]:
    """What continuous batching gives."""
    outputs = model.generate_batch(
        [tokens(1, count, seed=count)[0].tolist() for count in (5, 9, 17)],
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            num_blocks=40, page_size=8, max_batch_tokens=64
        ),
    )
    assert [output.error for output in outputs.values()] == [None] * 3
    return [output.generated_tokens for output in outputs.values()]


@torch.no_grad()
def cached(model: Any) -> dict[str, Any]:
    """Logits without a cache, the rows of the layers, and their bytes: counted, and by the formula."""
    ids = tokens(2, PROMPT)
    cache = cache_of(model(ids, use_cache=True, **cache_argument(DynamicCache(config=model.config))))
    rows = [layer.keys[:, 0] for layer in cache.layers]
    size = get_kv_cache_size(model, seq_len=PROMPT, batch_size=2)
    return {
        "logits": model(ids, use_cache=False).logits,
        "rows": rows,
        "bytes": cache_nbytes(cache),
        "formula": size.compressed_bytes,
        "paths": [(layer.decode, layer.refused) for layer in explain(model).layers],
        "heads": [(site.num_heads, site.kv_heads) for site, _ in patched_sites(model)],
    }


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of the parameters of the splice here, without a cache and behind one."""
    freeze_all_but_kvsplice(model)
    ids = tokens(2, PROMPT)
    model(ids, use_cache=False).logits.log_softmax(-1)[..., 0].sum().backward()
    model(ids, use_cache=True).logits.log_softmax(-1)[..., 1].sum().backward()
    parts = splice_parts_of(model).items()
    return {f"{part}.{name}": held.grad for part, splice in parts for name, held in splice.named_parameters()}


def what_a_model_does(name: str, base: Path, splice: Path, saves_to: Path) -> dict[str, Any]:
    """Everything that is to be the same in one process and in several."""
    found: dict[str, Any] = {}
    if name in CALIBRATED:
        model = loaded(base)
        calibrator = calibrated(model)
        found["fingerprint"], found["statistics"] = calibrator.fingerprint, calibrator.statistics
        patch_model_with_kvsplice(model, config_of(name), calibration=calibrator)
        save_kvsplice(model, saves_to)
        found["identities"] = [patched.splice.identity for _, patched in patched_sites(model)]
    if not splice.exists():
        if name not in CALIBRATED:
            model = loaded(base)
            patch_model_with_kvsplice(model, config_of(name), calibration=calibrated(model))
        save_kvsplice(model, splice)
    model = load_kvsplice(loaded(base), splice)
    found |= cached(model) | {"said": said(model), "said together": said_together(model)}
    if name in DIVIDED:
        found["gradients"] = gradients(model)
    if name == "deepseek_v2":
        unpatch_model(model)
        found["readers"] = calibrated(model, "readers").statistics
        model = patch_model_with_kvsplice(loaded(base), compression_ratio=0.5)  # of the weights alone
        found["of weights"] = model.model.layers[0].self_attn.kvsplice.expand.weight.detach()
        found["said by weights"] = said(model)
    return found


def in_each_process(folder: Path, names: list[str], makers: int) -> dict[str, Any]:
    kvsplice_hf.calibration.auto.OWN_TOKENS = 2048
    found = {}
    for name in names:
        base = folder.parent / name
        found[name] = what_a_model_does(name, base / "base", base / "splice", base / f"splice of {makers}")
    if "llama" in names:  # on text of its own, where nobody has kept statistics before
        model = patch_model_with_kvsplice(loaded(folder.parent / "llama" / "base"), config_of("llama"))
        found["llama"]["said by itself"] = said(model)
    return found


class Runs:
    """What the models do in one process and in two, found when it is first asked for.

    Attributes:
        folder: has of each model itself (`base`), a splice fitted to it, and those that were saved since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._alone: dict[str, dict[str, Any]] = {}
        self._divided: dict[str, list[dict[str, Any]]] = {}

    def alone(self, name: str) -> dict[str, Any]:
        if name not in self._alone:
            names = DIVIDED if name in DIVIDED else OTHERS
            for other in names:
                make(other).save_pretrained(self.folder / other / "base")
            self._alone |= in_each_process(self.folder / "one", names, 1)
        return self._alone[name]

    def divided(self, name: str) -> list[dict[str, Any]]:
        """By rank."""
        self.alone(name)  # which fits the splices
        if name not in self._divided:
            names = DIVIDED if name in DIVIDED else OTHERS
            found = in_processes(in_each_process, self.folder / f"two, {names[0]}", names, 2)
            self._divided |= {other: [of_rank[other] for of_rank in found] for other in names}
        return self._divided[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@needs_division
@every_calibrated
def test_statistics_are_those_of_one_process(name: str, runs: Runs) -> None:
    expected = runs.alone(name)["statistics"]
    for found in runs.divided(name):
        assert found["fingerprint"] == runs.alone(name)["fingerprint"]
        assert list(found["statistics"]) == list(expected)
        for part, layer in expected.items():
            other = found["statistics"][part]
            assert other.count == layer.count > 0
            for field in ("latent_outer", "fisher", "rot_outer", "rot_fisher", "cross", "rows"):
                assert close(getattr(other, field), getattr(layer, field)), (part, field)
    one, other = (found["statistics"] for found in runs.divided(name))
    assert all(torch.equal(one[part].fisher, other[part].fisher) for part in one)


@needs_division
def test_readers_are_those_of_one_process(runs: Runs) -> None:
    for found in runs.divided("deepseek_v2"):
        for part, layer in runs.alone("deepseek_v2")["readers"].items():
            other = found["readers"][part]
            assert close(other.readers, layer.readers)
            assert close(other.rot_readers, layer.rot_readers)


@needs_division
@every_calibrated
def test_a_splice_fitted_by_several_processes_is_that_of_one(name: str, runs: Runs) -> None:
    runs.divided(name)
    found, expected = (runs.folder / name / f"splice of {count}" for count in (2, 1))
    tensors, others = (load_file(folder / "kvsplice_model.safetensors") for folder in (found, expected))
    torch.testing.assert_close(tensors, others, rtol=1e-3, atol=1e-4)
    model = load_kvsplice(make(name), found)  # in one process
    assert said(model) == runs.alone(name)["said"]
    if name in LATENT:
        assert runs.divided(name)[0]["identities"] == runs.divided(name)[1]["identities"]


@needs_division
@every_model
def test_divided_models_say_what_whole_ones_say(name: str, runs: Runs) -> None:
    for found in runs.divided(name):
        assert close(found["logits"], runs.alone(name)["logits"])
        assert found["said"] == runs.alone(name)["said"]
        assert found["said together"] == runs.alone(name)["said together"]


@needs_division
@every_model
def test_processes_hold_the_same_codes_or_the_rows_of_their_heads(name: str, runs: Runs) -> None:
    for layer, rows in enumerate(runs.alone(name)["rows"]):
        parts = [found["rows"][layer] for found in runs.divided(name)]
        # A number between two levels falls to either one for its last digit.
        whole = parts if name in LATENT else [torch.cat(parts, dim=-1)]
        for found in whole:
            assert found.shape == rows.shape
            assert (found != rows).float().mean() < 0.02
    for found in runs.divided(name):
        assert found["bytes"] == found["formula"]
    if name in ORDINARY:
        divided = runs.divided(name)
        assert all(found["heads"] == [(4, 2)] * 2 for found in divided)
        assert sum(found["bytes"] for found in divided) < 1.4 * runs.alone(name)["bytes"]  # turns and places twice


@needs_division
@every_model
def test_divided_models_decode_on_codes_by_the_backend_of_whole_ones(name: str, runs: Runs) -> None:
    for found in runs.divided(name):
        assert found["paths"] == runs.alone(name)["paths"]
        assert not any(refused for _, refused in found["paths"])


@needs_division
@pytest.mark.parametrize("name", DIVIDED)
def test_gradients_of_the_splice_are_those_of_one_process(name: str, runs: Runs) -> None:
    expected, seen = runs.alone(name)["gradients"], set()
    for found in runs.divided(name):
        for parameter, gradient in found["gradients"].items():
            seen.add(parameter)
            if expected[parameter] is None:
                assert gradient is None
            else:  # some are 0 but for what rounding leaves
                torch.testing.assert_close(gradient, expected[parameter], rtol=1e-3, atol=1e-4, msg=parameter)
    assert seen == set(expected)


@needs_division
def test_weights_alone_give_each_process_the_splice_of_one(runs: Runs) -> None:
    for found in runs.divided("deepseek_v2"):
        assert close(found["of weights"], runs.alone("deepseek_v2")["of weights"])
        assert found["said by weights"] == runs.alone("deepseek_v2")["said by weights"]


@needs_division
def test_a_divided_model_calibrates_itself_on_its_own_text(runs: Runs) -> None:
    assert runs.divided("llama")[0]["said by itself"] == runs.divided("llama")[1]["said by itself"]


def with_experts_divided(folder: Path, name: str, base: Path) -> dict[str, Any]:
    """Each process has some of the experts, whole, and some of the heads."""
    found: dict[str, Any] = {}
    model = load_kvsplice(loaded(base / "base", distributed_config={"tp_size": 2, "ep_size": 2}), base / "splice")
    found["said"] = said(model)
    unpatch_model(model)
    found["statistics"] = calibrated(model).statistics
    return found


@pytest.mark.slow
@needs_division
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2"])
def test_experts_divided_among_processes_change_nothing(name: str, runs: Runs, tmp_path: Path) -> None:
    said_alone = runs.alone(name)["said"]
    expected = calibrated(loaded(runs.folder / name / "base")).statistics
    for found in in_processes(with_experts_divided, tmp_path, name, runs.folder / name):
        assert found["said"] == said_alone
        assert all(close(found["statistics"][part].fisher, layer.fisher) for part, layer in expected.items())


@pytest.mark.slow
@needs_division
def test_four_processes_say_what_one_says(runs: Runs) -> None:
    expected = {name: runs.alone(name) for name in DIVIDED}
    four = in_processes(in_each_process, runs.folder / "four", DIVIDED, 4, processes=4)
    for name in DIVIDED:
        for rank, found in enumerate(four):
            assert found[name]["said"] == expected[name]["said"], (name, rank)
            assert found[name]["said together"] == expected[name]["said together"], (name, rank)
            assert found[name]["bytes"] == found[name]["formula"]
        tensors, others = (
            load_file(runs.folder / name / f"splice of {count}" / "kvsplice_model.safetensors") for count in (4, 1)
        )
        torch.testing.assert_close(tensors, others, rtol=1e-3, atol=1e-4)
    assert all(found["llama"]["heads"] == [(2, 1)] * 2 for found in four)


# ------------------------------------------------------------------------------------------ what is refused, by all


def uneven(name: str, base: Path, rank: int) -> None:
    patch_model_with_kvsplice(loaded(base / "uneven"), config_of("llama"))


def uneven_calibration(name: str, base: Path, rank: int) -> None:
    calibrated(loaded(base / "uneven"))


def one_without_text(name: str, base: Path, rank: int) -> None:
    KVSpliceCalibrator(loaded(base / name)).collect([tokens(1, 32)] * 8 if rank == 0 else [], progress=False)


def others_text(name: str, base: Path, rank: int) -> None:
    KVSpliceCalibrator(loaded(base / name)).collect([tokens(1, 32, seed=rank)] * 8, progress=False)


def one_without_files(name: str, base: Path, rank: int) -> None:
    load_kvsplice(loaded(base / name), base / "splice" if rank == 0 else base / "nowhere")


def one_patched_already(name: str, base: Path, rank: int) -> None:
    model = loaded(base / name)
    if rank == 1:
        setattr(model.model.layers[0].self_attn, PATCH_ATTRIBUTE, None)
    patch_model_with_kvsplice(model, config_of("llama"))


def no_room(name: str, base: Path, rank: int) -> None:
    save_kvsplice(load_kvsplice(loaded(base / name), base / "splice"), base / "file")


def weights_of_one(name: str, base: Path, rank: int) -> None:
    model = load_kvsplice(loaded(base / name), base / "splice")
    model.save_pretrained(base / "saved", state_dict=model.state_dict())


def trainer(name: str, base: Path, rank: int) -> None:
    model = freeze_all_but_kvsplice(load_kvsplice(loaded(base / name), base / "splice"))
    KVSpliceTrainer(model, KVSpliceTrainingArguments(str(base / "out"), use_cpu=True, report_to=[]))


# What is done, and what both processes raise: the class, and words of the message, by rank.
REFUSED: dict[str, tuple[Callable[[str, Path, int], None], type[Exception], tuple[str, str]]] = {
    "heads that cannot be divided": (uneven, UnsupportedError, ("3 key heads", "3 key heads")),
    "calibration of heads that cannot be divided": (uneven_calibration, UnsupportedError, ("divides 3", "divides 3")),
    "one process without text": (one_without_text, CalibrationError, ("Process 1 of 2", "are empty")),
    "other text in each": (others_text, CalibrationError, ("different calibration text",) * 2),
    "one process without files": (one_without_files, CheckpointError, ("Process 1 of 2", "nowhere")),
    "one process patched already": (one_patched_already, PatchStateError, ("Process 1 of 2", "already patched")),
    "no room for the files": (no_room, CheckpointError, ("is a file", "Process 0 of 2")),
    "weights of one process": (weights_of_one, UnsupportedError, ("without `state_dict`",) * 2),
    "the Trainer": (trainer, UnsupportedError, ("tensor parallelism",) * 2),
}


def raised_in_each_process(folder: Path) -> dict[str, tuple[type, str]]:
    found = {}
    for case, (does, _, _) in REFUSED.items():
        try:
            does("llama", folder, dist.get_rank())
            found[case] = (type(None), "nothing was raised")
        except Exception as error:
            found[case] = (type(error), str(error))
    return found


@needs_division
def test_what_cannot_work_is_refused_by_all_processes_and_none_is_left_waiting(tmp_path: Path) -> None:
    build_ordinary("llama", **HEADS).save_pretrained(tmp_path / "llama")
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
    build_ordinary("llama", **sizes).save_pretrained(tmp_path / "uneven")
    model = build_ordinary("llama", **HEADS)
    patch_model_with_kvsplice(model, config_of("llama"), calibration=calibrated(model))
    save_kvsplice(model, tmp_path / "splice")
    (tmp_path / "file").write_text("")
    for rank, found in enumerate(in_processes(raised_in_each_process, tmp_path)):
        for case, (_, kind, words) in REFUSED.items():
            assert issubclass(found[case][0], kind), (rank, case, found[case])
            assert words[rank] in found[case][1], (rank, case, found[case])


class Mesh:
    """Of two processes along each of its dimensions."""

    def __init__(self, *names: str) -> None:
        self.mesh_dim_names = names

    def __getitem__(self, name: str) -> "Mesh":
        return Mesh(name)

    def size(self) -> int:
        return 2


def test_layers_divided_among_processes_are_refused() -> None:
    model = make("llama")
    model._device_mesh = Mesh("pp", "tp")
    with pytest.raises(UnsupportedError, match="pipeline parallelism"):
        patch_model_with_kvsplice(model, config_of("llama"))


def test_releases_that_do_not_mark_divided_weights_are_refused() -> None:
    model = make("llama")
    require_known_sharding(model.modules())
    model.model.layers[0].self_attn.k_proj._hf_device_mesh = Mesh()
    with pytest.raises(UnsupportedError, match=r"Install transformers>=5.23"):
        patch_model_with_kvsplice(model, config_of("llama"))


@pytest.mark.parametrize("setting", ["cp_enabled", "sp_enabled"])
def test_the_trainer_refuses_to_see_a_part_of_each_sequence(setting: str) -> None:
    settings = SimpleNamespace(cp_enabled=False, sp_enabled=False)
    require_whole_sequences(SimpleNamespace(parallelism_config=settings))
    setattr(settings, setting, True)
    with pytest.raises(UnsupportedError, match="Leave both off"):
        require_whole_sequences(SimpleNamespace(parallelism_config=settings))

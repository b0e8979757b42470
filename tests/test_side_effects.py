"""What the package leaves behind: files, checkpoints, uploads and settings; and that none of it can spoil a run.

Each section is a contract over a table: what is kept in a user's folder, what may be wrong with that folder or with a
kept file, what a `Trainer` does with checkpoints, and the ways in which settings are copied.
"""

import contextlib
import copy
import ctypes
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers.trainer
import transformers.utils.hub
from byte_tokenizer import byte_tokenizer, trained_model
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_demo import tiny_original
from test_packed import calibrated
from tiny_models import build
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from kvsplice_hf import (
    KVSpliceConfig,
    demo,
    folders,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
    unpatch_model,
)
from kvsplice_hf.attend.native import library as native_library
from kvsplice_hf.calibration import auto
from kvsplice_hf.patch.state import patched_sites
from kvsplice_hf.training import KVSpliceTrainer, KVSpliceTrainingArguments, freeze_all_but_kvsplice


ROOT = Path(__file__).parent.parent
NAME = "deepseek_v3"
SPLICE_FILES = {"kvsplice_config.json", "kvsplice_model.safetensors"}


# ------------------------------------------------------------------------------------------- what is kept in a folder


def keep_statistics() -> None:
    model = patch_model_with_kvsplice(copy.deepcopy(trained_model(5)), tokenizer=byte_tokenizer())
    assert all(layer.self_attn.kvsplice.codec is not None for layer in model.model.layers)


def keep_demo_model() -> None:
    model, tokenizer = demo.load_demo_model()
    assert model(torch.arange(20, dtype=torch.int64, device="cpu")[None]).logits.isfinite().all()
    assert tokenizer("abc").input_ids == byte_tokenizer()("abc").input_ids


def keep_library() -> None:
    native_library.load_library.cache_clear()
    library = native_library.load_library()
    assert library is not None
    assert ctypes.c_int.in_dll(library, "answer").value == 42


# What is kept, by what makes it or finds it; below `KVSPLICE_CACHE`.
KEPT: dict[str, Callable[[], None]] = {
    "statistics": keep_statistics,
    "demo model": keep_demo_model,
    "library": keep_library,
}
everything_kept = pytest.mark.parametrize("kept", KEPT)


def make_quick(set_attribute: Callable[[Any, str, Any], None], library: Path) -> None:
    """Little text, a tiny model in place of SmolLM2, and a library of one number."""
    set_attribute(auto, "AUTO_TOKENS", 1024)
    set_attribute(auto, "WINDOW", 64)
    set_attribute(demo, "load_original_demo_model", tiny_original)
    set_attribute(demo, "_CALIBRATION_WINDOW", 64)

    def run(command: list[str]) -> str:
        if "-o" in command:
            Path(command[command.index("-o") + 1]).symlink_to(library)
        return "the compiler"

    set_attribute(native_library, "_run", run)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next((name for name in native_library._COMPILERS if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("library")
    (folder / "source.cpp").write_text('extern "C" int answer = 42;\n', encoding="utf-8")
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "made.so"), str(folder / "source.cpp")]
    subprocess.run(command, check=True)
    return folder / "made.so"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Path) -> Iterator[Path]:
    """An empty cache folder, to be made; and things to keep in it that are made in no time."""
    make_quick(monkeypatch.setattr, library)
    monkeypatch.setenv("KVSPLICE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    native_library.load_library.cache_clear()


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


class Counted(NamedTuple):
    """How often things were made, rather than found."""

    made: list[str]


@pytest.fixture
def counted(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted([])
    for module, name in ((auto, "as_batches"), (demo, "convert_to_mla")):
        make = getattr(module, name)

        def noted(*args: Any, make: Any = make, **kwargs: Any) -> Any:
            counted.made.append("made")
            return make(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)
    run = native_library._run

    def run_noted(command: list[str]) -> str:
        if "-o" in command:
            counted.made.append("made")
        return run(command)

    monkeypatch.setattr(native_library, "_run", run_noted)
    return counted


@everything_kept
def test_it_is_made_once_and_then_found_without_a_word(
    kept: str, quick: Path, counted: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        KEPT[kept]()
    assert len(counted.made) == 1
    assert not caplog.records
    assert not [path for path in quick.rglob("*") if path.suffix == ".tmp"]


def a_file_in_its_place(root: Path) -> None:
    root.write_text("no folder", encoding="utf-8")


def no_permission(root: Path) -> None:
    root.mkdir(mode=0o500)
    if os.access(root, os.W_OK):
        pytest.skip("this user may write anywhere")


# What can be wrong with the folder that `KVSPLICE_CACHE` names.
OBSTACLES: dict[str, Callable[[Path], Any]] = {
    "a file in its place": a_file_in_its_place,
    "a file above it": lambda root: root.parent.write_text("no folder", encoding="utf-8"),
    "a file system that takes none": lambda root: None,
    "no permission": no_permission,
}
PATHS = {"a file above it": "file/below", "a file system that takes none": "/proc/kvsplice/cache"}


@everything_kept
@pytest.mark.parametrize("wrong", OBSTACLES)
def test_a_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(
    kept: str,
    wrong: str,
    quick: Path,
    counted: Counted,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = quick.parent / PATHS.get(wrong, quick.name)
    monkeypatch.setenv("KVSPLICE_CACHE", str(root))
    OBSTACLES[wrong](root)
    for _ in range(2):
        KEPT[kept]()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(counted.made) == 2, "one warning each time"
    assert all("cannot be kept" in text and str(root) in text and "KVSPLICE_CACHE" in text for text in messages)


def test_the_warning_comes_before_the_time_is_spent(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.write_text("no folder", encoding="utf-8")
    told: list[str] = []
    monkeypatch.setattr(folders, "warn_unkept", lambda *args: told.append(args[0]))

    def made(*args: Any, **kwargs: Any) -> Any:
        raise InterruptedError(f"after {len(told)} warnings")

    for kept, (module, name) in {"statistics": (auto, "as_batches"), "demo model": (demo, "convert_to_mla")}.items():
        told.clear()
        monkeypatch.setattr(module, name, made)
        with pytest.raises(InterruptedError, match="after 1 warnings"):
            KEPT[kept]()


@everything_kept
def test_a_user_without_a_home_folder_is_served(
    kept: str, quick: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KVSPLICE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    KEPT[kept]()
    assert [record.getMessage().count("home directory") for record in caplog.records] == [1]


def test_a_tilde_in_the_name_of_the_folder_is_the_home_folder(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KVSPLICE_CACHE", "~/kept")
    for keep in KEPT.values():
        keep()
    assert {path.name for path in (tmp_path / "kept").iterdir()} >= {"statistics", "native", demo._FOLDER}


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import test_side_effects as tests
tests.make_quick(setattr, Path(sys.argv[1]))
tests.trained_model(5)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))  # more than that in a file is refused
for keep in tests.KEPT.values():
    keep()
"""


def test_a_disk_that_fills_up_while_files_are_written_costs_a_warning_and_leaves_nothing(
    tmp_path: Path, library: Path
) -> None:
    pytest.importorskip("resource")
    # A library larger than the limit, so that its copy is cut off.
    big = tmp_path / "big.so"
    big.write_bytes(library.read_bytes() + bytes(2048))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "KVSPLICE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FULL_DISK, str(big)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("cannot be kept") == len(KEPT), process.stderr
    assert files_below(tmp_path / "cache") == []


# ------------------------------------------------------------------------------------------------- kept files as such


def damage_all(folder: Path, damage: Callable[[Path], Any]) -> None:
    found = [path for path in files_below(folder) if path.suffix in (".safetensors", ".so")]
    assert found
    for path in found:
        # Another file, for this process has loaded the one that was there.
        spoilt = path.with_name("spoilt" + path.suffix)
        shutil.copyfile(path, spoilt)
        damage(spoilt)
        path.unlink()
        spoilt.rename(path)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def spoil_numbers(path: Path) -> None:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        save_file({name: torch.full_like(t, torch.nan) if t.is_floating_point() else t for name, t in tensors.items()},
                  path, metadata)  # fmt: skip


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_bytes(b"something else " * 100),
    "another file of the format": lambda path: save_file({"a.b": torch.zeros(1)}, path),
    "numbers that are none": spoil_numbers,
    "a flipped byte": flip_a_byte,
}


@everything_kept
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced(kept: str, damage: str, quick: Path, counted: Counted) -> None:
    KEPT[kept]()
    intact = {path: path.stat().st_size for path in files_below(quick)}
    before = {path: path.read_bytes() for path in intact}
    damage_all(quick, DAMAGES[damage])
    if all(path.read_bytes() == content for path, content in before.items()):
        return  # a library holds no numbers to spoil
    KEPT[kept]()
    assert len(counted.made) == 2
    assert {path: path.stat().st_size for path in files_below(quick)} == intact
    KEPT[kept]()
    assert len(counted.made) <= 2


@everything_kept
def test_a_folder_in_place_of_a_kept_file_costs_a_warning(
    kept: str, quick: Path, caplog: pytest.LogCaptureFixture
) -> None:
    KEPT[kept]()
    damage_all(quick, replace_by_a_folder)
    KEPT[kept]()
    assert len(caplog.records) >= 1
    assert not [path for path in quick.rglob("*") if path.suffix == ".tmp"]


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def save_config(folder: Path) -> None:
    KVSpliceConfig(bits=4).save_json(folder / "config.json")


def save_statistics(folder: Path) -> None:
    calibrated(build(NAME)).save(folder / "statistics.safetensors")


def save_splice(folder: Path) -> None:
    save_kvsplice(patch_model_with_kvsplice(build(NAME), compression_ratio=0.5), folder)


def save_trained_splice(folder: Path) -> None:
    run = splice_trainer(spliced("half the rank"), folder, max_steps=1, save_strategy="no")
    run.save_model()


# Functions that write files which stay, given a folder.
WRITERS: dict[str, Callable[[Path], Any]] = {
    **{name: lambda folder, keep=keep: keep() for name, keep in KEPT.items()},
    "a config": save_config,
    "statistics of a name": save_statistics,
    "a splice": save_splice,
    "a trained splice": save_trained_splice,
}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027], ids=oct)
@pytest.mark.parametrize("writer", WRITERS)
def test_files_have_the_mode_that_the_umask_gives(writer: str, mask: int, quick: Path) -> None:
    with umask(mask):
        quick.mkdir()
        WRITERS[writer](quick)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in quick.rglob("*")}
    assert any(path.is_file() for path in modes)
    for path, mode in modes.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    place, contents = tmp_path / "file", [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=folders.write_bytes, args=(place, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt(), RuntimeError("anything")], ids=repr)
def test_a_file_that_was_not_finished_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    place = tmp_path / "file"
    folders.write_bytes(place, b"before")

    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        folders.write_whole(place, write)
    assert place.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [place]


# -------------------------------------------------------------------------------------------------- uploads to the Hub


def spliced(recipe: str, attention: str = "auto") -> Any:
    model = build(NAME)
    config = {
        "half the rank": KVSpliceConfig(compression_ratio=0.5, sink_tokens=2, attention=attention),
        "LayerNorm": KVSpliceConfig(compression_ratio=0.5, use_layernorm=True, sink_tokens=2, attention=attention),
        "packed": KVSpliceConfig(bits=3, sink_tokens=2, attention=attention),
    }[recipe]
    patch_model_with_kvsplice(model, config, calibration=None if config.use_layernorm else calibrated(model))
    return freeze_all_but_kvsplice(model)


all_recipes = pytest.mark.parametrize("recipe", ["half the rank", "LayerNorm", "packed"])


def windows(count: int = 16, tokens: int = 8) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(1)
    return torch.randint(8, 128, (count, tokens), generator=generator, dtype=torch.int64, device="cpu")


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "data_seed": 0,
        **changes,
    }


def data() -> dict[str, Any]:
    rows = windows().tolist()
    rows = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return {"train_dataset": rows, "eval_dataset": rows, "data_collator": default_data_collator}


def splice_trainer(model: Any, folder: Path, **changes: Any) -> KVSpliceTrainer:
    return KVSpliceTrainer(model, KVSpliceTrainingArguments(**arguments(folder, **changes)), **data())


def plain_trainer(model: Any, folder: Path, **changes: Any) -> Trainer:
    return Trainer(model, TrainingArguments(**arguments(folder, **changes)), **data())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(windows(2, 12), use_cache=False).logits


class Hub:
    """Stands in for the Hub: keeps what each upload holds, by commit."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uploads, self.running = folder, [], False

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return type("Repository", (), {"repo_id": repo_id})()

    def upload_folder(self, folder_path: str, path_in_repo: str = "", **kwargs: Any) -> Any:
        place = self.folder / str(len(self.uploads))
        ignored = shutil.ignore_patterns(*kwargs.get("ignore_patterns", ()))
        shutil.copytree(folder_path, place, ignore=ignored)
        self.uploads.append((path_in_repo, place))
        return self

    def done(self) -> bool:
        return not self.running


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", hub)
    return hub


PUSHED = {
    "end": [""],
    "every_save": ["", "", ""],
    "checkpoint": ["", "last-checkpoint", "", "last-checkpoint", ""],
    "all_checkpoints": ["", "checkpoint-1", "", "checkpoint-2", ""],
}


@pytest.mark.parametrize("strategy", PUSHED)
def test_every_upload_of_a_training_holds_the_splice_as_it_is_then(strategy: str, hub: Hub, tmp_path: Path) -> None:
    model = spliced("packed")
    run = splice_trainer(model, tmp_path / "out", push_to_hub=True, hub_strategy=strategy, hub_model_id="me/it")
    run.train()
    run.push_to_hub()
    assert [path for path, _ in hub.uploads] == PUSHED[strategy]
    for _, folder in hub.uploads:
        assert {path.name for path in folder.iterdir()} >= SPLICE_FILES | {"training_args.json"}
    last = load_kvsplice(build(NAME), hub.uploads[-1][1])
    assert torch.equal(logits(last), logits(model))
    if strategy == "every_save":
        first, second = (load_kvsplice(build(NAME), folder) for _, folder in hub.uploads[:2])
        assert torch.equal(logits(first), logits(load_kvsplice(build(NAME), tmp_path / "out" / "checkpoint-1")))
        assert torch.equal(logits(second), logits(model))


def test_files_of_an_upload_that_is_running_are_left_alone(hub: Hub, tmp_path: Path) -> None:
    run = splice_trainer(spliced("packed"), tmp_path, push_to_hub=True, hub_strategy="every_save", hub_model_id="me/it")
    hub.running = True
    run._finish_current_push = lambda: None  # it would wait for ever
    run.train()
    assert [path for path, _ in hub.uploads] == [""], "the second checkpoint came before the first was uploaded"
    assert (tmp_path / "kvsplice_model.safetensors").read_bytes() == (
        tmp_path / "checkpoint-1" / "kvsplice_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_patched_model_is_uploaded_with_its_splice(
    way: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.utils.hub, "hf_api", hub)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard(""))

    def kept(self: Any, working_dir: str, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any) -> None:
        assert (repo_id, files_timestamps) == ("me/it", {})
        hub.upload_folder(working_dir)

    monkeypatch.setattr(transformers.utils.PushToHubMixin, "_upload_modified_files", kept)
    model = spliced("packed")
    if way == "push_to_hub":
        model.push_to_hub("me/it")
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/it")
    ((_, folder),) = hub.uploads
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(load_kvsplice(stock, folder)), logits(model))


# ------------------------------------------------------------------------------------- checkpoints of a plain `Trainer`


@all_recipes
def test_a_plain_trainer_resumes_with_the_trained_splice(
    recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = spliced(recipe)
    plain_trainer(model, tmp_path).train()
    fresh = spliced(recipe)
    assert not torch.equal(logits(fresh), logits(model))
    caplog.clear()
    plain_trainer(fresh, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(fresh), logits(model))
    assert not [record for record in caplog.records if record.name.startswith("kvsplice_hf")]


@all_recipes
def test_a_plain_trainer_that_was_cut_off_goes_on_as_if_it_had_not_been(recipe: str, tmp_path: Path) -> None:
    def losses(run: Trainer) -> list[float]:
        return [row["loss"] for row in run.state.log_history if "loss" in row]

    changes = {"max_steps": 4, "logging_steps": 1}
    whole = plain_trainer(spliced(recipe), tmp_path / "whole", **changes)
    whole.train()
    second = plain_trainer(spliced(recipe), tmp_path / "second", **changes)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(second) == losses(whole)


def test_a_plain_trainer_loads_the_splice_of_its_best_checkpoint(tmp_path: Path) -> None:
    model = spliced("packed")
    changes = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.5}
    run = plain_trainer(model, tmp_path, max_steps=3, **changes)
    run.train()
    best = load_kvsplice(build(NAME), run.state.best_model_checkpoint)
    assert torch.equal(logits(best), logits(model))


def test_a_checkpoint_in_pieces_is_resumed_from_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = spliced("packed")
    save = model.save_pretrained
    model.save_pretrained = lambda *args, **kwargs: save(*args, **kwargs, max_shard_size="100KB")
    plain_trainer(model, tmp_path).train()
    assert len(list((tmp_path / "checkpoint-2").glob("model-*.safetensors"))) > 1
    fresh = spliced("packed")
    plain_trainer(fresh, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(fresh), logits(model))


def test_a_checkpoint_of_a_plain_trainer_is_one_of_ours_as_well(tmp_path: Path) -> None:
    model = spliced("packed")
    plain_trainer(model, tmp_path).train()
    assert torch.equal(logits(load_kvsplice(build(NAME), tmp_path / "checkpoint-2")), logits(model))
    fresh = spliced("packed")
    splice_trainer(fresh, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(fresh), logits(model))


def test_what_a_plain_trainer_saves_at_the_end_is_the_base_model_and_the_splice_beside_it(tmp_path: Path) -> None:
    model = spliced("packed")
    run = plain_trainer(model, tmp_path / "out")
    run.train()
    run.save_model(str(tmp_path / "final"))
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(stock), logits(build(NAME)))
    assert torch.equal(logits(load_kvsplice(stock, tmp_path / "final")), logits(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_its_own_splice(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    model = spliced("half the rank")
    clone = copied(model)
    with torch.no_grad():
        patched_sites(clone)[0][1].splice.compress.weight.mul_(2)
    clone.save_pretrained(tmp_path)
    assert torch.equal(logits(load_kvsplice(build(NAME), tmp_path)), logits(clone))
    assert not torch.equal(logits(clone), logits(model))


def test_gathered_weights_are_saved_and_dummies_are_not(tmp_path: Path) -> None:
    model = spliced("half the rank")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    with torch.no_grad():
        patched_sites(model)[0][1].splice.compress.weight.zero_()  # as where another process holds it
    model.save_pretrained(tmp_path / "gathered", state_dict=dict(weights))
    assert torch.equal(logits(load_kvsplice(build(NAME), tmp_path / "gathered")), expected)
    model.save_pretrained(tmp_path / "dummy", state_dict={})
    assert not SPLICE_FILES & {path.name for path in (tmp_path / "dummy").iterdir()}
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process").exists() or not list((tmp_path / "other process").iterdir())


@pytest.mark.parametrize("wrapped", [False, True], ids=["the model", "a wrapper"])
def test_weights_without_a_splice_are_loaded_with_a_warning(wrapped: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = spliced("half the rank")
    expected = logits(model)
    weights = build(NAME).state_dict()
    target = torch.nn.ModuleDict({"module": model}) if wrapped else model
    prefix = "module." if wrapped else ""
    target.load_state_dict({prefix + name: tensor for name, tensor in weights.items()}, strict=False)
    assert [record.getMessage().count("load_kvsplice(model, folder)") for record in caplog.records] == [1]
    assert torch.equal(logits(model), expected)
    caplog.clear()
    target.load_state_dict(target.state_dict())
    model.lm_head.load_state_dict(model.lm_head.state_dict())
    assert not caplog.records


def test_an_old_checkpoint_without_a_splice_is_resumed_from_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = spliced("half the rank")
    plain_trainer(model, tmp_path).train()
    folder = tmp_path / "checkpoint-2"
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if ".kvsplice." not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    plain_trainer(spliced("half the rank"), tmp_path).train(resume_from_checkpoint=str(folder))
    assert "hold no splice" in caplog.text


def with_widths(model: Any, widths: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: widths(tensor) if name.endswith("codec.widths") else tensor for name, tensor in state.items()}


def test_weights_with_other_widths_are_loaded_whole_or_refused(tmp_path: Path) -> None:
    model = spliced("packed")
    save_kvsplice(model, tmp_path)
    before = logits(model)
    turned = with_widths(model, lambda widths: torch.cat([widths[:8].flip(0), widths[8:]]))
    assert any(not torch.equal(turned[name], tensor) for name, tensor in model.state_dict().items())
    model.load_state_dict(turned)
    assert not torch.equal(logits(model), before)
    for _, patched in patched_sites(model):
        codec = patched.splice.codec
        fresh = type(codec)(*(getattr(codec, name).detach() for name in codec.saved))
        assert all(torch.equal(table, getattr(patched.splice.codec, name)) for name, table in fresh.named_buffers())
    with pytest.raises(RuntimeError, match="load_kvsplice"):
        model.load_state_dict(with_widths(model, lambda widths: torch.full_like(widths, 8)))
    assert torch.equal(logits(load_kvsplice(unpatch_model(model), tmp_path)), before)


def test_unpatching_leaves_no_trace_of_saving_and_loading(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = unpatch_model(spliced("half the rank"))
    assert "save_pretrained" not in vars(model)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
    model.load_state_dict(build(NAME).state_dict())
    assert not caplog.records
    model.save_pretrained(tmp_path)
    assert not SPLICE_FILES & {path.name for path in tmp_path.iterdir()}


# ----------------------------------------------------------------------------------------- settings of a patched model


# The ways in which settings leave a model.
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "pickle of a shallow copy": lambda config: pickle.loads(pickle.dumps(copy.copy(config))),
    "from_dict": lambda config: type(config).from_dict(config.to_dict()),
    "JSON": lambda config: type(config).from_dict(json.loads(config.to_json_string())),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_copied_settings_name_the_function_of_the_base_model(base: str, copied: str) -> None:
    model = build(NAME)
    model.set_attn_implementation(base)
    patch_model_with_kvsplice(model, compression_ratio=0.5)
    assert model.config._attn_implementation == f"kvsplice_{base}"
    found = COPIES[copied](model.config)
    assert found._attn_implementation in (base, None)
    assert type(found._attn_implementation) in (str, type(None))
    assert "kvsplice" not in str(found.to_dict())
    assert "kvsplice" not in str(vars(found))
    assert model.config._attn_implementation == f"kvsplice_{base}", "the model keeps its own"
    stock = AutoModelForCausalLM.from_config(found)
    assert stock.config._attn_implementation in ("sdpa", base)


STRANGER = """
import pickle, sys, torch
from transformers import AutoModelForCausalLM, AutoConfig
settings = [pickle.load(open(sys.argv[1], "rb")), AutoConfig.from_pretrained(sys.argv[2])]
for config in settings:
    model = AutoModelForCausalLM.from_config(config)
    assert model.config._attn_implementation == "sdpa", model.config._attn_implementation
    assert model(torch.arange(8, 16, dtype=torch.int64)[None]).logits.isfinite().all()
assert not [name for name in sys.modules if name.startswith("kvsplice")]
"""


def test_a_process_without_this_package_builds_a_model_from_the_settings(tmp_path: Path) -> None:
    model = spliced("packed")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(model.config))
    model.save_pretrained(tmp_path / "model")
    # So that it cannot even be found.
    program = f"import sys; sys.modules['kvsplice_hf'] = None\n{STRANGER}".replace("sys.modules if", "[] if")
    command = [sys.executable, "-c", program, str(tmp_path / "config.pickle"), str(tmp_path / "model")]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("mode", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copied_model_keeps_our_attention_function(copied: Callable[[Any], Any], mode: str) -> None:
    model = spliced("half the rank", attention=mode)
    name = model.config._attn_implementation
    assert name == ("sdpa" if mode == "expanded" else "kvsplice_sdpa")
    for clone in (copied(model), copied(copied(model))):
        assert clone.config._attn_implementation == name
        assert clone.config is clone.model.layers[0].self_attn.config
        assert torch.equal(logits(clone), logits(model))
        assert copy.deepcopy(clone.config)._attn_implementation == "sdpa"
        assert unpatch_model(clone).config._attn_implementation == "sdpa"
        assert type(clone.config._attn_implementation) is str
    layer = copied(model.model.layers[0])
    assert layer.self_attn.config._attn_implementation == name, "a part of a model is copied with its settings"


def test_a_copied_model_keeps_a_function_that_was_chosen_after_the_patch() -> None:
    model = spliced("half the rank")
    model.set_attn_implementation("eager")
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone.config._attn_implementation == "eager"
        assert unpatch_model(clone).config._attn_implementation == "eager"

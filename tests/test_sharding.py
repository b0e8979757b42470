"""A patched model spread over processes by FSDP trains, saves and loads as a whole one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ordinary_models import build_ordinary
from processes import in_processes, needs_gloo
from safetensors.torch import load_file
from tiny_models import TINY_MODELS, build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kvsplice_hf import (
    CheckpointError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    load_kvsplice,
    patch_model_with_kvsplice,
    save_kvsplice,
)
from kvsplice_hf.manage.loading import read_splices
from kvsplice_hf.patch.state import splice_disabled, splice_parts_of
from kvsplice_hf.training import freeze_all_but_kvsplice
from kvsplice_hf.training.monitor import splice_metrics
from kvsplice_hf.training.objectives import divergence_from
from kvsplice_hf.weights.sharding import whole


PROCESSES = 2
RECIPES: dict[str, tuple[str, KVSpliceConfig]] = {
    "half the rank": ("deepseek_v3", KVSpliceConfig(compression_ratio=0.5, sink_tokens=1)),
    "packed": ("deepseek_v3", KVSpliceConfig(bytes_per_token=40, sink_tokens=1)),
    "packed heads": ("llama", KVSpliceConfig(bits=5, sink_tokens=1)),
}
pytestmark = needs_gloo


def made(recipe: str) -> Any:
    name, _ = RECIPES[recipe]
    return build(name) if name in TINY_MODELS else build_ordinary(name)


def spliced(recipe: str, folder: Path) -> Any:
    """The model with the splice in a folder, in training."""
    return freeze_all_but_kvsplice(load_kvsplice(made(recipe), folder))


def tokens(batch: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


def spread(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: Any, ids: torch.Tensor, steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the gradients of the first step, whole."""
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=1e-3)
    losses, gradients = [], {}
    for step in range(steps):
        with splice_disabled(model), torch.no_grad():
            teacher = model(ids, use_cache=False).logits
        loss = divergence_from(teacher, model(ids, use_cache=False).logits, torch.ones_like(ids, dtype=torch.bool))
        loss.backward()
        if step == 0:
            found = {name: held.grad for name, held in model.named_parameters() if held.grad is not None}
            gradients = {name: whole(gradient).clone() for name, gradient in found.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients


def in_each_process(folder: Path, recipe: str) -> list[Any]:
    dist_rank = dist.get_rank()
    model = spliced(recipe, folder / "start")
    # What each process has seen is averaged: with half of the sequences each, the gradient of all of them. (Packed
    # numbers between two levels fall to either one for the last digit, which the size of a batch changes.)
    ids = tokens(4, 24, seed=0)
    ids = ids.chunk(2)[dist_rank] if recipe == "half the rank" else ids
    losses, gradients = trained(spread(model), ids)
    save_kvsplice(model, folder / "sharded", is_main_process=dist_rank == 0)
    metrics = splice_metrics(model)
    trained(model, tokens(4, 24, seed=0))
    load_kvsplice(model, folder / "sharded")
    save_kvsplice(model, folder / "again", is_main_process=dist_rank == 0)
    found = [losses, metrics["kvsplice/shift_std"], gradients]
    if recipe != "half the rank":
        load_kvsplice(model, folder / "others")
        save_kvsplice(model, folder / "of other widths", is_main_process=dist_rank == 0)
        # The optimiser, and FSDP, go on with the parameters that they know.
        held = {name: type(step).__name__ for name, step in model.named_parameters() if ".codec." in name}
        found += [trained(model, ids), held]
    return found


def save_other_widths(model: Any, folder: Path) -> None:
    """A splice of the same shapes whose rows have as many bytes, but not for the same numbers."""
    for splice in splice_parts_of(model).values():
        codec = splice.codec
        code = codec.widths[: len(codec.sigmas)]
        assert len(code.unique()) > 1
        changed = codec.widths.clone()
        changed[: len(code)] = code.flip(0)
        splice.codec = type(codec)(
            changed, codec.scales.detach(), codec.centres.detach(), codec.sigmas, codec.key_sigmas
        )
        assert splice.codec.row_bytes == codec.row_bytes
        assert not splice.codec.reads_rows_of(codec)
    save_kvsplice(model, folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sharded_model_trains_saves_and_loads_as_a_whole_one_does(recipe: str, tmp_path: Path) -> None:
    packed = recipe != "half the rank"
    model = patch_model_with_kvsplice(made(recipe), RECIPES[recipe][1], calibration=list(tokens(8, 64)[:, None]))
    save_kvsplice(model, tmp_path / "start")
    if packed:
        save_other_widths(model, tmp_path / "others")
    found = in_processes(in_each_process, tmp_path, recipe, processes=PROCESSES)
    model = spliced(recipe, tmp_path / "start")
    losses, gradients = trained(model, tokens(4, 24, seed=0))
    assert losses[0] != losses[1]
    for step, loss in enumerate(losses):
        assert sum(of_rank[0][step] for of_rank in found) / PROCESSES == pytest.approx(loss, rel=1e-4)
    for of_rank in found:
        assert of_rank[1] == pytest.approx(splice_metrics(model)["kvsplice/shift_std"], rel=1e-4)
        torch.testing.assert_close(of_rank[2], gradients, rtol=1e-3, atol=1e-5)
    save_kvsplice(model, tmp_path / "whole")
    expected, *others = (
        load_file(tmp_path / name / "kvsplice_model.safetensors") for name in ("whole", "sharded", "again")
    )
    for tensors in others:
        torch.testing.assert_close(tensors, expected, rtol=1e-3, atol=1e-5)
    if packed:
        expected, tensors = (
            load_file(tmp_path / name / "kvsplice_model.safetensors") for name in ("others", "of other widths")
        )
        assert all(torch.equal(tensors[name], held) for name, held in expected.items())
        losses, gradients = trained(spliced(recipe, tmp_path / "others"), tokens(4, 24, seed=0))
        for of_rank in found:
            assert set(of_rank[4].values()) == {"DTensor"}
            torch.testing.assert_close(of_rank[3][1], gradients, rtol=1e-3, atol=1e-5)
        assert sum(of_rank[3][0][1] for of_rank in found) / PROCESSES == pytest.approx(losses[1], rel=1e-4)


def patched_when_sharded(folder: Path, recipe: str) -> Any:
    """Calibrated and patched after it was spread, which every process has to do on the same text."""
    config, model = RECIPES[recipe][1], spread(made(recipe))
    calibrator = KVSpliceCalibrator(model, sink_tokens=1).collect(list(tokens(7, 64)[:, None]), progress=False)
    patch_model_with_kvsplice(model, config, calibration=calibrator)
    save_kvsplice(model, folder / "sharded")
    ids = tokens(2, 12)
    with torch.no_grad():
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    try:
        load_kvsplice(model, folder / "sharded" if dist.get_rank() == 0 else folder / "nowhere")
    except CheckpointError as error:
        return calibrator.fingerprint, calibrator.statistics, said, str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["packed", "packed heads"])
def test_a_sharded_model_is_calibrated_and_patched_as_a_whole_one_is(recipe: str, tmp_path: Path) -> None:
    found = in_processes(patched_when_sharded, tmp_path, recipe, processes=PROCESSES)
    config, model = RECIPES[recipe][1], made(recipe)
    calibrator = KVSpliceCalibrator(model, sink_tokens=1).collect(list(tokens(7, 64)[:, None]), progress=False)
    patch_model_with_kvsplice(model, config, calibration=calibrator)
    ids = tokens(2, 12)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    for fingerprint, statistics, of_rank, error in found:
        assert fingerprint == calibrator.fingerprint
        assert all(
            torch.allclose(statistics[part].fisher, layer.fisher, rtol=1e-3, atol=1e-6)
            for part, layer in calibrator.statistics.items()
        )
        assert of_rank.tolist() == said.tolist()
        assert "nowhere" in error
    assert read_splices(tmp_path / "sharded").keys() == {0, 1}

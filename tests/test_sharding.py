"""A patched model spread over processes by FSDP trains, saves and loads as a whole one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tiny_models import build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kvsplice_hf import KVSpliceConfig, load_kvsplice, patch_model_with_kvsplice, save_kvsplice
from kvsplice_hf.patch.state import splice_disabled
from kvsplice_hf.training import freeze_all_but_kvsplice
from kvsplice_hf.training.monitor import splice_metrics
from kvsplice_hf.training.objectives import divergence_from


PROCESSES = 2
RECIPES = {
    "half the rank": KVSpliceConfig(compression_ratio=0.5, sink_tokens=1),
    "packed": KVSpliceConfig(bytes_per_token=40, sink_tokens=1),
}
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def trained(model: Any, steps: int = 2) -> list[float]:
    ids = torch.randint(0, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        with splice_disabled(model), torch.no_grad():
            teacher = model(ids, use_cache=False).logits
        loss = divergence_from(teacher, model(ids, use_cache=False).logits, torch.ones_like(ids, dtype=torch.bool))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def spliced(config: KVSpliceConfig) -> Any:
    model = build("deepseek_v3")
    ids = torch.randint(0, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    return freeze_all_but_kvsplice(patch_model_with_kvsplice(model, config, calibration=list(ids[:, None])))


def in_each_process(rank: int, folder: str, recipe: str) -> None:
    torch.set_num_threads(1)
    model = spliced(RECIPES[recipe])  # before there is a group: its processes would share the calibration
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = trained(model)
        save_kvsplice(model, f"{folder}/sharded", is_main_process=rank == 0)
        metrics = splice_metrics(model)
        dist.barrier()  # the file is there
        trained(model)
        load_kvsplice(model, f"{folder}/sharded")
        save_kvsplice(model, f"{folder}/again", is_main_process=rank == 0)
        if rank == 0:
            torch.save([losses, metrics["kvsplice/shift_std"]], f"{folder}/found")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sharded_model_trains_saves_and_loads_as_a_whole_one_does(recipe: str, tmp_path: Path) -> None:
    mp.spawn(in_each_process, (str(tmp_path), recipe), nprocs=PROCESSES)
    losses, spread = torch.load(tmp_path / "found", weights_only=True)
    whole = spliced(RECIPES[recipe])
    assert losses == pytest.approx(trained(whole), rel=1e-5)
    assert losses[0] != losses[1]
    assert spread == pytest.approx(splice_metrics(whole)["kvsplice/shift_std"], rel=1e-5)
    save_kvsplice(whole, tmp_path / "whole")
    expected, *others = (
        load_file(tmp_path / name / "kvsplice_model.safetensors") for name in ("whole", "sharded", "again")
    )
    for found in others:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

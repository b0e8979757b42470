"""Fine-tuning in the coordinates of calibration: a step costs what it says, and training works as without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import SINKS, calibrated
from test_training import RECIPES, arguments, dataset, divergence
from tiny_models import build
from torch.nn import functional as F
from transformers import default_data_collator

from kvsplice_hf import (
    CalibrationError,
    KVSpliceCalibrator,
    KVSpliceConfig,
    TrainingError,
    patch_model_with_kvsplice,
)
from kvsplice_hf.calibration.solve import SHRINKAGE, latent_metric
from kvsplice_hf.patch.state import find_patch
from kvsplice_hf.training import KVSpliceTrainer, freeze_all_but_kvsplice
from kvsplice_hf.training.calibrated_steps import CalibratedSteps
from kvsplice_hf.training.parameters import splices_of


FITTED = [name for name, recipe in RECIPES.items() if not recipe.use_layernorm]
MODELS = ["deepseek_v3", "minicpm3", "deepseek_v2"]


def spliced(name: str, recipe: str, **changes: Any) -> tuple[Any, KVSpliceCalibrator]:
    model = build(name)
    known = calibrated(model)
    config = KVSpliceConfig(**{**vars(RECIPES[recipe]), **changes})
    return freeze_all_but_kvsplice(patch_model_with_kvsplice(model, config, calibration=known)), known


def steps_of(model: Any, known: KVSpliceCalibrator) -> CalibratedSteps:
    return CalibratedSteps(model, known, find_patch(model)[1].config)


def trainer(model: Any, folder: Path, calibration: Any, **changes: Any) -> KVSpliceTrainer:
    return KVSpliceTrainer(
        model,
        arguments(folder, **changes),
        train_dataset=dataset(),
        data_collator=default_data_collator,
        calibration=calibration,
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", FITTED)
def test_a_step_of_one_number_costs_at_most_half_its_square(name: str, recipe: str) -> None:
    model, known = spliced(name, recipe, **ROTATED[recipe])
    coordinates = steps_of(model, known).coordinates
    for layer_idx, splice in splices_of(model).items():
        statistics = known.statistics[layer_idx]
        scale = F.softplus(splice.transform_scale.detach()).double()
        metric = latent_metric(statistics, "fisher", SHRINKAGE)
        # A step of one entry (i, j) changes what is decoded by column i of this, times number j of a code.
        written = coordinates[splice.expand.weight].left.double() / scale[:, None]
        assert_about_one_at_most(written.T @ metric @ written)
        # Here, number i of a code by left_i times row j of this, times what is read.
        left, right = coordinates[splice.compress.weight]
        read = right.double() * scale
        assert_about_one_at_most(read @ statistics.covariance @ read.T)
        decoded = splice.expand.weight[:, : splice.rank].detach().double() * left.double() / scale[:, None]
        cost = (decoded.T @ metric @ decoded).diagonal()
        torch.testing.assert_close(cost, torch.ones_like(cost), atol=2e-3, rtol=0)


# Where latents are predicted from keys, what is encoded is what is left, of which statistics hold no covariance.
ROTATED: dict[str, dict[str, Any]] = {"packed": {"keys": "rotated"}, "half the rank": {}}


def assert_about_one_at_most(costs: torch.Tensor) -> None:
    """Of twice the costs of steps in all directions: damped by a tenth of the mean, none is above 1, and many near."""
    eigenvalues = torch.linalg.eigvalsh(costs)
    assert eigenvalues.max() < 1 + 1e-3
    assert eigenvalues.max() > 0.8


def test_a_step_of_gradient_descent_is_one_along_the_natural_gradient() -> None:
    model, known = spliced("deepseek_v3", "packed")
    steps = steps_of(model, known)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.25)
    steps.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    before, gradients = {}, {}
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        before[parameter], gradients[parameter] = parameter.detach().clone(), parameter.grad.clone()
    optimizer.step()
    for parameter, (left, right) in steps.coordinates.items():
        left = torch.diag(left) if left.ndim == 1 else left
        step = left @ left.T @ gradients[parameter]
        step = step if right is None else step @ right.T @ right
        expected = before[parameter] - 0.25 * step
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    frozen = set(parameters) - set(steps.coordinates)
    assert frozen == {splice.transform_scale for splice in splices_of(model).values()}
    assert all(torch.equal(parameter, before[parameter]) for parameter in frozen)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", FITTED)
def test_training_in_these_coordinates_brings_the_model_closer(name: str, recipe: str, tmp_path: Path) -> None:
    model, known = spliced(name, recipe)
    before = divergence(model)
    trainer(model, tmp_path, known, max_steps=25, learning_rate=1e-4).train()
    assert divergence(model) < before


def test_a_run_that_was_cut_off_resumes_with_the_same_losses(tmp_path: Path) -> None:
    def losses(run: Any) -> list[float]:
        return [row["loss"] for row in run.state.log_history if "loss" in row]

    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-4}
    model, known = spliced("deepseek_v3", "packed")
    whole = trainer(model, tmp_path / "whole", known, **saving)
    whole.train()
    model, known = spliced("deepseek_v3", "packed")
    second = trainer(model, tmp_path / "second", known, **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(second) == pytest.approx(losses(whole), rel=1e-4)


def test_statistics_may_be_a_file(tmp_path: Path) -> None:
    model, known = spliced("deepseek_v3", "packed")
    known.save(tmp_path / "statistics.safetensors")
    run = trainer(model, tmp_path, tmp_path / "statistics.safetensors", learning_rate=1e-4)
    run.train()
    assert len(run.state.log_history) > 1


def test_statistics_of_the_same_model_give_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, known = spliced("deepseek_v3", "packed")
    trainer(model, tmp_path, known)
    assert not caplog.records


def test_statistics_of_another_model_are_refused_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, known = spliced("deepseek_v3", "packed")
    del known.statistics[0]
    with pytest.raises(CalibrationError, match="of another model"):
        trainer(model, tmp_path, known)
    other = build("deepseek_v3")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    trainer(model, tmp_path, calibrated(other))
    assert "with other weights" in caplog.text


def test_normalised_codes_are_refused(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    known = calibrated(model)
    config = KVSpliceConfig(compression_ratio=0.5, use_layernorm=True, sink_tokens=SINKS)
    freeze_all_but_kvsplice(patch_model_with_kvsplice(model, config))
    with pytest.raises(TrainingError, match="use_layernorm"):
        trainer(model, tmp_path, known)

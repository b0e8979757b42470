"""The parts of a decode step: they add up, stock attention alone runs `kv_b_proj`, and a dry run of the script."""

from pathlib import Path

import pytest
import torch
from byte_tokenizer import trained_model
from programs import load_program, run_program
from tiny_models import build
from torch import nn

from kvsplice_hf import ConfigError
from kvsplice_hf.bench.command_line import LoadedModel
from kvsplice_hf.bench.step_parts import ATTENTION, LINEAR, REST, linear_layers, parts_of_step
from kvsplice_hf.patch.sites import find_sites


class Waits(nn.Linear):
    """A linear layer whose time is known."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        super().__init__(2, 2)
        self._clock, self._seconds = clock, seconds

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self._clock[0] += self._seconds
        return super().forward(inputs)


def test_linear_layers_of_attention_count_once_and_kv_b_proj_as_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj, self.kv_b_proj = Waits(clock, 3.0), Waits(clock, 5.0)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            clock[0] += 7.0
            return self.kv_b_proj(self.o_proj(inputs))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = Attention(), Waits(clock, 11.0)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            clock[0] += 13.0
            return self.head(self.attention(inputs))

    model = Model()
    found = parts_of_step(model, [model.attention], lambda: model(torch.ones(1, 2)), "cpu")
    assert found == {LINEAR: 14.0, ATTENTION: 12.0, REST: 13.0}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_linear_layer_of_a_model_is_found() -> None:
    model = build("deepseek_v3")
    found = linear_layers(model, frozenset({"kv_b_proj"}))
    expected = [part for name, part in model.named_modules() if isinstance(part, nn.Linear) and "kv_b_proj" not in name]
    assert set(expected) <= set(found)
    assert not {site.module.kv_b_proj for site in find_sites(model)} & set(found)


def test_steps_of_a_model_as_it_is_are_measured_part_by_part(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        loaded = LoadedModel(trained_model(), None)
        patch.setattr(load_program("measure/quantised_decode.py"), "load_model", lambda *_: loaded)
        options = ["--methods", "none", "--context", "64", "--repeats", "1", "--output", str(tmp_path)]
        (row,) = run_program("measure/quantised_decode.py", *options)["rows"]
    for cache in ("stock", "packed 4x"):
        (seconds,) = zip(*(row[cache][part] for part in (LINEAR, ATTENTION, REST)), strict=True)
        assert min(seconds) > 0
        assert row[cache]["step"] == [pytest.approx(sum(seconds))]
    assert row["step: share"] == row["attention on the cache: share"] == [1.0]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"methods": ["int3"]}, "int3"), ({"context": 0}, "context"), ({"splice": "./nowhere"}, "nowhere")],
)
def test_a_wrong_setting_is_named(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_program("measure/quantised_decode.py").Arguments(**wrong)

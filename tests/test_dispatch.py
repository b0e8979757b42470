"""Kernels serve only calls that they are made for, and only as long as they agree with PyTorch."""

import importlib.util
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvsplice_hf import RowCodec
from kvsplice_hf.attend import choice as dispatch
from kvsplice_hf.attend import reference as streaming
from kvsplice_hf.attend.choice import attend, pack
from kvsplice_hf.attend.triton import backend as triton_backend
from kvsplice_hf.code import trellis


R, P = 6, 2
CODEC = RowCodec(torch.full((R + P,), 4), torch.ones(R + P), torch.zeros(R + P), torch.ones(R))


class Kernels(SimpleNamespace):
    """Stands in for the module of the kernels, computes by PyTorch, and counts its calls."""

    def __init__(self, error: float = 0.0, raises: Exception | None = None) -> None:
        super().__init__(calls=0)
        self.error, self.raises = error, raises

    def kernels_available(self, device: torch.device) -> bool:
        return True

    def _called(self) -> None:
        self.calls += 1
        if self.raises is not None:
            raise self.raises

    def attend_rows(self, query: torch.Tensor, rows: torch.Tensor, value_dim: int, bias: Any, *, scaling: float) -> Any:
        self._called()
        by_query = None if bias is None else bias[:, None]
        mixed, lse = streaming.attend_rows(query, rows, value_dim, by_query, scaling=scaling)
        return mixed + self.error, lse

    def attend_packed(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        codec: RowCodec,
        value_dim: int,
        bias: Any,
        *,
        scaling: float,
        keys: Any = None,
    ) -> Any:
        self._called()
        by_query = None if bias is None else bias[:, None]
        mixed, lse = streaming.attend_packed(query, rows, codec, value_dim, by_query, scaling=scaling)
        return mixed + self.error, lse

    def encode_pack(self, rows: torch.Tensor, codec: RowCodec) -> torch.Tensor:
        self._called()
        return codec.pack(rows) + int(self.error)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(kernels: Any) -> Any:
        monkeypatch.setattr(triton_backend, "_triton_kernels", lambda: kernels)
        monkeypatch.setattr(dispatch, "_verdicts", {})
        monkeypatch.setattr(triton_backend, "_IN_INTERPRETER", True)
        return kernels

    return install


def call(kind: str, **settings: Any) -> torch.Tensor:
    torch.manual_seed(0)
    query, rows = torch.randn(2, 4, R + P), torch.randn(2, 9, R + P)
    if kind == "pack":
        return pack(rows, CODEC).float()
    query.requires_grad_(settings.pop("requires_grad", False))
    codec, stored = (None, rows) if kind == "rows" else (CODEC, CODEC.pack(rows))
    bias = torch.zeros(2, 1, 2, 9)
    return attend(query, stored, codec, R, bias, scaling=0.5, **settings).mixed


KINDS = ["rows", "packed", "pack"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_that_agrees_serves_every_call(kind: str, use: Any) -> None:
    use(None)
    expected = call(kind)
    kernels = use(Kernels())
    for count in (1, 2, 3):
        torch.testing.assert_close(call(kind), expected)
        assert kernels.calls == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kernels", "reason"),
    [(Kernels(error=1.0), "differs from that of PyTorch"), (Kernels(raises=RuntimeError("ptxas")), "ptxas")],
    ids=["wrong", "failing"],
)
def test_a_wrong_or_failing_kernel_is_given_up_with_one_warning(
    kind: str, kernels: Kernels, reason: str, use: Any, caplog: pytest.LogCaptureFixture
) -> None:
    use(None)
    expected = call(kind)
    use(kernels).calls = 0
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            torch.testing.assert_close(call(kind), expected)
    assert kernels.calls == 1
    assert len(caplog.records) == 1
    assert reason in caplog.text


@pytest.mark.parametrize("kind", ["rows", "packed"])
@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"requires_grad": True}], ids=str)
def test_calls_with_dropout_or_gradients_go_to_pytorch(kind: str, settings: dict[str, Any], use: Any) -> None:
    kernels = use(Kernels())
    call(kind, **settings)
    assert kernels.calls == 0


def test_kernels_can_be_left_out(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = use(Kernels())
    monkeypatch.setattr(dispatch, "_WITHOUT_KERNELS", True)
    for kind in KINDS:
        call(kind)
    assert kernels.calls == 0


@pytest.mark.parametrize("value", [None, "torch", "all"])
def test_the_environment_says_whether_they_are(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSPLICE_KERNELS", raising=False)
    monkeypatch.setattr(trellis, "_fastest", trellis._fastest)  # the other module offers its own search
    if value is not None:
        monkeypatch.setenv("KVSPLICE_KERNELS", value)
    spec = importlib.util.find_spec("kvsplice_hf.attend.choice")
    assert spec is not None
    assert spec.loader is not None
    another = importlib.util.module_from_spec(spec)  # as at import, beside the module that others use
    spec.loader.exec_module(another)
    assert another._WITHOUT_KERNELS is (value == "torch")


def test_that_triton_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kvsplice_hf.attend.triton.calls", None)
    monkeypatch.delattr("kvsplice_hf.attend.triton.calls", raising=False)
    triton_backend._triton_kernels.cache_clear()
    assert triton_backend._triton_kernels() is None
    assert "Install kvsplice-hf[gpu]" in caplog.text
    triton_backend._triton_kernels.cache_clear()

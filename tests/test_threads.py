"""What belongs to a call stays with it: several threads on one model, gradient checkpointing, compilation."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_packed import calibrated
from tiny_models import TINY_MODELS, build, tiny_batch
from transformers import PreTrainedModel

from kvsplice_hf import KVSpliceConfig, patch_model_with_kvsplice, splice_disabled
from kvsplice_hf.call import SpliceState, current_state, states_of_thread
from kvsplice_hf.patch.state import find_patch, patched_sites, told_of_round_trips
from kvsplice_hf.upstream import cache_argument, cache_of


NAME = "deepseek_v3"
THREADS, CALLS = 8, 200
HALF = KVSpliceConfig(compression_ratio=0.5, sink_tokens=2)


@pytest.fixture
def fast_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def make(kind: str, name: str = NAME) -> PreTrainedModel:
    model = build(name)
    if kind == "packed":
        return patch_model_with_kvsplice(model, KVSpliceConfig(bits=4.0, sink_tokens=2), calibration=calibrated(model))
    return patch_model_with_kvsplice(model, HALF)


@torch.no_grad()
def score(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the real tokens, without a cache."""
    return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


@torch.no_grad()
def step(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the last token, through a cache."""
    cache = cache_of(model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True))
    return model(ids[:, -1:], attention_mask=mask, **cache_argument(cache)).logits


def jobs(name: str = NAME) -> list[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Scoring and decoding, of batches of other lengths and paddings."""
    batches = [tiny_batch(name, length=6 + 5 * index, seed=index, pad=1 + index % 4) for index in range(6)]
    return [(run, *batch) for batch in batches for run in (score, step)]


@pytest.mark.usefixtures("fast_switching")
@pytest.mark.parametrize("kind", ["half the rank", "packed"])
def test_threads_compute_what_the_same_calls_give_one_after_the_other(kind: str) -> None:
    """One more thread runs the original model at the same time."""
    model, todo = make(kind), jobs()
    expected = [run(model, ids, mask) for run, ids, mask in todo]
    with splice_disabled(model):
        original = [run(model, ids, mask) for run, ids, mask in todo]
    start = threading.Barrier(THREADS + 1)

    def work(thread: int) -> list[str]:
        disabled = thread == THREADS
        wrong = []
        start.wait()
        with splice_disabled(model) if disabled else nullcontext():
            for call in range(CALLS):
                index = (5 * thread + call) % len(todo)
                run, ids, mask = todo[index]
                if not torch.equal(run(model, ids, mask), (original if disabled else expected)[index]):
                    wrong.append(f"thread {thread}, call {call}, {run.__name__} of {ids.shape[1]} tokens")
        return wrong

    with ThreadPoolExecutor(THREADS + 1) as pool:
        wrong = [line for lines in pool.map(work, range(THREADS + 1)) for line in lines]
    assert not wrong, f"{len(wrong)} of {(THREADS + 1) * CALLS} calls differ: {wrong[:5]}"


@pytest.mark.usefixtures("fast_switching")
@pytest.mark.parametrize("name", ["deepseek_v3", "mistral_large4"])
def test_threads_generate_what_they_generate_alone(name: str) -> None:
    model = make("half the rank", name)
    batches = [tiny_batch(name, length=9 + 4 * index, seed=index, pad=1 + index) for index in range(4)]

    def tokens(index: int) -> torch.Tensor:
        ids, mask = batches[index % len(batches)]
        return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)

    expected = [tokens(index) for index in range(len(batches))]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tokens, range(40)))
    assert all(torch.equal(ids, expected[index % len(expected)]) for index, ids in enumerate(found))


def test_a_state_belongs_to_one_thread_and_one_patch() -> None:
    ours, other = object(), object()
    seen: list[SpliceState] = []
    with states_of_thread([(ours, SpliceState(enabled=False))]):
        assert not current_state(ours).enabled
        assert current_state(other).enabled
        thread = threading.Thread(target=lambda: seen.append(current_state(ours)))
        thread.start()
        thread.join()
        with states_of_thread([(ours, SpliceState())]):
            assert current_state(ours).enabled
        assert not current_state(ours).enabled
    assert seen == [SpliceState()]
    assert current_state(ours).enabled


def test_a_copy_is_not_disabled_with_its_original() -> None:
    import copy

    model = make("half the rank")
    ids, mask = tiny_batch(NAME)
    expected, copied = score(model, ids, mask), copy.deepcopy(model)
    assert find_patch(copied)[1] is not find_patch(model)[1]
    assert {state.patch for _, state in patched_sites(copied)} == {find_patch(copied)[1]}
    with splice_disabled(model):
        assert torch.equal(score(copied, ids, mask), expected)
        assert not torch.equal(score(model, ids, mask), expected)


def test_an_error_inside_leaves_no_state_behind() -> None:
    model = make("half the rank")
    ids, mask = tiny_batch(NAME)
    expected = score(model, ids, mask)
    with pytest.raises(ZeroDivisionError), splice_disabled(model):
        raise ZeroDivisionError
    assert torch.equal(score(model, ids, mask), expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("enabled_at_backward", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_recomputed_forward_runs_as_the_first_one_did(
    name: str, enabled: bool, enabled_at_backward: bool, reentrant: bool
) -> None:
    """The backward pass of gradient checkpointing runs the layers again, out of the context of the forward."""
    if reentrant and name != NAME:
        pytest.skip("one architecture shows it")

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = patch_model_with_kvsplice(build(name), HALF).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids, mask = tiny_batch(name)
        with nullcontext() if enabled else splice_disabled(model):
            loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        with nullcontext() if enabled_at_backward else splice_disabled(model):
            loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None and "self_attn" in key}

    plain = gradients(checkpointing=False)
    assert any(".kvsplice." in key for key in plain) == enabled
    found = gradients(checkpointing=True)
    assert set(found) == set(plain)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, plain[key], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_listeners_hear_of_the_calls_of_their_own_thread(checkpointing: bool) -> None:
    model = patch_model_with_kvsplice(build(NAME), HALF).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    (ids, mask), heard = tiny_batch(NAME), []
    layers = len(model.model.layers)
    with told_of_round_trips(model, lambda *trip: heard.append(trip)):
        other = threading.Thread(target=lambda: model(ids, attention_mask=mask, use_cache=False))
        other.start()
        other.join()
        assert not heard
        model(ids, attention_mask=mask, use_cache=False)
    assert len(heard) == layers
    assert [module for module, _, _ in heard] == [layer.self_attn for layer in model.model.layers]
    model(ids, attention_mask=mask, use_cache=False)
    assert len(heard) == layers


@pytest.mark.compiles
def test_a_compiled_model_heeds_the_context_without_breaking_the_graph() -> None:
    model = make("half the rank")
    ids, mask = tiny_batch(NAME)
    torch._dynamo.reset()  # the limit of compilations counts those of other tests
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def run(forward: Any) -> torch.Tensor:
        with torch.no_grad():
            return forward(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]

    spliced = run(model)
    torch.testing.assert_close(run(compiled), spliced)
    with splice_disabled(model):
        torch.testing.assert_close(run(compiled), run(model))
        assert not torch.allclose(run(compiled), spliced)
    torch.testing.assert_close(run(compiled), spliced)

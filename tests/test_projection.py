"""`LearnedKVSplice` is exact at full rank, decodes by an affine map, and starts from the best subspace of a reader."""

import pytest
import torch
import torch.nn.functional as F

from kvsplice_hf.code.initialise import initialise_
from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import ConfigError


R, r = 24, 9
INITS = ("svd", "orthogonal", "identity")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Relative to the largest entry. In bf16 the codes and the folded weights each round once.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reader_weight(rows: int = 60) -> torch.Tensor:
    """A weight like that of `kv_b_proj`, with a spectrum that decays so that some directions matter more."""
    weight = torch.randn(rows, R, generator=generator(), dtype=torch.float64)
    return weight @ torch.diag(torch.logspace(0, -2, R, dtype=torch.float64)) @ random_basis(R, seed=1).T


def random_basis(rank: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(R, rank, generator=generator(seed), dtype=torch.float64)).Q


def splice_of(init: str, rank: int = r, dtype: torch.dtype = torch.float32, **kwargs: bool) -> LearnedKVSplice:
    splice = LearnedKVSplice(R, rank, dtype=dtype, **kwargs)
    initialise_(splice, init, reader_weight())
    return splice


@torch.no_grad()
def randomise_(splice: LearnedKVSplice, seed: int = 3) -> LearnedKVSplice:
    """Parameters as training may leave them: any scale, any shift, `expand` no longer the transpose of `compress`."""
    for parameter in splice.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)) * 0.5)
    return splice


def latents(dtype: torch.dtype = torch.float32, tokens: int = 7) -> torch.Tensor:
    return torch.randn(2, 1, tokens, R, generator=generator(5), dtype=torch.float64).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    tolerance = TOLERANCE[dtype or found.dtype] * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("init", INITS)
def test_at_full_rank_decoding_gives_the_latent_back(init: str, dtype: torch.dtype) -> None:
    latent = latents(dtype)
    assert_close(splice_of(init, rank=R, dtype=dtype)(latent), latent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_at_full_rank_any_scale_and_shift_cancel_when_expand_inverts_compress(dtype: torch.dtype) -> None:
    splice = splice_of("orthogonal", rank=R, dtype=dtype)
    splice.transform_scale.copy_(torch.linspace(-1, 2, R))
    splice.transform_shift.copy_(torch.linspace(1, -1, R))
    # Not a rotation any more, but well enough conditioned for bf16.
    mixed = splice.compress.weight.double() @ torch.diag(torch.linspace(0.7, 1.4, R, dtype=torch.float64))
    splice.compress.weight.copy_(mixed)
    splice.expand.weight.copy_(torch.linalg.pinv(splice.compress.weight.double()))
    latent = latents(dtype)
    assert_close(splice(latent), latent)


@pytest.mark.parametrize("use_layernorm", [False, True], ids=["plain", "layernorm"])
@pytest.mark.parametrize("start", [*INITS, "random"])
@torch.no_grad()
def test_decoding_is_the_affine_map_of_fold(start: str, use_layernorm: bool) -> None:
    splice = splice_of("svd" if start == "random" else start, use_layernorm=use_layernorm)
    if start == "random":
        randomise_(splice)
    matrix, offset = splice.fold()
    codes = splice.encode(latents())
    assert matrix.shape == (R, r)
    assert offset.shape == (R,)
    assert_close(splice.decode(codes), codes @ matrix.T + offset)
    # And both undo the transform that encoding applies: the scale divides, the shift is taken off.
    scale = F.softplus(splice.transform_scale)
    assert_close(splice.decode(codes), (splice.expand(codes) - splice.transform_shift) / scale)


@torch.no_grad()
def test_a_changed_parameter_changes_the_very_next_decoding() -> None:
    splice = splice_of("svd")
    codes = splice.encode(latents())
    before = splice.decode(codes)
    splice.expand.weight.mul_(2)
    assert_close(splice.decode(codes), 2 * before)


@torch.no_grad()
def test_the_svd_start_loses_least_of_what_its_reader_sees() -> None:
    weight = reader_weight()
    splice = splice_of("svd", dtype=torch.float64)
    # For white latents, the mean square of W c - W c_hat is the squared Frobenius norm of W (I - round trip).
    identity = torch.eye(R, dtype=torch.float64)
    loss = torch.linalg.norm(weight @ (identity - splice(identity).T))
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    truncated = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
    assert_close(weight @ splice(identity).T, truncated, torch.float64)
    assert_close(loss, torch.linalg.norm(S[r:]), torch.float64)
    for seed in range(100):
        basis = random_basis(r, seed)
        assert torch.linalg.norm(weight @ (identity - basis @ basis.T)) > loss


@pytest.mark.parametrize("init", INITS)
def test_every_start_projects_orthogonally(init: str) -> None:
    splice = splice_of(init, dtype=torch.float64)
    assert torch.equal(splice.expand.weight, splice.compress.weight.T)
    assert_close(splice.compress.weight @ splice.expand.weight, torch.eye(r))


def test_the_identity_start_keeps_the_first_dimensions() -> None:
    latent = latents()
    expected = latent.clone()
    expected[..., r:] = 0
    assert_close(splice_of("identity")(latent), expected)


def test_the_orthogonal_start_is_reproducible_and_draws_nothing_from_the_global_generator() -> None:
    splices = [LearnedKVSplice(R, r) for _ in range(2)]
    before = torch.get_rng_state()
    for splice in splices:
        initialise_(splice, "orthogonal")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(splices[0].compress.weight, splices[1].compress.weight)


@pytest.mark.parametrize("use_layernorm", [False, True], ids=["plain", "layernorm"])
def test_an_fp32_splice_hands_out_the_dtype_that_came_in(use_layernorm: bool) -> None:
    splice = splice_of("svd", use_layernorm=use_layernorm)
    latent = latents(torch.bfloat16)
    codes = splice.encode(latent)
    assert codes.dtype == splice.decode(codes).dtype == torch.bfloat16
    # Only the codes themselves are rounded to bf16: the arithmetic stays in fp32.
    assert torch.equal(codes, splice.encode(latent.float()).bfloat16())
    assert torch.equal(splice.decode(codes), splice.decode(codes.float()).bfloat16())


def test_the_transform_starts_at_a_scale_of_softplus_one_and_no_shift() -> None:
    splice = splice_of("identity")
    assert torch.equal(splice.transform_scale, torch.ones(R))
    assert torch.equal(splice.transform_shift, torch.zeros(R))
    # softplus(1)
    assert_close(splice.encode(latents()), 1.3132617 * latents()[..., :r])


@pytest.mark.parametrize("use_layernorm", [False, True], ids=["plain", "layernorm"])
def test_gradients_reach_every_parameter(use_layernorm: bool) -> None:
    splice = splice_of("svd", use_layernorm=use_layernorm)
    target = latents()
    F.mse_loss(splice(target), target).backward()
    silent = [name for name, p in splice.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_layernorm_codes_have_zero_mean_and_unit_variance() -> None:
    codes = splice_of("svd", use_layernorm=True).encode(latents() * 30 + 5)
    assert codes.mean(-1).abs().max() < 1e-5
    assert (codes.var(-1, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("rank", [0, -1, R + 1])
def test_a_rank_out_of_range_is_refused_with_the_range(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"`rank` is {rank}; it must be between 1 and the latent size {R}"):
        LearnedKVSplice(R, rank)


@pytest.mark.parametrize(("method", "phrase"), [("svd", "weight of kv_b_proj"), ("x", "Unknown initialisation 'x'")])
def test_a_start_that_cannot_be_made_is_refused(method: str, phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        initialise_(LearnedKVSplice(R, r), method)

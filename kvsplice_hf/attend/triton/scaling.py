"""Numbers of rows over their scales, inside a kernel: the steps that all packing starts with.

Legend: as in `packing`.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def asinh(x):
    """Inverse hyperbolic sine, exact to a few units in the last place also near 0."""
    size = tl.abs(x)
    square = size * size
    # log1p(y) = log(w) * y / (w - 1) with w = 1 + y rounded: the rounding errors of both factors cancel.
    y = size + tl.div_rn(square, 1.0 + tl.sqrt_rn(1.0 + square))
    w = 1.0 + y
    grown = w > 1.0
    log1p = tl.where(grown, tl.log(w) * tl.div_rn(y, tl.where(grown, w - 1.0, 1.0)), y)
    return tl.where(x < 0, -log1p, log1p)


@triton.jit
def gain_bytes(base, held, gained, centres, sigmas, BLOCK: tl.constexpr):
    """The gains' bytes int32 [BLOCK_R] of some rows."""
    total = tl.zeros([held.shape[0]], tl.float32)
    for first in range(0, gained, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < gained
        number = tl.load(base[:, None] + at[None, :], mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        number -= tl.load(centres + at, mask=inside, other=0.0)[None, :]
        sigma = tl.broadcast_to(tl.load(sigmas + at, mask=inside, other=1.0)[None, :], number.shape)
        relative = tl.where(held[:, None] & inside[None, :], tl.div_rn(number, sigma), 0.0)
        total += tl.sum(relative * relative, 1)
    size = tl.maximum(tl.sqrt_rn(total / gained), 1e-30)
    # Adding 1.5 * 2^23 leaves no fractional bits: this rounds halves to even, as torch does.
    steps = (16.0 * tl.log2(size) + 128.0 + 12582912.0) - 12582912.0
    # What is not a number is not above 0 either.
    return tl.minimum(tl.where(steps > 0.0, steps, 0.0), 255.0).to(tl.int32)


@triton.jit
def scaled(base, mine, coordinates, gains, scales, centres, HAS_KEY_GAIN: tl.constexpr):
    """The numbers at `coordinates` of some rows, [BLOCK_R, D], less their centres and over their scales and gains."""
    gained, factor, last, key_factor = gains
    number = tl.load(base[:, None] + coordinates[None, :], mask=mine, other=0.0).to(tl.float32)
    scale = tl.load(scales + coordinates)[None, :]
    own = scale
    if HAS_KEY_GAIN:
        own = tl.where((coordinates < last)[None, :], key_factor[:, None] * scale, scale)
    scale = tl.where((coordinates < gained)[None, :], factor[:, None] * scale, own)
    return tl.div_rn(number - tl.load(centres + coordinates)[None, :], scale)

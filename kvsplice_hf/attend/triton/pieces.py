"""How a row is cut into pieces: the sides of a block in Triton are powers of two, a row of 576 numbers is not."""

import triton


PIECES = 3
WIDEST = 512
# Coordinates of packed rows that are decoded at once.
CHUNK = 128
# The most numbers of a key that was coded before its rotation: one chunk.
WIDEST_KEY = CHUNK
# The same of a key head of ordinary attention, which is read by itself.
WIDEST_HEAD = 256


def side_of(n: int) -> int:
    """The side of a block for n numbers: a power of two, and at least the 16 that a matrix product needs."""
    return max(16, int(triton.next_power_of_2(n)))


def pieces_of(n: int, coded_keys: bool = False) -> tuple[int, ...]:
    """Powers of two from 16 up, of which three at most, the others 0, together hold n numbers with little to spare.

    Ahead of keys that were coded before their rotation two, where they can hold n: such a key is a piece of its own,
    and a kernel of four finds no registers.
    """
    most = 2 if coded_keys and n <= 2 * WIDEST else PIECES
    pieces: list[int] = []
    rest = n
    while rest > 0:
        above = min(WIDEST, side_of(rest))
        # One piece that is an eighth empty is cheaper than three full ones.
        whole = len(pieces) == most - 1 or above - rest <= rest // 8 or rest <= 16
        pieces.append(above if whole else above // 2)
        rest -= pieces[-1]
    return (*pieces, *[0] * (PIECES - len(pieces)))

"""What several processes that run one model together have to agree on.

A process that raises leaves the others waiting in their next collective operation. So what can fail in one of them
alone (a file that only it cannot read) is done under `failing_together`, and what decides about the next step is the
same in all of them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from kvsplice_hf.errors import KVSpliceError


T = TypeVar("T")


def process_count() -> int:
    """How many processes `torch.distributed` has; 1 where it is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Of this one among them."""
    return dist.get_rank() if process_count() > 1 else 0


def gathered(value: T, group: Any = None) -> list[T]:
    """What each process gives, by rank; of a group, or of all. A collective operation."""
    if process_count() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def of_first(value: T) -> T:
    """What the first process gives, in all of them. A collective operation."""
    if process_count() == 1:
        return value
    held: list[Any] = [value if process_rank() == 0 else None]
    dist.broadcast_object_list(held, src=0)
    return held[0]


@contextlib.contextmanager
def failing_together(takes_part: bool = True) -> Iterator[None]:
    """What is raised inside by one process is raised by all. There must be no collective operation inside.

    Args:
        takes_part: whether the processes run one model together; otherwise each one is on its own.

    Raises:
        KVSpliceError: another process has raised; of its class where that is one of this package, with its number and
            message.
    """
    if not takes_part or process_count() == 1:
        yield
        return
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    ours = type(raised) if isinstance(raised, KVSpliceError) else KVSpliceError
    said = None if raised is None else (ours, str(raised) or type(raised).__name__)
    found = gathered(said)
    if raised is not None:
        raise raised
    for rank, other in enumerate(found):
        if other is not None:
            kind, message = other
            raise kind(f"Process {rank} of {len(found)}, which runs the model together with this one: {message}")

"""Work that the workers do together, and whose errors all of them raise.

If one worker alone raised, the others would wait for it in their next collective until it is
killed.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from cluster.base.errors import CheckpointError

ResultT = TypeVar("ResultT")


def run_on_rank_zero(
    action: Callable[[], ResultT], rank: int, group: dist.ProcessGroup | None
) -> ResultT:
    """Run `action` on rank 0; its result or its error, on all ranks. Collective."""
    if group is None:
        return action()
    result, error = _attempt(action) if rank == 0 else (None, None)
    answer: list[Any] = [result, _picklable(error)]
    dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise error or answer[1]
    found: ResultT = answer[0]
    return found


def run_on_all(action: Callable[[], ResultT], group: dist.ProcessGroup | None) -> list[ResultT]:
    """Run `action` on every rank; the results by rank, or the first error, on all. Collective."""
    if group is None:
        return [action()]
    result, error = _attempt(action)
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (result, _picklable(error)), group=group)
    for _, raised in answers:
        if raised is not None:
            raise error or raised
    return [each for each, _ in answers]


def _attempt(action: Callable[[], ResultT]) -> tuple[ResultT | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _picklable(error: Exception | None) -> Exception | None:
    """The error as another process can read it: some classes pickle, but cannot be unpickled."""
    if error is None:
        return None
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
        return copy
    except Exception:
        return CheckpointError(f"{type(error).__name__}: {error}")

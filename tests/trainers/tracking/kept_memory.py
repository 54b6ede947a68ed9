"""The memory that something keeps each time it is done."""

import tracemalloc
from collections.abc import Callable


def kept_bytes(train: Callable[[int], None], runs: int) -> float:
    """Bytes that Python keeps for each of `runs` calls, after a first one that fills caches."""
    train(0)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(1, runs + 1):
        train(number)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / runs

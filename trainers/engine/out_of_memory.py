"""Micro-batches that do not fit into memory, and the size that would, found by trying."""

from collections.abc import Callable

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch could not allocate a tensor, on any device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    signs = ("can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def fits(attempt: Callable[[], None]) -> bool:
    """Whether `attempt` ends without running out of memory; its memory is free afterwards."""
    try:
        attempt()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def largest_that_fits(fits: Callable[[int], bool], failing: int) -> int:
    """The largest number below `failing` that `fits`, by bisection; 0 if none does."""
    low, high = failing // 2, failing
    while low and not fits(low):
        low, high = low // 2, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def memory_advice(
    device: torch.device, micro_batch: int, local_batch: int, fits: Callable[[int], bool] | None
) -> str:
    """A line about a micro-batch that did not fit: the size that would, and the spec's field.

    `local_batch` is the worker's share of the global batch in samples; the proposal divides it.
    `fits` tries a number of samples; without it, half of the micro-batch is proposed.
    """
    where = f"out of memory on {device}"
    largest = largest_that_fits(fits, micro_batch) if fits else micro_batch // 2
    if not largest:
        return (
            f"{where}: not even one sample fits; what helps is train.activation_checkpointing, "
            "a smaller model, or more workers with scale.parallel: fsdp"
        )
    proposal = max(number for number in range(1, largest + 1) if local_batch % number == 0)
    too_many = f"{where}: a micro-batch of {micro_batch} samples does not fit"
    if fits is None:
        return f"{too_many}: try train.micro_batch: {proposal}"
    return f"{too_many}; {largest} would: set train.micro_batch: {proposal}"

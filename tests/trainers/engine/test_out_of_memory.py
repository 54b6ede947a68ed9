"""Messages when memory runs out, with PyTorch's own allocator."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.base.errors import TrainingError
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_split
from trainers.engine.out_of_memory import fits, is_out_of_memory, largest_that_fits, memory_advice
from trainers.engine.step import TrainStep
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker

GIB = 1 << 30
CPU = torch.device("cpu")


@contextlib.contextmanager
def room() -> Iterator[None]:
    """Allows this process 5.5 GiB of address space more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 11 * GIB // 2, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def allocate(gib: int) -> None:
    torch.empty(gib * GIB, dtype=torch.uint8)


def test_errors_of_the_allocator_are_recognised_and_no_others() -> None:
    with room():
        assert fits(lambda: allocate(5))
        assert not fits(lambda: allocate(6))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="must match"):
        fits(lambda: (torch.zeros(2) + torch.zeros(3), None)[1])


def test_the_memory_of_a_failed_attempt_is_free_again() -> None:
    def attempt() -> None:
        held = torch.empty(4 * GIB, dtype=torch.uint8)
        allocate(len(held) // GIB)

    with room():
        assert not fits(attempt)
        assert fits(lambda: allocate(5))


@pytest.mark.parametrize("failing", [1, 2, 3, 512, 1000])
def test_the_largest_that_fits_is_exact_and_found_in_few_attempts(failing: int) -> None:
    for limit in {0, 1, 2, failing // 3, failing // 2, failing - 1} - {failing}:
        tried: list[int] = []

        def fits_here(samples: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(samples)
            return samples <= limit

        assert largest_that_fits(fits_here, failing) == min(limit, failing - 1)
        assert len(tried) == len(set(tried)) <= 2 * failing.bit_length()


def test_the_proposal_divides_the_workers_share() -> None:
    def advice(micro_batch: int, share: int, limit: int | None) -> str:
        known = None if limit is None else lambda samples: samples <= limit
        return memory_advice(torch.device("cuda", 0), micro_batch, share, known)

    assert advice(512, 512, 96) == (
        "out of memory on cuda:0: a micro-batch of 512 samples does not fit; 96 would: "
        "set train.micro_batch: 64"
    )
    assert advice(60, 60, 17).endswith("17 would: set train.micro_batch: 15")
    assert advice(48, 96, None).endswith("48 samples does not fit: try train.micro_batch: 24")
    for nothing in (advice(8, 8, 0), advice(1, 8, None)):
        assert nothing.startswith("out of memory on cuda:0: not even one sample fits; what helps ")


def test_a_step_that_does_not_fit_proposes_a_micro_batch(own_folder: Path) -> None:
    """A GiB for each sample and room for five of them; 12 samples a step on one worker."""
    source = (own_folder / "spirals.py").read_text()
    answer = 'return model(batch["point"])'
    greedy = f'torch.empty(len(batch["point"]) << 30, dtype=torch.uint8)\n        {answer}'
    (own_folder / "spirals.py").write_text(source.replace(answer, greedy))

    def first_step(micro_batch: int | None) -> None:
        train = {"global_batch": 12, "micro_batch": micro_batch}
        spec, workload = resolve({"workload": "spirals:Spirals", "train": train}, RunSpec)
        split = open_split(prepare_dataset(workload, own_folder), "train")
        TrainStep(spec, workload, split, Worker(), 1).run(0)

    first_step(1)  # imports and threads take address space too
    with room():
        with pytest.raises(TrainingError) as caught:
            first_step(None)
        assert str(caught.value) == (
            "out of memory on cpu: a micro-batch of 12 samples does not fit; 5 would: "
            "set train.micro_batch: 4"
        )
        with pytest.raises(TrainingError, match="6 samples does not fit; 5 would"):
            first_step(6)
        first_step(4)

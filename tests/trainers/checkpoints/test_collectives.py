"""An error of one worker is raised on all of them, and none is left waiting."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from trainers.checkpoints.collectives import run_on_all, run_on_rank_zero


class StubbornError(Exception):
    """An error that can be pickled, but not unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def fails(kind: str) -> None:
    if kind == "stubborn":
        raise StubbornError("no", "way")
    raise RuntimeError("the tracker has died") if kind == "runtime" else OSError(28, "full")


def work(rank: int, meeting: str, kind: str, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    found: list[str] = []
    for number, call in enumerate((run_on_rank_zero, run_on_all)):

        def action(failing: int = number) -> int:
            if rank == failing:
                fails(kind)
            return rank

        try:
            if call is run_on_rank_zero:
                run_on_rank_zero(action, rank, group)
            else:
                run_on_all(action, group)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    together = run_on_rank_zero(lambda: "same", rank, group), run_on_all(lambda: rank, group)
    answers.put((rank, found, together))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("os", "OSError: [Errno 28] full"),
        ("runtime", "RuntimeError: the tracker has died"),
        ("stubborn", "StubbornError: no way"),
    ],
)
def test_an_error_of_one_worker_is_that_of_all(kind: str, raised: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, str(tmp_path / "meeting"), kind, answers))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    results = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    for _, found, together in results:
        assert [error.removeprefix("CheckpointError: ") for error in found] == [raised, raised]
        assert together == ("same", [0, 1])


def test_a_single_worker_needs_no_group() -> None:
    assert run_on_rank_zero(lambda: 7, 0, None) == 7
    assert run_on_all(lambda: 7, None) == [7]
    with pytest.raises(OSError, match="full"):
        run_on_rank_zero(lambda: fails("os"), 0, None)

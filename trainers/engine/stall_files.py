"""The files of workers that hung: the step, the time, and the stacks of all threads."""

import re
from dataclasses import dataclass
from pathlib import Path

STALLS = "stalls"
"""The folder of these files in the folder of a run."""
START_TIMEOUT_FACTOR = 3
"""How many times `train.stall_timeout_s` a start may take up to the end of its first step: it
builds the model, reads the checkpoint and compiles."""
HEADER_BYTES = 256
STEP_FIELD = slice(5, 15)
"""The bytes of the header that hold the step."""
WAITING_FILES = (
    *("torch/distributed/", "torch/nn/parallel/", "torch/autograd/graph.py"),
    *("trainers/engine/loop.py", "trainers/engine/evaluate.py", "trainers/engine/coordination.py"),
    *("trainers/engine/step.py", "trainers/modeling/strategy.py"),
    "trainers/modeling/weight_update.py",
)
"""The file of the innermost call of a worker that waits for its peers or for its device."""


@dataclass(frozen=True)
class Stall:
    """A worker that hung, as read from its file."""

    rank: int
    step: int
    """The step that hung, counted from 1; 0 before the first one."""
    timeout_s: float
    waiting: bool
    """Whether it waited for another worker or for its device."""
    path: Path

    def __str__(self) -> str:
        where = f"at step {self.step}" if self.step else "before its first step"
        return (
            f"worker {self.rank} made no step for {self.timeout_s:g} s {where}; "
            f"its stack: {self.path}"
        )


def read_stalls(folder: Path) -> list[Stall]:
    """All stalls in `folder`, by worker, the latest of each worker last."""
    return [stall for path in stall_paths(folder) if (stall := read_stall(path)) is not None]


def stall_paths(folder: Path) -> list[Path]:
    """The files of all workers, with or without stacks in them."""
    return sorted(folder.glob("worker-*-*.txt"), key=rank_and_count)


def rank_and_count(path: Path) -> tuple[int, int]:
    """The rank of the worker, and the count of its file, from the file's name."""
    _, rank, count = path.stem.split("-")
    return int(rank), int(count)


def next_stall_path(folder: Path, rank: int) -> Path:
    """The path of the worker's next file: the count is one above those of its stalls."""
    counts = [rank_and_count(stall.path)[1] for stall in read_stalls(folder) if stall.rank == rank]
    return folder / f"worker-{rank}-{max(counts, default=0) + 1}.txt"


def read_stall(path: Path) -> Stall | None:
    """The stall in a file; None if the file has no stacks."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    stack = content[HEADER_BYTES:].decode(errors="replace")
    if not stack:
        return None
    head = content[:HEADER_BYTES].decode(errors="replace")
    allowed = re.search(r"after (\S+) s without", head)
    threads = re.split(r"^(?:Current t|T)hread ", stack, flags=re.MULTILINE)
    trains = next((thread for thread in threads if "/trainers/engine/loop.py" in thread), "")
    innermost = re.search(r'File "(.*?)"', trains)
    return Stall(
        rank=rank_and_count(path)[0],
        step=int(head[STEP_FIELD]),
        timeout_s=float(allowed[1]) if allowed else 0.0,
        waiting=innermost is not None and any(part in innermost[1] for part in WAITING_FILES),
        path=path,
    )

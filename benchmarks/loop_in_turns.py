"""One contender of `loop.py` that trains in turns with others: see `contest.take_turns`.

    python benchmarks/loop_in_turns.py heliostat|bare CASE WORKERS

`loop` and the packages are those of the checkout in PYTHONPATH, which may be of an earlier commit.
"""

import os
import sys
import warnings
from pathlib import Path

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
try:
    from contest import Turns
finally:  # `loop` is the checkout's
    others = [folder for folder in sys.path if folder != HERE]
    sys.path[:] = os.environ["PYTHONPATH"].split(os.pathsep) + others

STEPS_PER_TURN = {"digits CNN": 20, "small GPT": 5}
NO_END = 10**6


def heliostat(case: str, rank: int = 0, world: int = 1) -> float:
    import loop

    class Clock(loop.Clock):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._turns = Turns(STEPS_PER_TURN[case]) if rank == 0 else None

        def on_step_end(self, step: int) -> None:
            if self._turns is not None:
                self._turns.step_done()

        tick = on_step_end  # its name at commit 082b5a4

    loop.Clock, loop.STEPS = Clock, NO_END
    return float(loop.heliostat(case, rank, world))


def bare(case: str, rank: int = 0, world: int = 1) -> float:
    import loop

    class Bare(loop.Bare):  # type: ignore[misc]
        turns = Turns(STEPS_PER_TURN[case]) if rank == 0 else None

        def take(self, step: int) -> None:
            super().take(step)
            if self.turns is not None:
                self.turns.step_done()

    loop.Bare, loop.STEPS = Bare, NO_END
    return float(loop.bare(case, rank, world))


def main() -> None:
    import loop
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    contender = {"heliostat": heliostat, "bare": bare}[sys.argv[1]]
    case, workers = sys.argv[2], int(sys.argv[3])
    if workers == 1:
        contender(case)
    else:
        loop.two_workers(contender, case)


if __name__ == "__main__":
    main()

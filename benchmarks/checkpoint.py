"""How long a save stops training, for a model of 100 million parameters.

    python benchmarks/checkpoint.py [--rounds 7] [--width 2048] [--tiny]

A checkpoint has the weights and both moments of AdamW, 1.2 GB in float32. The time is that of the
call after which training may continue. For Heliostat and `dcp.async_save` this is the copy, after
the earlier write has ended (as it has at any sensible interval). For `torch.save` and `dcp.save`
it is copy and write, since they do nothing in the background. Only Heliostat syncs files to the
disk and checks them.

The last row is the wall time with saves at the interval `auto`, for one worker whose machine fails
once a day: 1 + stop / interval, against 1 for training without saves.
"""

import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from contest import compete, finish, options, parse, rows, show
from torch import nn

from trainers.checkpoints.checkpoints import Checkpoints
from trainers.engine.coordination import save_interval_s
from trainers.spec import CheckpointSpec

LAYERS = 24


def trained(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after one step, so that the optimizer has its moments."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def stopped_s(save: Callable[[], Any], settle: Callable[[Any], Any]) -> float:
    start = time.perf_counter()
    pending = save()
    seconds = time.perf_counter() - start
    settle(pending)
    return seconds


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--width", type=int, default=2048)
    args = parse(parser)
    if args.tiny:
        args.width = 64
    warnings.filterwarnings("ignore")
    model, optimizer = trained(args.width)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    folder = Path(tempfile.mkdtemp(prefix="heliostat-checkpoint-"))
    checkpoints = Checkpoints(folder / "ours", CheckpointSpec(keep=1))
    steps = iter(range(10**6))

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def heliostat() -> float:
        step = next(steps)
        save = lambda: checkpoints.save(step, model, optimizer)  # noqa: E731
        return stopped_s(save, lambda _: checkpoints.wait())

    def torch_save() -> float:
        return stopped_s(lambda: torch.save(state(), folder / "torch.pt"), lambda _: None)

    def dcp_save() -> float:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        save = lambda: dcp.save(state(), checkpoint_id=folder / "dcp", no_dist=True)  # noqa: E731
        return stopped_s(save, lambda _: None)

    def dcp_async_save() -> float:
        shutil.rmtree(folder / "async", ignore_errors=True)
        save = lambda: dcp.async_save(state(), checkpoint_id=folder / "async", no_dist=True)  # noqa: E731
        return stopped_s(save, lambda future: future.result())

    contenders = {
        "heliostat": heliostat,
        "torch.save": torch_save,
        "dcp.save": dcp_save,
        "dcp.async_save": dcp_async_save,
    }
    try:
        compete(contenders, 1)  # the first save of each contender allocates its buffers
        measured = compete(contenders, args.rounds)
    finally:
        shutil.rmtree(folder)
    case = f"{millions:.0f} M parameters"
    show(case, measured, "s", 1.0)
    shares = [1 + seconds / save_interval_s(seconds, 86400.0) for seconds in measured["heliostat"]]
    interval = save_interval_s(statistics.median(measured["heliostat"]), 86400.0)
    print(f"\nthe automatic interval is {interval:.0f} s")
    ones = [1.0] * args.rounds
    results = rows(case, "heliostat", measured)
    results += rows("wall time at auto", "heliostat", {"heliostat": shares, "no saves": ones})
    finish("checkpoint", results)


if __name__ == "__main__":
    main()

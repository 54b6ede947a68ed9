"""Model FLOPs utilisation of GPTs on one GPU, of ours and of bare PyTorch, in bf16 and compiled.

    python benchmarks/gpu.py [--rounds 7]    # no network, no Ray, no MLflow
    python benchmarks/gpu.py --tiny          # tiny sizes on the CPU, to try the code without a GPU

It needs torch, numpy, pyarrow, pydantic, ruamel.yaml and safetensors. The utilisation (MFU) is the
FLOPs that the model needs, divided by the FLOPs that the device does in matrix products in the
same time: the fastest of several square bf16 products, measured in the same round. A training step
needs 6 N + 12 L C T FLOPs per token (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), with N
weights except the position embeddings, L layers, width C and context T. Attention counts in full,
as if it were not causal. Recomputed operations do not count.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    import torch
    from bare import Bare
    from contest import Contender, compete, finish, leave_out, options, parse, rows, show

    from trainers.data.dataset import prepare_dataset
    from trainers.data.splits import open_split
    from trainers.devices import local_device
    from trainers.engine.step import TrainStep
    from trainers.spec import RunSpec, resolve
    from trainers.worker import Worker
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks/gpu.py: needs {error.name}, which is not installed here")

STEPS = 10
"""Number of steps, or of matrix products, that are timed together."""

GPT2 = {"vocabulary": 50304}
CASES: dict[str, dict[str, Any]] = {
    "GPT, 124 M": {
        "data": {"sequences": 512, "context": 1024},
        "model": {"layers": 12, "width": 768, "heads": 12, **GPT2},
        "batch": 32,
    },
    "GPT, 350 M": {
        "data": {"sequences": 512, "context": 1024},
        "model": {"layers": 24, "width": 1024, "heads": 16, **GPT2},
        "batch": 16,
    },
}
PRODUCTS = (4096, 8192, 16384)
TINY: dict[str, dict[str, Any]] = {
    "GPT, tiny": {
        "data": {"sequences": 64, "context": 32},
        "model": {"layers": 2, "width": 64, "heads": 2},
        "batch": 8,
    }
}
TINY_PRODUCTS = (128, 256)


def timed(device: torch.device, work: Callable[[int], object]) -> float:
    """Seconds per call of `work`, until the device has finished all calls."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    for number in range(STEPS):
        work(number)
    wait()
    return (time.perf_counter() - start) / STEPS


def products(device: torch.device, sizes: tuple[int, ...], flops: float) -> Contender:
    """Seconds that `flops` take at the rate of the fastest square product of these sizes."""
    factors = [
        [torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2)] for n in sizes
    ]

    def run() -> float:
        rates = []
        for a, b in factors:
            torch.mm(a, b)
            rates.append(2 * len(a) ** 3 / timed(device, lambda _, a=a, b=b: torch.mm(a, b)))
        return flops / max(rates)

    return run


def steps(device: torch.device, take: Callable[[int], object]) -> Contender:
    """Seconds per step. A first round, which is not timed, compiles the step."""
    done = 0

    def run() -> float:
        nonlocal done
        start, done = done, done + STEPS
        return timed(device, lambda number: take(start + number))

    run()
    return run


def contenders(
    case: dict[str, Any], device: torch.device, sizes: tuple[int, ...]
) -> dict[str, Contender]:
    compiled = device.type == "cuda"
    data = {
        "workload": "models:Text",
        "data": case["data"],
        "model": case["model"],
        "optimizer": {"weight_decay": 0.0, "schedule": {"name": "constant", "warmup": 0.0}},
        "train": {
            "steps": 10**6,
            "global_batch": case["batch"],
            "precision": "bf16",
            "compile": "default" if compiled else "off",
        },
    }
    spec, workload = resolve(data, RunSpec)
    folder = prepare_dataset(workload, Path(tempfile.gettempdir()) / "heliostat-benchmarks")
    split = open_split(folder, "train")
    worker = Worker(hardware=local_device("cpu" if device.type == "cpu" else "gpu"))
    train_step = TrainStep(spec, workload, split, worker, 10**6)
    bare = Bare(workload, split, case["batch"], worker, autocast=torch.bfloat16, compiled=compiled)
    weights = sum(weight.numel() for weight in bare.network.parameters())
    weights -= bare.network.place.numel()
    layers, width = case["model"]["layers"], case["model"]["width"]
    tokens = case["batch"] * case["data"]["context"]
    flops = (6 * weights + 12 * layers * width * case["data"]["context"]) * tokens
    print(f"\n{weights / 1e6:.0f} M weights, {flops / 1e12:.3g} TFLOP a step of {tokens} tokens")
    return {
        "Heliostat": steps(device, train_step.run),
        "bare PyTorch": steps(device, bare.take),
        "matrix products": products(device, sizes, flops),
    }


def main() -> None:
    args = parse(options(__doc__, rounds=7))
    results: list[dict[str, Any]] = []
    if args.tiny:
        device, cases, sizes = torch.device("cpu"), TINY, TINY_PRODUCTS
    elif torch.cuda.is_available():
        device, cases, sizes = torch.device("cuda", 0), CASES, PRODUCTS
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    else:
        leave_out("bare PyTorch", "no GPU here; --tiny tries the code on the CPU")
        device, cases, sizes = torch.device("cpu"), {}, ()
    for name, case in cases.items():
        measured = compete(contenders(case, device, sizes), args.rounds)
        show(name, measured, "ms/step", 1e3)
        results += rows(f"{name}, MFU", "matrix products", measured)
        results += rows(name, "Heliostat", {k: measured[k] for k in ("Heliostat", "bare PyTorch")})
    finish("gpu", results)


if __name__ == "__main__":
    main()

"""`language` compared with compression programs, and its loss by model size and tokens seen."""

import gzip
import lzma
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from answers import is_tiny, shipped_spec, table

from cluster.base.config import apply_overrides
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import count_samples
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.modeling.build import build_network
from trainers.spec import RunSpec, resolve
from trainers.workloads.language.workload import Language

SIZES = {"small": (2, 32), "middle": (2, 48), "as shipped": (3, 64)}
"""Layers and width; heads have 32 channels."""
SHARES = (0.25, 0.5, 1.0)
"""Shares of the shipped spec's epochs."""
FOLDER = Path(tempfile.gettempdir()) / "heliostat-answers"


def answer() -> str:
    _, workload = resolved(*SIZES["as shipped"], 1.0)
    texts = split_texts(workload)
    by_size = {name: trained(*size, 1.0) for name, size in SIZES.items()}
    by_text = [trained(*SIZES["small"], share) for share in SHARES[:-1]] + [by_size["small"]]
    return "\n\n".join(
        [
            "Bits per byte of held-out files of Python's standard library, split by file: "
            f"{len(texts['train']) / 1e6:.2f} MB for training, {len(texts['test']) / 1e6:.2f} MB "
            "held out. For a compression program, the bits *given the training text* are those by "
            "which the compressed training text grows when the held-out text is appended to it.",
            table([("", "alone", "given the training text"), *packers(texts), *ours(by_size)]),
            "The loss falls by a power law with the number of weights (those of the blocks, at the "
            "shipped spec's number of tokens), and with the number of tokens (with the small size, "
            "each run with a schedule of its own):",
            table(
                [
                    ("varied", "values", "bits per byte", "fit", "largest residual"),
                    law("weights N", [(run["weights"], run["bits"]) for run in by_size.values()]),
                    law("tokens D", [(run["tokens"], run["bits"]) for run in by_text]),
                ]
            ),
        ]
    )


def resolved(layers: int, width: int, share: float) -> tuple[RunSpec, Language]:
    data = shipped_spec("language")
    epochs = share * (0.02 if is_tiny() else data["train"]["epochs"])
    changes = {
        "model.layers": layers,
        "model.width": width,
        "model.heads": width // 32,
        "train.epochs": epochs,
        "train.evaluate_every_epochs": epochs,
    }
    spec, workload = resolve(
        apply_overrides(data, [f"{k}={v}" for k, v in changes.items()]), RunSpec
    )
    assert isinstance(workload, Language)
    return spec, workload


def trained(layers: int, width: int, share: float) -> dict[str, float]:
    """Train with the ordinary loop; returns weights, tokens, bits per byte and seconds."""
    spec, workload = resolved(layers, width, share)
    dataset = prepare_dataset(workload, FOLDER)
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    began = time.monotonic()
    outcome = train(spec, workload, dataset, folder, NullReporter())
    blocks = workload.blocks(build_network(spec.train, workload))
    samples = spec.train.total_steps(count_samples(dataset, "train")) * spec.train.global_batch
    found = {
        "weights": sum(weight.numel() for block in blocks for weight in block.parameters()),
        "tokens": samples * workload.tokens_per_sample,
        "bits": outcome.metrics["test/bits_per_byte"],
        "seconds": time.monotonic() - began,
    }
    print(found, flush=True)
    return found


def split_texts(workload: Language) -> dict[str, bytes]:
    """The text of each split, cut to the length that the windows cover."""
    parts = workload.parts()
    common = workload.common(parts)
    texts: dict[str, bytes] = {}
    for part in parts:
        documents = list(workload.documents(part))
        for split, windows in workload.part(part, common).items():
            said = b"".join(document + b"\0" for of, document in documents if of == split)
            size = sum(windows["bytes"].to_pylist())
            texts[split] = texts.get(split, b"") + said[:size]
    return texts


def packers(texts: dict[str, bytes]) -> list[tuple[str, str, str]]:
    """The rows of the compression programs: bits per byte of the held-out text."""
    packed = {
        "gzip -9": lambda text: len(gzip.compress(text, 9)),
        "zstd --ultra -22": lambda text: len(pa.Codec("zstd", 22).compress(text)),
        "xz -9e": lambda text: len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    known, held_out = texts["train"], texts["test"]
    return [
        (
            name,
            f"{8 * pack(held_out) / len(held_out):.3f}",
            f"{8 * (pack(known + held_out) - pack(known)) / len(held_out):.3f}",
        )
        for name, pack in packed.items()
    ]


def ours(runs: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
    return [
        (
            f"`language`, {name}: {run['weights']:,.0f} weights in blocks, "
            f"{run['tokens'] / 1e6:.1f} M tokens, {run['seconds']:.0f} s",
            "",
            f"{run['bits']:.3f}",
        )
        for name, run in runs.items()
    ]


def law(name: str, points: list[tuple[float, float]]) -> list[str]:
    """A row with a power law: the least-squares line through the logarithms of the points."""
    x, y = np.log(np.array(points, dtype=float).T)
    slope, intercept = np.polyfit(x, y, 1)
    worst = np.abs(np.exp(y - (slope * x + intercept)) - 1).max()
    symbol = name[-1]
    return [
        name,
        ", ".join(f"{at:,.0f}" for at, _ in points),
        ", ".join(f"{bits:.3f}" for _, bits in points),
        f"{math.exp(intercept):.3g} {symbol}^{slope:.4f}",
        f"{worst:.2%}",
    ]

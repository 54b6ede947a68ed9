"""`markets` compared with the exact probability of each state, and with a simple model."""

import tempfile
import time
from pathlib import Path

import numpy as np
from answers import shipped_spec, table
from sklearn.linear_model import LogisticRegression

from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_splits
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve
from trainers.workloads.markets.simulation import LEVELS, exact_up_probability

FOLDER = Path(tempfile.gettempdir()) / "heliostat-answers"
PUBLISHED = {(1, 1): 0.500, (1, 2): 0.336, (1, 3): 0.259, (2, 1): 0.664, (2, 3): 0.407}
"""Entries of Cont, Stoikov and Talreja's table: (orders at the best bid, at the best ask) ->
probability, for a spread of one."""


def answer() -> str:
    spec, workload = resolve(shipped_spec("markets"), RunSpec)
    dataset = prepare_dataset(workload, FOLDER)
    began = time.monotonic()
    outcome = train(spec, workload, dataset, Path(tempfile.mkdtemp(dir=FOLDER)), NullReporter())
    seconds = time.monotonic() - began
    splits = {
        name: {column: values.numpy() for column, values in split.items()}
        for name, split in open_splits(dataset).items()
    }
    exact = splits["test"]["exact"].astype(float)
    logistic = LogisticRegression().fit(imbalance(splits["train"]), splits["train"]["up"])
    simple = logistic.predict_proba(imbalance(splits["test"]))[:, 1]
    half = divergence(exact, np.full_like(exact, 0.5))
    rows = [
        ("one half", f"{half:.5f}", "0", f"{(splits['test']['up'] == 1).mean():.4f}"),
        scores("logistic regression of the queues' imbalance", exact, simple, half, splits["test"]),
        (
            f"`markets` as shipped, {seconds:.0f} s",
            f"{outcome.metrics['test/kl']:.5f}",
            f"{outcome.metrics['test/skill']:.4f}",
            f"{outcome.metrics['test/accuracy']:.4f}",
        ),
        scores("the exact probability", exact, exact, half, splits["test"]),
    ]
    solved = exact_up_probability(1)
    worst = max(abs(solved[a - 1, b - 1] - p) for (b, a), p in PUBLISHED.items())
    return "\n\n".join(
        [
            f"Predictions of the next move of the mid-price in {len(exact):,} held-out samples of "
            "a simulated order book. `kl` is the divergence from the exact probability in nats, "
            "`skill` is 1 minus its ratio to that of one half, and `accuracy` is the share of "
            "moves that are predicted correctly.",
            table([("", "kl", "skill", "accuracy"), *rows]),
            "The exact solution differs from Cont, Stoikov and Talreja's table, which has three "
            f"decimal places, by at most {worst:.4f} in the five entries that were compared.",
        ]
    )


def imbalance(split: dict[str, np.ndarray]) -> np.ndarray:
    """The imbalance of the sizes at the best prices in the newest book, from -1 to 1; [N, 1]."""
    sizes = np.expm1(split["book"][:, -1].reshape(-1, LEVELS, 2, 2)[:, 0, :, 1] + 1)
    return ((sizes[:, 1] - sizes[:, 0]) / sizes.sum(1))[:, None]


def divergence(exact: np.ndarray, found: np.ndarray) -> float:
    found = found.clip(1e-9, 1 - 1e-9)
    kept = exact.clip(1e-9, 1 - 1e-9)
    parts = kept * np.log(kept / found) + (1 - kept) * np.log((1 - kept) / (1 - found))
    return float(parts.mean())


def scores(
    name: str, exact: np.ndarray, found: np.ndarray, half: float, split: dict[str, np.ndarray]
) -> tuple[str, str, str, str]:
    kl = divergence(exact, found)
    right = ((found > 0.5) == (split["up"] == 1)).mean()
    return name, f"{kl:.5f}", f"{1 - kl / half:.4f}", f"{right:.4f}"

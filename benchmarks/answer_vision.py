"""`vision` on scikit-learn's handwritten digits, compared with classical classifiers."""

import tempfile
import time
from pathlib import Path

from answers import shipped_spec, table
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import Tensor

from cluster.base.config import apply_overrides
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_splits
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve

FOLDER = Path(tempfile.gettempdir()) / "heliostat-answers"
TRANSFORMER = ["model.network=vit", "model.width=48", "model.blocks=[4]", "optimizer.lr=0.002"]
SEEDS = (0, 1)


def answer() -> str:
    networks = {
        "`digits` as shipped, a ResNet": [],
        f"a transformer: `{' '.join(TRANSFORMER)} train.epochs=60`": [
            *TRANSFORMER,
            "train.epochs=60",
        ],
    }
    rows = [row for name, changes in networks.items() for row in trained(name, changes)]
    return "\n\n".join(
        [
            "Real handwritten digits, with a fixed share of each class held out. The aim is 0.985. "
            "One digit is 0.0028.",
            table([("", "test accuracy", "seconds"), *usual(), *rows]),
        ]
    )


def trained(name: str, changes: list[str]) -> list[tuple[str, str, str]]:
    """The rows of a network: one for each seed."""
    rows = []
    for seed in SEEDS:
        data = apply_overrides(shipped_spec("digits"), [*changes, f"train.seed={seed}"])
        spec, workload = resolve(data, RunSpec)
        dataset, folder = prepare_dataset(workload, FOLDER), Path(tempfile.mkdtemp(dir=FOLDER))
        began = time.monotonic()
        found = train(spec, workload, dataset, folder, NullReporter()).metrics
        seconds = time.monotonic() - began
        rows.append((f"{name}, seed {seed}", f"{found['test/accuracy']:.4f}", f"{seconds:.0f}"))
    return rows


def usual() -> list[tuple[str, str, str]]:
    """The rows of classifiers that need hardly any training, on the same split."""
    _, workload = resolve(shipped_spec("digits"), RunSpec)
    splits = open_splits(prepare_dataset(workload, FOLDER))
    seen, held_out = splits["train"], splits["test"]

    def pixels(image: Tensor) -> Tensor:
        return image.flatten(1) * (16 / 255)  # the scale of scikit-learn's digits

    classifiers = {
        "three nearest neighbours": KNeighborsClassifier(3),
        "support vector machine, RBF kernel": SVC(gamma=0.001),
    }
    rows = []
    for name, classifier in classifiers.items():
        began = time.monotonic()
        classifier.fit(pixels(seen["image"]), seen["label"])
        right = classifier.score(pixels(held_out["image"]), held_out["label"])
        rows.append((name, f"{right:.4f}", f"{time.monotonic() - began:.1f}"))
    return rows

"""A user's own images through the shipped workload: from a folder to a trained network."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heliostat.main import main
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.runs.run import new_run


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten class folders of twelve images: noise, and a bright block where the class has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")  # none of this may come as far as Ray
    random = np.random.default_rng(0)
    for label in range(10):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 60, (16, 16))
            row, column = divmod(label, 4)
            pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 250
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_training_on_a_folder_of_class_folders(images: Path) -> None:
    settings = ["data.source=images", "train.epochs=20", "model.augment=0", "train.global_batch=16"]
    run = new_run("digits", settings, "own", None)
    outcome = train(run.spec, run.workload, run.dataset, run.folder, NullReporter())
    assert outcome.metrics["test/accuracy"] >= 0.8


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda images: (images / "class3" / "5.png").write_bytes(b"no image"), "class3/5.png"),
        (lambda images: [p.unlink() for p in (images / "class3").iterdir()], "class3"),
        (lambda images: (images / "eleventh").mkdir(), "has 11 class folders"),
    ],
    ids=["a bad image", "an empty class folder", "one class too many"],
)
def test_a_mistake_is_reported_in_one_line(
    images: Path, spoil: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(spoil)
    spoil(images)
    assert main(["train", "digits", "--set", "data.source=images"]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert said in output.err
    assert not (images.parent / "runs" / "digits").exists()

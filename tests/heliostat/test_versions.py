"""Runs and sweeps of earlier versions: resumed, reported and loaded by this one.

`tests/fixtures/VERSION` has what that version wrote: `begun`, a run of the digits that was stopped
at step 23 of 197; `swept`, a sweep of them that was stopped with 2 of 4 trials ended; and the
exported model of a run that ended. They were written to /tmp/heliostat.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat import load_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir())
ENDED_LOSS = 0.3956
"""Of the test split, when `begun` was resumed to its end by the version that began it."""

pytestmark = [pytest.mark.parametrize("version", VERSIONS), pytest.mark.thorough]


def restore(version: str, name: str, home: Path, mlflow_uri: str) -> Path:
    """A run's folder as if it had been written in `home`, and tracked at `mlflow_uri`."""
    folder = home / "runs" / name
    shutil.copytree(FIXTURES / version / name, folder)
    log = folder / "track" / "spool.jsonl"
    for path in (folder / "spec.yaml", folder / "best.yaml", log):
        if path.exists():
            text = path.read_text().replace("sqlite:////tmp/heliostat/mlflow.db", mlflow_uri)
            path.write_text(text.replace("/tmp/heliostat", str(home)))
    # The MLflow server of that time is gone, and this one knows none of its runs.
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line)["do"] != "made"))
    (folder / "track" / "sent").unlink()
    return folder


def test_a_run_is_resumed_and_ends_as_it_would_have(
    version: str, heliostat: Any, mlflow_server: str
) -> None:
    restore(version, "begun", heliostat.folder, mlflow_server)
    output = heliostat("train", "--resume", "runs/begun")
    assert "train.evaluate_every: is called train.evaluate_every_epochs now" in output
    assert float(re.search(r"test/loss +([\d.]+)", output)[1]) == pytest.approx(
        ENDED_LOSS, rel=0.01
    )
    assert (heliostat.folder / "runs" / "begun" / "model" / "model.safetensors").exists()
    lines = (heliostat.folder / "runs" / "begun" / "track" / "spool.jsonl").read_text().splitlines()
    steps = [
        row[2]
        for operation in map(json.loads, lines)
        for row in operation.get("rows", ())
        if row[0] == "train/loss"
    ]
    assert sorted({*steps}) == sorted(steps), "a step was tracked twice"
    assert max(steps) == 197


@pytest.mark.parametrize("name", ["begun", "swept"])
def test_a_report_is_written(version: str, name: str, heliostat: Any, mlflow_server: str) -> None:
    folder = restore(version, name, heliostat.folder, mlflow_server)
    heliostat("report", f"runs/{name}")
    page = (folder / "report" / "index.html").read_text()
    assert "train/loss" in page or "val/loss" in page


def test_a_model_is_loaded(version: str) -> None:
    model = load_model(FIXTURES / version / "ended" / "model")
    output = model(torch.zeros(3, 1, 8, 8))
    assert output.shape == (3, 10)


def test_a_sweep_is_resumed_and_keeps_what_has_ended(
    version: str, heliostat: Any, mlflow_server: str
) -> None:
    folder = restore(version, "swept", heliostat.folder, mlflow_server)
    output = heliostat("sweep", "--resume", "runs/swept")
    trials = sorted(path.parent.name for path in folder.glob("trials/*/ended.json"))
    assert trials == ["0000", "0001", "0002", "0003"], output
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    ended = {line["trial"]: line["value"] for line in journal if "value" in line}
    assert (ended[0], ended[1]) == (0.9866240309344397, 0.48831560388207434)

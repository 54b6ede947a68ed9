"""The lines of a run are found by the index, whatever a crash left of it."""

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.tracking.log_index import INDEX_FILE, RECORD, run_lines
from trainers.tracking.operation_log import OPERATION_LOG_FILE, OperationLog, read_metrics

RUNS = ["sweep", "sweep/0001", "sweep/0011", 'a "quoted" \\ one', "Größe/0001"]


def wrote(folder: Path, runs: list[str]) -> list[dict[str, Any]]:
    """Append an operation of each run in turn; returns them all."""
    log = OperationLog(folder)
    operations: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        kinds = [
            {"do": "start", "id": "f00", "key": run, "params": {"n": number}, "parent": None},
            {"do": "log", "run": run, "rows": [["loss", 0.5, number, 7]]},
            {"do": "log", "run": run, "series": {"loss": [3, 4]}, "rows": [["x", 1, number, 7]]},
            {"do": "made", "key": run, "id": f"id-{number}"},
            {"do": "tag", "run": run, "tags": {"run": "sweep/0001"}},
        ]
        operations.append(kinds[number % len(kinds)])
        log.append(operations[-1])
    log.close()
    return operations


def found(folder: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in run_lines(folder / OPERATION_LOG_FILE, run)]


def of(run: str, operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in operations if each.get("run", each.get("key")) == run]


@settings(deadline=None, max_examples=30)
@given(
    runs=st.lists(st.sampled_from(RUNS), max_size=30),
    kept=st.floats(0, 1),
    damage=st.sampled_from(["none", "cut", "zeroed", "gone", "no index was written"]),
)
def test_every_line_of_a_run_is_found_in_order(
    tmp_path_factory: Any, runs: list[str], kept: float, damage: str
) -> None:
    folder = tmp_path_factory.mktemp("log")
    operations = wrote(folder, runs)
    index = folder / INDEX_FILE
    content = index.read_bytes()
    assert len(content) == RECORD.size * len(runs)
    whole = round(kept * len(content))
    if damage == "cut":
        index.write_bytes(content[:whole])
    elif damage == "zeroed":  # by a machine that lost its power
        index.write_bytes(content[:whole] + b"\0" * (len(content) - whole))
    elif damage == "gone":
        index.unlink()
    for run in RUNS:
        assert found(folder, run) == of(run, operations)
    operations += wrote(folder, runs[:3])  # a new writer completes the index
    assert len(index.read_bytes()) == RECORD.size * len(operations)
    for run in RUNS:
        assert found(folder, run) == of(run, operations)


def test_an_index_of_another_log_finds_nothing_wrong(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    wrote(first, RUNS * 3)
    operations = wrote(second, ["sweep/0001", *RUNS, *RUNS, *RUNS])
    (first / INDEX_FILE).rename(second / INDEX_FILE)
    assert found(second, "sweep/0001") == of("sweep/0001", operations)


def test_lines_that_are_written_while_one_reads(tmp_path: Path) -> None:
    """A line without its end is none yet, and the index may be ahead of a copy of the log."""
    operations = wrote(tmp_path, ["a", "b", "a", "b", "a"])
    path = tmp_path / OPERATION_LOG_FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert found(tmp_path, "a") == of("a", operations)[:-1]


def test_one_trial_of_many_is_read_without_the_others(tmp_path: Path) -> None:
    """The bytes that are read are those of the run and of the index."""
    log = OperationLog(tmp_path)
    rows = [("loss", 0.123456789, step, 1_790_000_000_000) for step in range(500)]
    for number in range(200):
        log.append({"do": "log", "run": f"sweep/{number:04d}", "rows": rows})
    log.close()
    path = tmp_path / OPERATION_LOG_FILE
    # What no run has any more is not read: everything but one trial and the last line is damaged.
    lines = path.read_bytes().splitlines(keepends=True)
    holes = [b"\0" * (len(line) - 1) + b"\n" for line in lines]
    path.write_bytes(b"".join([*holes[:70], lines[70], *holes[71:-1], lines[-1]]))
    assert os.path.getsize(path) > 3_000_000  # noqa: PTH202
    assert [tuple(point) for point in read_metrics(tmp_path, "sweep/0070")] == rows

"""The operation log is complete and in order, whatever happens to the disk and the writer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import SpecError
from trainers.tracking.operation_log import OperationLog, group_operations, read_metrics

NOBODY = 65534


def names(log: OperationLog) -> list[str]:
    return [operation["do"] for operation, _ in log.read()]


def test_a_partial_last_line_is_truncated(tmp_path: Path) -> None:
    log = OperationLog(tmp_path)
    for name in ("a", "b" * 200_000):
        log.append({"do": name})
    log.close()
    path = tmp_path / "spool.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    log = OperationLog(tmp_path)
    log.append({"do": "c"})
    assert names(log) == ["a", "c"]


def test_only_the_damaged_line_is_lost(tmp_path: Path) -> None:
    (tmp_path / "spool.jsonl").write_bytes(b'{"do":"a"}\n\0\0\0\0\n{"do":"b"}\n')
    assert names(OperationLog(tmp_path)) == ["a", "b"]


def test_an_offset_beyond_the_end_of_the_log_hides_no_later_operation(tmp_path: Path) -> None:
    """At a power loss `sent` was on the disk, the end of the log was not."""
    log = OperationLog(tmp_path)
    log.append({"do": "a"})
    log.commit(10_000)
    log.close()
    log = OperationLog(tmp_path)
    log.append({"do": "b"})
    assert [operation["do"] for operation, _ in log.read(log.sent_offset)] == ["b"]
    assert log.pending_bytes == len('{"do":"b"}\n')


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    first = OperationLog(tmp_path)
    with pytest.raises(SpecError, match="another process is writing"):
        OperationLog(tmp_path)
    first.close()
    OperationLog(tmp_path).close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_a_folder_without_write_permission_gives_a_one_line_error(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    code = f"""
import os
from pathlib import Path
from trainers.tracking.operation_log import OperationLog
os.setuid({NOBODY})
try:
    OperationLog(Path({str(tmp_path / "track")!r}))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = (
        f"SpecError {tmp_path / 'track'}: cannot write the operation log: Permission denied\n"
    )
    assert done.stdout == expected


FULL = """
import json, resource, sys
from pathlib import Path
from trainers.tracking.operation_log import OperationLog
log = OperationLog(Path(sys.argv[1]))
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
for number in range(100):
    log.append({"do": "x", "number": number})
found = {"trouble": log.write_error, "full": [o["number"] for o, _ in log.read()]}
found["pending"] = log.pending_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
log.append({"do": "x", "number": 100})
found |= {"better": log.write_error, "all": [o["number"] for o, _ in log.read()]}
print(json.dumps(found))
"""


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """The file may not grow beyond 1,000 bytes; the line at the limit is written in part."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert "kept in memory" in found["trouble"]
    assert found["full"] == list(range(len(found["full"])))
    assert 30 < len(found["full"]) < 50
    assert found["pending"] == sum(len(f'{{"do":"x","number":{i}}}\n') for i in range(100))
    assert found["better"] is None
    assert found["all"] == list(range(101))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 900))))
def test_batches_keep_each_runs_order_and_every_metric(operations: list[Any]) -> None:
    given_operations: list[dict[str, Any]] = []
    for index, (run, count) in enumerate(operations):
        metrics = {"do": "log", "run": run, "rows": [[index, i] for i in range(count)]}
        given_operations.append(metrics if count else {"do": "tag", "run": run, "index": index})
    ends = list(range(1, len(operations) + 1))
    groups = list(group_operations(iter(zip(given_operations, ends, strict=True))))

    def flat(list_of_operations: list[dict[str, Any]], run: str) -> list[str]:
        """The metrics and other operations of one run, in order."""
        seen = []
        for operation in list_of_operations:
            if operation["run"] == run:
                seen += [json.dumps(row) for row in operation.get("rows", [operation])]
        return seen

    sent = [operation for group, _ in groups for operation in group]
    for run in "ab":
        assert flat(sent, run) == flat(given_operations, run)
    offsets = [offset for _, offset in groups]
    assert offsets == sorted(offsets)
    assert offsets[-1:] == ends[-1:]


def test_points_from_before_a_take_over_are_no_part_of_a_runs_past(tmp_path: Path) -> None:
    """Another run's state after 4 steps was taken over; a run beside it is not concerned."""
    log = OperationLog(tmp_path)
    for run in ("one", "other"):
        for step, value in ((2, 1.0), (4, 2.0), (6, 3.0)):
            log.append({"do": "log", "run": run, "rows": [("val/loss", value, step, 0)]})
    log.append({"do": "rewind", "run": "one", "step": 4})
    log.append({"do": "log", "run": "one", "rows": [("val/loss", 9.0, 4, 0)]})
    log.close()
    assert [(p.step, p.value) for p in read_metrics(tmp_path, "one")] == [(2, 1.0), (4, 9.0)]
    assert [p.value for p in read_metrics(tmp_path, "other")] == [1.0, 2.0, 3.0]

"""What MLflow is to be told is on disk, whole and in order, whatever happens to disk and writer."""

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
from trainers.tracking.operation_log import OperationLog, group_operations

NOBODY = 65534


def names(spool: OperationLog) -> list[str]:
    return [operation["do"] for operation, _ in spool.read()]


def test_half_a_line_at_the_end_is_cut_off(tmp_path: Path) -> None:
    spool = OperationLog(tmp_path)
    for name in ("a", "b" * 200_000):
        spool.append({"do": name})
    spool.close()
    path = tmp_path / "spool.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    spool = OperationLog(tmp_path)
    spool.append({"do": "c"})
    assert names(spool) == ["a", "c"]


def test_a_damaged_line_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "spool.jsonl").write_bytes(b'{"do":"a"}\n\0\0\0\0\n{"do":"b"}\n')
    assert names(OperationLog(tmp_path)) == ["a", "b"]


def test_a_machine_that_forgot_what_was_sent_sends_all_that_comes_after(tmp_path: Path) -> None:
    """`sent` was on the disk when the power went, the end of the spool was not."""
    spool = OperationLog(tmp_path)
    spool.append({"do": "a"})
    spool.commit(10_000)
    spool.close()
    spool = OperationLog(tmp_path)
    spool.append({"do": "b"})
    assert [operation["do"] for operation, _ in spool.read(spool.sent_offset)] == ["b"]
    assert spool.pending_bytes == len('{"do":"b"}\n')


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    first = OperationLog(tmp_path)
    with pytest.raises(SpecError, match="another process is writing"):
        OperationLog(tmp_path)
    first.close()
    OperationLog(tmp_path).close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
def test_a_folder_that_may_not_be_written_is_told_in_a_line(tmp_path: Path) -> None:
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
    expected = f"SpecError {tmp_path / 'track'}: cannot keep what is tracked: Permission denied\n"
    assert done.stdout == expected


FULL = """
import json, resource, sys
from pathlib import Path
from trainers.tracking.operation_log import OperationLog
spool = OperationLog(Path(sys.argv[1]))
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
for number in range(100):
    spool.append({"do": "x", "number": number})
found = {"trouble": spool.write_error, "full": [o["number"] for o, _ in spool.read()]}
found["pending"] = spool.pending_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
spool.append({"do": "x", "number": 100})
found |= {"better": spool.write_error, "all": [o["number"] for o, _ in spool.read()]}
print(json.dumps(found))
"""


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A file may not grow beyond 1,000 bytes, and the line at that place is written in part."""
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
        log = {"do": "log", "run": run, "rows": [[index, i] for i in range(count)]}
        given_operations.append(log if count else {"do": "tag", "run": run, "index": index})
    ends = list(range(1, len(operations) + 1))
    groups = list(group_operations(iter(zip(given_operations, ends, strict=True))))

    def flat(list_of_operations: list[dict[str, Any]], run: str) -> list[str]:
        """What one run would see in turn."""
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

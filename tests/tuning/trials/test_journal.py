"""The journal of a sweep: appended lines, which survive a crash in the middle of one."""

from pathlib import Path

from tuning.trials.journal import Journal


def test_a_partial_line_at_the_end_of_the_journal_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.record_suggestion(0, {"a.b": 1})
    journal.record_suggestion(1, {"a.b": 2})
    path.write_bytes(path.read_bytes()[:-5])
    reopened = Journal(path)
    assert reopened.parameters == {0: {"a.b": 1}}
    reopened.record_suggestion(1, {"a.b": 3})
    assert Journal(path).parameters == {0: {"a.b": 1}, 1: {"a.b": 3}}


def test_a_record_is_appended_and_the_file_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.record_suggestion(0, {"a.b": 1})
    before, inode = path.read_bytes(), path.stat().st_ino
    journal.record_end(0, 0.5, 10, True)
    assert path.stat().st_ino == inode
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().count(b"\n") == 2
    assert Journal(path).ends == {0: {"trial": 0, "value": 0.5, "step": 10, "complete": True}}

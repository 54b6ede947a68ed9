"""The journal of a sweep: appended lines, which survive a crash in the middle of one."""

from pathlib import Path

from tuning.trials.journal import Change, Journal


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


def test_two_objects_that_append_to_one_file_know_all_of_it(tmp_path: Path) -> None:
    one, other = Journal(tmp_path / "journal"), Journal(tmp_path / "journal")
    one.record_suggestion(0, {"a.b": 1})
    other.record_change(0, Change(4, {"a.b": 2}, None, 0))
    one.record_end(0, 0.5, 10, True)
    other.refresh()
    for journal in (one, other, Journal(tmp_path / "journal")):
        assert journal.parameters_after(0) == {"a.b": 2}
        assert journal.parameters_after(0, 0) == {"a.b": 1}
        assert journal.ends[0]["value"] == 0.5
    assert len((tmp_path / "journal").read_text().splitlines()) == 3


def test_the_schedule_of_a_state_follows_it_through_the_trials(tmp_path: Path) -> None:
    """0 is taken over by 1 at step 4; that by 2 at step 8, after which 1 takes over from 0."""
    journal = Journal(tmp_path / "journal")
    for number in range(3):
        journal.record_suggestion(number, {"a": number})
    journal.record_change(1, Change(4, {"a": 10}, 0, 0))
    journal.record_change(2, Change(8, {"a": 20}, 1, 1))
    journal.record_change(1, Change(6, {"a": 11}, 0, 0))
    journal.record_change(0, Change(8, {"a": 30}, 2, 1))
    assert journal.schedule(0, 0) == [(0, {"a": 0})]
    assert journal.schedule(1, 1) == [(0, {"a": 0}), (4, {"a": 10})]
    assert journal.schedule(1, 2) == [(0, {"a": 0}), (6, {"a": 11})]
    assert journal.schedule(2, 1) == [(0, {"a": 0}), (4, {"a": 10}), (8, {"a": 20})]
    assert journal.schedule(0, 1) == [(0, {"a": 0}), (4, {"a": 10}), (8, {"a": 30})]

"""Totals are right after kills and restarts, and for entries in any order."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import ClusterError
from cluster.cost.ledger import Ledger, LedgerEntry, read_entries, total_costs


def entry(name: str, seconds: float, kind: str = "busy", usd: float | None = None) -> LedgerEntry:
    return LedgerEntry(name, "run", kind, 0.0, 0.0, seconds, node="n", usd=usd)  # type: ignore[arg-type]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(0, 3), st.integers(1, 100)),
        st.tuples(st.just("again"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("restart"), st.booleans(), st.integers(1, 60)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(STEPS)
def test_totals_are_right_after_any_number_of_restarts(steps: list[tuple[str, int, int]]) -> None:
    """A process works, repeats old entries, and is replaced, perhaps within a line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        ledger, process, busy_s = Ledger(path), 0, 0
        so_far: defaultdict[int, int] = defaultdict(int)
        said: dict[int, LedgerEntry] = {}
        for do, which, amount in steps:
            if do == "use":
                so_far[which] += amount
                busy_s += amount
                said[which] = entry(f"{process}/{which}", so_far[which], usd=so_far[which] / 4)
                ledger.append([said[which]])
            elif do == "again" and which in said:
                ledger.append([said[which]])
            elif do == "restart":
                ledger.close()
                if which:  # killed while it wrote
                    with path.open("ab") as file:
                        file.write(b'{"id":"torn","run":"run","kind":"busy","begin":0.0,'[:amount])
                ledger, process = Ledger(path), process + 1
                so_far.clear()
                said.clear()
        found = ledger.totals()
        assert ledger.totals_by_run() == ({"run": found} if busy_s else {})
        assert found.busy_s == busy_s
        assert (found.usd or 0) == busy_s / 4
        assert total_costs(read_entries(path)) == found
        ledger.close()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50)), max_size=30), st.randoms())
def test_the_order_of_lines_does_not_matter(amounts: list[tuple[int, int]], random: object) -> None:
    entries = [entry(f"{which}", seconds, usd=float(seconds)) for which, seconds in amounts]
    shuffled = [*entries, *entries[::2]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert total_costs(shuffled) == total_costs(entries)


WRITER = """
import sys
from pathlib import Path
from cluster.cost.ledger import LedgerEntry, Ledger
ledger = Ledger(Path(sys.argv[1]))
for seconds in range(1, 10**9):
    ledger.append([LedgerEntry(f"me", "run", "busy", 0.0, 0.0, seconds, usd=seconds / 2)])
    print(seconds, flush=True)
"""


def test_kill_9_loses_no_complete_entry(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    home = Path(__file__).parents[3]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home)},
    )
    assert writer.stdout is not None
    for _ in range(50):
        written = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    written = max([written, *map(int, writer.stdout.read().split())])
    writer.wait(600)
    found = Ledger(path).totals()
    assert found.busy_s in (written, written + 1)
    assert found.usd == found.busy_s / 2


def test_idle_time_is_separate_and_an_unknown_price_is_not_zero() -> None:
    found = total_costs(
        [
            entry("a", 3600, usd=2.0),
            entry("b", 1800, "idle", usd=1.0),
            entry("c", 600, "busy"),
            entry("d", 60, "wall"),
        ]
    )
    assert (found.busy_s, found.idle_s, found.wall_s) == (4200, 1800, 60)
    assert (found.usd, found.idle_usd, found.unpriced_s) == (3.0, 1.0, 600)
    assert total_costs([entry("c", 600)]).usd is None
    assert total_costs([]).energy.joules is None


def test_damage_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append([entry("a", 1), entry("b", 2)])
    ledger.close()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "#" * 20 + "\n" + lines[1])
    with pytest.raises(ClusterError, match=r"ledger.jsonl:2: is no entry"):
        Ledger(path)


def test_a_thread_may_read_while_another_one_appends(tmp_path: Path) -> None:
    """As a sweep's billing thread, while the driver ends the sweep."""
    ledger, errors, done = Ledger(tmp_path / "ledger.jsonl"), list[Exception](), threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                assert ledger.totals().busy_s <= 2000
                assert ledger.totals_by_run().keys() <= {f"run{n}" for n in range(7)}
            except Exception as error:
                errors.append(error)
                return

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        reader = threading.Thread(target=read)
        reader.start()
        for number in range(2000):
            ledger.append([replace(entry(f"e{number}", 1), run=f"run{number % 7}")])
        done.set()
        reader.join()
    finally:
        sys.setswitchinterval(before)
    assert errors == []
    assert ledger.totals().busy_s == 2000


RUNS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from("abc"), st.integers(0, 9)), max_size=30
)


@given(RUNS)
def test_totals_by_run_follow_each_change(changes: list[tuple[int, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger, newest = Ledger(Path(folder) / "ledger.jsonl"), dict[str, LedgerEntry]()
        for number, run, seconds in changes:
            changed = replace(entry(f"e{number}", seconds, usd=seconds / 4), run=run)
            newest[changed.id] = changed
            before = ledger.totals_by_run()
            ledger.append([changed])
            found = ledger.totals_by_run()
            for name in "abc":
                own = [each for each in newest.values() if each.run == name]
                if own or name in found:
                    assert found[name] == total_costs(own)
                if before.get(name) == found.get(name) and name != run:
                    assert before.get(name) is found.get(name), "it was computed again"
            assert ledger.totals() == total_costs(newest.values())

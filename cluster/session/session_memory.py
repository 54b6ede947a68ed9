"""The memory of a session: of its processes and all that they have started."""

import contextlib
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """A process and all that descend from it and are not orphaned, as /proc has them now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def memory_bytes(pid: int) -> int:
    """The memory of a process and its descendants; a page that several of them share counts once.

    By the proportional set size of Linux: each process has its part of the pages that it shares.
    """
    total_kb = 0
    for each in descendants(pid):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total_kb += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kb * 1024

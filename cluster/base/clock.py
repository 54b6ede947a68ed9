"""Points in time from which other processes, on this machine or another one, measure.

The time of day may be set at any moment: by a time server, or when a virtual machine resumes. The
monotonic clock is not, but counts from the start of its machine.
"""

import platform
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@cache
def _boot() -> str:
    """What tells this start of this machine from every other: its monotonic clock is one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


@dataclass(frozen=True)
class Moment:
    """A point in time."""

    unix_s: float
    monotonic_s: float
    """Seconds of the machine's monotonic clock."""
    boot: str

    @classmethod
    def now(cls) -> "Moment":
        return cls(time.time(), time.monotonic(), _boot())

    def seconds_until(self, later: "Moment") -> float:
        """By the monotonic clock if both are of one machine, otherwise by the time of day."""
        if self.boot == later.boot:
            return max(0.0, later.monotonic_s - self.monotonic_s)
        return max(0.0, later.unix_s - self.unix_s)

    def unix_s_here(self) -> float:
        """This moment by the time of day that this machine has now."""
        return time.time() - self.seconds_until(Moment.now())

"""Durations between processes, while the time of day is set."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from cluster.base.clock import Moment


@pytest.mark.parametrize("jump_s", [-3600, 3600])
def test_setting_the_time_of_day_changes_no_duration_on_one_machine(
    jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, true_time = Moment.now(), time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + jump_s)
    assert 0 <= begin.seconds_until(Moment.now()) < 60
    assert begin.unix_s_here() == pytest.approx(begin.unix_s + jump_s, abs=60)


def test_processes_of_one_machine_have_one_clock() -> None:
    begin = Moment.now()
    code = "from cluster.base.clock import Moment; m = Moment.now(); print(m.monotonic_s, m.boot)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    monotonic_s, boot = done.stdout.split()
    assert boot == begin.boot
    assert begin.monotonic_s < float(monotonic_s) < Moment.now().monotonic_s


def test_machines_have_the_time_of_day_in_common() -> None:
    here = Moment.now()
    there = replace(here, boot="another", monotonic_s=5.0, unix_s=here.unix_s + 3)
    assert here.seconds_until(there) == pytest.approx(3)
    assert there.seconds_until(here) == 0

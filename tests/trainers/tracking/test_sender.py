"""The thread that sends: it may wait for the first step, while the log is written to the disk."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from trainers.tracking.operation_log import OperationLog
from trainers.tracking.sender import BackgroundSender, Sender


class CountedLog(OperationLog):
    syncs = 0

    def write_and_sync(self) -> None:
        super().write_and_sync()
        self.syncs += 1


class Sends:
    """Notes that something was to be sent."""

    def __init__(self) -> None:
        self.called = threading.Event()

    def send(self, closed: threading.Event) -> None:
        self.called.set()


@pytest.mark.parametrize("hold_s", [0.0, 600.0])
def test_nothing_is_sent_while_it_is_held(
    hold_s: float, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    log, sends = CountedLog(tmp_path), Sends()
    background = BackgroundSender(log, cast(Sender, sends), hold_s)
    background.start()
    try:
        for count in range(1, 4):
            log.append({"do": "start", "key": "a"})
            background.wake()
            wait_until(lambda: log.syncs > count)  # noqa: B023
        assert sends.called.is_set() == (hold_s == 0)
        background.release()
        assert sends.called.wait(60)
    finally:
        background.close()
        log.close()

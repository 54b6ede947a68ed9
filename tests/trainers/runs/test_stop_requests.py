"""Requests of another process to stop: each is obeyed once, and only by whom it was meant for."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trainers.runs import stop_requests
from trainers.runs.session import stop_on_signal
from trainers.runs.stop_requests import (
    WHOLE,
    interrupted_on_request,
    request_stop,
    withdraw_stop,
)

Wait = Callable[..., None]


def test_a_request_interrupts_once_as_ctrl_c_does(
    tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_requests, "POLL_S", 0.01)
    with stop_on_signal() as stop, interrupted_on_request(tmp_path):
        request_stop(tmp_path, "0007")
        assert not stop.wait(0.05), "a trial's request is not the run's"
        request_stop(tmp_path)
        wait_until(stop.is_set)
        assert stop_requests.stop_requests(tmp_path) == {"0007"}
        threading.Event().wait(0.05)  # a second interruption would raise KeyboardInterrupt


def test_a_request_of_before_is_withdrawn(tmp_path: Path) -> None:
    assert stop_requests.stop_requests(tmp_path) == set()
    withdraw_stop(tmp_path)
    request_stop(tmp_path)
    assert stop_requests.stop_requests(tmp_path) == {WHOLE}
    before = signal.getsignal(signal.SIGINT)
    with interrupted_on_request(tmp_path):
        assert stop_requests.stop_requests(tmp_path) == set()
    assert signal.getsignal(signal.SIGINT) is before

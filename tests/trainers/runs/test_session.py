"""Signals, and requests of other processes, while a run is on."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trainers.run_folder import WHOLE, request_stop, stop_requests, withdraw_stop
from trainers.runs import session
from trainers.runs.session import interrupted_on_request, stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_asks_to_stop_and_the_second_one_interrupts(
    number: signal.Signals,
) -> None:
    with stop_on_signal() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_a_request_interrupts_once_as_ctrl_c_does(
    tmp_path: Path, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "STOP_POLL_S", 0.01)
    with stop_on_signal() as stop, interrupted_on_request(tmp_path):
        request_stop(tmp_path, "0007")
        assert not stop.wait(0.05), "a trial's request is not the run's"
        request_stop(tmp_path)
        wait_until(stop.is_set)
        assert stop_requests(tmp_path) == {"0007"}
        threading.Event().wait(0.05)  # a second interruption would raise KeyboardInterrupt


def test_a_request_of_before_is_withdrawn(tmp_path: Path) -> None:
    assert stop_requests(tmp_path) == set()
    withdraw_stop(tmp_path)
    request_stop(tmp_path)
    assert stop_requests(tmp_path) == {WHOLE}
    before = signal.getsignal(signal.SIGINT)
    with interrupted_on_request(tmp_path):
        assert stop_requests(tmp_path) == set()
    assert signal.getsignal(signal.SIGINT) is before

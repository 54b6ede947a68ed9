"""Signals while a run is on."""

import signal

import pytest

from trainers.runs.session import stop_on_signal


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

"""The first signal asks, the second aborts, and every handler is put back."""

import os
import signal
import threading

import pytest

from rankwise.errors import TrainingInterrupted
from rankwise.training.signals import StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_training_a_signal_stops_at_once(number: int):
    before = signal.getsignal(number)
    with StopRequest(), pytest.raises(TrainingInterrupted, match="before the first step: nothing was saved"):
        send(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_training_the_first_signal_waits_and_the_second_aborts(number: int):
    before = signal.getsignal(number)
    stop = StopRequest()
    stop.begin_steps()
    send(number)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt, match="second"):
        send(number)
    assert signal.getsignal(number) is before


def test_the_callers_handlers_outlive_training_and_ours_do_not():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.begin_steps()
        stop.end_steps()
        assert stop.installed
        with pytest.raises(TrainingInterrupted, match="after training: its checkpoints stay"):
            send(signal.SIGTERM)
    own = StopRequest()
    own.begin_steps()
    assert own.installed
    own.end_steps()
    assert not own.installed
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_installed():
    seen: list[bool] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(stop.installed)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]

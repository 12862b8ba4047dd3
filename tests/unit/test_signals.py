"""Requests by signal: noted, agreed on, and the handlers of before put back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from relora.train.signals import Requests, saving_on_signal, stop_signal, stopping_on_signals


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def test_handlers_come_back_whatever_happens_inside():
    before = handlers()
    with pytest.raises(KeyError), saving_on_signal(Requests()), stopping_on_signals(Requests()):
        assert handlers() != before
        raise KeyError
    assert handlers() == before


def test_a_users_own_handlers_come_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with stopping_on_signals(Requests()) as _:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_is_not_caught(number):
    requests = Requests()
    with stopping_on_signals(requests):
        os.kill(os.getpid(), number)
        assert stop_signal(requests.take()) == number
        assert stop_signal(requests.take()) == number  # it stands
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_request_to_save_is_taken_once():
    requests = Requests()
    with saving_on_signal(requests):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert requests.take() == (False, False, True) and requests.take() == (False, False, False)
    assert stop_signal((False, False, True)) is None
    assert stop_signal((True, True, False)) == signal.SIGTERM


def test_outside_of_the_main_thread_nothing_is_handled_and_nothing_fails():
    before, ran = handlers(), []

    def body() -> None:
        with saving_on_signal(Requests()), stopping_on_signals(Requests()):
            ran.append(handlers() == before)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert ran == [True]


def test_a_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal\n"
        "from relora.train.signals import Requests, stopping_on_signals\n"
        "with stopping_on_signals(Requests()):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('not any more', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT and done.stdout == "still here\n"

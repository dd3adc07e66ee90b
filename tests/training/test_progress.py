import signal
import threading

import pytest

from probllm.training import fit
from probllm.training.checkpoint import CHECKPOINT_FILE
from probllm.training.progress import ProgressBar, delayed_interrupt
from tests.training.tagging import TinyTagger, tagged


def test_ctrl_c_sets_a_flag_and_pressed_again_raises():
    with delayed_interrupt(ProgressBar(False, 1)) as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_handler_of_the_callers_own_is_left_alone():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        with delayed_interrupt(ProgressBar(False, 1)) as interrupt:
            signal.raise_signal(signal.SIGINT)
        assert heard == [1]
        assert not interrupt.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_fit_runs_in_a_thread_that_is_not_the_main_one():
    runs = []
    thread = threading.Thread(target=lambda: runs.append(fit(TinyTagger(), tagged(8), epochs=1)))
    thread.start()
    thread.join()
    assert runs[0].steps == 1


def test_the_second_ctrl_c_stops_within_a_step(tmp_path):
    class Stuck(TinyTagger):
        def loss(self, batch):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the step went on")

    with pytest.raises(KeyboardInterrupt):
        fit(Stuck(), tagged(8), epochs=1, folder=tmp_path)
    assert not (tmp_path / CHECKPOINT_FILE).exists()

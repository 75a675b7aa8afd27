"""A terminal that closes, a reader that leaves, a signal before there is a run."""

import os
import signal
from unittest.mock import Mock

import pytest

from genfw.train import runs
from genfw.train.terminal import Lasting, detach


def test_a_reader_that_leaves_stops_nothing():
    reads, writes = os.pipe()
    with Lasting(os.fdopen(writes, "wb"), line_buffering=True) as stream:
        print("heard", file=stream)
        assert os.read(reads, 9) == b"heard\n"
        os.close(reads)
        for _ in range(3):
            print("unheard", file=stream, flush=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_before_there_is_a_run(number, ignored):
    """143, also of those that end a process with a code of their own; what nohup ignores is."""
    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
        detach()
        os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if ignored else 143)


def test_a_command_that_is_the_process_lets_its_terminal_close(monkeypatch):
    monkeypatch.setattr(runs, "detach", apart := Mock())
    monkeypatch.setattr("sys.argv", ["sample", "run=here"])
    told = []
    assert runs.command(told.extend, ["n=3"]) == 0 and not apart.called
    assert runs.command(told.extend) == 0 and apart.called
    assert told == ["n=3", "run=here"]

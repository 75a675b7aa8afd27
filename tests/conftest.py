"""Every test starts from the same seed; `double` computes in float64. Arrays are checked against
their annotations."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from jaxtyping import config, install_import_hook

install_import_hook("genfw", "beartype.beartype").__enter__()

# A shell starts what runs in its background deaf to Ctrl-C, nohup to SIGHUP, and with it all that
# the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch):
    """Whatever the annotations say, as outside of tests."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def lockstep(monkeypatch):
    """Calls functions, each on a rank of its own (a thread), and returns what they return. Whom
    another rank leaves waiting in a reduction raises BrokenBarrierError."""

    def together(*functions):
        barrier = threading.Barrier(len(functions), timeout=0.3)
        brought = {}

        def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
            brought[threading.get_ident()] = tensor.clone()
            barrier.wait()
            stacked = torch.stack(list(brought.values()))
            barrier.wait()  # all have read before one brings the next
            tensor.copy_(stacked.sum(0) if op == dist.ReduceOp.SUM else stacked.amax(0))

        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        with ThreadPoolExecutor(len(functions)) as ranks:
            return [each.result() for each in [ranks.submit(one) for one in functions]]

    return together

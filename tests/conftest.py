"""Every test starts from the same seed; `double` computes in float64. Arrays are checked against
their annotations."""

import signal

import pytest
import torch
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

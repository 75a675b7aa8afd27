"""Every test starts from the same seed; `double` computes in float64. Arrays are checked against
their annotations."""

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("genfw", "beartype.beartype").__enter__()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

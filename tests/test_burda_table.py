"""The quick training of benchmarks/burda_table.py is the experiment's: its rates, its warm-up."""

import math
from pathlib import Path

import pytest
import torch
from test_start_at_mean import data, module

from genfw.objective import LinearWarmup, Objective


class Watched(Objective):
    """What a warm-up weighs the rate by, step by step."""

    def __init__(self):
        super().__init__()
        self.warmup, self.weights = LinearWarmup(steps=10), []

    def advance(self, step):
        self.warmup.advance(step)

    def forward(self, model, x, y=None, *, noise=None):
        self.weights.append(float(self.warmup.weight))
        return self.warmup(model, x, y, noise=noise)


def test_a_warmup_takes_its_share_of_the_training(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import burda_table as table

    watched = Watched()
    monkeypatch.setattr(table, "WARMUP", 10)
    monkeypatch.setattr(table, "CALIBRATION", 2)
    training = table.Training(
        module().model,
        watched,
        data(),
        highest=0.01,
        betas=(0.9, 0.999),
        planned=20,
        batch=2,
        device=torch.device("cpu"),
    )
    start = [p.clone() for p in training.model.parameters()]
    training.rehearse(3)
    assert all(map(torch.equal, start, training.model.parameters()))
    steps, _ = training.train(seconds=0.0)
    weights = watched.weights[-steps:]
    assert steps == 11 and set(watched.weights[:-steps]) == {0.0}
    risen = [min(1.0, 2 * i / steps) for i in range(steps)]  # in half of them, as 10 are of 20
    assert weights == pytest.approx(risen, abs=0.1)  # a step of the experiment's
    assert not any(map(torch.equal, start, training.model.parameters()))
    nll, error, bound = training.test(k=50, images=2, chunk=100)
    assert nll < bound + 3 * error and all(map(math.isfinite, (nll, error, bound)))

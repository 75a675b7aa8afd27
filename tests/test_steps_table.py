"""One model read at T steps and in continuous time: every row is the bound of that reading, by the
same draws."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

import genfw

BOUND, KEYS = genfw.Bound(sets=3, strata=2), genfw.Noise(5, torch.arange(7))


@pytest.fixture
def steps_table(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import steps_table

    monkeypatch.setattr(steps_table, "STEPS", (1, 2, 5, None))
    yield steps_table
    del sys.modules["steps_table"]


def test_a_row_is_the_bound_of_its_reading(steps_table):
    """Its error is of draws for these images, and the prior, of the end points alone, is one for
    all."""
    model, x = tiny.vdm(), tiny.Images().images["test"].long()
    rows = list(steps_table.readings(model, x, BOUND, KEYS))
    assert [row[0] for row in rows] == [1, 2, 5, "inf"]
    for steps, nll, error, bits, bits_error, reconstruction, levels, prior in rows:
        reading = model.at(None if steps == "inf" else steps)
        estimate = BOUND(reading, x, noise=KEYS)
        assert nll == pytest.approx(estimate.nats.mean().item(), rel=1e-12)
        assert error == pytest.approx(estimate.variance.mean().div(len(x)).sqrt().item(), rel=1e-9)
        assert [bits, bits_error] == pytest.approx([n / 4 / 0.6931471806 for n in (nll, error)])
        assert nll == pytest.approx(levels + prior - reconstruction, rel=1e-6)
        assert prior == rows[0][-1]
    assert len({row[1] for row in rows}) == len(rows)


def test_the_printed_terms_sum_to_the_printed_bound(steps_table):
    row = ["inf", 84.25, 0.5, 1.9, 0.01, -3.5, 80.5, 0.25]
    said = steps_table.line(row)
    nll, _, *terms = (cell.split("±")[0] for cell in said.strip("| ").split("|")[1:])
    assert float(nll) == sum(map(float, terms))
    assert said == "| inf | 84.25 ± 0.50 | 1.9000 ± 0.0100 | 3.500 | 80.50 | 0.2500 |"


def test_the_limit_is_the_line_that_finite_steps_fall_to(steps_table):
    rows = [[t, 0, 0, 2 + 1 / t, 0.1 / t, 0, 0, 0] for t in (1, 2, 5)]
    figure = steps_table.plot([*rows, ["inf", 0, 0, 2.0, 0.01, 0, 0, 0]])
    points, limit = figure.axes[0].lines[0], figure.axes[0].lines[-1]
    assert points.get_xydata().tolist() == [[1, 3], [2, 2.5], [5, 2.2]]
    assert set(limit.get_ydata()) == {2.0}

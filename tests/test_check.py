"""A number out of its range is refused by name, wherever it enters, and whatever it came as."""

import math
from functools import partial

import numpy as np
import pytest

import genfw
from genfw.check import not_negative, positive, share, share_below_one
from genfw.train.stability import Outliers

OUTLIERS = partial(Outliers, factor=2.0, quantile=0.5, window=3, max_consecutive=1)

POSITIVE = [
    (genfw.KarrasGrid, "rho"),
    (genfw.Churn, "inflation"),
    (genfw.Langevin, "size"),
    (genfw.ImportanceTime, "floor"),
    (genfw.Edm, "data_std"),
    (partial(genfw.Linear, 5.0, -5.0), "beta_min"),
    (partial(genfw.Sigmoid, 5.0, -5.0), "tau"),
    (partial(genfw.LogNormal, 5.0, -5.0), "p_std"),
    (partial(genfw.Laplace, 5.0, -5.0), "scale"),
    (genfw.Objective.registry["min_snr"], "gamma"),
    (genfw.Objective.registry["cyclic"], "ramp"),
    (genfw.Annealed, "step"),
    (genfw.ProbabilityFlow, "tolerance"),
    (OUTLIERS, "factor"),
]
NOT_NEGATIVE = [
    (genfw.Churn, "churn"),
    (genfw.Objective.registry["beta"], "beta"),
    (genfw.Objective.registry["p2"], "gamma"),
]
SHARES = [
    (genfw.DDIM, "eta"),
    (genfw.ImportanceTime, "floor"),
    (genfw.ImportanceTime, "decay"),
    (genfw.Objective.registry["ciwae"], "weight"),
    (genfw.Objective.registry["cyclic"], "ramp"),
    (OUTLIERS, "quantile"),
]


@pytest.mark.parametrize(
    ("make", "name", "below"),
    [
        *((make, name, 0) for make, name in POSITIVE),
        *((make, name, -1e-9) for make, name in NOT_NEGATIVE + SHARES),
        *((make, name, 1 + 1e-9) for make, name in SHARES),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_number_out_of_its_range_is_named(make, name, below):
    for wrong in (below, -math.inf, math.inf, math.nan, "5", [1.0]):
        with pytest.raises(ValueError, match=f"{name}: expected a .*number.*, got"):
            make(**{name: wrong})


@pytest.mark.usefixtures("unchecked")
def test_the_ends_of_a_range():
    tiny, last = math.ulp(0.0), math.nextafter(1.0, 0.0)
    for taken, refused, values in (
        (positive, (0, 0.0, -tiny), (tiny, 1e300)),
        (not_negative, (-tiny,), (0, tiny, 1e300)),
        (share, (-tiny, 1 + 1e-15), (0, tiny, last, 1)),
        (share_below_one, (-tiny, 1), (0, tiny, last)),
    ):
        assert [taken("n", value) for value in values] == list(values)
        assert taken("n", np.float32(0.5)) == 0.5
        for value in refused:
            with pytest.raises(ValueError, match="n: expected"):
                taken("n", value)


@pytest.mark.parametrize(
    "name", ["bins", "categorical", "discretized_gaussian", "logistic_mixture"]
)
@pytest.mark.usefixtures("unchecked")
def test_a_count_may_be_numpys(name):
    make, count = genfw.Likelihood.registry[name], np.prod((3, 2))
    made = make(count)
    assert type(made.bins) is int and made.bins == 6 and made.outputs == make(6).outputs
    for wrong in (1, 2.0, True, "6", None):
        with pytest.raises(ValueError, match="bins: expected an integer of at least 2, got"):
            make(wrong)

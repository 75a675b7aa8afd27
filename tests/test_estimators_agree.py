"""One number, many ways: on Gaussian data with the exact denoiser the bound, its importance weights
and the probability flow all say log p(x)."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from oracles import GaussianDenoiser, LinearGaussianChain, gaussian_log_prob
from test_vdm import MEAN, STD

from genfw import (
    VDM,
    Bound,
    GaussianLikelihood,
    ImportanceWeighted,
    LogLinear,
    Noise,
    ProbabilityFlow,
)


def gaussian_vdm(highest=14.0, lowest=-14.0, steps=None):
    denoiser = GaussianDenoiser(LogLinear(highest, lowest), MEAN, STD)
    return VDM(denoiser, GaussianLikelihood(), steps, shape=(3,))


def data(n):
    x = MEAN + STD * torch.randn(n, 3)
    return x, gaussian_log_prob(x, MEAN, STD), Noise(0, torch.arange(n))


def chain_log_p(vdm, x):
    """log p_T(x) of the model in T steps, whose conditionals are all linear."""
    mean, var, ends = torch.zeros(3), torch.ones(3), torch.tensor([[0.0] * 3, [1.0] * 3])
    for level in range(vdm.levels, 0, -1):
        p = vdm.decode(ends, level)
        gain = p.mean[1] - p.mean[0]
        mean, var = p.mean[0] + gain * mean, gain**2 * var + p.std[0] ** 2
    return gaussian_log_prob(x, mean, var.sqrt())


def test_more_steps_come_to_log_p(double):
    """By 1/T."""
    x, log_p, _ = data(40)
    far = [(chain_log_p(gaussian_vdm(11.0, -14.0, t), x) - log_p).abs().mean() for t in (100, 800)]
    assert 6 < far[0] / far[1] < 10 and far[1] < 0.02


def test_all_say_log_p(double):
    """The bound and the weights within four standard errors (and what T steps, or the finite number
    of weights, are known to lose), the flow to 1e-6 nats per dimension."""
    n = 40
    x, log_p, noise = data(n)
    vdm = gaussian_vdm(11.0, -14.0)
    chain = chain_log_p(vdm.at(steps=200), x)
    for estimator, read, truth, lost in (
        (Bound(sets=2, strata=256, chunk=2**16), vdm, log_p, 0.0),
        (Bound(sets=2, strata=256, chunk=2**16), vdm.at(steps=1000), log_p, 0.2),
        (ImportanceWeighted(40, chunk=1600), vdm.at(steps=200), chain, None),
    ):
        estimate = estimator(read, x, noise=noise)
        error = estimate.variance.sum().sqrt() / n
        gap = (estimate.nats + truth).mean()
        lost = estimate.variance.mean() if lost is None else lost  # half of it, by the delta method
        assert -4 * error < gap < 4 * error + lost and error < 0.15
    flow = ProbabilityFlow(draws=2, tolerance=1e-6)(gaussian_vdm(33.0, -33.0), x, noise=noise)
    assert ((flow.nats + log_p).abs() < 3e-6).all()


def test_weights_of_a_diffusion_chain_have_p_as_their_mean(double):
    vdm, n, x = gaussian_vdm(5.0, -5.0, steps=3), 100_000, torch.tensor([[0.1, -0.7, 1.0]])
    log_w = vdm.log_weight(x, noise=Noise(0, torch.arange(1)).each(0, n), k=n)
    w = (log_w - chain_log_p(vdm, x)).exp()
    assert abs(w.mean() - 1) < 4 * w.std() / n**0.5 and w.std() / n**0.5 < 0.05


def test_more_weights_and_more_steps_come_closer(double):
    x, log_p, noise = data(200)
    for vdm in (gaussian_vdm(8.0, -10.0, 5), gaussian_vdm(8.0, -10.0, 20)):
        gaps = [ImportanceWeighted(k, 5000)(vdm, x, noise=noise).nats + log_p for k in (1, 8, 40)]
        for few, many in pairwise(gaps):
            gap = few - many
            assert gap.mean() > 3 * gap.std() / 200**0.5
    loose, close = (
        ImportanceWeighted(8)(gaussian_vdm(8.0, -10.0, steps), x, noise=noise).nats
        for steps in (10, 60)
    )
    gap = loose - close
    assert gap.mean() > 3 * gap.std() / 200**0.5


def test_a_chain_is_walked_without_being_kept(double):
    """At no time are more than two levels alive, whatever T; the weight is that of the rungs."""
    alive, most = weakref.WeakSet(), []

    class Watched(LinearGaussianChain):
        def decode(self, z, t, y=None):
            alive.add(z)
            most.append(len(alive))
            return super().decode(z, t, y)

    gc.disable()
    try:
        with torch.no_grad():
            Watched(40).log_weight(torch.randn(3, 2), k=5)
    finally:
        gc.enable()
    assert max(most) <= 3


@pytest.mark.parametrize("model", [LinearGaussianChain(5, bias=0.3), gaussian_vdm(6.0, -6.0, 5)])
def test_the_weight_is_that_of_its_rungs(model, double):
    dims = 2 if isinstance(model, LinearGaussianChain) else 3
    x, noise = torch.randn(4, dims), Noise(0, torch.arange(4)).each(0, 3)
    rungs = model.climb(x, noise=noise, k=3)
    top = rungs[-1].z
    expected = model.prior(12).log_prob(top) + sum(r.log_below - r.q.log_prob(r.z) for r in rungs)
    assert torch.allclose(model.log_weight(x, noise=noise, k=3), expected, rtol=1e-12)


def test_continuous_time_has_no_weights(double):
    with pytest.raises(ValueError, match=r"set model.steps=T, or vdm.at\(steps=T\)"):
        ImportanceWeighted(2)(gaussian_vdm(), torch.randn(2, 3))

"""Weights on the denoising error, against closed formulas for Gaussian data, and the measures in
which they are stated."""

import inspect
import math

import pytest
import torch
from oracles import GaussianDenoiser
from test_vdm import MEAN, STD, gaussian_data, network_vdm

from genfw import (
    P2,
    VDM,
    BatchNoise,
    BinsLikelihood,
    Cosine,
    EdmWeighted,
    Elbo,
    GaussianLikelihood,
    Linear,
    LogLinear,
    MinSnr,
    NetworkDenoiser,
    Noise,
    NoiseSchedule,
    Objective,
    Parameterization,
    SigmoidWeighted,
)
from genfw.nets import MLP
from genfw.objective.denoising import DenoisingObjective

HIGH, LOW = 7.0, -7.0
OBJECTIVES = [c for c in Objective.registry.values() if issubclass(c, DenoisingObjective)]
WEIGHTS = {  # as the papers write them
    "simple": lambda snr: torch.ones_like(snr),
    "min_snr": lambda snr: torch.where(snr > 5, 5 / snr, 1.0),
    "p2": lambda snr: 1 / (1 + snr),
    "sigmoid": lambda snr: 1 / (1 + snr),
    "edm": lambda snr: (
        torch.distributions.Normal(2.4, 2.4).log_prob(snr.log()).exp() * (1 / snr + 0.25)
    ),
}
PER_LOG_SNR, PER_TIME = ("sigmoid", "edm"), ("simple", "min_snr", "p2")


def is_fixed(schedule):
    return not any(True for _ in schedule(HIGH, LOW).parameters())


SCHEDULES = pytest.mark.parametrize(
    "schedule", [c for c in NoiseSchedule.registry.values() if is_fixed(c)]
)


def oracle(schedule):
    denoiser = GaussianDenoiser(schedule, MEAN, STD)
    return VDM(denoiser, GaussianLikelihood(), shape=(3,))


def eps_error(log_snr):
    """E||eps - eps_hat||^2 of the exact denoiser: the sum of SNR s^2 / (SNR s^2 + 1)."""
    return (log_snr[:, None] + 2 * STD.log()).sigmoid().sum(1)


def measured(objective, vdm, n=20_000):
    """The mean loss and an upper bound on its standard error (times are stratified)."""
    loss = objective(vdm, gaussian_data(n), noise=BatchNoise(n))
    return loss.mean(), loss.std() / n**0.5


def integral(f, low, high, n=40_001):
    at = torch.linspace(low, high, n)
    return torch.trapezoid(f(at), at)


@SCHEDULES
@pytest.mark.parametrize("name", PER_LOG_SNR)
def test_a_weight_per_log_snr_is_one_number_for_all_schedules(name, schedule, double):
    """1/2 int w(lambda) E||eps - eps_hat||^2 dlambda."""
    exact = 0.5 * integral(lambda at: WEIGHTS[name](at.exp()) * eps_error(at), LOW, HIGH)
    got, error = measured(Objective.registry[name](), oracle(schedule(HIGH, LOW)))
    assert abs(got - exact) < 4 * error


@SCHEDULES
@pytest.mark.parametrize("name", PER_TIME)
def test_a_weight_per_time_implies_one_per_log_snr(name, schedule, double):
    """w = weight / (-d lambda / dt)."""
    made = schedule(HIGH, LOW)

    def integrand(at):
        return WEIGHTS[name](at.exp()) / made.slope(made.inverse(at)) * eps_error(at)

    exact = 0.5 * integral(integrand, LOW, HIGH)
    got, error = measured(Objective.registry[name](), oracle(made))
    assert abs(got - exact) < 4 * error
    assert error < 0.02 * exact


@pytest.mark.parametrize("name", PER_TIME)
def test_a_weight_per_time_changes_with_the_schedule(name, double):
    (a, error_a), (b, error_b) = (
        measured(Objective.registry[name](), oracle(schedule(HIGH, LOW)))
        for schedule in (LogLinear, Linear)
    )
    assert abs(a - b) > 5 * (error_a**2 + error_b**2) ** 0.5


@pytest.mark.parametrize("name", [c.name for c in OBJECTIVES])
@pytest.mark.parametrize("steps", [None, 5])
def test_weight_times_measure_times_error(name, steps, double):
    """At one draw, in continuous time and in T steps."""
    vdm = network_vdm(Cosine(7.9, -10.0)).at(steps=steps)
    x, noise = torch.randint(17, (8, 4)), Noise(0, torch.arange(8))
    draw, cls = vdm.denoising(x, noise=noise), Objective.registry[name]
    per = draw.measure if name in PER_LOG_SNR else torch.ones(8)
    expected = 0.5 * WEIGHTS[name](draw.log_snr.exp()) * per * draw.eps_error
    torch.testing.assert_close(cls()(vdm, x, noise=noise), expected, rtol=1e-10, atol=0)


def test_edm_is_the_loss_of_karras(double):
    """E over ln sigma ~ N(-1.2, 1.2^2) of (sigma^2 + s_d^2) / (sigma s_d)^2 ||x - x_hat||^2, with
    the exact denoiser's error sigma^2 s^2 / (sigma^2 + s^2)."""

    def integrand(log_sigma):
        sigma = log_sigma.exp()
        error = (1 / (1 / sigma[:, None] ** 2 + 1 / STD**2)).sum(1)
        density = torch.distributions.Normal(-1.2, 1.2).log_prob(log_sigma).exp()
        return density * (sigma**2 + 0.25) / (0.25 * sigma**2) * error

    karras = integral(integrand, -10.0, 8.0)
    n, x = 20_000, gaussian_data(20_000)
    vdm = oracle(LogLinear(16.0, -16.0))
    loss = 2 / 0.25 * EdmWeighted()(vdm, x, noise=BatchNoise(n))
    assert abs(loss.mean() - karras) < 4 * loss.std() / n**0.5
    assert loss.std() / n**0.5 < 0.02 * karras


def test_min_snr_is_the_clipped_x_error(double):
    """min(SNR, gamma) ||x - x_hat||^2, since ||eps - eps_hat||^2 = SNR ||x - x_hat||^2."""
    snr = torch.tensor([1e-3, 1.0, 4.9, 5.1, 1e5])
    torch.testing.assert_close(MinSnr().weight(snr.log()) * snr, snr.clamp_max(5.0))
    torch.testing.assert_close(MinSnr(gamma=1.0).weight(snr.log()) * snr, snr.clamp_max(1.0))


def test_limits(double):
    log_snr = torch.linspace(-10, 14, 50)
    one = torch.ones_like(log_snr)
    assert torch.equal(P2(gamma=0.0).weight(log_snr), one)
    torch.testing.assert_close(SigmoidWeighted(bias=50.0).weight(log_snr), one)
    torch.testing.assert_close(P2(gamma=2.0, k=3.0).weight(log_snr), (3 + log_snr.exp()) ** -2)
    torch.testing.assert_close(SigmoidWeighted().weight(log_snr), (-log_snr).sigmoid())  # sigma^2


def parameterized(name, bins):
    """Any registered parameterization; those of discrete data are told the number of values."""
    cls = Parameterization.registry[name]
    return cls(bins=bins) if "bins" in inspect.signature(cls).parameters else cls()


@pytest.mark.parametrize("param", Parameterization.registry)
@pytest.mark.parametrize("objective", [Elbo, *OBJECTIVES])
def test_any_parameterization_trains_with_any_objective(objective, param):
    made = parameterized(param, bins=3)
    net = MLP((1, 2, 2), out_channels=made.channels(1, 3), bins=3, width=8, blocks=1)
    vdm = VDM(NetworkDenoiser(net, made, Cosine(5.0, -8.0)), BinsLikelihood(3), shape=(1, 2, 2))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    loss = objective()(vdm, torch.randint(3, (16, 1, 2, 2))).mean()
    loss.backward()
    optimizer.step()
    after = list(net.parameters())
    assert loss.isfinite() and all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MinSnr(gamma=0.0), "gamma: expected a finite positive number, got 0"),
        (lambda: P2(gamma=-1.0), "gamma: expected a finite number of at least 0, got -1"),
        (lambda: P2(k=0.0), "k: expected a finite positive number, got 0"),
        (lambda: SigmoidWeighted(bias=math.nan), "bias: expected a finite number, got nan"),
        (lambda: EdmWeighted(std=-2.4), "std: expected a finite positive number, got -2.4"),
        (lambda: EdmWeighted(data_std=math.inf), "data_std: expected a finite positive"),
    ],
)
def test_weights_that_cannot_be(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_printing_an_objective_shows_its_weight():
    assert repr(MinSnr()) == "MinSnr(min(SNR, 5) / SNR per dt)"
    assert repr(SigmoidWeighted(2.0)) == "SigmoidWeighted(w = sigmoid(2 - log SNR))"
    assert "N(log SNR; 2.4, 2.4^2) (1 / SNR + 0.5^2)" in repr(EdmWeighted())


@pytest.mark.parametrize("schedule", [Cosine, Linear, LogLinear])
def test_denoising_score_matching_is_here_already(schedule, double):
    """E w ||score_hat + eps / sigma||^2 over t: twice `simple` for w = sigma^2, and the bound's own
    denoising term for w = g^2 / 2, g^2 = -sigma^2 lambda'. Draw by draw."""
    from genfw import Score

    made = schedule(HIGH, LOW)
    denoiser = NetworkDenoiser(MLP((3,), 3, width=8, blocks=1), Score(), made)
    for p in denoiser.parameters():
        p.data += 0.1 * torch.randn_like(p)
    vdm, x, noise = (
        VDM(denoiser, GaussianLikelihood()),
        gaussian_data(50),
        Noise(0, torch.arange(50)),
    )
    t, eps = noise.time(), noise.normal("eps", x)
    alpha, sigma = made.alpha(t)[:, None], made.sigma(t)[:, None]
    score = denoiser(alpha * x + sigma * eps, t).score
    error = (score + eps / sigma).square().sum(1)
    g_squared = sigma[:, 0] ** 2 * made.slope(t)
    with torch.no_grad():
        by_sigma = Objective.registry["simple"]()(vdm, x, noise=noise)
        by_bound = vdm.elbo(x, noise=noise).levels[0]
    assert torch.allclose(sigma[:, 0] ** 2 * error, 2 * by_sigma, rtol=1e-9)
    assert torch.allclose(g_squared / 2 * error, by_bound, rtol=1e-9)

"""What is minimised, and that it is something else than what is reported."""

import pytest
import torch
from test_vae import random_vae
from test_vdm import network_vdm

from genfw import BernoulliLikelihood, Cosine, Elbo, Linear, Noise, Simple


def test_elbo_is_the_negative_bound(double):
    vdm, x, noise = (
        network_vdm(Cosine(7.9, -10.0)),
        torch.randint(17, (8, 4)),
        Noise(0, torch.arange(8)),
    )
    assert torch.equal(Elbo()(vdm, x, noise=noise), -vdm.elbo(x, noise=noise).total)


@pytest.mark.parametrize("schedule", [Cosine, Linear])
def test_simple_is_the_bound_without_its_slope(schedule, double):
    """The same draws: weight * error = the bound's denoising term, weight being half the slope at
    the drawn time."""
    vdm, x, noise = (
        network_vdm(schedule(7.9, -10.0)),
        torch.randint(17, (8, 4)),
        Noise(0, torch.arange(8)),
    )
    level = vdm.elbo(x, noise=noise).levels[0]
    simple = Simple()(vdm, x, noise=noise)
    assert torch.allclose(level, simple * vdm.schedule.slope(noise.time()))


def test_simple_is_unweighted_in_t_steps_too(double):
    x, noise = torch.randint(17, (8, 4)), Noise(0, torch.arange(8))
    vdm = network_vdm(Cosine(7.9, -10.0)).at(steps=5)
    error = vdm.denoising(x, noise=noise).eps_error
    assert torch.allclose(Simple()(vdm, x, noise=noise), 0.5 * error, rtol=1e-12)


def test_simple_depends_on_the_schedule_and_the_bound_does_not(double):
    n, x = 200_000, torch.randint(17, (1, 4)).expand(200_000, 4)
    one, other = network_vdm(Cosine(7.9, -10.0)), network_vdm(Linear(7.9, -10.0))
    other.denoiser.network = one.denoiser.network
    a, b = Simple()(one, x), Simple()(other, x)
    assert abs(a.mean() - b.mean()) > 5 * (a.var() / n + b.var() / n).sqrt()


def test_a_model_without_denoising_is_refused():
    with pytest.raises(TypeError, match=r"objective=simple .* VAE has none: use objective=elbo"):
        Simple()(random_vae(BernoulliLikelihood()), torch.randint(2, (2, 4)))

"""Two forms of the diffusion bound, and a third that is none.

denoising     Luo (58): KL(q(z_s | z_t, x) || p(z_s | z_t)), at a random step
consistency   log q(z_t | z_{t-1}) - log p(z_t | z_{t+1}), both at one draw of the chain
literal       KL(q(z_t | z_{t-1}) || p(z_t | z_{t+1})), as if z_t and z_{t+1} were independent
"""

from itertools import pairwise

import pytest
import torch
from oracles import GaussianDenoiser, gaussian_log_prob
from test_vdm import MEAN, STD, gaussian_data, network_vdm

from genfw import VDM, Cosine, GaussianLikelihood, Linear, LogLinear, Noise


def oracle(schedule, steps):
    denoiser = GaussianDenoiser(schedule, MEAN, STD)
    return VDM(denoiser, GaussianLikelihood(), steps, shape=(3,))


def every_step(vdm, x):
    """(58) with each of its T terms at a draw of its own."""
    noise = Noise(0, torch.arange(len(x)))
    draws = [vdm.elbo(x, noise=noise.stratified(j, vdm.steps)).total for j in range(vdm.steps)]
    return torch.stack(draws).mean(0)


def literal(vdm, x):
    """The bound with an analytic divergence in the place of the log ratio at one draw."""
    rungs = vdm.climb(x)
    levels = sum(below.q.kl(above.p) for below, above in pairwise(rungs))
    return rungs[0].log_below - levels - rungs[-1].q.kl(vdm.prior(len(x)))


def mean(nats):
    return nats.mean(), nats.std() / len(nats) ** 0.5


@pytest.mark.parametrize("schedule", [LogLinear, Cosine, Linear])
@pytest.mark.parametrize("steps", [8, 32])
def test_denoising_and_consistency_agree_and_the_literal_form_does_not(schedule, steps, double):
    x = gaussian_data(4_000)
    vdm, exact = oracle(schedule(6.0, -6.0), steps), gaussian_log_prob(x, MEAN, STD)
    denoising, error = mean(every_step(vdm, x) - exact)
    consistency, error_too = mean(vdm.ancestral_elbo(x).total - exact)
    wrong, error_wrong = mean(literal(vdm, x) - exact)
    assert abs(denoising - consistency) < 4 * (error**2 + error_too**2) ** 0.5
    assert max(error, error_too) < 0.05 * abs(denoising)
    assert max(denoising, consistency) < 4 * max(error, error_too)  # lower bounds on log p(x)
    assert wrong < denoising - 10 * (error**2 + error_wrong**2) ** 0.5


def test_the_literal_form_falls_with_t_where_the_bound_rises(double):
    x = gaussian_data(1_000)
    short, long = (oracle(LogLinear(6.0, -6.0), steps) for steps in (16, 64))
    assert every_step(long, x).mean() > every_step(short, x).mean()
    assert literal(long, x).mean() < 2 * literal(short, x).mean() < 0


def test_consistency_has_no_noise_where_the_model_is_the_posterior(double):
    """log p(x, z) - log q(z | x) is log p(x) for every chain when p(z | x) = q(z | x). With an
    exact denoiser in many short steps it nearly is, and a term of (58) still is noisy."""
    x, n = gaussian_data(1).expand(2_000, 3), 2_000
    vdm = oracle(LogLinear(9.0, -9.0), 256)
    assert vdm.log_weight(x).std() < 0.5 * vdm.elbo(x, noise=Noise(0, torch.arange(n))).total.std()


@pytest.mark.parametrize("steps", [None, 6])
def test_a_draw_does_not_depend_on_its_batch(steps, double):
    """Keyed draws: the same in any order, batch and company, term by term."""
    vdm, x = network_vdm(Cosine(7.9, -10.0)).at(steps=steps), torch.randint(17, (12, 4))
    whole = vdm.denoising(x, noise=Noise(3, torch.arange(12)))
    order = torch.tensor([11, 0, 7, 3, 5])
    parts = [vdm.denoising(x[i : i + 1], noise=Noise(3, torch.tensor([i]))) for i in order]
    shuffled = vdm.denoising(x[order], noise=Noise(3, order))
    for name in ("t", "log_snr", "eps_error", "measure", "dt", "cost"):
        expected = getattr(whole, name)[order]
        alone = torch.cat([getattr(part, name).expand(1) for part in parts])
        torch.testing.assert_close(getattr(shuffled, name).expand(5), expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(alone, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("steps", [2, 6])
def test_a_chain_does_not_depend_on_its_batch(steps, double):
    vdm, x = network_vdm(Cosine(7.9, -10.0)).at(steps=steps), torch.randint(17, (12, 4))
    order = torch.tensor([11, 0, 7, 3, 5])
    whole = vdm.ancestral_elbo(x, noise=Noise(3, torch.arange(12)))
    part = vdm.ancestral_elbo(x[order], noise=Noise(3, order))
    for one, other in zip((*part.levels, part.prior), (*whole.levels, whole.prior), strict=True):
        torch.testing.assert_close(one, other[order], rtol=1e-10, atol=1e-10)

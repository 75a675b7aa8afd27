"""Annealed importance sampling, on a linear-Gaussian model whose evidence is known."""

import pytest
import torch
from oracles import LinearGaussianChain
from test_vae import random_vae

from genfw import Annealed, BernoulliLikelihood, Noise
from genfw.estimators.annealed import _Bridge
from genfw.estimators.importance import ImportanceWeighted


def oracle():
    """The prior is far from the posterior: plain importance sampling from it is hopeless."""
    return LinearGaussianChain(1, dims=3, a=1.5, s=0.15, bias=0.3, stretch=2.0)


@pytest.mark.parametrize("from_encoder", [False, True])
def test_the_exact_evidence_lies_between_the_two_bounds(from_encoder, double):
    n, chain = 60, LinearGaussianChain(1, dims=3, s=0.4, bias=0.2, stretch=2.0)
    ais = Annealed(60, chains=2, leapfrog=4, from_encoder=from_encoder)
    both = ais.bidirectional(chain, n, noise=Noise(0, torch.arange(n)))
    exact = chain.log_prob(both.x)
    for gap in (exact - both.lower, both.upper - exact):
        assert gap.mean() > -3 * gap.std() / n**0.5
        assert gap.mean() < 0.6
    assert (both.upper - both.lower).mean() > 0


def test_the_weights_have_the_evidence_as_their_mean(double):
    """E[w] = p(x) however few the temperatures; and E[1/w] = 1/p(x) on the way back."""
    n, chain = 3000, LinearGaussianChain(1, dims=1, a=1.0, s=1.2)
    ais = Annealed(2, chains=1, leapfrog=3, chunk=10_000)
    x = torch.full((n, 1), 1.2)
    w = (-ais(chain, x, noise=Noise(0, torch.arange(n))).nats - chain.log_prob(x)).exp()
    assert abs(w.mean() - 1) < 4 * w.std() / n**0.5 and w.std() > 0.1
    both = ais.bidirectional(chain, n, noise=Noise(1, torch.arange(n)))
    back = (chain.log_prob(both.x) - both.upper).exp()
    assert abs(back.mean() - 1) < 4 * back.std() / n**0.5 and back.std() > 0.1


def test_more_temperatures_are_tighter_and_acceptance_is_steered(double):
    chain, x = oracle(), 1.5 * torch.randn(40, 3)
    noise = Noise(0, torch.arange(40))
    few, many = (Annealed(t, chains=2, leapfrog=4)(chain, x, noise=noise) for t in (15, 120))
    gap = few.nats - many.nats
    assert gap.mean() > 3 * gap.std() / 40**0.5
    assert (many.diagnostics["acceptance"] - 0.65).abs().mean() < 0.15
    assert (many.diagnostics["ess"] > few.diagnostics["ess"]).double().mean() > 0.5


def test_no_chain_comes_back_to_where_it_was(double):
    """Four leapfrogs of sqrt(2) are a whole period of a standard normal: cos(angle) = 1 - step^2/2
    = 0. Steps that were all the same would propose the start, for ever."""
    n, ais = 500, Annealed(4, chains=1, leapfrog=4)
    chain = LinearGaussianChain(1, dims=1)
    x, noise = torch.zeros(n, 1), Noise(0, torch.arange(n))
    bridge = _Bridge(chain, x, None, chain.prior(n))
    z = start = bridge.start.sample(noise)
    for t in range(4):  # at beta = 0, the standard normal alone
        z, _ = ais._move(bridge, z, 0.0, torch.full((n,), 2**0.5), noise.fold("step", t))
    assert torch.corrcoef(torch.cat([z, start], 1).T)[0, 1] < 0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5


def test_agrees_with_importance_weighting_on_a_vae(double):
    vae, x = random_vae(BernoulliLikelihood()), torch.randint(2, (20, 4))
    noise = Noise(0, torch.arange(20))
    iw = ImportanceWeighted(5000)(vae, x, noise=noise)
    ais = Annealed(60, chains=8, leapfrog=4)(vae, x, noise=noise)
    error = (iw.variance + ais.variance).sum().sqrt() / 20
    assert abs((ais.nats - iw.nats).mean()) < 4 * error + 0.003 and error < 0.02


def test_no_number_depends_on_chunk_or_batch_or_inference_mode(double):
    chain, x = oracle(), 1.5 * torch.randn(5, 3)
    whole = Annealed(10, chains=6, leapfrog=2)(chain, x, noise=Noise(0, torch.arange(5)))
    for chunk, rows in ((1, [3, 1]), (4, [0]), (13, [4, 2, 1])):
        with torch.inference_mode():
            part = Annealed(10, chains=6, leapfrog=2, chunk=chunk)(
                chain, x[rows], noise=Noise(0, torch.tensor(rows))
            )
        assert torch.allclose(part.nats, whole.nats[rows], rtol=1e-10)
        assert torch.allclose(part.variance, whole.variance[rows], rtol=1e-6)


def test_gradients_reach_through_networks_in_inference_mode():
    vae, x = random_vae(BernoulliLikelihood()), torch.randint(2, (3, 4))
    with torch.inference_mode():
        x = x + 0  # an inference tensor, as Lightning's are
        estimate = Annealed(3, chains=2, leapfrog=2)(vae, x, noise=Noise(0, torch.arange(3)))
    assert estimate.nats.isfinite().all() and all(p.grad is None for p in vae.parameters())


def test_other_models_and_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="not a hierarchy of one level"):
        Annealed()(LinearGaussianChain(2), torch.randn(2, 2))
    for wrong in ("temperatures", "chains", "leapfrog", "chunk"):
        with pytest.raises(ValueError, match=f"{wrong}: expected an integer of at least 1"):
            Annealed(**{wrong: 0})
    with pytest.raises(ValueError, match="step: expected a positive"):
        Annealed(step=0.0)

"""Annealed importance sampling, on a linear-Gaussian model whose evidence is known."""

import pytest
import torch
from oracles import LinearGaussianChain, Mixture
from test_model import Laplace
from test_vae import random_vae

from genfw import Annealed, BatchNoise, BernoulliLikelihood, Elbo, Noise
from genfw.estimators.annealed import _Bridge
from genfw.estimators.importance import ImportanceWeighted
from genfw.evaluate import looseness
from genfw.noise import mix
from genfw.train.module import LatentModule


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
    ais = Annealed(2, chains=3, leapfrog=3, chunk=10_000)
    x = torch.full((n, 1), 1.2)
    w = (-ais(chain, x, noise=Noise(0, torch.arange(n))).nats - chain.log_prob(x)).exp()
    assert abs(w.mean() - 1) < 4 * w.std() / n**0.5 and w.std() > 0.1
    both = ais.bidirectional(chain, n, noise=Noise(1, torch.arange(n)))
    back = (chain.log_prob(both.x) - both.upper).exp()
    assert abs(back.mean() - 1) < 4 * back.std() / n**0.5 and back.std() > 0.1


def test_pilots_have_random_numbers_of_their_own(double):
    """Or step sizes would look at the chains they move."""
    ais, chain, moves = Annealed(3, chains=4), oracle(), []
    bridge = _Bridge(chain, torch.zeros(2, 3), None, None)
    noise, move = Noise(0, torch.arange(2)), ais._move

    def seen(bridge, z, beta, step, noise):
        moves.append((z, noise.normal("momentum", z)))
        return move(bridge, z, beta, step, noise)

    ais._move = seen
    steps = ais._pilot(bridge, noise)
    pilots, moves = moves, []
    ais._up(bridge.repeat(4), steps, noise, 0, 4)
    for pilot, chains in zip(pilots, moves, strict=True):
        for theirs, ours in zip(pilot, chains, strict=True):
            assert torch.cat([theirs, ours]).unique(dim=0).shape == (16, 3)


def test_few_temperatures_far_from_the_prior_are_unbiased_both_ways(double):
    """At one image: E[w] = p(x) by chains from the prior, E[1/w] = 1/p(x) by chains from exact
    draws of the posterior. A move at another temperature than its weight's, or a weight from the
    other side of the move, is off by many standard errors."""
    n, chain = 4000, LinearGaussianChain(1, dims=1, a=1.0, s=0.6)
    ais, noise = Annealed(4, chains=1, leapfrog=3, step=0.3), Noise(0, torch.arange(n))
    x = torch.full((n, 1), 2.0)
    bridge, steps, log_p = _Bridge(chain, x, None, None), None, chain.log_prob(x)
    steps = ais._pilot(bridge, noise)
    up = (ais._up(bridge, steps, noise, 0, 1)[0][:, 0] - log_p).exp()
    z = chain.encode(x, 1).sample(noise.fold("exact"))
    down = (log_p - ais._down(bridge, z, steps, noise, 0, 1)[:, 0]).exp()
    for w in (up, down):
        assert abs(w.mean() - 1) < 4 * w.std() / n**0.5


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_a_move_leaves_its_temperature_alone(beta, double):
    n, chain, ais = 20_000, LinearGaussianChain(1, dims=1, a=1.0, s=0.6), Annealed(1, leapfrog=3)
    precision = 1 + beta / chain.s**2  # of N(0, 1) times N(x; z, s^2)^beta
    mean, std = 2.0 * beta / chain.s**2 / precision, precision**-0.5
    noise, x = Noise(0, torch.arange(n)), torch.full((n, 1), 2.0)
    z = mean + std * torch.randn(n, 1)
    bridge = _Bridge(chain, x, None, chain.prior(n))
    for t in range(3):
        z, chance = ais._move(bridge, z, beta, torch.full((n,), std), noise.fold("step", t))
        assert 0.5 < chance.mean() < 0.99
    assert abs(z.mean() - mean) < 4 * std / n**0.5
    assert abs(z.var() / std**2 - 1) < 4 * (2 / n) ** 0.5


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_labels_follow_their_images_into_every_chunk(chunk, double):
    """From the true posterior of each label every chain says log p(x | y) exactly, both ways."""
    x, y, noise = torch.randn(9, 2), torch.randint(10, (9,)), Noise(0, torch.arange(9))
    chain, ais = LinearGaussianChain(1), Annealed(2, 3, 1, from_encoder=True, chunk=chunk)
    found = ais(chain, x, y, noise=noise)
    torch.testing.assert_close(found.nats, -chain.log_prob(x, y))
    both = ais.bidirectional(chain, 9, y, noise=noise)
    exact = chain.log_prob(both.x, y)
    torch.testing.assert_close(both.lower, exact)
    torch.testing.assert_close(both.upper, exact)


def test_a_run_is_told_how_loose_the_number_is(double):
    """The mean distance of the two bounds, of images with labels in turn."""
    n, chain = 30, LinearGaussianChain(1, dims=1, s=0.4)
    chain.classes, ais = 3, Annealed(6, chains=2, leapfrog=3)
    told = looseness(LatentModule(chain, Elbo(), torch.optim.SGD, estimator=ais, seed=5), n)
    noise = Noise(mix(5, "simulated"), torch.arange(n))
    both = ais.bidirectional(chain, n, torch.arange(n) % 3, noise=noise)
    gap = both.upper - both.lower
    assert told["test/looseness"] == pytest.approx(float(gap.mean()), rel=1e-12) and gap.mean() > 0
    assert told["test/looseness_stderr"] == pytest.approx(float(gap.std()) / n**0.5, rel=1e-12)


def test_more_temperatures_are_tighter_and_acceptance_is_steered(double):
    chain, x = oracle(), 1.5 * torch.randn(40, 3)
    noise = Noise(0, torch.arange(40))
    few, many = (Annealed(t, chains=2, leapfrog=4)(chain, x, noise=noise) for t in (15, 120))
    gap = few.nats - many.nats
    assert gap.mean() > 3 * gap.std() / 40**0.5
    assert (many.diagnostics["acceptance"] - 0.65).abs().mean() < 0.15
    assert (many.diagnostics["ess"] > few.diagnostics["ess"]).double().mean() > 0.5


def test_steps_of_no_length_are_all_accepted(double):
    ais, noise = Annealed(3, chains=2, leapfrog=2, step=1e-9), Noise(0, torch.arange(5))
    accepted = ais(oracle(), torch.randn(5, 3), noise=noise).diagnostics["acceptance"]
    torch.testing.assert_close(accepted, torch.ones(5), rtol=0, atol=1e-6)


def test_no_chain_comes_back_to_where_it_was(double):
    """Four leapfrogs of sqrt(2) are a whole period of a standard normal: cos(angle) = 1 - step^2/2
    = 0. Steps that were all the same would propose the start, for ever."""
    n, ais = 500, Annealed(4, chains=1, leapfrog=4)
    chain = LinearGaussianChain(1, dims=1)
    x, noise = torch.zeros(n, 1), Noise(0, torch.arange(n))
    bridge = _Bridge(chain, x, None, chain.prior(n))
    z = start = bridge.begin(noise)
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


def test_no_bound_of_a_simulated_image_depends_on_the_chunk(double):
    chain, noise = oracle(), Noise(0, torch.arange(5))
    one, *others = (
        Annealed(3, chains=2, leapfrog=1, chunk=each).bidirectional(chain, 5, noise=noise)
        for each in (1, 5, 100)
    )
    for other in others:
        for name in ("x", "lower", "upper"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name))


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
    with pytest.raises(ValueError, match="step: expected a finite positive"):
        Annealed(step=0.0)


@pytest.mark.parametrize("from_encoder", [False, True])
def test_a_prior_may_be_any_distribution(from_encoder, double):
    """A mixture of one normal gives the normal's numbers; of two, E[w] = p(x) up and back."""
    ais, noise = Annealed(2, 2, leapfrog=2, from_encoder=from_encoder), Noise(0, torch.arange(3))
    chain, x = LinearGaussianChain(1, dims=3, bias=0.2), torch.randn(3, 3)
    plain, both = ais(chain, x, noise=noise), ais.bidirectional(chain, 3, noise=noise)
    chain.prior = lambda n: Mixture(torch.zeros(1, 3), torch.ones(1), n)
    assert torch.allclose(ais(chain, x, noise=noise).nats, plain.nats)
    assert torch.allclose(ais.bidirectional(chain, 3, noise=noise).lower, both.lower)

    means, std, n = torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, 0.7]), 2000
    chain = LinearGaussianChain(1, dims=1, a=1.0, s=1.2, stretch=1.5)
    chain.prior = lambda n: Mixture(means, std, n)
    evidence = Mixture(chain.a * means, (chain.a**2 * std**2 + chain.s**2).sqrt(), n)
    x, noise = torch.full((n, 1), 0.7), Noise(0, torch.arange(n))
    up = (-ais(chain, x, noise=noise).nats - evidence.log_prob(x)).exp()
    both = ais.bidirectional(chain, n, noise=noise)
    for w in (up, (evidence.log_prob(both.x) - both.upper).exp()):
        assert abs(w.mean() - 1) < 4 * w.std() / n**0.5 < 0.2


def test_chains_start_at_an_encoder_of_its_own_kind(double):
    """Drawn from and weighed as it says itself, however many chains there are."""
    chain, x = LinearGaussianChain(1), torch.randn(5, 2)
    chain.encode = lambda z, t, y=None: Laplace(0.6 * z, 0.8 * torch.ones_like(z))
    bridge, noise = _Bridge(chain, x, None, chain.encode(x, 1)).repeat(3), BatchNoise(15)
    own = chain.encode(x.repeat_interleave(3, 0), 1)
    z = own.sample(noise)
    assert torch.equal(bridge.log_start(z), own.log_prob(z))
    ais = Annealed(1, 2, leapfrog=1, from_encoder=True)
    assert ais(chain, x, noise=Noise(0, torch.arange(5))).nats.isfinite().all()

"""The generic hierarchy, on linear-Gaussian chains whose evidence is known."""

import math

import pytest
import torch
from oracles import LinearGaussianChain
from scipy import stats

from genfw import L2, Annealed, Bound, Dreg, FreeBits, ImportanceWeighted, Noise, Stl
from genfw.distributions import Distribution, Normal, divergence, per_example
from genfw.model import repeated
from genfw.noise import draws

DEPTHS = pytest.mark.parametrize("levels", [1, 2, 5])


def data(n=64):
    return 1.3 * torch.randn(n, 2)


@DEPTHS
def test_with_the_true_posterior_every_weight_is_the_evidence(levels, double):
    """Of the label too, where there is one."""
    chain, x = LinearGaussianChain(levels), data()
    for y in (None, torch.arange(64) % 3):
        assert torch.allclose(chain.log_weight(x, y), chain.log_prob(x, y), atol=1e-10)


class Laplace(Normal):
    """A Normal by name: it is drawn from and weighed as it says itself."""

    def __init__(self, mean, scale):
        super().__init__(mean, scale)
        self.laplace = torch.distributions.Laplace(mean, scale)

    def log_prob(self, value):
        return per_example(self.laplace.log_prob(value))

    def sample(self, noise=None, purpose="sample"):
        return self.laplace.icdf(draws(noise, self.mean).uniform(purpose, self.mean))


@pytest.mark.parametrize("k", [1, 4])
def test_an_encoder_of_its_own_kind_weighs_what_it_draws(k, double):
    """Exactly: log w is log p(x, z) - log q(z | x) at the draw; and E[w] = p(x)."""
    chain, x = LinearGaussianChain(1), data(1).expand(20_000, 2)
    chain.encode = lambda z, t, y=None: Laplace(0.6 * z, 0.8 * torch.ones_like(z))
    noise = Noise(0, torch.arange(len(x))).each(0, k)
    w = (chain.log_weight(x, noise=noise, k=k) - chain.log_prob(x[:1])).exp()
    assert abs(w.mean() - 1) < 4 * w.std() / len(w) ** 0.5 < 0.1
    z = chain.encode(x.repeat_interleave(k, 0), 1).sample(noise.fold("z1"))
    (rung,) = chain.climb(x, noise=noise, k=k)
    assert torch.equal(rung.z, z) and type(rung.q) is Laplace


@DEPTHS
def test_the_bound_of_an_encoder_of_its_own_kind_is_the_log_weight_at_its_draw(levels, double):
    """By its density, not that of the Normal it is by name."""
    chain, x, noise = LinearGaussianChain(levels), data(), Noise(0, torch.arange(64))
    chain.encode = lambda z, t, y=None: Laplace(0.6 * z, 0.8 * torch.ones_like(z))
    bound, log_w = chain.elbo(x, noise=noise).total, chain.log_weight(x, noise=noise)
    assert torch.allclose(bound, log_w, atol=1e-10)


class Exact(Laplace):
    def kl(self, other):
        return torch.full((len(self.mean),), 7.0).to(self.mean)


def test_a_divergence_in_closed_form_is_of_the_densities_that_there_are(double):
    mean, std = torch.randn(5, 2), torch.ones(5, 2)
    normal, laplace, exact = Normal(mean, std), Laplace(mean, std), Exact(mean, std)
    z = torch.randn(5, 2)
    standard = Normal(0 * mean, std)
    assert torch.equal(divergence(normal, standard, z), normal.kl(standard))
    for q, p in ((laplace, normal), (normal, laplace), (exact, Laplace(0 * mean, std))):
        assert torch.allclose(divergence(q, p, z), q.log_prob(z) - p.log_prob(z), atol=1e-12)
    assert (divergence(exact, normal, z) == 7).all()  # as it says itself, of a normal
    for q, p in ((laplace, normal), (normal, laplace)):
        for closed in (q.kl, q.kl_by_dimension):
            with pytest.raises(TypeError, match="Laplace has a density of its own"):
                closed(p)


@DEPTHS
def test_the_bound_is_tight_with_the_true_posterior_and_below_otherwise(levels, double):
    x = data(4).repeat_interleave(20_000, 0)
    exact = LinearGaussianChain(levels)
    for chain, gap in ((exact, False), (LinearGaussianChain(levels, bias=0.3, stretch=1.2), True)):
        total = chain.ancestral_elbo(x).total.view(4, -1)
        error = total.std(1) / 20_000**0.5
        missing = chain.log_prob(x).view(4, -1)[:, 0] - total.mean(1)
        if gap:
            assert (missing > 0.05).all()
        else:
            assert (missing.abs() < 5 * error + 1e-9).all()


@DEPTHS
def test_weights_average_to_the_evidence_whatever_the_encoder(levels, double):
    """E[w] = p(x). With the closed-form KL in place of the top log ratio it would not be."""
    chain, n = LinearGaussianChain(levels, bias=0.2, stretch=1.3), 200_000
    x = data(2).repeat_interleave(n, 0)
    w = (chain.log_weight(x) - chain.log_prob(x)).exp().view(2, -1)
    assert ((w.mean(1) - 1).abs() < 5 * w.std(1) / n**0.5).all()
    bound = (chain.ancestral_elbo(x).total - chain.log_prob(x)).exp().view(2, -1)
    assert ((bound.mean(1) - 1).abs() > 5 * bound.std(1) / n**0.5).all()


@DEPTHS
def test_the_bound_is_the_mean_log_weight(levels, double):
    chain, n = LinearGaussianChain(levels, bias=0.2, stretch=1.3), 50_000
    x = data(1).repeat_interleave(n, 0)
    bound, weight = chain.ancestral_elbo(x).total, chain.log_weight(x)
    error = (bound.var() / n + weight.var() / n).sqrt()
    assert abs(bound.mean() - weight.mean()) < 5 * error


def test_the_literal_consistency_kl_is_not_the_bound(double):
    """KL(q(z_t|z_{t-1}) || p(z_t|z_{t+1})) averaged over q: analytic, smooth, and not a bound
    (theory, section 2)."""
    chain, n = LinearGaussianChain(5), 20_000
    x = data(1).repeat_interleave(n, 0)
    literal, below, z = 0.0, x, []
    for t in range(1, 6):
        z.append(chain.encode(below, t).sample())
        below = z[-1]
    literal = chain.decode(z[0], 1).log_prob(x) - chain.encode(z[3], 5).kl(chain.prior(n))
    for t in range(1, 5):
        literal = literal - chain.encode(x if t == 1 else z[t - 2], t).kl(chain.decode(z[t], t + 1))
    right = chain.ancestral_elbo(x)
    evidence = chain.log_prob(x)[0]
    assert abs(right.total.mean() - evidence) < 5 * right.total.std() / n**0.5 + 1e-9
    assert literal.mean() < evidence - 0.5


@DEPTHS
def test_terms_add_up_and_count_levels(levels, double):
    chain, x = LinearGaussianChain(levels, bias=0.1), data()
    elbo = chain.ancestral_elbo(x, noise=Noise(0, torch.arange(64)))
    assert len(elbo.levels) == levels - 1 and elbo.total.shape == (64,)
    assert torch.allclose(elbo.rate, elbo.prior + sum(elbo.levels))
    assert torch.allclose(elbo.total, elbo.reconstruction - elbo.rate)


@DEPTHS
def test_ancestral_samples_follow_the_model(levels, double):
    """Each given its label: y moves every level, so it must reach them all."""
    chain, n, std = LinearGaussianChain(levels), 20_000, LinearGaussianChain(levels).var[0] ** 0.5
    for y in (None, torch.arange(n) % 3):
        x = chain.ancestral_sample(n, y, noise=Noise(0, torch.arange(n))) - chain.mean(0, y)
        for column in x.T:
            assert stats.kstest(column.numpy(), stats.norm(0, std).cdf).pvalue > 1e-3


@DEPTHS
def test_an_example_keeps_its_number_whatever_its_batch(levels, double):
    chain, x = LinearGaussianChain(levels, bias=0.1), data(10)
    whole = chain.ancestral_elbo(x, noise=Noise(0, torch.arange(10))).total
    order = torch.randperm(10)[:4]
    part = chain.ancestral_elbo(x[order], noise=Noise(0, order)).total
    assert torch.allclose(part, whole[order], rtol=1e-12)
    some = chain.ancestral_sample(4, noise=Noise(5, order))
    assert torch.allclose(some, chain.ancestral_sample(10, noise=Noise(5, torch.arange(10)))[order])


@pytest.mark.parametrize("levels", [1, 3])
def test_k_weights_of_an_example_are_those_of_k_rows(double, levels):
    chain, x = LinearGaussianChain(levels, bias=0.3, stretch=1.2), torch.randn(4, 2)
    y, noise = torch.tensor([2, 0, 1, 1]), Noise(0, torch.arange(4)).each(0, 5)
    together = chain.log_weight(x, y, noise=noise, k=5)
    rows, labels = x.repeat_interleave(5, 0), y.repeat_interleave(5, 0)
    apart = chain.log_weight(rows, labels, noise=noise)
    assert together.shape == (20,) and torch.allclose(together, apart, rtol=1e-12)


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2, 3), (4, 2)])
def test_repeated_rows_stand_side_by_side(shape):
    x = torch.arange(math.prod(shape)).view(shape)
    assert torch.equal(repeated(x, 5), x.repeat_interleave(5, 0))
    assert (repeated(x, 5).data_ptr() == x.data_ptr()) == (len(x) == 1)


class Drawn(Distribution):
    """Draws of another distribution, and no density."""

    def __init__(self, of):
        self.of = of

    mean = property()

    def log_prob(self, value):
        raise AssertionError("asked for the density of `prior`, where z is known")

    def sample(self, noise=None, purpose="sample"):
        return self.of.sample(noise, purpose)


class Apart(LinearGaussianChain):
    """Its prior's density is told of a z alone."""

    def prior(self, n):
        return Drawn(super().prior(n))

    def prior_of(self, z):
        return super().prior(len(z))


ASK = {
    "elbo": lambda chain, x, noise: chain.elbo(x, noise=noise).total,
    "log_weight": lambda chain, x, noise: chain.log_weight(x, noise=noise),
    "divergences": lambda chain, x, noise: chain.divergences(x, noise=noise)[1][0][1].mean,
    "l2": lambda chain, x, noise: L2()(chain, x, noise=noise),
    "free_bits": lambda chain, x, noise: FreeBits(0.1, "batch_dimension")(chain, x, noise=noise),
    "stl": lambda chain, x, noise: Stl()(chain, x, noise=noise),
    "dreg": lambda chain, x, noise: Dreg(3)(chain, x, noise=noise),
    "bound": lambda chain, x, noise: Bound(2, 2)(chain, x, noise=noise).nats,
    "weights": lambda chain, x, noise: ImportanceWeighted(30)(chain, x, noise=noise).nats,
    "annealed": lambda chain, x, noise: Annealed(4, 2, 2)(chain, x, noise=noise).nats,
    "from the encoder": lambda chain, x, noise: (
        Annealed(4, 2, 2, from_encoder=True)(chain, x, noise=noise).nats
    ),
    "upper": lambda chain, x, noise: Annealed(4, 2, 2).bidirectional(chain, 3, noise=noise).upper,
}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_wherever_z_is_known_its_prior_is_prior_of(ask, double):
    x, noise = data(3), Noise(0, torch.arange(3))
    found, expected = (ask(made(1, bias=0.3), x, noise) for made in (Apart, LinearGaussianChain))
    assert torch.equal(found, expected)


def test_a_prior_that_is_no_normal_where_z_is_known_is_refused_beforehand(double):
    chain = LinearGaussianChain(1)
    chain.prior_of = lambda z: Drawn(chain.prior(len(z)))
    with pytest.raises(TypeError, match="prior is no Normal"):
        FreeBits(0.1, "batch_dimension").check(chain)


class Endless(LinearGaussianChain):
    """In continuous time, and no VDM."""

    endless = True
    levels = property(fset=lambda self, levels: None)


def test_a_chain_without_end_is_neither_annealed_nor_weighed(double):
    assert not LinearGaussianChain(2).endless
    for estimator in (Annealed(4, 2, 2), ImportanceWeighted(30)):
        with pytest.raises(ValueError, match=r"Endless.*use estimator=bound$|Endless.*no end"):
            estimator.check(Endless(2))

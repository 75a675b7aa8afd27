"""Other prices for the latents, each against its formula by hand."""

import math
from itertools import pairwise

import pytest
import tiny
import torch
from oracles import LinearGaussianChain
from test_hvae import LaplacePosterior, random_hvae
from test_vae import Map, random_vae
from test_vdm import network_vdm
from torch import nn
from torch.distributions import Normal as Reference
from torch.distributions import kl_divergence

from genfw import (
    L2,
    VAE,
    BernoulliLikelihood,
    Beta,
    Bound,
    CategoricalLikelihood,
    Cosine,
    CyclicWarmup,
    DiscretizedGaussianLikelihood,
    Elbo,
    FreeBits,
    GaussianLikelihood,
    LinearWarmup,
    Noise,
    Objective,
)
from genfw.noise import mix
from genfw.objective import Floor
from genfw.train.module import LatentModule


def noise(n=8):
    return Noise(0, torch.arange(n))


def vae_and_data():
    return random_vae(CategoricalLikelihood(5)), torch.randint(5, (8, 4))


def parts(vae, x):
    """By hand: log p(x|z) and the KL of every latent dimension, (b,) and (b, D), with `noise()`."""
    mean, log_std = vae.encoder((2 * x + 1) / 5 - 1).chunk(2, 1)
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std)
    z = mean + log_std.exp() * noise(len(x)).fold("z1").normal("sample", mean)
    logits = vae.decoder(z).view(len(x), 5, 4).log_softmax(1)
    return logits.gather(1, x[:, None])[:, 0].sum(1), kl, z


# ---- beta and its warm-ups -----------------------------------------------------------------------


def test_beta_weighs_the_rate_and_one_is_the_bound(double):
    vae, x = vae_and_data()
    log_p, kl, _ = parts(vae, x)
    assert torch.allclose(Beta(7.0)(vae, x, noise=noise()), -(log_p - 7 * kl.sum(1)))
    assert torch.equal(Beta(1.0)(vae, x, noise=noise()), Elbo()(vae, x, noise=noise()))


@pytest.mark.parametrize("levels", [1, 3])
def test_the_rate_of_a_chain_is_all_its_levels(levels, double):
    chain, x = LinearGaussianChain(levels, bias=0.2, stretch=1.3), torch.randn(8, 2)
    one, two, ten = (Beta(b)(chain, x, noise=noise()) for b in (1.0, 2.0, 10.0))
    elbo = chain.elbo(x, noise=noise())
    assert len(elbo.levels) == levels - 1
    assert torch.allclose(two - one, sum(elbo.levels) + elbo.prior)
    assert torch.allclose(ten - one, 9 * elbo.rate)


def test_beta_of_a_diffusion_model(double):
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (8, 4))
    elbo = vdm.elbo(x, noise=noise())
    expected = 3 * (elbo.levels[0] + elbo.prior) - elbo.reconstruction
    assert torch.allclose(Beta(3.0)(vdm, x, noise=noise()), expected)


def test_linear_warmup_by_hand():
    warmup = LinearWarmup(steps=4, start=0.2, beta=1.0)
    assert [warmup.beta_at(s) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_cyclic_warmup_by_hand():
    """Two cycles of 8 steps, rising in the first half; then the top for good."""
    cyclic = CyclicWarmup(period=8, cycles=2, ramp=0.5, beta=2.0)
    cycle = [0, 0.5, 1, 1.5, 2, 2, 2, 2]
    assert [cyclic.beta_at(s) for s in range(20)] == pytest.approx([*cycle, *cycle, 2, 2, 2, 2])


@pytest.mark.parametrize("warmup", [LinearWarmup(), CyclicWarmup()])
def test_a_warmup_that_is_not_told_the_step_says_so(warmup):
    with pytest.raises(ValueError, match=r"training step .* objective.advance\(step\)"):
        warmup(*vae_and_data())


class Recorded(Objective):
    """Beta of each micro-batch of a warm-up."""

    def __init__(self):
        super().__init__()
        self.warmup, self.betas = LinearWarmup(steps=5), []

    def forward(self, model, x, y=None, *, noise=None):
        self.warmup.advance(self.step)
        self.betas.append(self.warmup.beta_at(self.step))
        return self.warmup(model, x, y, noise=noise)


def test_warmup_counts_optimizer_steps_and_goes_on_after_a_resume(tmp_path):
    whole, cut, resumed = Recorded(), Recorded(), Recorded()
    several = {"accumulate_grad_batches": 2, "val_check_interval": 2}
    tiny.trainer(tmp_path, 6, **several).fit(tiny.module(whole), tiny.Images())
    first = tiny.trainer(tmp_path, 3, **several)
    first.fit(tiny.module(cut), tiny.Images())
    first.save_checkpoint(tmp_path / "cut.ckpt")
    again = tiny.trainer(tmp_path, 6, **several)
    again.fit(tiny.module(resumed), tiny.Images(), ckpt_path=tmp_path / "cut.ckpt")
    expected = [b for b in (0, 0.2, 0.4, 0.6, 0.8, 1) for _ in range(2)]
    assert whole.betas == pytest.approx(expected)
    assert cut.betas + resumed.betas == whole.betas


# ---- free bits -----------------------------------------------------------------------------------


def test_free_bits_mean_four_things(double):
    """One VAE, one floor, four numbers: each by hand."""
    vae, x = vae_and_data()
    vae.encoder.layers[-1].weight.data[1] *= 5  # the second dimension tells more than the first
    log_p, kl, _ = parts(vae, x)
    level = kl.sum(1)
    floor = float(level.detach().median())  # between examples and between dimensions
    expected = {
        Floor.EXAMPLE_LEVEL: (level.clamp_min(floor) - log_p).mean(),
        Floor.BATCH_LEVEL: level.mean().clamp_min(floor) - log_p.mean(),
        Floor.EXAMPLE_DIMENSION: (kl.clamp_min(floor).sum(1) - log_p).mean(),
        Floor.BATCH_DIMENSION: kl.mean(0).clamp_min(floor).sum() - log_p.mean(),
    }
    assert set(expected) == set(Floor)
    found = {per: FreeBits(floor, per)(vae, x, noise=noise()).mean() for per in Floor}
    for per, value in expected.items():
        torch.testing.assert_close(found[per], value, rtol=1e-12, atol=0)
        assert FreeBits(floor, per.value)(vae, x, noise=noise()).mean() == found[per]
    values = sorted(float(value.detach()) for value in found.values())
    assert min(b - a for a, b in pairwise(values)) > 1e-3


@pytest.mark.parametrize("per", Floor)
def test_below_the_floor_the_rate_has_no_pull_and_no_floor_is_the_bound(per, double):
    vae, x = vae_and_data()
    assert torch.allclose(FreeBits(0.0, per)(vae, x, noise=noise()), Elbo()(vae, x, noise=noise()))
    FreeBits(100.0, per)(vae, x, noise=noise()).mean().backward()
    found = [p.grad.clone() for p in vae.encoder.parameters()]
    vae.zero_grad()
    (-vae.elbo(x, noise=noise()).reconstruction).mean().backward()
    for gradient, p in zip(found, vae.encoder.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)


def test_free_bits_of_a_chain_floor_each_level(double):
    chain, x = LinearGaussianChain(3, bias=0.2, stretch=1.3), torch.randn(8, 2)
    elbo = chain.elbo(x, noise=noise())
    costs = torch.stack((*elbo.levels, elbo.prior), 1)
    floor = float(costs.mean(0).median())
    rate = sum(max(float(cost), floor) for cost in costs.mean(0))
    found = FreeBits(floor, "batch_level")(chain, x, noise=noise())
    assert float(found.mean()) == pytest.approx(rate - float(elbo.reconstruction.mean()))
    rate = costs.clamp_min(floor).sum(1)
    found = FreeBits(floor, "example_level")(chain, x, noise=noise())
    assert torch.allclose(found, rate - elbo.reconstruction)


@pytest.mark.parametrize("batch", [False, True])
def test_free_bits_per_dimension_of_a_top_down_hierarchy(batch, double):
    """Every level's divergence is a sum over dimensions: floored one by one, by hand."""
    hvae, x = random_hvae(), torch.randint(2, (8, 1, 2, 2))
    log_p, pairs = hvae.divergences(x, noise=noise())
    kl = [
        kl_divergence(Reference(q.mean, q.std), Reference(p.mean, p.std)).flatten(1)
        for q, p in pairs
    ]
    elbo = hvae.elbo(x, noise=noise())
    for level, each in zip((*elbo.levels, elbo.prior), kl, strict=True):
        torch.testing.assert_close(level, each.sum(1))
    kl = torch.cat(kl, 1)
    floor = float(kl.median())
    rate = (kl.mean(0) if batch else kl).clamp_min(floor).sum(-1)
    found = FreeBits(floor, "batch_dimension" if batch else "example_dimension")
    found = found(hvae, x, noise=noise())
    torch.testing.assert_close(found.mean(), (rate - log_p).mean())


def test_free_bits_are_refused_where_they_mean_nothing():
    with pytest.raises(TypeError, match=r"free_bits .* VDM are fixed noise: use objective=elbo"):
        FreeBits()(network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (8, 4)))
    with pytest.raises(TypeError, match=r"per=batch_dimension needs div.* a log ratio .* Linear"):
        FreeBits(per="batch_dimension")(LinearGaussianChain(2), torch.randn(4, 2))
    hvae, x = random_hvae(), torch.randint(2, (3, 1, 2, 2))
    hvae.posterior = LaplacePosterior()
    said = r"per=batch_dimension: a Laplace has a density of its own, .*: use per=batch_level"
    with pytest.raises(TypeError, match=said):
        FreeBits(per="batch_dimension")(hvae, x)
    assert FreeBits(per="batch_level")(hvae, x).isfinite().all()
    with pytest.raises(ValueError, match=r"per: expected one of example_level, .* got 'level'"):
        FreeBits(per="level")


# ---- squared error -------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_l2_by_hand(rate, double):
    vae, x = vae_and_data()
    _, kl, z = parts(vae, x)
    p = vae.decoder(z).view(8, 5, 4).softmax(1)
    centres = torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8])
    error = ((2 * x + 1) / 5 - 1 - torch.einsum("bkd,k->bd", p, centres)).square().sum(1)
    assert torch.allclose(L2(rate)(vae, x, noise=noise()), error + rate * kl.sum(1))


def test_l2_of_a_chain_is_a_gaussian_bound_without_its_constant(double):
    """x | z_1 is normal with a known width s: 2 s^2 (bound without the constant) is the loss."""
    chain, x = LinearGaussianChain(3, bias=0.2, stretch=1.3), torch.randn(8, 2)
    elbo, var = chain.elbo(x, noise=noise()), chain.s**2
    error = 2 * var * (-elbo.reconstruction - math.log(2 * math.pi * var))  # 2 dimensions
    assert torch.allclose(L2(2 * var)(chain, x, noise=noise()), error + 2 * var * elbo.rate)


@pytest.mark.parametrize(
    "likelihood", [BernoulliLikelihood(), DiscretizedGaussianLikelihood(2), GaussianLikelihood()]
)
def test_l2_trains_the_mean_of_any_likelihood(likelihood, double):
    vae, x = random_vae(likelihood), torch.randint(2, (8, 4))
    x = x.double() if likelihood.density else x
    L2()(vae, x).mean().backward()
    assert all((p.grad != 0).any() for p in vae.parameters())


def test_l2_needs_a_learned_decoder():
    with pytest.raises(TypeError, match=r"objective=l2 .* VDM is no chain with one"):
        L2()(network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (8, 4)))


# ---- what they may not do ------------------------------------------------------------------------


class Flat(nn.Module):
    """Pictures to vectors, through a network, and back."""

    def __init__(self, network, shape):
        super().__init__()
        self.network, self.shape = network, shape

    def forward(self, x, y=None):
        return self.network(x.flatten(1)).unflatten(1, self.shape)


def tiny_vae():
    torch.manual_seed(3)
    likelihood, dims = CategoricalLikelihood(tiny.BINS), math.prod(tiny.SHAPE)
    encoder, decoder = Map(dims, 4), Map(2, dims * likelihood.outputs)
    return VAE(Flat(encoder, (4,)), Flat(decoder, (-1, *tiny.SHAPE[1:])), likelihood, latents=2)


@pytest.mark.parametrize("objective", [Beta(10.0), L2(0.1), FreeBits(3.0), CyclicWarmup(4)])
def test_trained_by_another_price_and_reported_by_the_bound(objective, tmp_path):
    """A VAE trained with beta = 10: its reported NLL is the unweighted bound, and the loss is
    not."""
    images = tiny.Images()
    module = LatentModule(
        tiny_vae(),
        objective,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        estimator=Bound(sets=2, strata=2),
    )
    start = [p.detach().clone() for p in module.model.parameters()]
    trainer = tiny.trainer(tmp_path, 4)
    trainer.fit(module, images)
    assert any((a != b).any() for a, b in zip(start, module.model.parameters(), strict=True))
    found = trainer.test(module, images, verbose=False)[0]
    assert found["test/nll"] == pytest.approx(
        -found["test/reconstruction"] + found["test/prior"], rel=1e-5
    )

    x, vae = images.images["test"], module.model
    draws = Noise(mix(0, "test"), torch.arange(len(x)))
    with torch.no_grad():
        plain = Bound(sets=2, strata=2)(vae, x, noise=draws).nats.mean()
        objective.advance(1)
        loss = objective(vae, x, noise=draws).mean()
        q = vae.encode(x, 1)  # and the prior term by hand, unweighted
        kl = 0.5 * (q.mean**2 + q.std**2 - 1 - 2 * q.std.log()).sum(1).mean()
    assert found["test/nll"] == pytest.approx(float(plain), rel=1e-6)
    assert found["test/prior"] == pytest.approx(float(kl), rel=1e-5)
    assert abs(float(loss) - found["test/nll"]) > 0.05


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_prices_are_numbers(bad):
    for make in (
        Beta,
        FreeBits,
        L2,
        lambda b: LinearWarmup(beta=b),
        lambda b: CyclicWarmup(beta=b),
    ):
        with pytest.raises(ValueError, match="expected a finite number of at least 0"):
            make(bad)


def test_schedules_need_steps():
    for make in (LinearWarmup, CyclicWarmup):
        with pytest.raises(ValueError, match="expected an integer of at least 1, got 0"):
            make(0)
    with pytest.raises(ValueError, match="ramp: expected a finite positive number, got 0"):
        CyclicWarmup(ramp=0.0)

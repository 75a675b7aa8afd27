"""Bounds of many draws: formulas by hand, order, limits; then gradients by the path."""

import copy
import math
from itertools import pairwise

import pytest
import tiny
import torch
from oracles import LinearGaussianChain
from test_hvae import random_hvae
from test_objective_rate import tiny_vae
from test_vae import Map, random_vae
from test_vdm import network_vdm

import genfw
from genfw import (
    L2,
    MHVAE,
    Beta,
    Bound,
    CategoricalLikelihood,
    Ciwae,
    Cosine,
    Dreg,
    Elbo,
    FreeBits,
    Iwae,
    LatentModel,
    Miwae,
    Noise,
    Normal,
    Stl,
)
from genfw.noise import mix
from genfw.train.module import LatentModule

DEPTHS = pytest.mark.parametrize("levels", [1, 2, 5])


def name(objective):
    """For pytest."""
    return objective.name


def noise(n=8):
    return Noise(0, torch.arange(n))


def weights(chain, x, k):
    """The log weights that an objective of k draws sees with `noise()`, (b, k)."""
    return chain.log_weight(x, noise=noise(len(x)).each(0, k), k=k).view(len(x), k)


def log_mean(log_w):
    """log of the mean of exp over the last axis, the naive way."""
    return log_w.exp().mean(-1).log()


# ---- values --------------------------------------------------------------------------------------


def test_iwae_by_hand(double):
    """log 1/k sum p(x|z) p(z) / q(z|x), every density written out."""
    vae, x, k = random_vae(CategoricalLikelihood(5)), torch.randint(5, (8, 4)), 3
    mean, log_std = vae.encoder((2 * x + 1) / 5 - 1).chunk(2, 1)
    mean, std = mean[:, None].expand(8, k, 2), log_std.exp()[:, None].expand(8, k, 2)
    eps = noise().each(0, k).fold("z1").normal("sample", torch.empty(8 * k, 2)).view(8, k, 2)
    z = mean + std * eps
    p = vae.decoder(z.reshape(8 * k, 2)).view(8, k, 5, 4).softmax(2)
    p_x = p.gather(2, x[:, None, None].expand(8, k, 1, 4)).prod(3)[:, :, 0]
    p_z = torch.exp(-0.5 * z**2).prod(2) / (2 * math.pi)
    q_z = (torch.exp(-0.5 * eps**2) / std).prod(2) / (2 * math.pi)
    expected = -(p_x * p_z / q_z).mean(1).log()
    torch.testing.assert_close(Iwae(k)(vae, x, noise=noise()), expected, rtol=1e-10, atol=0)


@DEPTHS
def test_miwae_and_ciwae_by_hand(levels, double):
    chain, x = LinearGaussianChain(levels, bias=0.3, stretch=1.2), torch.randn(8, 2)
    log_w = weights(chain, x, 6)
    found = Miwae(m=2, k=3)(chain, x, noise=noise())
    other = Miwae(m=3, k=2)(chain, x, noise=noise())
    assert torch.allclose(found, -0.5 * (log_mean(log_w[:, :3]) + log_mean(log_w[:, 3:])))
    assert torch.allclose(other, -sum(log_mean(log_w[:, [i, i + 1]]) for i in (0, 2, 4)) / 3)
    assert not torch.allclose(found, other)  # M and K are not the same thing
    found = Ciwae(6, weight=0.2)(chain, x, noise=noise())
    assert torch.allclose(found, -(0.2 * log_w.mean(1) + 0.8 * log_mean(log_w)))


def test_special_cases(double):
    chain, x = LinearGaussianChain(2, bias=0.3, stretch=1.2), torch.randn(8, 2)
    value = {
        case: objective(chain, x, noise=noise())
        for case, objective in {
            "iwae": Iwae(6),
            "miwae of one": Miwae(1, 6),
            "ciwae, all iwae": Ciwae(6, 0.0),
            "dreg": Dreg(6),
            "mean": Miwae(6, 1),
            "ciwae, all bound": Ciwae(6, 1.0),
            "stl": Stl(),
            "one": Iwae(1),
            "dreg of one": Dreg(1),
        }.items()
    }
    for one in ("miwae of one", "ciwae, all iwae", "dreg"):
        assert torch.allclose(value[one], value["iwae"], rtol=1e-12), one
    assert torch.allclose(value["mean"], -weights(chain, x, 6).mean(1), rtol=1e-12)
    assert torch.allclose(value["ciwae, all bound"], value["mean"], rtol=1e-12)
    for one in ("stl", "dreg of one"):
        assert torch.allclose(value[one], value["one"], rtol=1e-12), one


@DEPTHS
def test_with_the_true_posterior_any_number_of_draws_gives_the_evidence(levels, double):
    """A forgotten -log k shows here."""
    chain, x = LinearGaussianChain(levels), torch.randn(8, 2)
    for objective in (Iwae(1), Iwae(7), Miwae(3, 4), Ciwae(5), Dreg(6), Stl()):
        assert torch.allclose(objective(chain, x), -chain.log_prob(x), atol=1e-9)


@DEPTHS
def test_iwae_rises_with_k_to_the_evidence(levels, double):
    chain, n = LinearGaussianChain(levels, bias=0.3, stretch=1.3), 4000
    x = torch.tensor([[0.7, -0.4]])
    evidence, means, errors = chain.log_prob(x), [], []
    for k in (1, 4, 16, 64):
        bound = -Iwae(k)(chain, x.expand(n, 2))
        means.append(float(bound.mean()))
        errors.append(float(bound.std()) / n**0.5)
    for (low, high), (a, b) in zip(pairwise(means), pairwise(errors), strict=True):
        assert high - low > 2 * math.hypot(a, b)
    assert means[-1] < evidence + 4 * errors[-1]
    many = -Iwae(20_000)(chain, x.expand(4, 2))
    assert (many - evidence).abs().max() < 0.05
    assert abs(means[0] - evidence) > 0.1


@DEPTHS
def test_one_draw_is_the_bound_in_the_mean(levels, double):
    chain, n = LinearGaussianChain(levels, bias=0.3, stretch=1.3), 40_000
    x = torch.tensor([[0.7, -0.4]]).expand(n, 2)
    exact = Elbo()(chain, x)
    for objective in (Iwae(1), Miwae(3, 1), Ciwae(3, 1.0), Stl()):
        found = objective(chain, x)
        error = (exact.var() / n + found.var() / n).sqrt()
        assert abs(found.mean() - exact.mean()) < 4 * error


def warming(objective, step=5):
    """In the middle of training."""
    objective.advance(step)
    return objective


@DEPTHS
def test_a_warmup_by_hand(levels, double):
    """log p(x | z_1) + beta log p(z)/q(z | x), every density taken from the rungs; then the
    bound to the last bit."""
    chain, x = LinearGaussianChain(levels, bias=0.3, stretch=1.2), torch.randn(8, 2)
    rungs = chain.climb(x, noise=noise().each(0, 6), k=6)
    decoded = rungs[0].log_below
    cost = sum(rung.q.log_prob(rung.z) - rung.log_below for rung in rungs) + decoded
    cost = cost - chain.prior(48).log_prob(rungs[-1].z)
    log_w = (decoded - 0.25 * cost).view(8, 6)
    expected = {
        Iwae: log_mean(log_w),
        Dreg: log_mean(log_w),
        Miwae: (log_mean(log_w[:, :3]) + log_mean(log_w[:, 3:])) / 2,
        Ciwae: 0.2 * log_w.mean(1) + 0.8 * log_mean(log_w),
        Stl: chain.log_weight(x, noise=noise().each(0, 1), beta=0.25),
    }
    assert not torch.allclose(log_w, weights(chain, x, 6))
    for cls, value in expected.items():
        few = {Miwae: {"m": 2, "k": 3}, Ciwae: {"k": 6, "weight": 0.2}, Stl: {}}.get(cls, {"k": 6})
        objective = warming(cls(**few, warmup=20))
        torch.testing.assert_close(objective(chain, x, noise=noise()), -value)
        for step in (20, 21, 10**6):
            objective.advance(step)
            plain = cls(**few)(chain, x, noise=noise())
            assert torch.equal(objective(chain, x, noise=noise()), plain)


def test_before_its_warmup_one_draw_is_the_reconstruction(double):
    chain, x = LinearGaussianChain(2, bias=0.3, stretch=1.2), torch.randn(8, 2)
    first, _ = chain.climb(x, noise=noise().each(0, 1))
    for objective in (Iwae(1, warmup=9), Miwae(1, 1, warmup=9), Stl(warmup=9), Dreg(1, warmup=9)):
        found = warming(objective, 0)(chain, x, noise=noise())
        torch.testing.assert_close(found, -first.log_below)


def test_a_warmup_is_told_the_step_and_says_what_it_is():
    vae, x = tiny_vae(), torch.randint(2, (4, 1, 2, 2))
    for cls in (Iwae, Miwae, Ciwae, Stl, Dreg):
        objective = cls(warmup=7)
        assert cls().bound and not objective.bound
        assert not objective.state_dict()
        with pytest.raises(ValueError, match="with warmup=7 depends on the training step"):
            objective(vae, x)
        cls()(vae, x)
        for wrong in (-1, True):
            with pytest.raises(ValueError, match="warmup: expected an integer of at least 0"):
                cls(warmup=wrong)


class NoBound(Iwae):
    bound = False


def test_what_a_subclass_says_of_itself_stands():
    assert Iwae.bound and not NoBound.bound and not NoBound(3).bound


def test_more_draws_in_one_bound_are_better_than_more_bounds(double):
    chain, x = LinearGaussianChain(2, bias=0.5, stretch=1.3), torch.randn(1, 2).expand(4000, 2)
    deep, wide = Miwae(2, 16)(chain, x), Miwae(16, 2)(chain, x)
    assert wide.mean() - deep.mean() > 5 * (deep.var() / 4000 + wide.var() / 4000).sqrt()


# ---- gradients -----------------------------------------------------------------------------------


class LearnedChain(LinearGaussianChain):
    """A linear-Gaussian chain with parameters of its own for each example, so that one backward
    pass gives the gradient of every draw. With off = 0 the encoder is the true posterior.
    """

    def __init__(self, rows, levels, off):
        super().__init__(levels, dims=1)
        ones = torch.ones(levels, rows, 1)
        gain = [self.a * self.var[t] / self.var[t - 1] for t in range(1, levels + 1)]
        std = [
            (self.var[t] - g**2 * self.var[t - 1]) ** 0.5
            for t, g in zip(range(1, levels + 1), gain, strict=True)
        ]
        scaled = [torch.tensor(each).view(-1, 1, 1) * ones for each in (gain, std)]
        self.gain = torch.nn.Parameter(scaled[0] + off)
        self.shift = torch.nn.Parameter(off * ones)
        self.log_std = torch.nn.Parameter(scaled[1].log() + off)
        self.slope = torch.nn.Parameter(self.a * ones)

    def encode(self, z, t, y=None):
        gain, shift, log_std = (
            each[t - 1].repeat_interleave(len(z) // each.shape[1], 0)
            for each in (self.gain, self.shift, self.log_std)
        )
        return Normal(gain * z + shift, log_std.exp())

    def decode(self, z, t, y=None):
        slope = self.slope[t - 1].repeat_interleave(len(z) // self.slope.shape[1], 0)
        return Normal(slope * z, torch.as_tensor(self.s))

    def gradients(self, objective, x, noise=None):
        """(encoder's, decoder's): one row per parameter, one column per example."""
        self.zero_grad()
        objective(self, x, noise=noise).sum().backward()
        encoder = torch.cat([self.gain.grad, self.shift.grad, self.log_std.grad])
        return encoder[..., 0], self.slope.grad[..., 0]


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(
    ("path", "plain"),
    [
        (Stl(), Iwae(1)),
        (Dreg(5), Iwae(5)),
        (warming(Stl(warmup=20)), warming(Iwae(1, warmup=20))),
        (warming(Dreg(5, warmup=20)), warming(Iwae(5, warmup=20))),
    ],
    ids=name,
)
def test_gradients_by_the_path_are_unbiased(levels, path, plain, double):
    """Against the plain reparameterized estimator, every parameter, within 4.5 standard errors."""
    n = 40_000
    chain, x = LearnedChain(n, levels, off=0.15), torch.full((n, 1), 0.8)
    for one, other in zip(chain.gradients(path, x), chain.gradients(plain, x), strict=True):
        error = (one.var(1) / n + other.var(1) / n).sqrt()
        assert ((one.mean(1) - other.mean(1)).abs() < 4.5 * error).all()
        assert (other.mean(1).abs() > 9 * error).any()  # there is something to be wrong about


@DEPTHS
def test_at_the_true_posterior_the_path_has_no_gradient_left(levels, double):
    """Sticking the landing: zero for every draw, where the plain estimator still shakes."""
    chain, x = LearnedChain(50, levels, off=0.0), torch.randn(50, 1)
    for path, plain in ((Stl(), Iwae(1)), (Dreg(4), Iwae(4))):
        encoder, _ = chain.gradients(path, x)
        shaking, _ = chain.gradients(plain, x)
        assert encoder.abs().max() < 1e-9
        assert shaking.std(1).min() > 0.05


def test_the_signal_of_dreg_does_not_drown(double):
    """Tucker et al.: with many draws the plain encoder gradient is noise, this one is not."""
    n, x = 4000, torch.full((4000, 1), 0.8)
    chain = LearnedChain(n, 1, off=0.15)
    one, other = (chain.gradients(objective(64), x)[0] for objective in (Dreg, Iwae))
    ratio = [(each.mean(1).abs() / each.std(1)).mean() for each in (one, other)]
    assert ratio[0] > 2 * ratio[1]


@pytest.mark.parametrize(("path", "plain"), [(Stl(), Iwae(1)), (Dreg(5), Iwae(5))], ids=name)
def test_the_decoder_is_trained_as_ever(path, plain, double):
    """The same draws, the same gradient."""
    chain, x = LearnedChain(8, 3, off=0.15), torch.randn(8, 1)
    (encoder, one), (plain_encoder, other) = (
        chain.gradients(each, x, noise()) for each in (path, plain)
    )
    assert torch.allclose(one, other, rtol=1e-9)
    assert not torch.allclose(encoder, plain_encoder)


def mhvae():
    likelihood = CategoricalLikelihood(5)
    encoders = [Map(4, 6), Map(3, 4)]
    decoders = [Map(3, 4 * likelihood.outputs), Map(2, 6)]
    return MHVAE(encoders, decoders, likelihood, latents=[3, 2])


class Frozen(torch.nn.Module):
    """log w, its log q by an encoder that may hear z and not learn: another derivation."""

    def __init__(self, model):
        super().__init__()
        self.model, self.deaf = model, copy.deepcopy(model).requires_grad_(False)

    def forward(self, x, noise):
        rungs = self.model.climb(x, noise=noise)
        below, log_q = x, 0.0
        for t, rung in enumerate(rungs, 1):
            log_q = log_q + self.deaf.encode(below, t).log_prob(rung.z)
            below = rung.z
        log_p = self.model.prior(len(x)).log_prob(below) + sum(each.log_below for each in rungs)
        return log_p - log_q


@pytest.mark.parametrize("objective", [Stl(), Dreg(4)], ids=name)
def test_the_path_through_networks(objective, double):
    """On a two-level MHVAE, against a frozen copy of the encoder: the same gradient to rounding,
    with z_1 reaching q(z_2 | z_1) through its mean and width."""
    model, x, k = mhvae(), torch.randint(5, (8, 4)), getattr(objective, "k", 1)
    objective(model, x, noise=noise()).sum().backward()
    found = [p.grad.clone() for p in model.encoders.parameters()]
    model.zero_grad()
    log_w = Frozen(model)(x.repeat_interleave(k, 0), noise().each(0, k)).view(8, k)
    (-(log_w.detach().softmax(1).square() * log_w).sum()).backward()
    for gradient, p in zip(found, model.encoders.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-9, atol=1e-12)


# ---- what they may not do ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        *(Iwae(3), Miwae(2, 3), Ciwae(3), Stl(), Dreg(3)),
        *(Iwae(3, warmup=99), Miwae(2, 3, warmup=99), Stl(warmup=99), Dreg(3, warmup=99)),
    ],
    ids=name,
)
def test_trained_by_many_draws_and_reported_by_the_bound(objective, tmp_path):
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
    assert all((a != b).any() for a, b in zip(start, module.model.parameters(), strict=True))
    found = trainer.test(module, images, verbose=False)[0]
    x = images.images["test"]
    draws = Noise(mix(0, "test"), torch.arange(len(x)))
    with torch.no_grad():
        plain = Bound(sets=2, strata=2)(module.model, x, noise=draws).nats.mean()
    assert found["test/nll"] == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize("objective", [Iwae(3), Dreg(3), Stl()], ids=lambda each: each.name)
def test_values_are_the_same_without_gradients(objective):
    """Those that differentiate for themselves are asked where gradients are off, too."""
    model, x = tiny_vae(), torch.randint(2, (4, 1, 2, 2))
    value = objective(model, x, noise=Noise(0, torch.arange(4)))
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            again = objective(model, x.clone(), noise=Noise(0, torch.arange(4)))
        assert torch.equal(value, again)


def test_a_diffusion_model_in_steps_has_weights_and_in_continuous_time_has_not(double):
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (8, 4))
    vdm.shape = (4,)
    steps = vdm.at(steps=3)
    gradients = []
    for objective in (Iwae(3), Dreg(3)):  # its encoder is fixed: nothing but the decoder learns
        vdm.zero_grad()
        objective(steps, x, noise=noise()).mean().backward()
        gradients.append([p.grad.clone() for p in vdm.denoiser.network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    for objective in (Iwae(3), Miwae(2, 3), Ciwae(3), Stl(), Dreg(3)):
        with pytest.raises(ValueError, match=r"continuous time .* infinite: .* vdm.at\(steps=T\)"):
            objective(vdm, x)


def test_a_top_down_hierarchy_has_levels_and_weights_and_no_way_up(double):
    hvae, x = random_hvae(), torch.randint(2, (8, 1, 2, 2))
    elbo, log_w = hvae.elbo(x, noise=noise()), weights(hvae, x, 3)
    costs = torch.stack((*elbo.levels, elbo.prior), 1)
    for objective, expected in (
        (Beta(3.0), 3 * costs.sum(1) - elbo.reconstruction),
        (FreeBits(0.3, "example_level"), costs.clamp_min(0.3).sum(1) - elbo.reconstruction),
        (Iwae(3), -log_mean(log_w)),
    ):
        assert torch.allclose(objective(hvae, x, noise=noise()), expected)
    for objective in (Stl(), Dreg(3), L2()):
        with pytest.raises(TypeError, match=f"objective={objective.name} .* HVAE .*use "):
            objective(hvae, x)


class Unweighted(LatentModel):
    """A bound, and nothing else."""

    def elbo(self, x, y=None, *, noise=None):
        raise NotImplementedError

    def sample(self, n, y=None, *, noise=None):
        raise NotImplementedError


def test_models_that_cannot_follow_are_refused():
    x = torch.randint(2, (4, 4))
    for objective in (Iwae(3), Miwae(2, 3), Ciwae(3)):
        with pytest.raises(TypeError, match="needs importance weights and Unweighted has none"):
            objective(Unweighted(), x)
    for objective in (Stl(), Dreg(3)):
        with pytest.raises(TypeError, match=r"chain of latents from x up, which Unweighted is not"):
            objective(Unweighted(), x)


class OnePlain(Unweighted):
    """Weights, of the bound alone."""

    def log_weight(self, x, y=None, *, noise=None, k=1):
        return torch.zeros(len(x) * k)


class PassesOn(OnePlain):
    def log_weight(self, x, y=None, **more):
        return torch.full((len(x) * more["k"],), float(more.get("beta", 1.0)))


def test_weights_that_pass_a_beta_on_serve_a_warmup():
    x = torch.randint(2, (4, 4))
    assert torch.equal(warming(Iwae(3, warmup=20))(PassesOn(), x), torch.full((4,), -0.25))


def test_weights_of_the_bound_alone_serve_it_and_no_warmup():
    x = torch.randint(2, (4, 4))
    for cls in (Iwae, Miwae, Ciwae):
        assert torch.equal(cls(3)(OnePlain(), x), torch.zeros(4))
        objective = warming(cls(3, warmup=9))
        with pytest.raises(TypeError, match=r"OnePlain.log_weight takes no beta: .* warmup=0"):
            objective.check(OnePlain())
        with pytest.raises(TypeError, match=r"OnePlain.log_weight takes no beta: .* warmup=0"):
            objective(OnePlain(), x)


def test_bad_arguments_are_refused():
    for make in (Iwae, Dreg, Ciwae, lambda k: Miwae(2, k)):
        with pytest.raises(ValueError, match="k: expected an integer of at least 1, got 0"):
            make(0)
    with pytest.raises(ValueError, match="m: expected an integer of at least 1, got -2"):
        Miwae(m=-2)
    with pytest.raises(ValueError, match=r"weight: expected a number from 0 to 1, got 1\.5"):
        Ciwae(weight=1.5)


@pytest.mark.parametrize("wrong", [0, -1, True])
def test_counts_are_integers_everywhere(wrong):
    made = [
        *(lambda each=each: each(k=wrong) for each in (Iwae, Miwae, Ciwae, Dreg)),
        lambda: Miwae(m=wrong),
        lambda: genfw.LinearWarmup(steps=wrong),
        lambda: genfw.CyclicWarmup(period=wrong),
        lambda: genfw.CyclicWarmup(cycles=wrong),
        lambda: genfw.ImportanceWeighted(k=wrong),
        lambda: genfw.Annealed(temperatures=wrong),
    ]
    for make in made:
        with pytest.raises(ValueError, match=f"expected an integer of at least 1, got {wrong!r}$"):
            make()

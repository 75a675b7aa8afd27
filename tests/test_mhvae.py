"""The chain with any number of learned levels."""

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal as Reference

from genfw import MHVAE, VAE, BernoulliLikelihood, CategoricalLikelihood, Noise
from genfw.nets import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder

IMAGES = torch.tensor([[i >> b & 1 for b in range(4)] for i in range(16)]).view(16, 1, 2, 2)


def mlp(*sizes, likelihood=None, shape=(1, 2, 2)):
    """Latents of these sizes, from z_1 up."""
    likelihood = likelihood or BernoulliLikelihood()
    below = (shape, *sizes)
    encoders = [MLPEncoder(b, z, hidden=[8], activation="tanh") for b, z in zip(below, sizes)]
    decoders = [
        MLPDecoder(b, z, 2 if t else likelihood.outputs, hidden=[8], activation="tanh")
        for t, (b, z) in enumerate(zip(below, sizes))
    ]
    return spread(MHVAE(encoders, decoders, likelihood, sizes))


def conv():
    """Two levels with latents (2, 2, 2) and (3, 1, 1)."""
    shapes, channels = [(1, 2, 2), (2, 2, 2), (3, 1, 1)], (8, 8)
    pairs = list(pairwise(shapes))
    encoders = [ConvEncoder(b, z, channels=channels) for b, z in pairs]
    decoders = [ConvDecoder(b, z, 1 + t, channels=channels) for t, (b, z) in enumerate(pairs)]
    return spread(MHVAE(encoders, decoders, BernoulliLikelihood(), shapes[1:]))


def spread(model):
    """Every level matters, and the encoders are wide enough to weigh all of the posterior."""

    def last(network):
        layers = (torch.nn.Linear, torch.nn.Conv2d)
        return [layer for layer in network.modules() if isinstance(layer, layers)][-1]

    with torch.no_grad():
        for network in [*model.encoders, *model.decoders[1:]]:
            last(network).weight *= 0.6
            last(network).bias *= 0.6
        for encoder, z in zip(model.encoders, model.latents, strict=True):
            last(encoder).bias[math.prod(z) :] += 0.2
        last(model.decoders[0]).weight *= 3
        for decoder in model.decoders[1:]:
            last(decoder).weight *= 2
    return model


MODELS = pytest.mark.parametrize(
    "make",
    [lambda: mlp(2), lambda: mlp(3, 2), lambda: mlp(3, 2, 2), conv],
    ids=["mlp-1", "mlp-2", "mlp-3", "conv-2"],
)


def test_one_level_is_the_vae_number_for_number():
    """Same seed, same weights, same number exactly."""
    likelihood = CategoricalLikelihood(3)
    torch.manual_seed(3)
    vae = VAE(MLPEncoder((2, 3), 4), MLPDecoder((2, 3), 4, 3), likelihood, 4)
    torch.manual_seed(3)
    chain = MHVAE([MLPEncoder((2, 3), 4)], [MLPDecoder((2, 3), 4, 3)], likelihood, [4])
    x, noise = torch.randint(3, (5, 2, 3)), Noise(1, torch.arange(5))
    for each, other in zip(vae.parameters(), chain.parameters(), strict=True):
        assert torch.equal(each, other)
    assert torch.equal(vae.elbo(x, noise=noise).total, chain.elbo(x, noise=noise).total)
    assert torch.equal(vae.log_weight(x, noise=noise), chain.log_weight(x, noise=noise))
    assert torch.equal(vae.sample(5, noise=noise), chain.sample(5, noise=noise))
    assert vae.encoder is vae.encoders[0] and vae.decoder is vae.decoders[0]


def test_the_bound_written_out(double):
    """Luo (58): both densities of z_1 at one draw, z_2 in closed form, and nothing skips a
    level."""
    model, x, noise = mlp(3, 2), IMAGES, Noise(0, torch.arange(16))

    def normal(h):
        mean, log_std = h.chunk(2, 1)
        return Reference(mean, log_std.exp())

    q_1 = normal(model.encoders[0](x - 0.5))
    z_1 = q_1.mean + q_1.stddev * noise.fold("z1").normal("sample", q_1.mean)
    q_2 = normal(model.encoders[1](z_1))
    z_2 = q_2.mean + q_2.stddev * noise.fold("z2").normal("sample", q_2.mean)
    p_1, logits = normal(model.decoders[1](z_2)), model.decoders[0](z_1)
    log_p = -torch.nn.functional.binary_cross_entropy_with_logits(
        logits, x.double(), reduction="none"
    )
    prior = torch.distributions.kl_divergence(q_2, Reference(0.0, 1.0)).sum(1)
    elbo = model.elbo(x, noise=noise)
    torch.testing.assert_close(elbo.reconstruction, log_p.flatten(1).sum(1))
    torch.testing.assert_close(elbo.levels[0], (q_1.log_prob(z_1) - p_1.log_prob(z_1)).sum(1))
    torch.testing.assert_close(elbo.prior, prior)


@MODELS
@torch.no_grad()
def test_probabilities_of_all_binary_images_sum_to_one(make, double):
    model, n = make(), 2000
    log_w = model.log_weight(IMAGES, k=n).view(16, n)
    w = log_w.exp()
    error = (w.var(1) / n).sum().sqrt()
    assert abs(w.mean(1).sum() - 1) < 4 * error and error < 0.03
    total = model.elbo(IMAGES.repeat_interleave(n, 0)).total.view(16, n)
    error = ((total.var(1) + log_w.var(1)) / n).sqrt()
    assert ((total.mean(1) - log_w.mean(1)).abs() < 5 * error).all()
    p = total.mean(1).exp()
    assert p.sum() <= 1 + 4 * (p**2 * total.var(1) / n).sum().sqrt()


@MODELS
@torch.no_grad()
def test_samples_have_the_models_own_frequencies(make, double):
    model, n = make(), 10_000
    w = model.log_weight(IMAGES, k=2000).exp().view(16, -1)
    p, variance = w.mean(1), w.var(1) / w.shape[1]
    samples = model.sample(n, noise=Noise(0, torch.arange(n)))
    assert samples.shape == (n, 1, 2, 2)
    codes = (samples.flatten(1) * torch.tensor([1, 2, 4, 8])).sum(1)
    gap = torch.bincount(codes, minlength=16) / n - p
    assert (gap.abs() < 5 * (p * (1 - p) / n + variance).sqrt()).all()


@MODELS
def test_gradients_against_finite_differences(make, double):
    model, x, noise = make(), IMAGES[3:7], Noise(0, torch.arange(4))
    model.elbo(x, noise=noise).total.sum().backward()
    for parameter in model.parameters():
        direction, step = torch.randn_like(parameter), 1e-6
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step * direction
                ends.append(model.elbo(x, noise=noise).total.sum())
                parameter -= sign * step * direction
            slope, gradient = (ends[0] - ends[1]) / (2 * step), (parameter.grad * direction).sum()
        torch.testing.assert_close(slope, gradient, rtol=1e-5, atol=1e-6)


@MODELS
def test_an_example_keeps_its_number_whatever_its_batch(make, double):
    model, some = make(), torch.tensor([11, 2, 7])
    whole = model.elbo(IMAGES, noise=Noise(0, torch.arange(16))).total
    torch.testing.assert_close(model.elbo(IMAGES[some], noise=Noise(0, some)).total, whole[some])


def test_the_architecture_of_burda_et_al():
    """784-[200, 200]-100-[100, 100]-50, tanh: their two-level model, to the last parameter."""
    encoders = [
        MLPEncoder((1, 28, 28), 100, hidden=[200, 200], activation="tanh"),
        MLPEncoder(100, 50, hidden=[100, 100], activation="tanh"),
    ]
    decoders = [
        MLPDecoder((1, 28, 28), 100, 1, hidden=[200, 200], activation="tanh"),
        MLPDecoder(100, 50, 2, hidden=[100, 100], activation="tanh"),
    ]
    model = MHVAE(encoders, decoders, BernoulliLikelihood(), [100, 50])
    sizes = [784, 200, 200, 200], [100, 100, 100, 100], [100, 200, 200, 784], [50, 100, 100, 200]
    expected = sum((a + 1) * b for each in sizes for a, b in pairwise(each))
    assert sum(p.numel() for p in model.parameters()) == expected
    assert len(model.elbo(torch.randint(2, (3, 1, 28, 28))).levels) == 1


def test_labels_reach_every_level(double):
    pairs = [((1, 2, 2), 3), (3, 2)]
    model = MHVAE(
        [MLPEncoder(b, z, classes=2, hidden=[8]) for b, z in pairs],
        [MLPDecoder(b, z, 1 + t, classes=2, hidden=[8]) for t, (b, z) in enumerate(pairs)],
        BernoulliLikelihood(),
        [3, 2],
        classes=2,
    )
    noise = Noise(0, torch.arange(16))
    one, other = (model.elbo(IMAGES, torch.full((16,), y), noise=noise) for y in (0, 1))
    for name in ("reconstruction", "prior"):
        assert (getattr(one, name) != getattr(other, name)).all()
    assert (one.levels[0] != other.levels[0]).all()


def test_printing_shows_the_chain():
    assert "x -> z_1 in R^[3] -> z_2 in R^[2]; p: N(0, I) and back" in repr(mlp(3, 2))

    class Other(type(mlp(3, 2))):
        def prior(self, n):
            return super().prior(n)

    model = mlp(3, 2)
    model.__class__ = Other
    assert "; p: p(z_2) and back" in repr(model)


E_1, D_1 = MLPEncoder((1, 2, 2), 3), MLPDecoder((1, 2, 2), 3, 1)


@pytest.mark.parametrize(
    ("encoders", "decoders", "latents", "message"),
    [
        ([E_1], [D_1], [3, 2], "one encoder, one decoder and one size .* got 1, 1 and 2"),
        ([], [], [], "got 0, 0 and 0"),
        ([E_1], [D_1], [0], r"latents: expected positive sizes .*, got 0"),
        ([E_1], [D_1], [4], r"encoder 1 gives \(6,\) numbers for z_1 of shape \(4,\): .* \(8,\)"),
        (
            [E_1, MLPEncoder(3, 2)],
            [D_1, MLPDecoder(3, 2, 1)],
            [3, 2],
            r"decoder 2 gives \(3,\) numbers for z_1 of shape \(3,\): expected \(6,\)",
        ),
        (
            [E_1, MLPEncoder(4, 2)],
            [D_1, MLPDecoder(3, 2, 2)],
            [3, 2],
            "MLPEncoder reads 4 per example, got 3: build it for .* data or, .* the latents",
        ),
        (
            [MLPEncoder((1, 3, 3), 3)],
            [MLPDecoder((1, 3, 3), 3, 1)],
            [3],
            "MLPEncoder reads 1x3x3 per example, got 1x2x2: build it for the shape of your data or",
        ),
    ],
)
def test_sizes_that_do_not_match_are_refused(encoders, decoders, latents, message):
    with pytest.raises(ValueError, match=message) as error:
        MHVAE(encoders, decoders, BernoulliLikelihood(), latents).elbo(IMAGES)
    assert "\n" not in str(error.value)

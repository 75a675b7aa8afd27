"""The laws of genfw's interfaces, for this package's classes, and one of its own."""

import pytest
import torch
from genfw_mixture import Blend, MixtureVAE
from genfw_mixture.model import Mixture

from genfw import VAE, CategoricalLikelihood, ImportanceWeighted, Noise, V
from genfw.nets import MLPDecoder, MLPEncoder
from genfw.testing import MODEL_LAWS, check


def make(cls: type[VAE] = MixtureVAE, shape=(1, 2, 2), bins=3, latents=2, **more):
    """A model of the smallest images."""
    encoder = MLPEncoder(shape, latents, hidden=[8])
    likelihood = CategoricalLikelihood(bins)
    decoder = MLPDecoder(shape, latents, likelihood.outputs, hidden=[8])
    return cls(encoder, decoder, likelihood, latents, **more)


@pytest.mark.parametrize("law", MODEL_LAWS)
def test_mixture_vae_is_a_model(law):
    law(make, shape=(1, 2, 2), bins=3)


def test_one_standard_component_is_a_vae():
    """Its bound is that of `VAE`, but for a KL at the draw where that has it in closed form."""
    mixture = make(components=1).eval()
    vae = make(VAE).eval()
    vae.encoders, vae.decoders = mixture.encoders, mixture.decoders
    torch.nn.init.zeros_(mixture.means)
    x = torch.randint(3, (1, 1, 2, 2)).expand(20000, -1, -1, -1)
    noise = Noise(0, torch.arange(len(x)))
    with torch.no_grad():
        drawn, closed = (each.elbo(x, noise=noise).prior for each in (mixture, vae))
    assert abs(drawn.mean() - closed.mean()) < 5 * drawn.std() / len(x) ** 0.5
    few = ImportanceWeighted(5), noise.of(slice(3))
    weighed = (few[0](each, x[:3], noise=few[1]).nats for each in (mixture, vae))
    torch.testing.assert_close(*weighed)


def test_samples_follow_the_density():
    """Mean and spread of draws are those of the density on a line, summed up."""
    logits, means = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([[-2.0], [1.0], [4.0]])
    std, n = torch.tensor([[0.5], [0.2], [1.0]]), 100_000
    z = torch.linspace(-6, 12, 4001)[:, None]
    p = Mixture(logits, means, std, len(z)).log_prob(z).exp() * (z[1] - z[0])
    mean = (p * z[:, 0]).sum()
    spread = (p * (z[:, 0] - mean).square()).sum().sqrt()
    assert abs(p.sum() - 1) < 1e-3
    drawn = Mixture(logits, means, std, n)
    x = drawn.sample(Noise(0, torch.arange(n)))[:, 0]
    assert abs(x.mean() - mean) < 5 * spread / n**0.5 and abs(drawn.mean[0] - mean) < 1e-3
    assert abs(x.std() - spread) < 0.01 * spread


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_blend_is_a_parameterization(power):
    check(Blend, power=power)


def test_blend_of_power_one_is_v_turned_round():
    x, eps, alpha = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor(0.8)
    sigma = (1 - alpha**2).sqrt()
    blend = Blend(power=1.0).target(x, eps, alpha, sigma)
    torch.testing.assert_close(blend, -V().target(x, eps, alpha, sigma))

"""The laws of genfw's interfaces, for this package's classes, and one of its own."""

import pytest
import torch
from genfw_mixture import Blend, MixtureVAE

from genfw import VAE, CategoricalLikelihood, Noise, V
from genfw.nets import MLPDecoder, MLPEncoder
from genfw.testing import MODEL_LAWS, check


def make(cls=MixtureVAE, shape=(1, 2, 2), bins=3, latents=2, **more):
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
    vae.encoders[0], vae.decoders[0] = mixture.encoder, mixture.decoder
    torch.nn.init.zeros_(mixture.means)
    x = torch.randint(3, (1, 1, 2, 2)).expand(20000, -1, -1, -1)
    noise = Noise(0, torch.arange(len(x)))
    with torch.no_grad():
        drawn, closed = (each.elbo(x, noise=noise).prior for each in (mixture, vae))
    error = drawn.std() / len(x) ** 0.5
    assert abs(drawn.mean() - closed.mean()) < 5 * error


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_blend_is_a_parameterization(power):
    check(Blend, power=power)


def test_blend_of_power_one_is_v_turned_round():
    x, eps, alpha = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor(0.8)
    sigma = (1 - alpha**2).sqrt()
    blend = Blend(power=1.0).target(x, eps, alpha, sigma)
    torch.testing.assert_close(blend, -V().target(x, eps, alpha, sigma))

"""The smallest learned models of every kind, for laws that need one; all are conditional where
`classes` says so."""

from __future__ import annotations

from collections.abc import Sequence

from genfw.diffusion.denoiser import NetworkDenoiser
from genfw.diffusion.sampler import Ancestral
from genfw.likelihood import BinsLikelihood, CategoricalLikelihood, Likelihood
from genfw.models.hvae import HVAE
from genfw.models.mhvae import MHVAE
from genfw.models.vae import VAE
from genfw.models.vdm import VDM
from genfw.nets import MLP, Ladder, MLPDecoder, MLPEncoder
from genfw.parameterization import Eps, Parameterization
from genfw.schedule import Cosine, NoiseSchedule


def vae(shape: Sequence[int], bins: int, classes: int | None = None) -> VAE:
    """One level of two latents."""
    encoder = MLPEncoder(shape, 2, classes=classes, hidden=[8])
    decoder = MLPDecoder(shape, 2, outputs=bins, classes=classes, hidden=[8])
    return VAE(encoder, decoder, CategoricalLikelihood(bins), 2, classes=classes)


def mhvae(shape: Sequence[int], bins: int, classes: int | None = None) -> MHVAE:
    """Two levels, of three latents and of two."""
    encoders = [
        MLPEncoder(shape, 3, classes=classes, hidden=[8]),
        MLPEncoder(3, 2, classes=classes, hidden=[8]),
    ]
    decoders = [
        MLPDecoder(shape, 3, outputs=bins, classes=classes, hidden=[8]),
        MLPDecoder(3, 2, outputs=2, classes=classes, hidden=[8]),
    ]
    return MHVAE(encoders, decoders, CategoricalLikelihood(bins), [3, 2], classes=classes)


def hvae(shape: Sequence[int], bins: int, classes: int | None = None) -> HVAE:
    """A ladder of two levels."""
    ladder = Ladder(shape, outputs=bins, classes=classes, width=8, latents=2, blocks=(1, 1))
    return HVAE(ladder, CategoricalLikelihood(bins), classes=classes)


def vdm(
    shape: Sequence[int],
    bins: int,
    classes: int | None = None,
    param: Parameterization | None = None,
    likelihood: Likelihood | None = None,
    schedule: NoiseSchedule | None = None,
) -> VDM:
    """In continuous time; sampled in four steps."""
    param = Eps() if param is None else param
    net = MLP(shape, param.channels(shape[0], bins), classes=classes, width=8, blocks=1)
    schedule = Cosine(8.0, -6.0) if schedule is None else schedule
    likelihood = BinsLikelihood(bins) if likelihood is None else likelihood
    denoiser, sampler = NetworkDenoiser(net, param, schedule), Ancestral(steps=4)
    return VDM(denoiser, likelihood, shape=shape, sampler=sampler, classes=classes)

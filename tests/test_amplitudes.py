"""alpha and sigma of a latent, from log SNR alone."""

import torch

from genfw import parameterization
from genfw.amplitudes import amplitudes, broadcast


def test_variance_is_preserved_and_the_smaller_amplitude_is_exact():
    """sigma at log SNR 80 is e^-40, where 1 - alpha^2 is nothing."""
    log_snr = torch.linspace(-80, 80, 33, dtype=torch.float64)
    alpha, sigma = amplitudes(log_snr)
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones_like(alpha), rtol=1e-15)
    assert torch.allclose(alpha / sigma, (log_snr / 2).exp(), rtol=1e-13)
    assert torch.equal(alpha.flip(0), sigma)


def test_an_amplitude_belongs_to_its_example():
    like = torch.zeros(3, 1, 2, 2)
    amplitude = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    spread = broadcast(amplitude, like)
    assert spread.dtype == like.dtype
    assert torch.equal((like + spread).flatten(1), amplitude.float()[:, None].expand(3, 4))
    assert torch.equal(like + broadcast(0.5, like), like + 0.5)
    assert torch.equal(broadcast(spread, like), spread)


def test_plug_ins_find_it_where_it_was():
    assert parameterization.broadcast is broadcast

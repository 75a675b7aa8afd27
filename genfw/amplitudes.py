r"""The amplitudes of data and noise in a latent, :math:`z = \alpha x + \sigma \epsilon`.

Variance is preserved, so log SNR says both:

.. math:: \alpha^2 = \mathrm{sigmoid}(\lambda), \quad \sigma^2 = \mathrm{sigmoid}(-\lambda)
"""

from __future__ import annotations

import torch
from torch import Tensor


def amplitudes(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, each of log SNR's shape; the smaller one exact too, where 1 - the square of
    the other would be nothing."""
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def broadcast(amplitude: Tensor | float, like: Tensor) -> Tensor:
    """(b,) or a scalar, made broadcastable to (b, ...)."""
    amplitude = torch.as_tensor(amplitude, device=like.device)
    if amplitude.ndim == 1:
        amplitude = amplitude.reshape(-1, *[1] * (like.ndim - 1))
    return amplitude.to(like.dtype)

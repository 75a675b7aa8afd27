"""Laws of parameterizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from genfw.bayes import centres
from genfw.parameterization import (
    DiscreteParameterization,
    LinearParameterization,
    Parameterization,
    Prediction,
)
from genfw.schedule import LogLinear
from genfw.testing.oracles import GaussianDenoiser, MixtureDenoiser

Make = Callable[..., Parameterization]
Point: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor, Tensor]"
SHAPE, BINS = (2, 3), 5
"""Of the data; a discrete parameterization says itself how many values they have."""


def any_output_is_consistent_with_z(make: Make, **arguments: Any) -> None:
    """z = alpha x_hat + sigma eps_hat, whatever the network says."""
    param, (_, _, z, alpha, sigma) = _asked(make, arguments)
    p = param.solve(_output(param, z), z, alpha, sigma)
    _equal(p.alpha * p.x + p.sigma * p.eps, z, "alpha x_hat + sigma eps_hat is not z")


def a_true_target_gives_back_x_and_eps(make: Make, **arguments: Any) -> None:
    """Of linear ones: target, divided by `scale`, then `solve`, is the identity."""
    param, (x, eps, z, alpha, sigma) = _asked(make, arguments)
    if isinstance(param, LinearParameterization):
        scale = param.scale(_wide(alpha), _wide(sigma))
        p = param.solve(param.target(x, eps, alpha, sigma) / scale, z, alpha, sigma)
        _equal(p.x, x, "a perfect network does not give x")
        _equal(p.eps, eps, "a perfect network does not give eps")


def the_target_is_never_z_itself(make: Make, **arguments: Any) -> None:
    """Of linear ones: at no log SNR from -20 to 20 is the target a x + b eps a multiple of z, which
    the network reads: alpha b - sigma a neither vanishes nor passes zero."""
    param = make(**arguments)
    if isinstance(param, LinearParameterization):
        log_snr = torch.linspace(-20, 20, 4001, dtype=torch.float64)
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        a, b = param.coefficients(alpha, sigma)
        side = torch.sign(alpha * b - sigma * a)
        wrong = (side != side[0]) | (side == 0)
        where = log_snr[wrong][:1].tolist()
        assert not where, f"near log SNR {where[0]:.2f} a prediction is divided by zero"


def amplitudes_broadcast(make: Make, **arguments: Any) -> None:
    """(b,) amplitudes, and the same made broadcastable, give the same."""
    param, (_, _, z, alpha, sigma) = _asked(make, arguments)
    output = _output(param, z)
    narrow = param.solve(output, z, alpha, sigma)
    wide = param.solve(output, z, _wide(alpha), _wide(sigma))
    _equal(narrow.x, wide.x, "(b,) and (b, 1, 1) amplitudes differ")


def examples_do_not_mix(make: Make, **arguments: Any) -> None:
    """The first example alone is the first of the batch."""
    param, (_, _, z, alpha, sigma) = _asked(make, arguments)
    output = _output(param, z)
    whole = param.solve(output, z, alpha, sigma)
    first = param.solve(output[:1], z[:1], alpha[:1], sigma[:1])
    _equal(whole.x[:1], first.x, "an example depends on its batch")


def positions_do_not_mix(make: Make, **arguments: Any) -> None:
    """Of discrete ones: the prior at a position alone is that beside others, which it is computed
    with as memory allows."""
    param, (_, _, z, _, _) = _asked(make, arguments)
    if isinstance(param, DiscreteParameterization):
        numbers = _numbers(param, _output(param, z))
        whole, positions = param.log_prior(numbers), numbers.shape[2]
        expected = (len(z), param.bins, positions)
        assert whole.shape == expected, f"log_prior is {tuple(whole.shape)}, not {expected}"
        for i in range(positions):
            alone = param.log_prior(numbers[..., i : i + 1]).log_softmax(1)
            beside = whole[..., i : i + 1].log_softmax(1)
            _equal(alone, beside, "the prior at a position depends on the others")


def every_level_has_finite_predictions_and_gradients(make: Make, **arguments: Any) -> None:
    """From log SNR -12 to 14, in float32 too."""
    param, point = _asked(make, arguments)
    for dtype in (torch.float64, torch.float32):
        _, _, z, alpha, sigma = (each.to(dtype) for each in point)
        output = _output(param, z).requires_grad_()
        p = param.solve(output, z, alpha, sigma)
        assert p.x.dtype == dtype, f"x_hat of {dtype} is {p.x.dtype}"
        assert isinstance(p, Prediction) and p.x.shape == z.shape == p.eps.shape, "another shape"
        (gradient,) = torch.autograd.grad(p.eps.square().sum(), output)
        for what, value in {"x_hat": p.x, "eps_hat": p.eps, "the gradient": gradient}.items():
            assert value.isfinite().all(), f"{what} is not finite in {dtype}"


def the_score_is_the_gradient_of_the_log_density(make: Make, **arguments: Any) -> None:
    """Tweedie: of a perfect network, `Prediction.score` is autograd's gradient of log p_t(z). For
    linear ones the data are a Gaussian and a mixture; for discrete ones, the output's own prior
    over values."""
    param, (_, _, z, alpha, sigma) = _asked(make, arguments)
    z = z.requires_grad_()
    if isinstance(param, LinearParameterization):
        schedule, t = LogLinear(14.0, -12.0), torch.linspace(1, 0, len(z), dtype=torch.float64)
        means = torch.stack([_centred(z) - 0.4, 0.5 - _centred(z)])
        for oracle in (GaussianDenoiser(schedule, 0.3, 0.4), MixtureDenoiser(schedule, means, 0.5)):
            perfect = oracle(z.detach(), t)
            alpha, sigma = perfect.alpha, perfect.sigma
            target = param.target(perfect.x, perfect.eps, alpha, sigma)
            p = param.solve(target / param.scale(alpha, sigma), z.detach(), alpha, sigma)
            _equal_scores(p, oracle.log_density(z, t), z)
    elif isinstance(param, DiscreteParameterization):
        output, values = _output(param, z), centres(param.bins).view(-1, 1, 1)
        prior = param.log_prior(_numbers(param, output)).unflatten(2, SHAPE)
        gap = z.unsqueeze(1) - _wide(alpha).unsqueeze(1) * values
        log_p = (prior - 0.5 * (gap / _wide(sigma).unsqueeze(1)) ** 2).logsumexp(1)
        _equal_scores(param.solve(output, z.detach(), alpha, sigma), log_p.flatten(1).sum(1), z)


def _equal_scores(p: Prediction, log_density: Tensor, z: Tensor) -> None:
    (gradient,) = torch.autograd.grad(log_density.sum(), z)
    away = p.sigma * (p.score - gradient)  # of the order of 1 at every level
    assert away.abs().max() < 1e-6, "the score is not the gradient of log p_t"


def _centred(z: Tensor) -> Tensor:
    """Some point of the shape of an example."""
    return torch.linspace(-0.3, 0.3, z[0].numel(), dtype=z.dtype).view(z.shape[1:])


def _asked(make: Make, arguments: dict[str, Any]) -> tuple[Parameterization, Point]:
    """One, and data of as many values as it reads."""
    param = make(**arguments)
    return param, _point(_bins(param))


def _bins(param: Parameterization) -> int:
    return param.bins if isinstance(param, DiscreteParameterization) else BINS


def _point(bins: int) -> Point:
    """x, eps, z (9, 2, 3), alpha, sigma (9,), float64."""
    made = torch.Generator().manual_seed(0)
    log_snr = torch.linspace(-12, 14, 9, dtype=torch.float64)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    k = torch.randint(bins, (9, *SHAPE), generator=made)
    x = (2 * k.double() + 1) / bins - 1
    eps = torch.randn(x.shape, generator=made, dtype=torch.float64)
    return x, eps, _wide(alpha) * x + _wide(sigma) * eps, alpha, sigma


def _wide(amplitude: Tensor) -> Tensor:
    return amplitude.view(-1, *[1] * len(SHAPE))


def _output(param: Parameterization, z: Tensor) -> Tensor:
    made = torch.Generator().manual_seed(1)
    channels = param.channels(SHAPE[0], _bins(param))
    return torch.randn(len(z), channels, *SHAPE[1:], generator=made, dtype=torch.float64).to(z)


def _numbers(param: DiscreteParameterization, output: Tensor) -> Tensor:
    """An output as numbers (b, outputs, n) at n positions."""
    return output.unflatten(1, (param.outputs, -1)).flatten(2)


def _equal(found: Tensor, expected: Tensor, otherwise: str) -> None:
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9), otherwise


PARAMETERIZATION_LAWS = (
    any_output_is_consistent_with_z,
    a_true_target_gives_back_x_and_eps,
    the_target_is_never_z_itself,
    amplitudes_broadcast,
    examples_do_not_mix,
    positions_do_not_mix,
    every_level_has_finite_predictions_and_gradients,
    the_score_is_the_gradient_of_the_log_density,
)

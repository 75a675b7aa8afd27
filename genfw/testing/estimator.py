"""Laws of estimators of the negative log-likelihood: on models whose evidence is known."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from genfw.estimators.estimator import Estimate, Estimator
from genfw.likelihood import GaussianLikelihood
from genfw.model import LatentModel
from genfw.models.vdm import VDM
from genfw.noise import Noise
from genfw.objective.objective import Objective
from genfw.schedule import Cosine
from genfw.testing.oracles import GaussianDenoiser, LinearGaussianChain, gaussian_log_prob
from genfw.types import Labels, Nats

Make = Callable[..., Estimator]
"""Builds an estimator; few draws will do."""

LOOSE = 1.0
"""Nats per image by which a bound may miss the evidence of a model whose encoder is right."""

OFF = 0.2
"""The share by which a stated variance may miss the one found, beside the error of both."""


def an_image_keeps_its_number(make: Make, **arguments: Any) -> None:
    """With keyed noise, whatever its batch, its place in it and the size of chunks; float64."""
    estimator = make(**arguments)
    for model in served(estimator, bent=True):
        x, y = images(5)
        whole = _measured(estimator, model, x, y)
        assert whole.nats.shape == whole.variance.shape == (5,), "not one number per image"
        assert whole.nats.dtype == torch.float64, f"nats are {whole.nats.dtype}, not float64"
        assert whole.variance.dtype == torch.float64, f"the variance is {whole.variance.dtype}"
        assert whole.nats.isfinite().all(), "nats are not finite"
        for some in (torch.tensor([4, 0]), torch.tensor([2])):
            part = estimator(model, x[some], y[some], noise=Noise(0, some))
            _same(part, whole.nats[some], whole.variance[some], "an image depends on its batch")
        if "chunk" in inspect.signature(make).parameters:
            for chunk in (2, 1000):
                cut = _measured(make(**{**arguments, "chunk": chunk}), model, x, y)
                _same(cut, whole.nats, whole.variance, "an image depends on the chunk")


def the_number_is_on_the_side_that_kind_says(make: Make, **arguments: Any) -> None:
    """Against the evidence, without labels and given them: to five standard errors an upper bound
    is above -log p(x) and an unbiased estimate at it; where the encoder is right, none is more than
    `LOOSE` nats away."""
    estimator = make(**arguments)
    for bent in (False, True):
        for model in served(estimator, bent):
            for y in (None, images(200)[1]):
                x, exact = drawn(model, 200, y)
                gap = _measured(estimator, model, x, y).nats + exact
                mean, error = float(gap.mean()), float(gap.std() / len(gap) ** 0.5) + 1e-3
                said = f"{mean:.4f} ± {error:.4f} nats above -log p(x{'' if y is None else '|y'})"
                said += f" of {type(model).__name__}, kind: {estimator.kind}"
                unbiased = "unbiased" in estimator.kind
                assert mean > -5 * error or estimator.kind.startswith("lower"), said
                assert mean < 5 * error or not (unbiased or estimator.kind[:5] == "lower"), said
                assert bent or abs(mean) < LOOSE + 5 * error, said


def the_stated_variance_is_the_variance_found(make: Make, **arguments: Any) -> None:
    """Of one image under many independent draws; where none is stated (nan), nothing is asked."""
    estimator, n = make(**arguments), 600
    for model in served(estimator, bent=True):
        x, _ = drawn(model, 1, None)
        found = _measured(estimator, model, x.expand(n, -1), None)
        if found.variance.isnan().all():
            continue
        square = (found.nats - found.nats.mean()).square()
        variance, stated = float(square.mean()), float(found.variance.mean())
        error = float(((square.var() + found.variance.var()) / n).sqrt())
        said = f"variance {stated:.3g} stated, {variance:.3g} ± {error:.2g} found"
        assert abs(stated - variance) < 5 * error + OFF * variance + 1e-9, said


def precision_is_kept_under_autocast(make: Make, **arguments: Any) -> None:
    """float64 numbers also there; and of float32 images those of float64 ones."""
    estimator = make(**arguments)
    for model in served(estimator, bent=True):
        x, y = images(5)
        exact = _measured(estimator, model, x, y).nats
        with torch.autocast("cpu", torch.bfloat16):
            for given in (x, x.float()):
                found = _measured(estimator, model, given, y).nats
                assert found.dtype == torch.float64, f"nats are {found.dtype} under autocast"
                away = float((found - exact).abs().max())
                assert away < 1e-2, f"{away:.2g} nats are lost under autocast, in {given.dtype}"


ESTIMATOR_LAWS = (
    an_image_keeps_its_number,
    the_number_is_on_the_side_that_kind_says,
    the_stated_variance_is_the_variance_found,
    precision_is_kept_under_autocast,
)


def served(judge: Estimator | Objective, bent: bool) -> Iterator[LatentModel]:
    """Those models of known evidence that it can measure, or train; `bent`: with encoders that are
    not the posterior."""
    bias, stretch = (0.3, 1.2) if bent else (0.0, 1.0)
    chains = (LinearGaussianChain(levels, bias=bias, stretch=stretch) for levels in (1, 3))
    denoiser = GaussianDenoiser(Cosine(9.0, -9.0), 0.1, 0.5)
    vdm = VDM(denoiser, GaussianLikelihood(), shape=(LinearGaussianChain.dims,), classes=4)
    taken = 0
    for model in (*chains, vdm):
        try:
            judge.check(model)
        except (TypeError, ValueError):
            continue
        taken += 1
        yield model
    assert taken, "serves neither a hierarchy nor a diffusion model"


def images(n: int) -> tuple[Tensor, Labels]:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(n, LinearGaussianChain.dims, generator=made, dtype=torch.float64)
    return x, 3 * (torch.arange(n) % 2)


def drawn(model: LatentModel, n: int, y: Labels | None) -> tuple[Tensor, Nats]:
    """Images that the model makes, and their log evidence."""
    x, _ = images(n)
    if isinstance(model, LinearGaussianChain):
        mean, std = model.mean(0, y), model.var[0] ** 0.5
    else:
        assert isinstance(model, VDM) and isinstance(model.denoiser, GaussianDenoiser)
        shift = 0.0 if y is None else y.double()[:, None]
        mean, std = model.denoiser.mean + shift, model.denoiser.std
    return mean + std * x, gaussian_log_prob(mean + std * x, mean, std)


def _measured(estimator: Estimator, model: LatentModel, x: Tensor, y: Labels | None) -> Estimate:
    return estimator(model, x, y, noise=Noise(0, torch.arange(len(x))))


def _same(found: Estimate, nats: Nats, variance: Nats, otherwise: str) -> None:
    for one, other in ((found.nats, nats), (found.variance, variance)):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-9, equal_nan=True), otherwise

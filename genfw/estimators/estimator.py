"""Estimators of the negative log-likelihood: what is reported. They know models and bounds, never
objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genfw.elbo import ELBO
from genfw.model import LatentModel
from genfw.noise import Noise
from genfw.registry import Registered
from genfw.types import Image, Labels, Nats


@dataclass(frozen=True)
class Estimate:
    """A negative log-likelihood per example, and how sure it is.

    Attributes:
        nats: (b,) float64, positive for masses: -log p(x), or an upper bound on it.
        variance: (b,) float64, the Monte-Carlo variance of `nats`: of this number around its own
            mean over draws, not of images around each other.
        elbo: the terms of the bound averaged over draws, where the estimator is made of them.
        diagnostics: what else is known of each number, (b,) each, such as its effective sample
            size; means over images are reported.
    """

    nats: Nats
    variance: Nats
    elbo: ELBO | None = None
    diagnostics: Mapping[str, Nats] = field(default_factory=dict)


class Estimator(Registered, nn.Module, ABC, group="estimator"):
    """A way to measure the negative log-likelihood of a model: of its weights in evaluation, as
    `undisturbed` has them, whatever mode it is in.

    Attributes:
        kind: what `nats` is in the mean: "upper bound on -log p(x)", "unbiased", ...
        diagnostics: the names that may stand in `Estimate.diagnostics`.
        draws: how many random draws of all latents each image gets.
        continuous: whether a diffusion model is read in continuous time, whatever its steps.
    """

    kind: str
    draws: int
    continuous: ClassVar[bool] = False
    diagnostics: ClassVar[tuple[str, ...]] = ()

    def check(self, model: LatentModel) -> None:
        """Says, before anything is computed, whether this model can be measured so.

        Raises:
            TypeError, ValueError: it cannot, in one sentence with what can be.
        """

    def __call__(self, model: LatentModel, *args: Any, **kwargs: Any) -> Estimate:
        with torch.inference_mode(False), undisturbed(model):  # some take gradients of their own
            return super().__call__(model, *args, **kwargs)

    @abstractmethod
    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Noise | None = None
    ) -> Estimate:
        """Args: x (b, *shape) integers; noise keys every draw by example, None takes a random
        seed."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A number must be the same each time it is asked for: no dropout, no autocast, no gradients.
    Afterwards every module is in its own mode again."""
    modes = [(each, each.training) for each in model.modules()]
    device = next((p.device.type for p in model.parameters()), "cpu")
    with torch.no_grad(), torch.autocast(device, enabled=False):
        try:
            model.eval()
            yield
        finally:
            for each, training in modes:
                each.training = training


def keyed(noise: Noise | None, x: Tensor) -> Noise:
    """`noise`, or a fresh seed for this batch.

    Raises:
        ValueError: the batch is empty: no mean is that of no image.
    """
    if not len(x):
        raise ValueError("x: expected at least one image to estimate the likelihood of, got none")
    if noise is not None:
        return noise
    return Noise(int(torch.randint(2**62, ())), torch.arange(len(x), device=x.device))

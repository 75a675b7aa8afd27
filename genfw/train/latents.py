"""What diagnostics ask of a hierarchy: where its latents lie for given images, and what images
given latents stand for.

Every learned hierarchy answers. A diffusion model does not: its encoder is fixed, and its latents
are noisy images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from genfw.distributions import Normal, divergence_by_dimension
from genfw.model import LatentModel, MarkovianHierarchy
from genfw.models.vdm import VDM
from genfw.noise import Draws
from genfw.types import Image, Labels


@runtime_checkable
class Latents(Protocol):
    """The latents of a hierarchy, z_1 (next to the data) .. z_T."""

    @property
    def levels(self) -> int:
        """T."""
        ...

    def posteriors(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> list[tuple[Normal, Tensor]]:
        """q of every z_t given x and the draws it depends on, and the draw of z_t, from z_1 to
        z_T."""
        ...

    def costs(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> list[Tensor]:
        """What every unit of z_1 .. z_T costs at these draws, (b, units) nats each: their sums over
        units are the terms of the bound. nan where single units have no cost of their own."""
        ...

    def expected(self, above: Sequence[Tensor], y: Labels | None = None) -> Tensor:
        """E[x | z_1 .. z_T], (b, ...), where z_t .. z_T are given, as `above`, and the others are
        the means of their priors."""
        ...


class Chain:
    """The latents of a Markovian hierarchy: everything below z_t depends on z_t alone."""

    def __init__(self, model: MarkovianHierarchy):
        self.model, self.levels = model, model.levels

    def posteriors(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> list[tuple[Normal, Tensor]]:
        return [(rung.q, rung.z) for rung in self.model.climb(x, y, noise=noise)]

    def costs(
        self, x: Image, y: Labels | None = None, *, noise: Draws | None = None
    ) -> list[Tensor]:
        """As `bound` has them: log ratios at the draw, at the top a divergence; nan where the prior
        is no Normal, or q or p has a density of its own: units may then depend on each other.

        Raises:
            TypeError: a p(z_t | z_{t+1}) that is no normal: its units may depend on each other.
        """
        rungs = self.model.climb(x, y, noise=noise)
        costs = []
        for rung, above in pairwise(rungs):
            if not isinstance(above.p, Normal):
                raise TypeError(
                    f"p(z_t | z_(t+1)) is a {type(above.p).__name__}, and what single units cost "
                    "is known of a Normal: leave these out, callbacks.diagnostics=null"
                )
            z = rung.z.reshape(-1, 1)
            ratio = rung.q.by_dimension().log_prob(z) - above.p.by_dimension().log_prob(z)
            if not (rung.q.plain and above.p.plain):
                ratio = torch.full_like(ratio, torch.nan)
            costs.append(ratio.view(len(x), -1))
        top = divergence_by_dimension(rungs[-1].q, self.model.prior_of(rungs[-1].z))
        return [*costs, top]

    def expected(self, above: Sequence[Tensor], y: Labels | None = None) -> Tensor:
        z = above[0]
        for t in range(self.levels - len(above) + 1, 0, -1):
            z = self.model.decode(z, t, y).mean
        return z


def latents_of(model: LatentModel) -> Latents | None:
    """What can be asked about the latents of this model; None where they are not learned."""
    if isinstance(model, VDM):
        return None
    if isinstance(model, MarkovianHierarchy):
        return Chain(model)
    return model if isinstance(model, Latents) else None


class Means(Draws):
    """No noise: every normal draw is its mean, every uniform one 1/2."""

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        return torch.full_like(like, 0.5)

    def time(self) -> Tensor:
        raise TypeError("there is no mean time")

    antithetic = time

    def fold(self, *keys: int | str) -> Means:
        return self

    def each(self, first: int, last: int) -> Means:
        return self

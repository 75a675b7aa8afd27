"""The bound itself, averaged over draws."""

from __future__ import annotations

import torch

from genfw.check import at_least, at_least_one
from genfw.elbo import ELBO
from genfw.estimators.estimator import Estimate, Estimator, keyed
from genfw.model import LatentModel
from genfw.noise import Noise
from genfw.types import Image, Labels


class Bound(Estimator, name="bound"):
    """-ELBO, averaged over `sets` independent sets of `strata` draws.

    The times of a diffusion model are stratified within a set (uniformly in log SNR in continuous
    time); the variance is measured between sets, so it knows what stratification gained.

    Args:
        sets: independent sets per example; at least 2, or there is no variance to measure.
        strata: draws per set.
        chunk: (image, draw) pairs at once. It sets memory and speed, never the number: draws are
            keyed by example, set and stratum.
    """

    kind = "upper bound on -log p(x)"

    def __init__(self, sets: int = 2, strata: int = 32, chunk: int = 500):
        super().__init__()
        self.sets, self.strata = at_least(2, "sets", sets), at_least_one("strata", strata)
        self.draws = sets * strata
        self.chunk = at_least_one("chunk", chunk)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Noise | None = None
    ) -> Estimate:
        noise, model = keyed(noise, x), model.for_evaluation()
        sets = torch.stack([self._set(model, x, y, noise.fold("set", r)) for r in range(self.sets)])
        reconstruction, prior, *levels = sets.mean(0)
        nats = sets[:, 1:].sum(1) - sets[:, 0]
        return Estimate(
            nats=nats.mean(0),
            variance=nats.var(0) / self.sets,
            elbo=ELBO(reconstruction, tuple(levels), prior),
        )

    def _set(self, model: LatentModel, x: Image, y: Labels | None, noise: Noise) -> torch.Tensor:
        """(terms, b) float64: reconstruction, prior, levels, averaged over one stratified set of
        draws."""
        width = max(1, self.chunk // len(x))
        total: torch.Tensor | float = 0.0
        for i in range(0, self.strata, width):
            j = min(i + width, self.strata)
            parts = []
            for rows in (slice(g, g + self.chunk) for g in range(0, len(x), self.chunk)):
                given = None if y is None else y[rows].repeat_interleave(j - i, 0)
                of = noise.of(rows).strata(i, j, self.strata)
                elbo = model.elbo(x[rows].repeat_interleave(j - i, 0), given, noise=of)
                terms = torch.stack([elbo.reconstruction, elbo.prior, *elbo.levels])
                parts.append(terms.double().unflatten(1, (-1, j - i)).sum(2))
            total = total + torch.cat(parts, 1)
        return torch.as_tensor(total) / self.strata

    def extra_repr(self) -> str:
        return f"sets={self.sets}, strata={self.strata}"

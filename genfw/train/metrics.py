r"""NLL over a data set, with the two spreads that people confuse.

.. math:: \bar n = \frac1N \sum_i n_i, \qquad
    \text{stderr} = \frac1N \sqrt{\sum_i \mathrm{Var}[n_i]}, \qquad
    \text{std}^2 = \frac1{N-1} \sum_i (n_i - \bar n)^2

`stderr` is the Monte-Carlo standard error of the mean over *this fixed set* of images: how far a
second evaluation with other random draws would come out. `std` is how much images differ from each
other. Everything is kept as float64 sums and counts, reduced by summing, so that no split into
batches or ranks changes the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from genfw.elbo import bits_per_dim
from genfw.estimators.estimator import Estimate


class NLL(Metric):
    """Accumulates `Estimate`s; every image counts once.

    `compute` returns, in nats per image (float64):

    * `nll`, `bpd`: the mean over images, and the same in bits per dimension.
    * `nll_stderr`, `nll_std`: see above (`nll_std` is 0 for a single image).
    * `reconstruction`, `levels`, `prior`: the terms of the bound, nll = -reconstruction + levels +
      prior; absent where an estimator has no such terms.
    * `ess`, `khat`, ...: the mean over images of each of the estimator's diagnostics.
    * `count`: images, and `nonfinite`: how many of them had an infinite or undefined NLL. They are
      *not* left out: `nll` is then itself not finite.
    """

    full_state_update = False
    nats: Tensor
    squares: Tensor
    variance: Tensor
    terms: Tensor
    count: Tensor
    dims: Tensor
    explained: Tensor
    nonfinite: Tensor
    diagnosed: Tensor
    diagnosis: Tensor

    def __init__(self, diagnostics: Iterable[str] = (), **kwargs: Any):
        """Args: diagnostics: the names that estimates may bring."""
        super().__init__(**kwargs)
        self.diagnostics = tuple(dict.fromkeys(diagnostics))
        for name in ("diagnosed", "diagnosis"):  # how many images, and their sum, by name
            zeros = torch.zeros(len(self.diagnostics), dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        for name in ("nats", "squares", "variance"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("terms", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "dims", "explained", "nonfinite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, estimate: Estimate, dims: int) -> None:
        """One batch of estimates, of images with C * H * W = `dims` dimensions.

        Raises:
            ValueError: the estimates are not one per example, or bring a diagnostic that was not
                announced.
        """
        nats = estimate.nats.detach().double()
        if nats.ndim != 1:
            raise ValueError(
                f"NLL counts examples: expected nats of shape (b,), got {(*nats.shape,)}"
            )
        self.nats += nats.sum()
        self.squares += nats.square().sum()
        self.variance += estimate.variance.detach().double().sum()
        self.count += len(nats)
        self.dims += len(nats) * dims
        self.nonfinite += (~nats.isfinite()).sum()
        if estimate.elbo is not None:
            bound = estimate.elbo
            levels = sum(bound.levels, start=torch.zeros_like(bound.prior))
            rows = torch.stack([bound.reconstruction, levels, bound.prior])
            self.terms += rows.detach().double().sum(1)
            self.explained += len(nats)
        for name, value in estimate.diagnostics.items():
            if name not in self.diagnostics:
                raise ValueError(
                    f"diagnostic {name}: not among those its estimator announces in `diagnostics`"
                )
            self.diagnosed[self.diagnostics.index(name)] += len(nats)
            self.diagnosis[self.diagnostics.index(name)] += value.detach().double().sum()

    def compute(self) -> dict[str, Tensor]:
        """The numbers over all images so far.

        Raises:
            ValueError: when there were none.
        """
        n = self.count
        if n == 0:
            raise ValueError("NLL over no images: update was never called")
        mean = self.nats / n
        scatter = (self.squares - n * mean.square()).clamp_min(0)
        values = {
            "nll": mean,
            "bpd": bits_per_dim(self.nats, int(self.dims)),
            "nll_stderr": self.variance.sqrt() / n,
            "nll_std": (scatter / (n - 1).clamp_min(1)).sqrt(),
            "count": n,
        }
        if self.explained == n:
            values |= zip(("reconstruction", "levels", "prior"), self.terms / n, strict=True)
        for name, number, total in zip(
            self.diagnostics, self.diagnosed, self.diagnosis, strict=True
        ):
            if number > 0:
                values[name] = total / number
        if self.nonfinite > 0:
            values["nonfinite"] = self.nonfinite
        return values

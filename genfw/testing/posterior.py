"""Laws of posteriors of top-down hierarchies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from genfw.distributions import Normal
from genfw.models.posterior import Posterior

Make = Callable[..., Posterior]


def starts_at_the_standard_prior(make: Make, **arguments: Any) -> None:
    """Zeros beside N(0, I) are N(0, I): a hierarchy whose heads start at zero pays nothing."""
    standard = Normal(torch.zeros(2, 3, 4), torch.ones(2, 3, 4))
    kl = make(**arguments)(torch.zeros(2, 6, 4), standard).kl(standard)
    assert (kl.abs() < 1e-6).all(), f"zeros beside N(0, I) cost {kl.tolist()} nats"


def reaches_any_normal(make: Make, **arguments: Any) -> None:
    """Some numbers give any mean and deviation, whatever the prior: searched for by gradient."""
    random = torch.Generator().manual_seed(0)
    draw = torch.randn(4, 2, 3, generator=random, dtype=torch.float64)
    prior, wanted = (Normal(mean, log.exp()) for mean, log in (0.5 * draw).view(2, 2, 2, 3))
    posterior, h = make(**arguments), torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([h], max_iter=300, line_search_fn="strong_wolfe")

    def distance() -> torch.Tensor:
        search.zero_grad()
        kl = posterior(h, prior).kl(wanted).sum()
        kl.backward()
        return kl

    search.step(distance)  # pyright: ignore[reportArgumentType]
    left = float(distance().detach())
    assert left < 1e-6, f"a normal is {left:.2g} nats from the nearest posterior"


def stays_finite(make: Make, **arguments: Any) -> None:
    """Numbers of a diverging network give no infinite mean, no deviation of 0, no dead gradient."""
    standard = Normal(torch.zeros(2, 3), torch.ones(2, 3))
    for size in (1e4, -1e4):
        h = torch.full((2, 6), size, requires_grad=True)
        q = make(**arguments)(h, standard)
        (q.mean.sum() + q.std.log().sum()).backward()
        assert q.mean.isfinite().all() and q.std.isfinite().all(), f"{size:g} gives {q.mean}"
        assert (q.std > 0).all(), f"{size:g} gives a deviation of 0"
        assert h.grad is not None and h.grad.isfinite().all(), f"the gradient at {size:g} is none"


POSTERIOR_LAWS = (starts_at_the_standard_prior, reaches_any_normal, stays_finite)

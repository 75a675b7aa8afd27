"""Laws of likelihoods: masses on integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from genfw.likelihood import Likelihood
from genfw.noise import Noise

Make = Callable[..., Likelihood]
Head: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


def sums_to_one(make: Make, **arguments: Any) -> None:
    """Over all K values, tails and extreme parameters included, in float32 too."""
    likelihood = make(**arguments)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        for h, x in _asked(likelihood, dtype):
            log_p = likelihood(h).log_prob(x)
            assert log_p.shape == (len(x),), f"log_prob of {len(x)} is {tuple(log_p.shape)}"
            total = float(log_p.logsumexp(0).exp())
            assert abs(total - 1) < tolerance, f"masses sum to {total} in {dtype} at {_said(h)}"


def gradients_are_finite(make: Make, **arguments: Any) -> None:
    """At extreme parameters as well."""
    likelihood = make(**arguments)
    for h, x in _asked(likelihood, torch.float32):
        parts = [part.clone().requires_grad_() for part in (h if isinstance(h, tuple) else (h,))]
        given = (parts[0], parts[1]) if isinstance(h, tuple) else parts[0]
        likelihood(given).log_prob(x).sum().backward()
        for part in parts:
            assert part.grad is not None, "a number given to the likelihood has no gradient"
            assert part.grad.isfinite().all(), f"a gradient is not finite at {_said(h)}"


def normalize_gives_bin_centres(make: Make, **arguments: Any) -> None:
    """2 (k + 1/2) / K - 1, the only map from integers to reals."""
    likelihood = make(**arguments)
    if (bins := likelihood.bins) is not None:
        v = likelihood.normalize(torch.arange(bins).view(1, bins))[0]
        centres = (2 * torch.arange(bins) + 1) / bins - 1
        assert torch.allclose(v.double(), centres.double(), atol=1e-6), "not the bin centres"


def samples_follow_the_masses(make: Make, **arguments: Any) -> None:
    """Integers 0..K-1, as often as `log_prob` says."""
    likelihood, n = make(**arguments), 4000
    for h, x in _asked(likelihood, torch.float64, extreme=False):
        p = likelihood(h).log_prob(x).exp()
        rows = _repeat(h, n)
        drawn = likelihood(rows).sample(Noise(0, torch.arange(n)))
        assert not drawn.is_floating_point(), f"samples are {drawn.dtype}, not integers"
        often = torch.bincount(drawn.flatten().long(), minlength=len(x)).double() / n
        error = (p * (1 - p) / n).sqrt() + 1 / n
        assert ((often - p).abs() < 5 * error).all(), "samples do not follow log_prob"


def _asked(
    likelihood: Likelihood, dtype: torch.dtype, extreme: bool = True
) -> Iterator[tuple[Head, Tensor]]:
    """One dimension asked for all its K values: (head, x (K, 1)). Network outputs, and a diffusion
    model's pair, as far as the likelihood takes them."""
    if likelihood.density or likelihood.bins is None:
        return
    bins, made = likelihood.bins, torch.Generator().manual_seed(0)
    x = torch.arange(bins).view(-1, 1)
    heads: list[Head] = []
    for size in (1.0, 30.0, 1e4) if extreme else (1.0,):
        heads.append(size * torch.randn(1, likelihood.outputs, generator=made, dtype=dtype))
        heads.append(torch.full((1, likelihood.outputs), -size, dtype=dtype))
    for where in (-3.0, 0.31, 0.999) if extreme else (0.31,):
        for width in (1e-3, 0.05, 3.0) if extreme else (0.3,):
            pair = torch.tensor([[[where]], [[width]]], dtype=dtype)
            heads.append((pair[0], pair[1]))
    taken = 0
    for head in heads:
        try:
            likelihood(head)
        except Exception as error:
            if isinstance(head, tuple) == likelihood.takes_pair:  # the kind that it takes
                said = f"takes_pair={likelihood.takes_pair}, and yet: {error}"
                raise AssertionError(said) from error
            continue
        taken += 1
        yield _repeat(head, bins), x
    assert taken, "takes neither a network's output nor a diffusion model's pair"


def _repeat(head: Head, n: int) -> Head:
    if isinstance(head, tuple):
        where, width = (part[:1].expand(n, -1) for part in head)
        return where, width
    return head[:1].expand(n, -1)


def _said(head: Head) -> str:
    parts = head if isinstance(head, tuple) else (head,)
    return ", ".join(str(part[0].tolist()) for part in parts)


LIKELIHOOD_LAWS = (
    sums_to_one,
    gradients_are_finite,
    normalize_gives_bin_centres,
    samples_follow_the_masses,
)

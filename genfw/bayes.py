r"""Bayes' rule for integers seen through Gaussian noise.

A data dimension has K values, the bin centres :math:`v_k = (2k + 1)/K - 1`; a prior says how likely
each is, and z = alpha v_k + sigma eps has been seen. Then

.. math:: p(k \mid z) \propto p(k) \exp(-\tfrac12 ((z - \alpha v_k) / \sigma)^2),

the exponent being SNR (z / alpha - v_k)^2 / 2 without a division by alpha. Its masses need a tensor
with an axis of K; `piecewise` makes it for some of the positions at a time and keeps none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfw.distributions import Distribution, in_rows, inverse_cdf, per_example, shaped, wide
from genfw.noise import Draws, draws
from genfw.types import Nats

Prior = Callable[[Tensor], Tensor]
"""Numbers (b, m, n) at n positions to log p(k), (b, K, n), up to a constant at each position."""

PIECE, SHARE = 2**16, 32  # a piece is this many numbers, or this part of all: the larger


def logits(numbers: Tensor) -> Tensor:
    """The prior that is given as it is, K logits per dimension."""
    return numbers


def centres(bins: int) -> Tensor:
    """The K values of a normalized dimension, (K,) float64."""
    return (2 * torch.arange(bins, dtype=torch.float64) + 1) / bins - 1


class DiscretePosterior(Distribution):
    """p(k | z) in every dimension; see the page above.

    Args:
        numbers: (b, m, *dims), what the prior is made of.
        z: (b, *dims).
        alpha, sigma: amplitudes, broadcastable to z.
        bins: K.
        prior: from numbers to log masses; by default they are K logits per dimension (m = K).
        size: how many numbers per dimension the prior computes with, K unless it needs more: the
            more, the smaller the pieces.
    """

    def __init__(
        self,
        numbers: Tensor,
        z: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        bins: int,
        prior: Prior = logits,
        size: int | None = None,
    ):
        self.z, self.bins, self.rule = z, bins, _Bayes(bins, prior)
        self.seen = (
            numbers.flatten(2),
            *(each.expand_as(z).flatten(1) for each in (z, alpha, sigma)),
        )
        whole = bins * z.numel()
        self.pieces = max(1, math.ceil((size or bins) * z.numel() / max(PIECE, whole / SHARE)))

    @property
    def x(self) -> Tensor:
        """The expected value, E[v_k | z], (b, *dims)."""
        return piecewise(self.rule.expected, self.seen, self.pieces).view_as(self.z).to(self.z)

    @property
    def mean(self) -> Tensor:
        """The expected integer, (b, *dims)."""
        return ((self.x + 1) * self.bins - 1) / 2

    def log_prob(self, value: Tensor) -> Nats:
        seen = in_rows(shaped(value, self.z).long().flatten(1), *self.seen)
        return per_example(piecewise(self.rule.log_mass, seen, self.pieces))

    @torch.no_grad()
    def sample(self, noise: Draws | None = None, purpose: str = "sample") -> Tensor:
        u = draws(noise, self.z).uniform(purpose, self.z).flatten(1)
        return piecewise(self.rule.choose, (u, *self.seen), self.pieces).view_as(self.z)


@dataclass(frozen=True)
class _Bayes:
    """The rule at n positions: numbers (b, m, n), everything else (b, n)."""

    bins: int
    prior: Prior

    def log_masses(self, numbers: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(k | z) up to a constant, (b, K, n)."""
        z, alpha, sigma = (wide(each).unsqueeze(1) for each in (z, alpha, sigma))
        values = centres(self.bins).to(z)[:, None]
        return self.prior(wide(numbers)) - 0.5 * ((z - alpha * values) / sigma).square()

    def expected(self, *seen: Tensor) -> Tensor:
        masses = self.log_masses(*seen).softmax(1)
        return (masses * centres(self.bins).to(masses)[:, None]).sum(1)

    def log_mass(self, k: Tensor, *seen: Tensor) -> Tensor:
        masses = self.log_masses(*seen)
        return masses.gather(1, k.unsqueeze(1)).squeeze(1) - masses.logsumexp(1)

    def choose(self, u: Tensor, *seen: Tensor) -> Tensor:
        return inverse_cdf(self.log_masses(*seen).softmax(1), u)


def piecewise(function: Callable[..., Tensor], inputs: Sequence[Tensor], pieces: int) -> Tensor:
    """function(*inputs), some positions (the last axis, common to all) at a time.

    Nothing but the inputs is kept for the gradient: each piece is computed again, and its gradients
    are written where they belong. At its peak a backward pass holds the inputs, their gradients and
    what one piece needs. One that is to be differentiated itself (`create_graph`) keeps everything.

    Args:
        function: acts on each position alone; every tensor that it differentiates is an input.
    """
    return _Piecewise.apply(function, pieces, *inputs)  # pyright: ignore[reportReturnType]


class _Piecewise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], pieces: int, *inputs: Tensor) -> Tensor:
        ctx.function, ctx.pieces = function, pieces
        ctx.save_for_backward(*inputs)
        return torch.cat([function(*piece) for piece in _cut(inputs, pieces)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        wanted = [i for i, need in enumerate(needed) if need]
        read = [inputs[i] for i in wanted]
        if torch.is_grad_enabled():
            gradients = torch.autograd.grad(ctx.function(*inputs), read, grad, create_graph=True)
        else:
            gradients = [torch.empty_like(x) for x in read]
            parts = [_cut(each, ctx.pieces) for each in (inputs, grad, gradients)]
            for piece, (cotangent,), into in zip(*parts, strict=True):
                leaves = [x.detach().requires_grad_(need) for x, need in zip(piece, needed)]
                with torch.enable_grad():
                    made = ctx.function(*leaves)
                found = torch.autograd.grad(made, [leaves[i] for i in wanted], cotangent)
                for place, gradient in zip(into, found, strict=True):
                    place.copy_(gradient)
        left = iter(gradients)
        return (None, None, *(next(left) if need else None for need in needed))


def _cut(tensors: Sequence[Tensor], pieces: int) -> list[tuple[Tensor, ...]]:
    """The tensors' last axes cut alike: one tuple of views for each piece."""
    return list(zip(*(each.tensor_split(pieces, dim=-1) for each in tensors), strict=True))

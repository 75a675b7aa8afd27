"""log p(x) by importance sampling from the model's own encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from genfw.check import at_least_one
from genfw.estimators.estimator import Estimate, Estimator, keyed
from genfw.estimators.memory import Live
from genfw.estimators.weights import (
    effective_sample_size,
    log_mean,
    log_mean_variance,
    pareto_khat,
    tail,
)
from genfw.model import LatentModel, MarkovianHierarchy, Weighs
from genfw.noise import Noise
from genfw.types import Image, Labels, Nats

MEMORY = 2**28
"""Bytes that the tensors of a chunk may take; what operators need within comes on top."""

MOST = 2500
"""Pairs of a chunk: more are no quicker on a CPU."""

PROBE = 8
"""Pairs that a chunk's size is found on."""


class ImportanceWeighted(Estimator, name="importance_weighted"):
    r"""The k-sample bound, :math:`-\log \frac1k \sum_i w_i`: in the mean above -log p(x), falling
    to it as k grows.

    Args:
        k: draws per example.
        chunk: (example, draw) pairs computed at once; None: as many as keep within 256 MB, 2500 at
            most. It sets memory and speed, never the number: draws are keyed by example and draw.

    Diagnostics: `ess`, the effective sample size of the k draws; `khat`, the shape of the weights'
    tail, and `khat_over_0.7`, whether it is too heavy for this k (from k = 21 on). Variance by the
    jackknife; nan for k = 1.

    Raises:
        ValueError: k or chunk below 1, or a diffusion model in continuous time.
        TypeError: the model has no importance weights.

    References:
        Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, 2015,
        https://arxiv.org/abs/1509.00519.
    """

    kind = "upper bound on -log p(x)"
    diagnostics = ("ess", "khat", "khat_over_0.7")

    def __init__(self, k: int = 5000, chunk: int | None = None):
        super().__init__()
        self.k = self.draws = at_least_one("k", k)
        self.chunk = None if chunk is None else at_least_one("chunk", chunk)

    def check(self, model: LatentModel) -> None:
        _weighing(model)

    def forward(
        self, model: LatentModel, x: Image, y: Labels | None = None, *, noise: Noise | None = None
    ) -> Estimate:
        noise, weighing = keyed(noise, x), _weighing(model)
        chunk = self.chunk or within_memory(model, x, y, noise, self.k)
        return assembled(len(x), self._groups(weighing, x, y, noise, chunk))

    def _groups(
        self, model: Weighs, x: Image, y: Labels | None, noise: Noise, chunk: int
    ) -> Iterator[tuple[slice, Estimate]]:
        for rows, ranges in chunks(len(x), self.k, chunk):
            given, of = None if y is None else y[rows], noise.of(rows)
            log_w = [
                model.log_weight(x[rows], given, noise=of.each(i, j), k=j - i).view(-1, j - i)
                for i, j in ranges
            ]
            yield rows, weighed(torch.cat(log_w, 1))

    def extra_repr(self) -> str:
        return f"k={self.k}"


def alternatives(model: LatentModel) -> str:
    """Other estimators, which can serve this model."""
    more = " or importance_weighted" if isinstance(model, Weighs) and not _endless(model) else ""
    return f"estimator=bound{more}"


def _weighing(model: LatentModel) -> Weighs:
    if not isinstance(model, Weighs):
        raise TypeError(
            f"estimator=importance_weighted needs importance weights (log_weight), and "
            f"{type(model).__name__} has a bound alone: use estimator=bound"
        )
    if _endless(model):
        raise ValueError(
            f"estimator=importance_weighted goes through the levels of a chain, and a "
            f"{type(model).__name__} in continuous time has no end of them: set model.steps=T, or "
            "vdm.at(steps=T)"
        )
    return model


def _endless(model: object) -> bool:
    return isinstance(model, MarkovianHierarchy) and model.endless


def weighed(log_w: Tensor) -> Estimate:
    """-log of the mean of the weights (b, k), with all that they say of themselves."""
    diagnostics: dict[str, Nats] = {"ess": effective_sample_size(log_w)}
    if tail(log_w.shape[1]) >= 5:
        diagnostics["khat"] = khat = pareto_khat(log_w)
        diagnostics["khat_over_0.7"] = (~(khat <= 0.7)).double()
    return Estimate(-log_mean(log_w), log_mean_variance(log_w), diagnostics=diagnostics)


def assembled(n: int, groups: Iterable[tuple[slice, Estimate]]) -> Estimate:
    """The estimate of n examples, of those of groups of them.

    Each is written to its place at once: small tensors that are kept between the large ones of the
    chunks would leave the heap in pieces, and its peak would grow with n.
    """
    whole: dict[str, Tensor] = {}
    for rows, group in groups:
        for name, value in {
            "nats": group.nats,
            "variance": group.variance,
            **group.diagnostics,
        }.items():
            if name not in whole:
                whole[name] = value.new_empty(n)
            whole[name][rows] = value
    return Estimate(whole.pop("nats"), whole.pop("variance"), diagnostics=whole)


def within_memory(model: LatentModel, x: Image, y: Labels | None, noise: Noise, k: int) -> int:
    """How many (example, draw) pairs take `MEMORY` together, by what `PROBE` of them take; at most
    `MOST`."""
    assert isinstance(model, Weighs)
    draws = min(k, PROBE)
    rows = slice(0, -(-PROBE // draws))
    given = None if y is None else y[rows]
    held = [*model.parameters(), *model.buffers(), x, *([] if y is None else [y])]
    with Live(but=held) as memory:
        log_w = model.log_weight(x[rows], given, noise=noise.of(rows).each(0, draws), k=draws)
    return max(1, min(MOST, MEMORY * len(log_w) // memory.peak))


def chunks(n: int, k: int, chunk: int) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """n examples with k draws each, at most `chunk` pairs at once: groups of examples, and for
    each the ranges of draws, (first, last + 1)."""
    ranges = [(i, min(i + chunk, k)) for i in range(0, k, chunk)]
    group = max(1, chunk // k)
    for i in range(0, n, group):
        yield slice(i, i + group), ranges

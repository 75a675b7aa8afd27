"""Laws of likelihoods: masses on integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from genfw.likelihood import Likelihood
from genfw.noise import Noise

Make = Callable[..., Likelihood]
Head: TypeAlias = "Tensor | tuple[Tensor, Tensor]"

ENUMERABLE = 2**13
"""How many examples are summed over at a time, and of how many dimensions they are: as many as
give no more; two at least, where only two will do."""


def sums_to_one(make: Make, **arguments: Any) -> None:
    """Over all K values of a dimension, tails and extreme parameters included, in float32 too."""
    likelihood = make(**arguments)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        for head in _extreme(likelihood, dtype):
            log_p, _ = _masses(likelihood, head, dims=1)
            total = float(log_p.logsumexp(0).exp())
            assert abs(total - 1) < tolerance, f"masses sum to {total} in {dtype} at {_said(head)}"


def examples_of_several_dimensions_sum_to_one(make: Make, **arguments: Any) -> None:
    """Over all K^D of them, D = 2 to 4: a mean over dimensions, or one that is left out, is found
    here."""
    likelihood = make(**arguments)
    dims = max(2, _enumerable(likelihood, 4))
    for head in _single(likelihood, dims):
        log_p, _ = _masses(likelihood, head, dims)
        total = float(log_p.logsumexp(0).exp())
        assert abs(total - 1) < 1e-9, f"examples of {dims} dimensions sum to {total}"


def examples_do_not_mix(make: Make, **arguments: Any) -> None:
    """Beside others with other parameters, and alone, an example has the same log mass (density,
    where it is one) and, with keyed noise, the same sample."""
    likelihood, rows, dims = make(**arguments), 5, 3
    made = torch.Generator().manual_seed(1)
    x = torch.randn(rows, dims, generator=made, dtype=torch.float64)
    if likelihood.bins is not None:
        x = torch.randint(likelihood.bins, (rows, dims), generator=made)
    for head in _ordinary(likelihood, rows, dims):
        whole = likelihood(head)
        log_p, drawn = whole.log_prob(x), whole.sample(Noise(0, torch.arange(rows)))
        assert log_p.shape == (rows,), f"log_prob of {rows} examples is {tuple(log_p.shape)}"
        for some in ([3], [4, 0]):
            part, index = likelihood(_rows(head, some)), torch.tensor(some)
            same = torch.allclose(part.log_prob(x[index]), log_p[index], rtol=1e-9, atol=1e-9)
            assert same, "an example's log_prob depends on its batch"
            again = part.sample(Noise(0, index))
            assert torch.allclose(again, drawn[index]), "a sample depends on its batch"


def mean_is_the_expected_integer(make: Make, **arguments: Any) -> None:
    """sum_k k p(k), neither normalized nor rounded, in every dimension; of more than two a mixture
    may say it approximately."""
    likelihood = make(**arguments)
    dims = _enumerable(likelihood, 2)
    for head in _single(likelihood, dims):
        log_p, x = _masses(likelihood, head, dims)
        mean, expected = likelihood(head).mean[0], log_p.double().exp() @ x.double()
        said = f"the mean is {mean.tolist()}, the masses have {expected.tolist()}"
        assert torch.allclose(mean.double(), expected, rtol=1e-6, atol=1e-6), said


def gradients_are_finite(make: Make, **arguments: Any) -> None:
    """At extreme parameters as well."""
    likelihood = make(**arguments)
    for head in _extreme(likelihood, torch.float32):
        x = torch.arange(likelihood.bins or 0).view(-1, 1)
        h = _rows(head, [0] * len(x))
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
    """Integers 0..K-1, as often as `log_prob` says, in one dimension and in two together."""
    likelihood, n = make(**arguments), 4000
    for dims in {1, _enumerable(likelihood, 2)}:
        for head in _single(likelihood, dims):
            log_p, x = _masses(likelihood, head, dims)
            drawn = likelihood(_rows(head, [0] * n)).sample(Noise(0, torch.arange(n)))
            assert not drawn.is_floating_point(), f"samples are {drawn.dtype}, not integers"
            inside = drawn.min() >= 0 and drawn.max() <= x.max()
            assert inside, f"samples outside 0..{int(x.max())}"
            place = (likelihood.bins or 0) ** torch.arange(dims - 1, -1, -1)
            often = torch.bincount((drawn.long() * place).sum(1), minlength=len(x)).double() / n
            p = log_p.exp()
            error = (p * (1 - p) / n).sqrt() + 1 / n
            assert ((often - p).abs() < 5 * error).all(), "samples do not follow log_prob"


LIKELIHOOD_LAWS = (
    sums_to_one,
    examples_of_several_dimensions_sum_to_one,
    examples_do_not_mix,
    mean_is_the_expected_integer,
    gradients_are_finite,
    normalize_gives_bin_centres,
    samples_follow_the_masses,
)


def _extreme(likelihood: Likelihood, dtype: torch.dtype) -> Iterator[Head]:
    """Of one example of one dimension, where there are masses."""
    if likelihood.density or likelihood.bins is None:
        return
    made = torch.Generator().manual_seed(0)
    heads: list[Head] = []
    for size in (1.0, 30.0, 1e4):
        heads.append(size * torch.randn(1, likelihood.outputs, generator=made, dtype=dtype))
        heads.append(torch.full((1, likelihood.outputs), -size, dtype=dtype))
    edge = 2 * (likelihood.bins // 2) / likelihood.bins - 1  # between two values, equally near
    for where in (-1e3, -3.0, 0.0, edge, 0.31, 0.999):
        for width in (1e-6, 1e-3, 0.05, 3.0):
            pair = torch.tensor([[[where]], [[width]]], dtype=dtype)
            heads.append((pair[0], pair[1]))
    yield from _taken(likelihood, heads)


def _single(likelihood: Likelihood, dims: int) -> Iterator[Head]:
    """Of one example, where there are masses."""
    if not (likelihood.density or likelihood.bins is None):
        yield from _ordinary(likelihood, 1, dims)


def _ordinary(likelihood: Likelihood, rows: int, dims: int) -> Iterator[Head]:
    """Of examples of which no two are alike, in float64."""
    made = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    pair = 0.31 + 0.4 * random(rows, dims), 0.3 * (0.4 * random(rows, dims)).exp()
    yield from _taken(likelihood, [random(rows, likelihood.outputs * dims), pair])


def _taken(likelihood: Likelihood, heads: Sequence[Head]) -> Iterator[Head]:
    """Network outputs, and a diffusion model's pairs, as far as the likelihood takes them."""
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
        yield head
    assert taken, "takes neither a network's output nor a diffusion model's pair"


def _masses(likelihood: Likelihood, head: Head, dims: int) -> tuple[Tensor, Tensor]:
    """log p of all K^D values of an example, and these, (K^D, D)."""
    x = torch.cartesian_prod(*[torch.arange(likelihood.bins or 0)] * dims).view(-1, dims)
    parts = []
    for piece in x.split(ENUMERABLE):
        parts.append(likelihood(_rows(head, [0] * len(piece))).log_prob(piece))
        shape = tuple(parts[-1].shape)
        assert shape == (len(piece),), f"log_prob of {len(piece)} is {shape}"
    return torch.cat(parts), x


def _enumerable(likelihood: Likelihood, most: int) -> int:
    """The number of dimensions up to `most` of which there are at most `ENUMERABLE` examples; 1,
    where there are more of two."""
    bins = likelihood.bins or 0
    return max(dims for dims in range(1, most + 1) if dims == 1 or bins**dims <= ENUMERABLE)


def _rows(head: Head, index: Sequence[int]) -> Head:
    """The parameters of these examples."""
    return (head[0][index], head[1][index]) if isinstance(head, tuple) else head[index]


def _said(head: Head) -> str:
    parts = head if isinstance(head, tuple) else (head,)
    return ", ".join(str(part[0].tolist()) for part in parts)

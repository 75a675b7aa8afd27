r"""Where random numbers come from.

Every random draw in genfw is asked of a `Draws` object, one stream per example:

* `Noise(seed, index)` for evaluation and sampling. A draw is a pure function of (seed, example
  index, purpose, position), so an example's number does not depend on its batch, the chunk size,
  the number of ranks or the device.
* `BatchNoise(size)` for training. It draws from torch's global generator, and stratifies time over
  the batch.

Functions take `noise: Draws | None`; None means `BatchNoise`.

References:
    Fast Splittable Pseudorandom Number Generators, Steele, Lea, Flood, 2014 (the finalizer of
    splitmix64).
"""

from __future__ import annotations

import hashlib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import SupportsIndex

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15


def mix(*keys: int | str) -> int:
    """A 63-bit seed from any number of keys; different keys, unrelated seeds.

    Example:
        >>> mix(0, "val", 7) == mix(0, "val", 7), mix(0, "val", 7) == mix(0, "val", 8)
        (True, False)
    """
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Draws(ABC):
    """Random draws for a batch of examples. `purpose` names the draw: one name, one draw."""

    @abstractmethod
    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of `like` (b, ...)."""

    @abstractmethod
    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        """Uniform numbers in (0, 1) with the shape, dtype and device of `like` (b, ...)."""

    @abstractmethod
    def time(self) -> Tensor:
        """One uniform number in [0, 1) per example, (b,) float64, stratified."""

    @abstractmethod
    def antithetic(self) -> Tensor:
        """One uniform number in [0, 1] per example, (b,) float64, in pairs u and 1 - u."""

    def lot(self, share: float) -> tuple[Tensor, float]:
        """Which examples are drawn with this probability, (m,) indices, and as how many each then
        counts: the mean of what they have, counted so, is that of all."""
        return (self.time() < share).nonzero()[:, 0], 1 / share

    @abstractmethod
    def fold(self, *keys: int | str) -> Draws:
        """Draws for the same examples, independent of these and of those under other keys."""

    @abstractmethod
    def each(self, first: int, last: int) -> Draws:
        """Draws first..last - 1 of every example, those of an example side by side."""


class BatchNoise(Draws):
    """Draws from torch's global generator, for `size` examples at once.

    `time` is stratified over a global batch of `chunks` batches of this size, of which this one is
    number `chunk`: t = (u + position / N) mod 1, positions permuted. `u` and the permutation come
    from `seed` alone where it is given, so that the chunks of one training step, on whatever ranks
    they run, cover [0, 1) together.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cpu",
        *,
        seed: int | None = None,
        chunk: int = 0,
        chunks: int = 1,
    ):
        if seed is None and chunks > 1:
            raise ValueError("chunks that stratify time together need a common seed=: none came")
        self.size, self.device = size, device
        self.seed, self.chunk, self.chunks = seed, chunk, chunks

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return torch.randn_like(_for(self.size, like))

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        tiny = torch.finfo(like.dtype).tiny
        return torch.rand_like(_for(self.size, like)).clamp_min(tiny)

    def time(self) -> Tensor:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        n = self.size * self.chunks
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        position = torch.randperm(n, generator=generator)[self.chunk * self.size :][: self.size]
        return ((offset + position.double() / n) % 1.0).to(self.device)

    def antithetic(self) -> Tensor:
        """The second half of the batch mirrors the first."""
        u = torch.rand((self.size + 1) // 2, dtype=torch.float64, device=self.device)
        return torch.cat([u, 1 - u])[: self.size]

    def lot(self, share: float) -> tuple[Tensor, float]:
        """So many of a batch, rounded up, and so one at least: as many at every step."""
        m = math.ceil(share * self.size)
        return torch.randperm(self.size, device=self.device)[:m], self.size / m

    def fold(self, *keys: int | str) -> BatchNoise:
        return self

    def each(self, first: int, last: int) -> BatchNoise:
        return BatchNoise(
            self.size * (last - first),
            self.device,
            seed=self.seed,
            chunk=self.chunk,
            chunks=self.chunks,
        )


class Noise(Draws):
    """Draws keyed by (seed, example index, purpose): the same wherever and beside whomever they
    are drawn.

    Args:
        seed: one for the whole evaluation or set of samples.
        index: (b,) integers, the examples' indices in their data set (or the samples' numbers).
        stratum: (j, m): this is draw j of m for these examples. The m times of an example are
            stratified, t_j = (u + j / m) mod 1, and everything else is independent. j may be a
            tuple, one for each row.
        draw: (b,) integers, where an example stands in several rows: which of its draws each row
            is.

    Example:
        >>> a = Noise(0, torch.arange(4)).normal("eps", torch.empty(4, 2))
        >>> b = Noise(0, torch.tensor([2])).normal("eps", torch.empty(1, 2))
        >>> bool((a[2] == b[0]).all())
        True
    """

    def __init__(
        self,
        seed: SupportsIndex,
        index: Tensor,
        stratum: tuple[int | tuple[int, ...], int] = (0, 1),
        *,
        draw: Tensor | None = None,
    ):
        if index.ndim != 1 or index.is_floating_point():
            raise ValueError(
                f"index: expected integers of shape (b,), got {index.dtype} {tuple(index.shape)}"
            )
        j, m = stratum
        if isinstance(j, tuple):
            if len(j) != len(index):
                raise ValueError(f"stratum: expected one j per index, {len(index)}, got {len(j)}")
        elif not 0 <= j < m:
            raise ValueError(f"stratum: expected (j, m) with 0 <= j < m, got {stratum}")
        if draw is not None and draw.shape != index.shape:
            raise ValueError(
                f"draw: expected one per index, {(*index.shape,)}, got {(*draw.shape,)}"
            )
        self.seed, self.index, self.stratum = operator.index(seed), index.long(), stratum
        self.draw = draw

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        centred = self._uniform64(purpose, like).mul_(2).sub_(1)  # exact, so the tails are too
        return centred.erfinv_().mul_(math.sqrt(2)).to(like.dtype)

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        u = self._uniform64(purpose, like).to(like.dtype)
        return u.clamp(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps / 2)

    def time(self) -> Tensor:
        j, m = self.stratum
        if isinstance(j, tuple):
            j = torch.tensor(j, dtype=torch.float64, device=self.index.device)
        start = _uniform(self._stream(mix(self.seed, "time")))
        return (start + j / m) % 1.0

    def antithetic(self) -> Tensor:
        """Of an example's draws, every second mirrors the one before."""
        j, _ = self.stratum
        u = _uniform(self._stream(self._by_stratum(lambda j: mix(self.seed, "antithetic", j // 2))))
        second = torch.tensor(j, device=u.device) % 2 == 1
        return torch.where(second, 1 - u, u)

    def fold(self, *keys: int | str) -> Noise:
        return Noise(mix(self.seed, *keys), self.index, self.stratum, draw=self.draw)

    def stratified(self, j: int, m: int) -> Noise:
        """Draw j of m for the same examples: stratified times, independent otherwise."""
        return Noise(self.seed, self.index, (j, m), draw=self.draw)

    def strata(self, first: int, last: int, m: int) -> Noise:
        """Draws first..last - 1 of m of every example, those of an example side by side: each as
        `stratified` gives it."""
        if not 0 <= first < last <= m:
            raise ValueError(
                f"strata: expected 0 <= first < last <= m, not 0 <= {first} < {last} <= {m}"
            )
        self._must_be_one_row_each("strata")
        index = self.index.repeat_interleave(last - first)
        return Noise(self.seed, index, (tuple(range(first, last)) * len(self.index), m))

    def each(self, first: int, last: int) -> Noise:
        """Draws first..last - 1 of every example, those of an example side by side: independent
        of one another, and each the same in whatever range it is asked for."""
        self._must_be_one_row_each("each")
        draw = torch.arange(first, last, device=self.index.device)
        index = self.index.repeat_interleave(last - first)
        return Noise(self.seed, index, self.stratum, draw=draw.repeat(len(self.index)))

    def of(self, rows: slice) -> Noise:
        """Draws for some of the examples."""
        draw = None if self.draw is None else self.draw[rows]
        j, m = self.stratum
        stratum = (j[rows] if isinstance(j, tuple) else j, m)
        return Noise(self.seed, self.index[rows], stratum, draw=draw)

    def _must_be_one_row_each(self, what: str) -> None:
        if self.draw is not None or isinstance(self.stratum[0], tuple):
            raise ValueError(f"{what}: these rows are draws of their examples already")

    def _by_stratum(self, seed_of: Callable[[int], int]) -> int | Tensor:
        """A seed that depends on the stratum, for all rows or for each."""
        j, _ = self.stratum
        if not isinstance(j, tuple):
            return seed_of(j)
        seeds = {each: seed_of(each) for each in set(j)}
        return torch.tensor([seeds[each] for each in j], device=self.index.device)

    def _stream(self, seed: int | Tensor) -> Tensor:
        """A 64-bit stream key per row."""
        keys = _stream(seed, self.index)
        return keys if self.draw is None else _splitmix(keys ^ _splitmix(self.draw + seed))

    def _uniform64(self, purpose: str, like: Tensor) -> Tensor:
        _for(len(self.index), like)
        _, m = self.stratum
        seed = self._by_stratum(lambda j: mix(self.seed, purpose, j, m))
        key = self._stream(seed).to(like.device)
        count = torch.arange(math.prod(like.shape[1:]), device=like.device)
        return _uniform(_splitmix(key[:, None] + count * _signed(_GAMMA))).reshape(like.shape)


def draws(noise: Draws | None, like: Tensor) -> Draws:
    """`noise`, or torch's global generator for the batch `like` where it is None."""
    return BatchNoise(len(like), like.device) if noise is None else noise


def _for(size: int, like: Tensor) -> Tensor:
    """`like` itself, which is to have so many examples."""
    if len(like) != size:
        raise ValueError(f"noise is for {size} examples, asked for {len(like)}")
    return like


def _stream(seed: int | Tensor, index: Tensor) -> Tensor:
    """A 64-bit stream key per example."""
    return _splitmix(_splitmix(index * _signed(_GAMMA) + seed) + seed)


def _splitmix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 on int64 (arithmetic modulo 2^64)."""
    x = (x ^ _shift(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x = x.bitwise_xor_(_shift(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift: torch's own repeats the sign bit."""
    return (x >> n).bitwise_and_((1 << (64 - n)) - 1)


def _uniform(bits: Tensor) -> Tensor:
    """52 of 64 random bits as a number in (0, 1), float64, never 0 or 1: with 53, adding a half
    would round."""
    return _shift(bits, 12).double().add_(0.5).mul_(2.0**-52)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x

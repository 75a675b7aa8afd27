"""Draws are functions of (seed, example, purpose), and they are random."""

import numpy as np
import pytest
import torch
from scipy import stats

from genfw import BatchNoise, Noise
from genfw.noise import _uniform, mix


def test_an_example_draws_the_same_alone_and_in_company(double):
    together = Noise(3, torch.arange(10)).normal("eps", torch.empty(10, 4, 2))
    for i in range(10):
        alone = Noise(3, torch.tensor([i])).normal("eps", torch.empty(1, 4, 2))
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("keys", [(), ("set", 3)])
@pytest.mark.parametrize(("first", "last"), [(0, 7), (2, 5), (6, 7)])
def test_strata_side_by_side_are_those_drawn_one_by_one(first, last, keys, double):
    """Rows of an example stand side by side; every kind of draw, at every stratum, to the bit."""
    noise, width = Noise(3, torch.tensor([8, 0, 5])).fold(*keys), last - first
    like = torch.empty(3, 4)
    together = noise.strata(first, last, 7)
    for row, j in enumerate(range(first, last)):
        alone = noise.stratified(j, 7)
        for draw in ("normal", "uniform"):
            found = getattr(together, draw)("eps", like.repeat_interleave(width, 0))
            assert torch.equal(found[row::width], getattr(alone, draw)("eps", like))
        assert torch.equal(together.time()[row::width], alone.time())
        assert torch.equal(together.antithetic()[row::width], alone.antithetic())
        folded, part = together.fold("z1"), together.of(slice(width, 2 * width))
        assert torch.equal(
            folded.normal("x", like.repeat(width, 1))[row::width],
            alone.fold("z1").normal("x", like),
        )
        assert torch.equal(part.time()[row], alone.time()[1])


def test_strata_stand_for_themselves():
    noise = Noise(0, torch.arange(2))
    with pytest.raises(ValueError, match="draws of their examples already"):
        noise.strata(0, 2, 4).each(0, 2)
    with pytest.raises(ValueError, match="draws of their examples already"):
        noise.each(0, 2).strata(0, 2, 4)
    with pytest.raises(ValueError, match="0 <= 2 < 5 <= 4"):
        noise.strata(2, 5, 4)


@pytest.mark.parametrize("other", [Noise(4, torch.arange(50)), Noise(3, torch.arange(50, 100))])
def test_other_keys_other_numbers(other):
    like = torch.empty(50, 3)
    mine = Noise(3, torch.arange(50))
    assert not (mine.normal("eps", like) == other.normal("eps", like)).any()
    assert not (mine.normal("eps", like) == mine.normal("z0", like)).any()
    assert not (mine.normal("eps", like) == mine.fold(1).normal("eps", like)).any()


def test_numbers_are_normal_and_uncorrelated_within_and_between_examples(double):
    e = Noise(0, torch.arange(20_000)).normal("eps", torch.empty(20_000, 4))
    for column in e.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    flat = torch.stack([e[:-1, 0], e[1:, 0], e[:-1, 1], e[:-1, 2], e[:-1, 3]])
    off = torch.corrcoef(flat) - torch.eye(5)
    assert off.abs().max() < 4.5 / 20_000**0.5  # standard errors


def test_purposes_and_seeds_are_uncorrelated(double):
    like, noise = torch.empty(20_000, 1), Noise(0, torch.arange(20_000))
    e = torch.cat(
        [noise.normal("a", like), noise.normal("b", like), noise.fold(1).normal("a", like)], 1
    )
    assert (torch.corrcoef(e.T) - torch.eye(3)).abs().max() < 4.5 / 20_000**0.5


def test_uniforms_stay_inside_the_open_interval():
    u = Noise(0, torch.arange(100_000)).uniform("u", torch.empty(100_000, 3))
    assert u.dtype == torch.float32 and u.min() > 0 and u.max() < 1
    assert stats.kstest(u[:, 0].numpy(), "uniform").pvalue > 1e-3


def test_no_bits_make_a_uniform_of_0_or_1_or_an_infinite_normal():
    ends = _uniform(torch.tensor([0, -1]))  # all bits zero, all bits one
    assert ends.min() > 0 and ends.max() < 1 and ends.sum() == 1
    assert torch.erfinv(2 * ends - 1).isfinite().all()


def test_normals_are_the_quantiles_of_the_uniforms(double):
    noise, like = Noise(0, torch.arange(2000)), torch.empty(2000, 50)
    wanted = stats.norm.ppf(noise._uniform64("a", like).numpy())
    assert np.abs(noise.normal("a", like).numpy() - wanted).max() < 1e-10


def test_times_of_one_example_are_stratified_over_its_draws():
    noise, m = Noise(0, torch.arange(5)), 8
    t = torch.stack([noise.stratified(j, m).time() for j in range(m)])
    assert torch.allclose(
        (t * m).floor().sort(0).values, torch.arange(m).double()[:, None].expand(m, 5)
    )
    one = noise.stratified(0, m).normal("eps", torch.empty(5, 2))
    assert not (one == noise.stratified(1, m).normal("eps", torch.empty(5, 2))).any()


def test_a_batch_covers_time_evenly():
    t = BatchNoise(64).time()
    assert torch.equal((t * 64).floor().sort().values, torch.arange(64).double())
    assert t.dtype == torch.float64 and (t != t.float()).any()  # not single precision in disguise


def test_chunks_of_one_step_cover_time_together():
    chunks = [BatchNoise(16, seed=7, chunk=c, chunks=4).time() for c in range(4)]
    t = torch.cat(chunks)
    assert torch.equal((t * 64).floor().sort().values, torch.arange(64).double())
    assert not torch.equal(
        t, torch.cat([BatchNoise(16, seed=8, chunk=c, chunks=4).time() for c in range(4)])
    )
    assert chunks[0].std() > 0.2  # positions are permuted: a chunk is no stretch of time


@pytest.mark.parametrize(
    ("size", "share", "m"), [(8, 0.25, 2), (6, 0.3, 2), (3, 1e-9, 1), (4, 1.0, 4)]
)
def test_a_lot_is_so_many_of_a_batch_rounded_up_and_counts_for_all(size, share, m):
    chosen, each = BatchNoise(size).lot(share)
    assert len(set(chosen.tolist())) == m
    assert each * m == pytest.approx(size)


def test_a_lot_gives_every_example_the_same_chance_whatever_its_time():
    n = 4000
    counts, late = torch.zeros(8), 0
    for seed in range(n):
        noise = BatchNoise(8, seed=seed)
        chosen, _ = noise.fold("decoder").lot(0.25)
        counts[chosen] += 1
        late += int((noise.time()[chosen] > 0.5).sum())
    assert ((counts / n - 0.25).abs() < 5 * (0.25 * 0.75 / n) ** 0.5).all()
    assert abs(late / (2 * n) - 0.5) < 5 * 0.5 / (2 * n) ** 0.5


def test_a_lot_of_keyed_draws_is_of_every_example_by_itself():
    chosen, each = Noise(0, torch.arange(4000)).lot(0.125)
    assert each == 8
    assert abs(len(chosen) / 4000 - 0.125) < 5 * (0.125 * 0.875 / 4000) ** 0.5
    alone = [i for i in range(50) if len(Noise(0, torch.tensor([i])).lot(0.125)[0])]
    assert alone == [i for i in chosen.tolist() if i < 50]


def test_mix_separates_keys():
    keys = [(0, 1), (1, 0), ("01",), (0, "1"), ("0", 1), (1,), (0, 1, 0)]
    assert len({mix(*key) for key in keys}) == len(keys)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="integers of shape"):
        Noise(0, torch.rand(3))
    with pytest.raises(ValueError, match="0 <= j < m"):
        Noise(0, torch.arange(3), (2, 2))
    with pytest.raises(ValueError, match="3 examples, asked for 4"):
        Noise(0, torch.arange(3)).normal("x", torch.empty(4, 1))
    with pytest.raises(ValueError, match="common seed"):
        BatchNoise(4, chunks=2)


def test_draws_of_an_example_are_the_same_in_any_range_and_unrelated(double):
    noise, like = Noise(3, torch.arange(100)), torch.empty(300 * 100, 2)
    every = noise.each(0, 300).normal("eps", like).view(100, 300, 2)
    some = noise.of(slice(4, 6)).each(7, 9).fold().normal("eps", torch.empty(4, 2))
    plain = Noise(mix(3), torch.arange(100)).each(0, 300).normal("eps", like).view(100, 300, 2)
    assert torch.equal(some.view(2, 2, 2), plain[4:6, 7:9])
    assert every.flatten().unique().numel() == every.numel()
    assert stats.kstest(every.flatten().numpy(), "norm").pvalue > 1e-3
    by_draw, by_example = every[..., 0].T, every[..., 0]
    for rows in (by_draw[:100], by_example):
        off = torch.corrcoef(rows) - torch.eye(100)
        assert off.abs().max() < 5 / rows.shape[1] ** 0.5  # standard errors
    with pytest.raises(ValueError, match="draws of their examples already"):
        noise.each(0, 2).each(0, 2)
    with pytest.raises(ValueError, match="one per index"):
        Noise(0, torch.arange(3), draw=torch.arange(2))


@pytest.mark.parametrize("asked", ["time", "antithetic"])
def test_times_of_an_examples_draws_are_unrelated(asked):
    """Draws side by side are no strata: independent, and the same in whatever range."""
    noise, n = Noise(3, torch.arange(1000)), 1000
    t = getattr(noise.each(0, 2), asked)().view(n, 2)
    assert torch.equal(getattr(noise.each(1, 2), asked)(), t[:, 1])
    assert abs(torch.corrcoef(t.T)[0, 1]) < 5 / n**0.5  # standard errors
    assert all(stats.kstest(each.numpy(), "uniform").pvalue > 1e-3 for each in t.T)


def test_a_seed_of_numpy_is_the_same_seed():
    one, other = (Noise(seed, torch.arange(3)).time() for seed in (7, np.int64(7)))
    assert torch.equal(one, other)


@pytest.mark.parametrize("noise", [BatchNoise(1), Noise(0, torch.arange(1))])
@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_noise_for_one_example_is_not_for_three(noise, draw):
    with pytest.raises(ValueError, match="noise is for 1 examples, asked for 3"):
        getattr(noise, draw)("eps", torch.empty(3, 2))

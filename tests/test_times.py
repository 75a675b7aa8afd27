"""Any choice of times gives the same integral over log SNR; what differs is the variance."""

import pytest
import tiny
import torch
from oracles import GaussianDenoiser
from scipy import stats

from genfw import (
    VDM,
    BatchNoise,
    Cosine,
    GaussianLikelihood,
    ImportanceTime,
    Linear,
    LogLinear,
    Noise,
    TimeSampler,
    UniformLogSNR,
    UniformTime,
)
from genfw.diffusion.denoising import Denoising

ALL = pytest.mark.parametrize("cls", TimeSampler.registry.values())


def bump(log_snr):
    """Something to integrate: a narrow bump and a slope."""
    return (-0.5 * ((log_snr - 1) / 0.7).square()).exp() + 0.1 * log_snr.sigmoid()


def biased(times):
    """Any estimate will do, a wrong one too."""
    if isinstance(times, ImportanceTime):
        times.count.fill_(1.0)
        times.total.copy_(torch.rand(times.bins).double().square() * 10)
        times.total[3] = 0.0
    return times


@ALL
@pytest.mark.parametrize("schedule", [Cosine(5.0, -6.0), Linear(5.0, -6.0)])
def test_the_integral_over_log_snr_is_exact(cls, schedule):
    """The mean over u of measure x f is the integral of f, and t is where log SNR is drawn."""
    n, times = 200_000, biased(cls())
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t, measure = times(u, schedule)
    got = (measure * bump(schedule.log_snr(t))).mean()
    grid = torch.linspace(-6, 5, 20_001, dtype=torch.float64)
    assert got.item() == pytest.approx(torch.trapezoid(bump(grid), grid).item(), rel=5e-4)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(times(ends, schedule)[0], ends, rtol=0, atol=1e-9)
    slope = -(schedule.log_snr(t)[1:] - schedule.log_snr(t)[:-1]) * n
    assert ((slope / measure[1:] - 1).abs() < 0.02).double().mean() > 0.99


@ALL
@pytest.mark.parametrize("schedule", [Cosine(5.0, -6.0), Linear(5.0, -6.0)])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_sum_over_steps_is_exact(cls, schedule, steps):
    """The mean over u of measure x f is the sum of expm1(what a step gains) f, that of dt x f the
    mean over steps; t is where a step ends."""
    n, times = 200_000, biased(cls())
    t, measure, dt = times.in_steps((torch.arange(n).double() + 0.5) / n, steps, schedule)
    ends = torch.arange(steps + 1).double() / steps
    log_snr = schedule.log_snr(ends)
    assert torch.isin(t, ends[1:]).all()
    assert dt.max() < 2.001  # no step is drawn less than half as often as evenly
    for got, wanted in (
        (measure * bump(schedule.log_snr(t)), (-log_snr.diff()).expm1() * bump(log_snr[1:])),
        (dt * bump(schedule.log_snr(t)), bump(log_snr[1:]) / steps),
    ):
        assert got.mean().item() == pytest.approx(wanted.sum().item(), rel=5e-3)


@pytest.mark.parametrize("schedule", [Cosine(13.3, -10.0), Linear(13.3, -10.0)])
def test_a_bound_in_steps_is_evaluated_where_log_snr_falls(schedule, double):
    """The first steps of these cost most, and of steps drawn evenly few are the first."""
    vdm = VDM(GaussianDenoiser(schedule, 0.2, 0.7), GaussianLikelihood(), steps=100, shape=(1,))
    x, noise = 0.2 + 0.7 * torch.randn(20_000, 1), Noise(0, torch.arange(20_000))
    even, chosen = (each.elbo(x, noise=noise).levels[0] for each in (vdm, vdm.for_evaluation()))
    difference = even.mean() - chosen.mean()
    assert abs(difference) < 4 * ((even.var() + chosen.var()) / len(x)).sqrt()
    assert chosen.var() < even.var() / 10


@ALL
@pytest.mark.parametrize("noise", [BatchNoise(1000), Noise(0, torch.arange(1000))])
def test_every_number_is_uniform(cls, noise):
    u = cls().draw(noise, torch.empty(1000, 3))
    assert u.dtype == torch.float64 and u.shape == (1000,)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4


def test_antithetic_numbers_come_in_pairs_and_pairs_are_independent():
    times = TimeSampler.registry["antithetic"]()
    for size in (10, 11):
        u = times.draw(BatchNoise(size), torch.empty(size, 1))
        half = (size + 1) // 2
        assert torch.equal(u[half:], 1 - u[: size - half])
        assert u[:half].unique().numel() == half
    noise = Noise(0, torch.arange(5))
    u = torch.stack([times.draw(noise.stratified(j, 4), torch.empty(5, 1)) for j in range(4)])
    assert torch.equal(u[1], 1 - u[0]) and torch.equal(u[3], 1 - u[2])
    assert not (u[0] == u[2]).any()


def test_independent_numbers_are_neither_stratified_nor_paired():
    times = TimeSampler.registry["independent"]()
    spread = torch.stack([times.draw(BatchNoise(64), torch.empty(64, 1)) for _ in range(2000)])
    expected = 1 / 12 / 64
    assert spread.mean(1).var().item() == pytest.approx(expected, rel=0.15)  # 5 standard errors
    even = torch.stack([BatchNoise(64).time() for _ in range(200)])
    assert even.mean(1).var() < expected / 10


@ALL
def test_the_bound_is_the_same(cls, double):
    """On an oracle, to standard errors; batches are the draws, as they may be correlated within."""
    vdm = VDM(GaussianDenoiser(Cosine(5.0, -6.0), 0.2, 0.7), GaussianLikelihood(), shape=(1,))
    read = VDM(vdm.denoiser, vdm.likelihood, shape=(1,), times=biased(cls()))
    read.times.eval()  # the estimate stays wrong
    x = 0.2 + 0.7 * torch.randn(1000, 1)

    def batches(model):
        return torch.stack([model.denoising(x).cost.mean() for _ in range(40)])

    a, b = batches(read), batches(vdm)
    assert abs(a.mean() - b.mean()) < 4.5 * ((a.var() + b.var()) / 40).sqrt()


def learned(vdm, x, steps=60, **kwargs):
    vdm.times = ImportanceTime(bins=16, **kwargs)
    vdm.train()
    for _ in range(steps):
        vdm.denoising(x)
    return vdm.times


def test_importance_learns_the_root_mean_square_and_lowers_the_variance(double):
    vdm = VDM(GaussianDenoiser(Cosine(7.0, -9.0), 0.2, 0.7), GaussianLikelihood(), shape=(1,))
    x = 0.2 + 0.7 * torch.randn(4000, 1)
    times = learned(vdm, x, floor=0.05)
    assert torch.allclose(times.density().sum(), torch.tensor(1.0))
    assert times.density().min() >= 0.05 / 16
    log_snr = 7.0 - 16 * (torch.arange(16_000) + 0.5) / 16_000
    snr = log_snr.exp() * 0.7**2  # eps - eps_hat is normal with variance snr / (1 + snr)
    root = (snr / (1 + snr)).square().view(16, 1000).mean(1).sqrt()
    assert torch.allclose(times.density(), 0.95 * root / root.sum() + 0.05 / 16, rtol=0.1)

    def variance(sampler):
        read = VDM(vdm.denoiser, vdm.likelihood, shape=(1,), times=sampler.eval())
        return read.denoising(0.2 + 0.7 * torch.randn(100_000, 1)).cost.var()

    assert variance(times) < 0.7 * min(variance(UniformTime()), variance(UniformLogSNR()))


def test_importance_is_uniform_until_it_has_seen_every_level():
    times = ImportanceTime(bins=4)
    assert torch.equal(times.density(), torch.full((4,), 0.25, dtype=torch.float64))
    times.count[:3], times.total[:3] = 1.0, torch.tensor([1.0, 100.0, 1.0]).double()
    assert torch.equal(times.density(), torch.full((4,), 0.25, dtype=torch.float64))
    times.count[3] = 1.0  # all seen, nothing lost there
    expected = 0.9 * torch.tensor([1, 10, 1, 0]).double() / 12 + 0.025
    assert torch.allclose(times.density(), expected)


def test_importance_adds_what_a_level_cost_to_what_it_remembers(double):
    """Counts and squares of 1/2 ||eps - eps_hat||^2, from the data side; both fade by `decay`, or
    what was costly once would stay so."""
    times, one = ImportanceTime(bins=4, decay=0.75), torch.ones(5)
    draws = [
        ([3.0, 1.5, -0.5, -3.9, -4.0], [2.0, 4.0, 6.0, 8.0, 10.0]),
        ([4.0, 3.9, 0.5, 4.5, -5.0], [1.0, 1.0, 3.0, 2.0, 4.0]),  # the ends may have moved
    ]
    counts, totals = ([1, 1, 1, 2], [3, 1, 0, 1]), ([1, 4, 9, 16 + 25], [1.5, 2.25, 0, 4])
    for log_snr, error in draws:
        seen = Denoising(one, torch.tensor(log_snr), torch.tensor(error), one, one)
        times.observe(seen, LogLinear(4.0, -4.0))
    for kept, (first, second) in ((times.count, counts), (times.total, totals)):
        assert torch.allclose(kept, 0.75 * torch.tensor(first) + torch.tensor(second))


def test_importance_learns_in_training_only_and_is_in_the_checkpoint(double):
    vdm = VDM(GaussianDenoiser(Cosine(5.0, -6.0), 0.2, 0.7), GaussianLikelihood(), shape=(1,))
    x = torch.randn(500, 1)
    times = learned(vdm, x, steps=3)
    state = {k: v.clone() for k, v in vdm.state_dict().items()}
    assert {"times.count", "times.total"} <= state.keys() and (state["times.count"] > 0).all()
    vdm.for_evaluation().elbo(x)
    with torch.no_grad():
        vdm.elbo(x)
    vdm.eval().elbo(x)
    assert all(torch.equal(v, state[k]) for k, v in vdm.state_dict().items())
    other = ImportanceTime(bins=16)
    other.load_state_dict(times.state_dict())
    assert torch.equal(other.density(), times.density())
    assert isinstance(vdm.for_evaluation().times, UniformLogSNR)


def rank(index, world, file, out):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=index, world_size=world
    )
    torch.manual_seed(index)
    model = tiny.vdm()
    model.times = ImportanceTime(bins=4)
    for _ in range(3):
        model.denoising(torch.randint(3, (8, *tiny.SHAPE)))
    torch.save(model.times.state_dict(), f"{out}/{index}.pt")
    torch.distributed.destroy_process_group()


def test_all_ranks_hold_one_density(tmp_path):
    """What each saw is summed."""
    arguments = (2, tmp_path / "meet", tmp_path)
    torch.multiprocessing.start_processes(rank, arguments, nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    kept = 1 + 0.99 + 0.99**2
    assert one["count"].sum().item() == pytest.approx(16 * kept)


@pytest.mark.parametrize("wrong", [{"bins": 0}, {"floor": 0.0}, {"floor": 1.5}, {"decay": 1.0}])
def test_bad_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        ImportanceTime(**wrong)

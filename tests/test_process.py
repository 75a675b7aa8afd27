"""Bayes: the three conditionals of the forward process agree, to 1e-12 in float64."""

import pytest
import torch

from genfw import NoiseSchedule, marginal, posterior, transition

SCHEDULES = pytest.mark.parametrize("cls", NoiseSchedule.registry.values())
TIMES = pytest.mark.parametrize("times", [(0.0, 1.0), (0.2, 0.7), (0.5, 0.5001), (0.0, 0.004)])


@SCHEDULES
@TIMES
def test_bayes(cls, times, double):
    """q(z_s | z_t, x) q(z_t | x) = q(z_t | z_s) q(z_s | x), at any point."""
    schedule = cls(7.0, -7.0)
    s, t = (torch.tensor(time) for time in times)
    x = torch.randn(5, 3)
    z_s = marginal(x, s, schedule).sample()
    z_t = transition(z_s, s, t, schedule).sample()
    left = posterior(z_t, x, s, t, schedule).log_prob(z_s) + marginal(x, t, schedule).log_prob(z_t)
    right = transition(z_s, s, t, schedule).log_prob(z_t) + marginal(x, s, schedule).log_prob(z_s)
    assert torch.allclose(left, right, rtol=1e-11, atol=1e-10)


@SCHEDULES
@TIMES
def test_transitions_compose(cls, times, double):
    """Means and variances of marginal(s) then transition(s, t) are those of marginal(t)."""
    schedule = cls(13.3, -10.0)
    s, t = (torch.tensor(time) for time in times)
    x = torch.randn(5, 3)
    first, second = marginal(x, s, schedule), transition(torch.ones(5, 3), s, t, schedule)
    gain = second.mean  # alpha_ts, at z_s = 1
    whole = marginal(x, t, schedule)
    assert torch.allclose(gain * first.mean, whole.mean, rtol=0, atol=1e-12)
    assert torch.allclose(gain**2 * first.std**2 + second.std**2, whole.std**2, rtol=0, atol=1e-12)


@SCHEDULES
def test_posterior_is_luo_84_written_out(cls, double):
    schedule, s, t = cls(7.0, -7.0), torch.tensor(0.3), torch.tensor(0.6)
    (a_s, a_t), (v_s, v_t) = (
        [f(u) for u in (s, t)] for f in (schedule.alpha, lambda u: schedule.sigma(u) ** 2)
    )
    a_ts = a_t / a_s
    v_ts = v_t - a_ts**2 * v_s
    z_t, x = torch.randn(4, 2), torch.randn(4, 2)
    q = posterior(z_t, x, s, t, schedule)
    mean = (a_ts * v_s * z_t + a_s * v_ts * x) / v_t
    assert torch.allclose(q.mean, mean, rtol=0, atol=1e-12)
    assert torch.allclose(q.std**2, v_ts * v_s / v_t * torch.ones(4, 2), rtol=0, atol=1e-12)


def test_a_step_backwards_is_refused(double):
    """Of one example among others, and named: its variance would be the root of a negative."""
    schedule, x = NoiseSchedule.registry["cosine"](7.0, -7.0), torch.randn(3, 2)
    s, t = torch.tensor([0.1, 0.6, 0.2]), torch.tensor(0.5)
    for step in (lambda: transition(x, s, t, schedule), lambda: posterior(x, x, s, t, schedule)):
        with pytest.raises(ValueError, match=r"expected s <= t, got s=0.6, t=0.5"):
            step()


def test_times_may_differ_between_examples(double):
    schedule = next(iter(NoiseSchedule.registry.values()))(7.0, -7.0)
    x, t = torch.randn(3, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    together = marginal(x, t, schedule)
    for i in range(3):
        alone = marginal(x[i : i + 1], t[i], schedule)
        assert torch.equal(alone.mean[0], together.mean[i]) and torch.equal(
            alone.std[0], together.std[i]
        )


def test_times_may_be_numbers():
    """As a tensor of them in float64 says, whatever the precision of the data."""
    schedule, x = NoiseSchedule.registry["cosine"](7.0, -7.0), torch.randn(3, 2)
    s, t = (torch.tensor(each, dtype=torch.float64) for each in (0.2, 0.7))
    for one, other in (
        (marginal(x, 0.2, schedule), marginal(x, s, schedule)),
        (transition(x, 0.2, 0.7, schedule), transition(x, s, t, schedule)),
        (posterior(x, x, 0.2, t, schedule), posterior(x, x, s, t, schedule)),
        (marginal(x, 1.0, schedule), marginal(x, torch.ones(()), schedule)),
    ):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)
        assert one.mean.dtype == x.dtype
    with pytest.raises(ValueError, match=r"expected s <= t, got s=0.7, t=0.2"):
        transition(x, 0.7, 0.2, schedule)

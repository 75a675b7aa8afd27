"""Each schedule is the one its paper states; what is true of all of them is in test_laws."""

import math
from functools import partial

import pytest
import torch
from scipy import stats
from torch import nn

from genfw import Cosine, Laplace, Linear, LogLinear, LogNormal, NoiseSchedule, Sigmoid
from genfw.testing import SCHEDULE_LAWS
from genfw.train.resolvers import log_snr_max

ALL = pytest.mark.parametrize("cls", NoiseSchedule.registry.values())


@ALL
def test_closed_forms_equal_autograd_and_bisection(cls):
    schedule, u = cls(13.3, -10.0), torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert torch.allclose(
        schedule.curve_slope(u), NoiseSchedule.curve_slope(schedule, u), rtol=1e-9
    )
    log_snr = schedule.curve(u)
    assert torch.allclose(NoiseSchedule.curve_inverse(schedule, log_snr), u, rtol=0, atol=1e-12)
    assert torch.allclose(schedule.curve_inverse(log_snr), u, rtol=0, atol=1e-12)


@ALL
def test_one_is_made_where_nothing_is_computed(cls):
    """As models are whose weights come later."""
    with torch.device("meta"):
        schedule = cls(7.9, -10.0)
    assert schedule.slope(torch.tensor(0.5, device="meta")).shape == ()


def test_a_slope_has_a_gradient_where_one_is_wanted():
    """Of one that is differentiated: of time, or of its own parameters."""

    class Own(NoiseSchedule):
        def log_snr(self, t):
            return 3 - 6 * t.square()

    schedule, t = Own(2.0, -2.0), torch.rand(3)
    assert not schedule.slope(t).requires_grad
    assert schedule.slope(t.requires_grad_()).requires_grad


def test_linear_is_ddpm_and_loglinear_is_not():
    """The product of 1 - beta_i over many small steps, beta linear, against alpha^2 in closed
    form."""
    steps, t = 200_000, 0.37
    schedule = Linear(30.0, -10.1)  # ends far out: the curve as it stands
    u = schedule.inverse(schedule.curve(torch.tensor(t, dtype=torch.float64)))
    i = (torch.arange(int(steps * t), dtype=torch.float64) + 0.5) / steps
    log_alpha_bar = torch.log1p(-(0.1 + 19.9 * i) / steps).sum()
    assert (schedule.alpha(u) ** 2).log().item() == pytest.approx(log_alpha_bar.item(), rel=1e-3)
    straight = LogLinear(30.0, -10.1)
    assert abs(straight.log_snr(torch.tensor(0.5)) - schedule.log_snr(torch.tensor(0.5))) > 1


def test_cosine_is_nichol_and_dhariwal():
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    curve = Cosine(20.0, -20.0).curve(t)
    assert torch.allclose(curve.sigmoid(), torch.cos(math.pi / 2 * t) ** 2, rtol=0, atol=1e-14)
    shifted = Cosine(20.0, -20.0, shift=-3.0).curve(t)
    assert torch.allclose(shifted, curve - 3)


def test_sigmoid_is_jabri_fleet_and_chen():
    """Their pseudocode, line by line."""
    start, end, tau = -2.0, 3.0, 0.7

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    v_start, v_end = sigmoid(start / tau), sigmoid(end / tau)
    for t in (0.01, 0.3, 0.5, 0.99):
        gamma = (v_end - sigmoid((t * (end - start) + start) / tau)) / (v_end - v_start)
        curve = Sigmoid(9.0, -9.0, start, end, tau).curve(torch.tensor(t, dtype=torch.float64))
        assert curve.sigmoid().item() == pytest.approx(gamma, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "density"),
    [
        (LogNormal(8.0, -9.0), stats.norm(2.4, 2.4)),  # log sigma ~ N(-1.2, 1.2^2)
        (LogNormal(8.0, -9.0, p_mean=0.5, p_std=2.0), stats.norm(-1.0, 4.0)),
        (Laplace(8.0, -9.0), stats.laplace(0.0, 0.5)),
        (Laplace(8.0, -9.0, mean=-1.0, scale=2.0), stats.laplace(-1.0, 2.0)),
    ],
)
def test_edm_and_laplace_are_densities_of_log_snr(schedule, density):
    """t is the share of the density above log SNR, and the slope its reciprocal."""
    u = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    log_snr = schedule.curve(u)
    assert torch.allclose(torch.from_numpy(density.sf(log_snr)), u, rtol=1e-10)
    assert torch.allclose(
        schedule.curve_slope(u), 1 / torch.from_numpy(density.pdf(log_snr)), rtol=1e-9
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Sigmoid(5.0, -5.0, start=3.0, end=-3.0),
        lambda: Sigmoid(5.0, -5.0, tau=0.0),
        lambda: LogNormal(5.0, -5.0, p_std=0.0),
        lambda: Laplace(5.0, -5.0, scale=-1.0),
        lambda: Linear(5.0, -5.0, beta_min=3.0, beta_max=2.0),
    ],
)
def test_a_shape_that_does_not_fall_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()


@pytest.mark.parametrize("cls", [LogNormal, Laplace])
def test_ends_that_float64_cannot_tell_from_the_end_of_the_curve_are_refused(cls):
    with pytest.raises(ValueError, match=r"nearer to u = 0 or u = 1 than float64"):
        cls(13.3, -40.0)


@pytest.mark.parametrize(
    "far",
    [
        partial(Sigmoid, tau=0.004),  # sinh w is more than a float64 holds
        partial(Sigmoid, start=-1e4),
        partial(LogNormal, p_mean=5.0),  # the data end lies seven deviations out
    ],
)
@pytest.mark.parametrize("law", SCHEDULE_LAWS)
def test_the_laws_hold_of_steep_and_of_shifted_curves(far, law):
    law(far)


def test_a_new_schedule_states_its_curve_and_inherits_the_rest():
    class Square(NoiseSchedule):
        def log_snr(self, t):
            return 10 - 30 * t**2

    schedule = Square(8.0, -9.0)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert schedule.log_snr(t)[[0, 2]].tolist() == [8.0, -9.0]
    assert torch.allclose(schedule.inverse(schedule.log_snr(t)), t, rtol=0, atol=1e-9)
    u = (2 / 30) ** 0.5 + ((19 / 30) ** 0.5 - (2 / 30) ** 0.5) * t
    assert torch.allclose(schedule.log_snr(t), 10 - 30 * u**2)
    with torch.inference_mode():
        assert torch.allclose(schedule.slope(t), 60 * u * (u[-1] - u[0]))
    with pytest.raises(ValueError, match=r"Square reaches log SNR 10 .* asked for 12"):
        Square(12.0, -9.0)


def test_a_schedule_made_of_another_keeps_no_closed_form_of_its_parent():
    class Root(LogLinear):
        def log_snr(self, t):
            return super().log_snr(t**0.5)

    class Steeper(Cosine):
        def log_snr(self, t):
            return 1.5 * super().curve(t)

    class Later(Steeper):
        def log_snr(self, t):
            return super().log_snr(t) + 1

    class Same(Later):
        pass

    for law in SCHEDULE_LAWS:
        law(Same)
    u = torch.tensor(0.3, dtype=torch.float64)
    assert Same(9.0, -9.0).curve(u) == 1.5 * Cosine(9.0, -9.0).curve(u) + 1
    schedule, t = Root(9.0, -9.0), torch.linspace(0.01, 1, 12, dtype=torch.float64)
    assert torch.allclose(schedule.log_snr(t), 9 - 18 * t.sqrt(), rtol=0, atol=1e-4)
    assert torch.allclose(schedule.inverse(schedule.log_snr(t)), t, rtol=0, atol=1e-9)
    assert torch.allclose(schedule.slope(t), 9 / t.sqrt(), rtol=1e-6)


def test_a_new_schedule_that_sets_its_numbers_too_late_is_told():
    class Power(NoiseSchedule):
        def __init__(self, log_snr_max, log_snr_min, power=2.0):
            super().__init__(log_snr_max, log_snr_min)
            self.power = power

        def log_snr(self, t):
            return 10 - 30 * t**self.power

    with pytest.raises(TypeError, match=r"no attribute 'power': set it before super\(\).__init__"):
        Power(8.0, -9.0)


class Bent(NoiseSchedule):
    """log SNR a learned power of t: somebody else's schedule with a parameter."""

    def __init__(self, log_snr_max, log_snr_min):
        super().__init__(log_snr_max, log_snr_min)
        self.log_power = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def piece(self):
        return 0.0, 1.0

    def log_snr(self, t):
        power = self.log_power.exp()
        return self.log_snr_max - (self.log_snr_max - self.log_snr_min) * t**power


@pytest.mark.parametrize("law", SCHEDULE_LAWS)
def test_the_laws_hold_of_a_schedule_with_a_parameter(law):
    law(Bent)


def test_the_shape_of_any_learned_schedule_gets_its_gradient():
    """log SNR held still does not move with it; the slope there does as on paper: with p the power
    and u = t^p, span p t^(p - 1) at t = u^(1/p) is span p u^(1 - 1/p)."""
    schedule, t = Bent(8.0, -9.0), torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    p = schedule.log_power
    still = schedule.still(t)
    assert torch.equal(still, t)
    for log_snr, slope in zip(schedule.log_snr(still), schedule.slope(still), strict=True):
        (held,) = torch.autograd.grad(log_snr, p, retain_graph=True)
        assert abs(held) < 1e-12
        (found,) = torch.autograd.grad(slope, p, retain_graph=True)
        power = p.detach().exp().requires_grad_()
        u = ((8.0 - log_snr) / 17.0).detach()
        (expected,) = torch.autograd.grad(17.0 * power * u ** (1 - 1 / power), power)
        assert found.item() == pytest.approx((expected * power).item(), rel=1e-6)


def test_a_new_schedule_whose_parameter_comes_too_late_is_told_how():
    class Unsaid(Bent):
        piece = NoiseSchedule.piece

    with pytest.raises(TypeError, match=r"no attribute 'log_power': .* by construction .* `piece`"):
        Unsaid(8.0, -9.0)


@ALL
def test_bad_ends_are_refused(cls):
    with pytest.raises(ValueError, match="must be finite"):
        cls(math.inf, -10.0)
    with pytest.raises(ValueError, match="must exceed"):
        cls(-10.0, 10.0)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("cosine", "shift"), ("linear", "beta_max"), ("edm", "p_mean"), ("laplace", "mean")),
        *(("sigmoid", "start"), ("sigmoid", "end"), ("sigmoid", "tau")),
        *(("linear", "beta_min"), ("edm", "p_std"), ("laplace", "scale")),
    ],
)
def test_an_argument_that_is_no_number_is_named(name, argument):
    with pytest.raises(
        ValueError, match=f"{argument}: expected a finite (positive )?number, got inf"
    ):
        NoiseSchedule.registry[name](7.0, -10.0, **{argument: math.inf})


def test_default_end_point_separates_the_bins():
    """At t = 0 half a bin is about three noise deviations: 1/K = 3.02 sigma_0 / alpha_0."""
    for bins in (2, 17, 256):
        schedule = Cosine(log_snr_max(bins), -10.0)
        zero = torch.tensor(0.0)
        assert (schedule.sigma(zero) / schedule.alpha(zero)).item() == pytest.approx(
            1 / (3.02 * bins)
        )

"""Down the chain: equalities between samplers, and the order with which they converge."""

import itertools
import math
import operator

import pytest
import torch
from oracles import GaussianDenoiser, LinearDenoiser

import genfw
from genfw import (
    DDIM,
    Ancestral,
    AngleGrid,
    Churn,
    Cosine,
    DPMSolver,
    DPMSolverSDE,
    Euler,
    Heun,
    KarrasGrid,
    Langevin,
    LinearParameterization,
    LogLinear,
    LogSNRGrid,
    NetworkDenoiser,
    Noise,
    NoiseSchedule,
    Parameterization,
    PredictorCorrector,
    Sampler,
    TimeGrid,
    UniPC,
    posterior,
)
from genfw.diffusion.sampler.langevin import walk
from genfw.diffusion.sampler.multistep import in_the_middle, polynomial_weights
from genfw.nets import MLP
from genfw.noise import Draws
from genfw.parameterization import DiscreteParameterization
from genfw.testing.oracles import MixtureDenoiser
from genfw.testing.small import vdm

MEAN, STD = 0.3, 0.4


def registered(interface):
    return pytest.mark.parametrize("cls", interface.registry.values(), ids=interface.registry)


def keys(n=8):
    return Noise(0, torch.arange(n))


def mixture(schedule=None):
    """A flow that is not linear."""
    means = torch.tensor([[-0.7, 0.2, 0.1], [0.5, -0.4, 0.6]], dtype=torch.float64)
    return MixtureDenoiser(Cosine(7.0, -7.0) if schedule is None else schedule, means, 0.2)


def equal(one, other, n=8, tolerance=1e-9):
    z = torch.randn(n, 3, dtype=torch.float64)
    found, expected = (each(mixture(), z, noise=keys(n)) for each in (one, other))
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grid", TimeGrid.registry.values(), ids=TimeGrid.registry)
def test_ddim_with_all_the_noise_is_ancestral(grid):
    assert equal(DDIM(7, eta=1.0, grid=grid()), Ancestral(7, grid()))
    assert not equal(DDIM(7, eta=0.9, grid=grid()), Ancestral(7, grid()))


def test_ddim_without_noise_is_euler_in_z_over_alpha_against_sigma_over_alpha():
    assert equal(DDIM(7, eta=0.0), Euler(7))
    assert not equal(DDIM(7, eta=0.1), Euler(7))


def test_the_first_step_of_a_multistep_solver_is_of_order_one():
    assert equal(DPMSolver(1), DDIM(1))
    assert equal(UniPC(1), DDIM(1))
    assert equal(DPMSolverSDE(1), Ancestral(1))
    assert not equal(DPMSolver(2), DDIM(2))
    assert not equal(DPMSolverSDE(2), Ancestral(2))


def test_edm_without_churn_is_heun():
    assert equal(Churn(5, churn=0.0), Heun(5))
    assert equal(Churn(5, churn=9.0, low=1e4, high=1e5), Heun(5))
    assert equal(Churn(5, churn=9.0, low=0.0, high=1e-5), Heun(5))
    assert not equal(Churn(5, churn=1.0), Heun(5))


@pytest.mark.parametrize(("churn", "factor"), [(2.0, 1.2), (30.0, 2**0.5)], ids=["2", "most"])
def test_churn_adds_what_it_says(churn, factor, double):
    """n^ = (1 + gamma) n, gamma at most sqrt 2 - 1: by the moments of the latent that the denoiser
    is shown first."""
    schedule, shown = Cosine(7.0, -7.0), []
    denoiser, n, t = GaussianDenoiser(schedule, MEAN, STD), 50_000, torch.tensor(0.5)
    z = torch.full((n, 1), 0.7)
    with denoiser.register_forward_pre_hook(lambda _, given: shown.append(given)):
        Churn(10, churn=churn, inflation=1.5).step(
            denoiser, z, t, torch.tensor(0.4), None, noise=keys(n)
        )
    z_hat, t_hat, _ = shown[0]
    before, after = (schedule.sigma(each) / schedule.alpha(each) for each in (t, t_hat))
    assert torch.isclose(after, factor * before)
    u = z_hat / schedule.alpha(t_hat)
    std = 1.5 * (after**2 - before**2).sqrt()
    assert abs(u.mean() - 0.7 / schedule.alpha(t)) < 5 * std / n**0.5
    assert abs(u.std() / std - 1) < 5 / (2 * n) ** 0.5


def exact_flow(z, schedule):
    """Where the probability flow of N(MEAN, STD^2) takes z from t = 1 to t = 0: it keeps the
    number of standard deviations from the mean."""
    alpha, sigma = (f(torch.tensor([1.0, 0.0])) for f in (schedule.alpha, schedule.sigma))
    std = (alpha**2 * STD**2 + sigma**2).sqrt()
    return alpha[1] * MEAN + std[1] / std[0] * (z - alpha[0] * MEAN)


@pytest.mark.parametrize("schedule", [LogLinear(5.0, -5.0), Cosine(5.0, -5.0)], ids=str)
@pytest.mark.parametrize(
    ("make", "order"),
    [
        (Euler, 1),
        (DDIM, 1),
        (Heun, 2),
        (lambda *a, **k: Churn(*a, churn=0.0, **k), 2),
        (DPMSolver, 2),
        (lambda *a, **k: UniPC(*a, order=1, **k), 2),
        (lambda *a, **k: UniPC(*a, order=2, **k), 3),
        (lambda *a, **k: UniPC(*a, order=3, **k), 4),
    ],
    ids=["euler", "ddim", "heun", "edm", "dpm_solver", "unipc1", "unipc2", "unipc3"],
)
def test_halving_the_steps_shows_the_order(make, order, schedule):
    """On the flow of theory.md, dz/dlambda = 1/2 sigma^2 (z + score), whose end is known."""
    z = torch.randn(64, 3, dtype=torch.float64)
    denoiser, end = GaussianDenoiser(schedule, MEAN, STD), exact_flow(z, schedule)
    errors = [
        float((make(steps, grid=LogSNRGrid())(denoiser, z) - end).square().mean().sqrt())
        for steps in (50, 100)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3, errors


class Basis(Draws):
    """The number 1 in the one example that belongs to a draw, and 0 in all others: with them a
    sampler that is linear in its latent and its noise shows its coefficients."""

    def __init__(self):
        self.count = 0

    def normal(self, purpose, like):
        self.count += 1
        drawn = torch.zeros_like(like)
        drawn[self.count] = 1
        return drawn

    def fold(self, *keys):
        return self

    uniform = time = antithetic = each = None


def law_of_samples(sampler, denoiser):
    """Mean and standard deviation of z_0, exactly, where z_1 has the law of its marginal and data
    are normal: example 0 is without noise, the last is moved at the start."""
    one = torch.tensor(1.0)
    alpha, sigma = denoiser.schedule.alpha(one), denoiser.schedule.sigma(one)
    noise, most = Basis(), sampler.evaluations + 1
    z = (alpha * denoiser.mean).expand(most + 1, 1).clone()
    z[-1] += (alpha**2 * denoiser.std**2 + sigma**2).sqrt()
    z = sampler(denoiser, z, noise=noise)[:, 0]
    assert noise.count < most
    return float(z[0]), float((z[1:] - z[0]).norm())


def wrong(sampler, schedule, std=STD):
    """By how much the samples' mean is off, and by which factor their deviation is."""
    denoiser, zero = GaussianDenoiser(schedule, MEAN, std), torch.tensor(0.0)
    alpha, sigma = schedule.alpha(zero), schedule.sigma(zero)
    mean, found = law_of_samples(sampler, denoiser)
    return mean - float(alpha * MEAN), found / float((alpha**2 * std**2 + sigma**2).sqrt()) - 1


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (Ancestral, 1),
        (lambda *a, **k: DDIM(*a, eta=0.5, **k), 1),
        (DPMSolverSDE, 2),
        (lambda *a, **k: Churn(*a, churn=5.0, low=0.0, high=1e9, **k), 2),
    ],
    ids=["ancestral", "ddim_eta", "dpm_solver_sde", "edm"],
)
def test_halving_the_steps_shows_the_order_of_the_law(make, order, double):
    """Of samplers that draw: their deviation approaches that of the data, without Monte Carlo."""
    errors = [wrong(make(steps, grid=LogSNRGrid()), Cosine(5.0, -5.0)) for steps in (50, 100)]
    assert abs(math.log2(errors[0][1] / errors[1][1]) - order) < 0.15, errors
    assert all(abs(mean) < 1e-4 for mean, _ in errors)


def test_annealed_langevin_is_as_much_too_wide_as_its_page_says(double):
    """On normal data by its delay, which halves with more steps or more corrections; on a point
    by the stationary law of its last level."""
    schedule, grid = Cosine(9.0, -9.0), LogSNRGrid()
    assert wrong(Langevin(grid=grid), schedule)[1] == pytest.approx(0.050, abs=2e-3)
    for better in (Langevin(200, grid=grid), Langevin(corrections=20, grid=grid)):
        assert wrong(better, schedule)[1] == pytest.approx(0.024, abs=2e-3)
    settled = Langevin(100, 40, size=0.3, grid=grid)
    assert wrong(settled, schedule, std=0.0)[1] == pytest.approx((1 - 0.15) ** -0.5 - 1, abs=2e-3)


@pytest.mark.parametrize("corrections", [1, 3])
def test_a_corrector_walks_at_the_level_it_arrived_at(corrections, double):
    """Of a point of data an ancestral step has no error, whatever its length: what is wrong is the
    walk's law, whose variance goes from v to (1 - size)^2 v + 2 size sigma_s^2 with each step."""
    size, v = 0.1, 1.0
    for _ in range(corrections):
        v = (1 - size) ** 2 * v + 2 * size
    sampler = PredictorCorrector(1, corrections, size)
    mean, wider = wrong(sampler, Cosine(5.0, -5.0), std=0.0)
    assert abs(mean) < 1e-12 and wider == pytest.approx(v**0.5 - 1, abs=1e-9)


def test_the_middle_of_a_step_lies_on_the_line_through_the_last_two_guesses(double):
    """A guess that is linear in l = log SNR / 2 is extrapolated exactly, however uneven steps
    are."""
    schedule, like = Cosine(7.0, -7.0), torch.randn(4, 3)

    def guess(t):
        log_snr, slope = schedule.log_snr(t), torch.arange(3.0)
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        x = like + slope * log_snr / 2
        return genfw.Prediction(x, 0 * like, alpha.expand(4, 1), sigma.expand(4, 1))

    for r, t, s in ((0.9, 0.8, 0.4), (0.9, 0.3, 0.2), (0.7, 0.69, 0.0)):
        r, t, s = (torch.tensor(each) for each in (r, t, s))
        middle = schedule.inverse((schedule.log_snr(t) + schedule.log_snr(s)) / 2)
        found = in_the_middle(guess(t), (guess(r),), s, t, schedule)
        torch.testing.assert_close(found, guess(middle).x, rtol=1e-7, atol=1e-7)


def test_weights_integrate_polynomials_against_the_exponential():
    from scipy.integrate import quad

    nodes = torch.tensor([-1.3, -0.4, 0.0, 1.0], dtype=torch.float64)
    h = torch.tensor(0.7, dtype=torch.float64)
    for m in (1, 2, 3, 4):
        w = polynomial_weights(nodes[-m:], h)
        for k in range(m):
            exact = 0.7 * quad(lambda x, k=k: math.exp(0.7 * (x - 1)) * x**k, 0, 1)[0]
            assert abs(float((w * nodes[-m:] ** k).sum()) - exact) < 1e-12


@pytest.mark.parametrize("schedule", NoiseSchedule.registry.values(), ids=NoiseSchedule.registry)
def test_one_ancestral_step_is_the_posterior_with_the_guess(schedule, double):
    """Luo (94): mean and variance of many draws of one step."""
    denoiser = GaussianDenoiser(schedule(9.0, -9.0), MEAN, STD)
    z, s, t = torch.full((50_000, 1), 0.7), torch.tensor(0.4), torch.tensor(0.6)
    z_s, prediction = Ancestral(1).step(
        denoiser, z, t, s, None, noise=Noise(0, torch.arange(50_000))
    )
    q = posterior(z, prediction.x, s, t, denoiser.schedule)
    assert abs(z_s.mean() - q.mean[0]) < 5 * q.std[0] / 50_000**0.5
    assert abs(z_s.std() / q.std[0, 0] - 1) < 0.02


def test_langevin_keeps_its_stationary_law(double):
    """On N(alpha m, v) steps of c have the stationary variance v / (1 - c / (2 v))."""
    n, size, t = 40_000, 0.4, torch.tensor(0.5)
    denoiser = GaussianDenoiser(Cosine(7.0, -7.0), MEAN, STD)
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    v, c = alpha**2 * STD**2 + sigma**2, size * sigma**2
    z = torch.zeros(n, 1)
    for i in range(40):
        z, _ = walk(denoiser, z, t, None, size, keys(n).fold(i))
    stationary = v / (1 - c / (2 * v))
    assert abs(z.mean() - alpha * MEAN) < 5 * (stationary / n).sqrt()
    assert abs(z.var() / stationary - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.var() / v - 1) > 0.1  # and not v itself: the step is large


@pytest.mark.parametrize("cls", [Langevin, PredictorCorrector])
def test_walks_of_one_step_draw_noise_of_their_own(cls):
    """Two corrections with the same noise would add up to twice its deviation."""

    class Blind(genfw.Denoiser):
        schedule = Cosine(7.0, -7.0)

        def forward(self, z, t, y=None):
            alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
            return genfw.Prediction(z / alpha, 0 * z, alpha, sigma)

    n, s, t = 40_000, torch.tensor(0.5), torch.tensor(0.5 + 1e-9)
    z, _ = cls(10, corrections=4, size=0.1).step(
        Blind(), torch.zeros(n, 1, dtype=torch.float64), t, s, None, noise=keys(n)
    )
    expected = (4 * 2 * 0.1) ** 0.5 * Blind.schedule.sigma(s)
    assert abs(z.std() / expected - 1) < 5 / (2 * n) ** 0.5


@registered(Sampler)
def test_every_parameterization_is_sampled(cls):
    """Also in float32; linear ones, which say the same, give the same samples."""
    z, drawn = torch.randn(4, 1, 2, 2), []
    for param_cls in Parameterization.registry.values():
        discrete = issubclass(param_cls, DiscreteParameterization)
        param = param_cls(bins=5) if discrete else param_cls()
        net = MLP((1, 2, 2), param.channels(1, 5), width=8, blocks=1)
        denoiser = NetworkDenoiser(net, param, Cosine(7.0, -7.0))
        x = cls(steps=2)(denoiser, z, noise=keys(4))
        assert x.isfinite().all() and x.dtype == torch.float32
        if isinstance(param, LinearParameterization):
            exact = LinearDenoiser(Cosine(7.0, -7.0), param, MEAN, STD)
            drawn.append(cls(steps=2)(exact, z.double(), noise=keys(4)))
    assert len(drawn) >= 6
    for x in drawn[1:]:
        assert torch.allclose(x, drawn[0], rtol=1e-7, atol=1e-7)


def empty_vdm(param, likelihood, sampler=None):
    shape, bins = (2, 3, 3), 5
    net = MLP(shape, param.channels(2, bins), width=8, blocks=1)
    denoiser = NetworkDenoiser(net, param, LogLinear(9.0, -7.0))
    return genfw.VDM(denoiser, likelihood, shape=shape, sampler=sampler)


@registered(Sampler)
def test_of_no_noise_no_samples_are_made(cls):
    vdm = empty_vdm(genfw.Eps(), genfw.BinsLikelihood(5), cls(steps=3))
    drawn = vdm.sample(0, torch.zeros(0, dtype=torch.long))
    assert drawn.shape == (0, 2, 3, 3) and not drawn.is_floating_point()


@registered(Parameterization)
def test_of_no_images_there_is_a_bound_and_a_gradient(cls):
    discrete = issubclass(cls, DiscreteParameterization)
    likelihood = genfw.CategoricalLikelihood(5) if discrete else genfw.BinsLikelihood(5)
    vdm = empty_vdm(cls(5) if discrete else cls(), likelihood, UniPC(steps=3))
    x = torch.zeros(0, 2, 3, 3, dtype=torch.long)
    total = vdm.elbo(x).total
    assert total.shape == (0,)
    total.sum().backward()
    assert all((p.grad == 0).all() for p in vdm.parameters())
    assert vdm.sample(0).shape == x.shape


def test_the_path_ends_where_the_loop_does_and_the_last_time_is_zero(double):
    denoiser, z = GaussianDenoiser(Cosine(9.0, -9.0), MEAN, STD), torch.randn(4, 3)
    path = list(Ancestral(5).path(denoiser, z, noise=keys(4)))
    assert len(path) == 5 and path[-1].s == 0
    assert torch.equal(path[-1].z, Ancestral(5)(denoiser, z, noise=keys(4)))
    assert path[0].prediction.x.shape == z.shape


def test_a_hook_on_the_denoiser_shows_the_progress_of_a_model():
    denoiser = GaussianDenoiser(Cosine(7.9, -7.0), MEAN, STD)
    sampler = Heun(6)
    vdm = genfw.VDM(denoiser, genfw.BinsLikelihood(5), shape=(3,), sampler=sampler)
    done = []
    with denoiser.register_forward_hook(lambda *_: done.append(len(done) + 1)):
        vdm.sample(4)
    assert done == list(range(1, sampler.evaluations + 1))


def test_one_key_begins_at_one_z_whatever_the_sampler_and_its_steps():
    """So that samplers are compared sample by sample, and more steps refine the same images."""
    asked = []

    class Spy(GaussianDenoiser):
        def forward(self, z, t, y=None):
            asked.append(z)
            return super().forward(z, t, y)

    denoiser = Spy(Cosine(7.0, -7.0), MEAN, STD)
    for sampler in (DDIM(20), DDIM(21), Ancestral(5), Heun(3)):
        vdm = genfw.VDM(denoiser, genfw.BinsLikelihood(17), shape=(3,), sampler=sampler)
        asked.append(None)
        vdm.sample(4, noise=keys(4))
    first = [after for before, after in itertools.pairwise(asked) if before is None]
    assert len(first) == 4 and all(torch.equal(each, first[0]) for each in first)


def test_grids_are_even_in_what_they_say():
    schedule = Cosine(7.1, -9.3)  # ends that float32 would round
    inside = genfw.UniformGrid()(8, schedule)
    assert torch.allclose(inside.diff(), torch.tensor(-1 / 8).double())
    rho = 3.0
    for grid, read in (
        (LogSNRGrid(), lambda log_snr: log_snr),
        (AngleGrid(), lambda log_snr: (-log_snr / 2).exp().atan()),
        (KarrasGrid(rho), lambda log_snr: (-log_snr / 2 / rho).exp()),
        (KarrasGrid(1.0), lambda log_snr: (-log_snr / 2).exp()),
    ):
        steps = read(schedule.log_snr(grid(8, schedule))).diff()
        assert torch.allclose(steps, steps.mean().expand(8), rtol=1e-9)


def test_the_angle_is_where_the_cosine_schedule_stops():
    schedule, cosine = LogLinear(7.0, -9.0), Cosine(7.0, -9.0)
    stops = schedule.log_snr(AngleGrid()(8, schedule))
    assert torch.allclose(stops, cosine.log_snr(genfw.UniformGrid()(8, cosine)), rtol=1e-9)
    far = AngleGrid()(8, LogLinear(60.0, -90.0))  # an angle of pi / 2, to the last bit
    assert far.isfinite().all() and (far.diff() < 0).all()


def test_a_root_beyond_any_number_is_still_a_grid():
    times = KarrasGrid(0.003)(8, Cosine(7.0, -9.0))  # e^1500 at the noise end
    assert times.isfinite().all() and (times.diff() < 0).all()


def test_a_step_is_given_the_predictions_that_its_sampler_remembers():
    """Whatever their number, the oldest first, and no others are kept."""
    given = []

    class Fifth(Euler):
        remembers = 5

        def step(self, denoiser, z, t, s, y, *, noise, past=()):
            given.append(past)
            return super().step(denoiser, z, t, s, y, noise=noise)

    z = torch.randn(2, 3, dtype=torch.float64)
    made = [step.prediction for step in Fifth(8).path(mixture(), z, noise=keys(2))]
    for i, past in enumerate(given):
        expected = made[max(0, i - 5) : i]
        assert len(past) == len(expected) and all(map(operator.is_, past, expected))
    assert len(given) == 8


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ancestral(steps=0), "at least 1, got 0"),
        (lambda: DDIM(eta=1.1), "eta: expected a number from 0 to 1, got 1.1"),
        (lambda: Churn(churn=-1.0), "churn: expected a finite number of at least 0"),
        (lambda: Churn(inflation=0.0), "inflation: expected a finite positive"),
        (lambda: Churn(inflation=math.inf), "inflation: expected a finite positive"),
        (lambda: Churn(low=2.0, high=1.0), "low <= high, got 2.0 and 1.0"),
        (lambda: UniPC(order=4), "order: expected 1, 2 or 3, got 4"),
        (lambda: Langevin(corrections=0), "corrections: expected an integer of at least 1"),
        (lambda: PredictorCorrector(size=1.0), r"size: expected a number in \[0, 1\), got 1.0"),
        (lambda: Langevin(size=0.0), "size: expected a finite positive number, got 0.0"),
        (lambda: KarrasGrid(rho=0.0), "rho: expected a finite positive number"),
    ],
)
def test_arguments_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@registered(Sampler)
def test_a_default_below_float32_changes_no_step(cls):
    """Torch's, beside weights in float32."""
    denoiser, z = vdm((1, 2, 2), 3).eval().denoiser, torch.randn(4, 1, 2, 2)
    sampler, noise = cls(3), keys(4)
    with torch.no_grad():
        expected = sampler(denoiser, z, noise=noise)
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = sampler(denoiser, z, noise=noise)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype and torch.equal(found, expected)

"""The probability-flow likelihood against densities known in closed form, against torchdiffeq, and
against itself in other batches."""

import inspect
import math
from itertools import pairwise

import pytest
import torch
from oracles import FiniteDenoiser, GaussianDenoiser, gaussian_log_prob
from test_vae import random_vae
from test_vdm import MEAN, STD, Net, network_vdm

from genfw import (
    VDM,
    BernoulliLikelihood,
    BinsLikelihood,
    CategoricalLikelihood,
    CategoricalParameterization,
    Cosine,
    Denoiser,
    Eps,
    GaussianLikelihood,
    Linear,
    LogLinear,
    NetworkDenoiser,
    Noise,
    NoiseSchedule,
    Parameterization,
    Prediction,
    ProbabilityFlow,
)
from genfw.amplitudes import broadcast
from genfw.estimators.dormand_prince import FIFTH_MINUS_FOURTH, NODES, WEIGHTS, adaptive
from genfw.estimators.ode import DEQUANTIZATIONS, PROBES, Flow
from genfw.nets import MLP, Conv, UNet

PROBED = {"exact_dims": 0}


def amplitudes(log_snr):
    log_snr = torch.as_tensor(log_snr, dtype=torch.float64)
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def carried(schedule, mean, std, z_0):
    """log p_ode for Gaussian data and the exact score: the flow is linear, and takes N(0, I) at
    lambda_min, which the data are not quite, to lambda_max."""
    (alpha, sigma), (alpha_1, sigma_1) = map(
        amplitudes, (schedule.log_snr_max, schedule.log_snr_min)
    )
    spread, spread_1 = (
        (a**2 * std**2 + s**2).sqrt() for a, s in ((alpha, sigma), (alpha_1, sigma_1))
    )
    z_1 = alpha_1 * mean + (z_0 - alpha * mean) * spread_1 / spread
    return gaussian_log_prob(z_1, 0.0, 1.0) + (spread_1 / spread).log().expand_as(z_0).sum(1)


class Mixture(Denoiser):
    """The exact denoiser of a mixture of Gaussians N(means_j, std^2 I), equal weights."""

    def __init__(self, schedule, means, std):
        super().__init__()
        self.schedule, self.means, self.std = schedule, means, std

    def forward(self, z, t, y=None):
        alpha, sigma = (broadcast(f(t), z) for f in (self.schedule.alpha, self.schedule.sigma))
        var = alpha**2 * self.std**2 + sigma**2
        gap = z[:, None] - alpha[:, None] * self.means
        weight = (-0.5 * gap.square().sum(2) / var).softmax(1)
        score = -torch.einsum("bn,bnd->bd", weight, gap) / var
        return Prediction((z + sigma**2 * score) / alpha, -sigma * score, alpha, sigma)

    def log_prob(self, z, log_snr):
        alpha, sigma = amplitudes(log_snr)
        var = alpha**2 * self.std**2 + sigma**2
        gap = (z[:, None] - alpha * self.means).square().sum(2)
        dims = z.shape[1]
        each = -0.5 * gap / var - dims / 2 * (2 * math.pi * var).log()
        return each.logsumexp(1) - math.log(len(self.means))


class Correlated(Denoiser):
    """The exact denoiser of N(mean, covariance)."""

    def __init__(self, schedule, mean, covariance):
        super().__init__()
        self.schedule, self.mean, self.covariance = schedule, mean, covariance

    def forward(self, z, t, y=None):
        alpha, sigma = (broadcast(f(t), z) for f in (self.schedule.alpha, self.schedule.sigma))
        noisy = alpha[..., None] ** 2 * self.covariance + sigma[..., None] ** 2 * torch.eye(4)
        score = -torch.linalg.solve(noisy, z - alpha * self.mean)
        return Prediction((z + sigma**2 * score) / alpha, -sigma * score, alpha, sigma)


def two_humps(schedule=None):
    schedule = LogLinear(6.0, -33.0) if schedule is None else schedule
    return Mixture(schedule, torch.tensor([[0.9, -0.4], [-0.6, 0.5], [0.1, 0.2]]), 0.15)


def density(denoiser, z_0, seed=0, **how):
    flow = ProbabilityFlow(**{"tolerance": 1e-6, **how})
    noise = Noise(seed, torch.arange(len(z_0)))
    vdm = VDM(denoiser, GaussianLikelihood(), shape=z_0.shape[1:])
    return flow.log_density(vdm, z_0, noise=noise)


@pytest.mark.parametrize("schedule", NoiseSchedule.registry.values())
def test_gaussian_data_have_their_density(schedule, double):
    schedule = schedule(14.0, -12.0)
    z_0 = MEAN + STD * torch.randn(6, 3)
    found = density(GaussianDenoiser(schedule, MEAN, STD), z_0, tolerance=1e-4)
    error = (found.log_prob - carried(schedule, MEAN, STD, z_0)).abs()
    assert (error < 3e-4).all() and (found.error < 3e-4).all()


@pytest.mark.parametrize("how", [{}, {"steps": 150}])
def test_with_wide_ends_it_is_that_of_the_data(how, double):
    """To 1e-6 nats per dimension; N(0, I) is p at lambda_min = -33 but for alpha_1 = 7e-8."""
    denoiser, (alpha, sigma) = GaussianDenoiser(LogLinear(14.0, -33.0), MEAN, STD), amplitudes(14.0)
    z_0 = MEAN + STD * torch.randn(10, 3)
    truth = gaussian_log_prob(z_0, alpha * MEAN, (alpha**2 * STD**2 + sigma**2).sqrt())
    assert torch.allclose(density(denoiser, z_0, **how).log_prob, truth, rtol=0, atol=3e-6)


def test_a_rademacher_probe_is_exact_where_the_jacobian_is_diagonal(double):
    denoiser, z_0 = GaussianDenoiser(Cosine(14.0, -14.0), 0.3, torch.tensor(0.5)), torch.randn(9, 4)
    truth = carried(denoiser.schedule, 0.3, torch.tensor(0.5), z_0)
    assert torch.allclose(density(denoiser, z_0, **PROBED).log_prob, truth, rtol=0, atol=4e-6)
    gaussian = density(denoiser, z_0, probe="gaussian", **PROBED, steps=20)
    assert (gaussian.log_prob - truth).abs().max() > 0.1


def correlated():
    root = torch.randn(4, 4)
    return Correlated(LogLinear(10.0, -33.0), torch.tensor([0.3, -1, 0, 0.5]), root @ root.T / 3)


def test_correlated_gaussian_data_have_their_density(double):
    denoiser, (alpha, sigma) = correlated(), amplitudes(10.0)
    noisy = torch.distributions.MultivariateNormal(
        alpha * denoiser.mean, alpha**2 * denoiser.covariance + sigma**2 * torch.eye(4)
    )
    z_0 = noisy.sample((20,))
    assert torch.allclose(density(denoiser, z_0).log_prob, noisy.log_prob(z_0), atol=1e-5)


@pytest.mark.parametrize("probe", PROBES)
def test_probes_are_unbiased_and_one_for_the_whole_solve(probe, double):
    n, denoiser = 500, correlated()
    z_0 = torch.tensor([[0.1, -0.7, 0.4, 0.2]]).expand(n, 4)
    truth = density(denoiser, z_0[:1]).log_prob
    how = {"probe": probe, **PROBED, "steps": 20}
    found = density(denoiser, z_0, **how).log_prob
    gap = found - truth
    assert abs(gap.mean()) < 4 * gap.std() / n**0.5 and gap.std() > 0.1
    # redrawn at each call, 121 probes would average out
    assert torch.equal(found, density(denoiser, z_0, **how).log_prob)
    finer = density(denoiser, z_0, **how | {"steps": 40}).log_prob
    assert torch.allclose(finer, found, atol=1e-2 * gap.std().item())


def test_a_mixture_has_its_density_which_integrates_to_one(double):
    denoiser = two_humps()
    grid = torch.linspace(-1.8, 1.8, 37)
    z_0 = torch.cartesian_prod(grid, grid)
    found = density(denoiser, z_0, steps=60).log_prob
    likely = denoiser.log_prob(z_0, 6.0) > -5
    assert torch.allclose(found[likely], denoiser.log_prob(z_0, 6.0)[likely], atol=1e-4)
    assert abs(found.exp().sum() * (grid[1] - grid[0]) ** 2 - 1) < 1e-4


def test_any_network_has_a_density_that_integrates_to_one(double):
    vdm = network_vdm(LogLinear(3.0, -4.0), dims=1)
    vdm.denoiser.network.layers[0].weight.data *= 4
    z_0 = torch.linspace(-60, 60, 2401)[:, None]
    found = ProbabilityFlow(tolerance=1e-5).log_density(vdm, z_0).log_prob
    assert abs(found.exp().sum() * 0.05 - 1) < 1e-5


def test_fixed_steps_are_of_fifth_order(double):
    denoiser, counts = two_humps(LogLinear(5.0, -5.0)), (20, 40)
    z_0 = amplitudes(5.0)[0] * denoiser.means.repeat(8, 1) + 0.15 * torch.randn(24, 2)
    truth = density(denoiser, z_0, steps=120).log_prob
    solved = [density(denoiser, z_0, steps=n) for n in counts]
    errors = [(each.log_prob - truth).abs() for each in solved]
    for coarse, fine in pairwise(errors):
        assert 4.5 < (coarse.mean() / fine.mean()).log2() < 6.5
    for each, error, n in zip(solved, errors, counts, strict=True):
        assert (error <= each.error).all() and (each.calls == 1 + 6 * n).all()
    believed = [each.error.mean() for each in solved]
    assert all(3.5 < (a / b).log2() < 5.5 for a, b in pairwise(believed))


def test_the_tolerance_is_kept(double):
    """In nats per dimension, for data that the model finds likely; a smaller one costs more."""
    denoiser, before = two_humps(), 0
    z_0 = amplitudes(6.0)[0] * denoiser.means.repeat(8, 1) + 0.15 * torch.randn(24, 2)
    truth = density(denoiser, z_0, tolerance=1e-7).log_prob
    for tolerance in (1e-3, 1e-4, 1e-5):
        found = density(denoiser, z_0, tolerance=tolerance)
        error = (found.log_prob - truth).abs() / 2
        assert (error < tolerance).all() and error.max() > 1e-3 * tolerance
        assert (found.error / 2 <= tolerance).all()
        assert found.calls.mean() > before
        before = found.calls.mean()


def test_an_error_is_that_of_z_over_sigma_and_that_of_the_volume(double):
    """Per dimension: 5 / sqrt(2) is the root mean square of (3, -4), and 6 a volume's error of two
    dimensions."""
    schedule, s = LogLinear(4.0, -6.0), torch.tensor([0.0, 0.5, 1.0])
    flow = Flow(GaussianDenoiser(schedule, 0.0, 1.0), None, torch.Size([2]), None, torch.float64)
    _, sigma = amplitudes([4.0, -1.0, -6.0])
    of_z, of_volume = torch.tensor([[3.0, -4.0, 0.0]] * 3), torch.tensor([[0.0, 0.0, -6.0]] * 3)
    torch.testing.assert_close(flow.size(of_z, s), 12.5**0.5 / sigma)
    torch.testing.assert_close(flow.size(of_volume, s), torch.full((3,), 3.0))
    torch.testing.assert_close(flow.size(of_z + of_volume, s), 12.5**0.5 / sigma + 3)


@pytest.mark.parametrize("how", [{"tolerance": 1e-2}, {"steps": 10}])
def test_a_tolerance_is_per_dimension_and_an_error_in_nats(how, double):
    """Of two halves that are alike and independent: twice the nats, twice the error, as many
    calls."""
    denoiser, z_0 = GaussianDenoiser(Cosine(7.0, -9.0), 0.3, 0.2), torch.randn(5, 3) / 4
    one, two = density(denoiser, z_0, **how), density(denoiser, z_0.repeat(1, 2), **how)
    assert torch.allclose(two.log_prob, 2 * one.log_prob, rtol=1e-9)
    assert torch.allclose(two.error, 2 * one.error, rtol=1e-6) and (one.error > 1e-9).all()
    assert torch.equal(two.calls, one.calls)


@pytest.mark.parametrize("dims", [3, 4, 5])
def test_up_to_exact_dims_the_trace_is_exact(dims, double):
    """And above it is probed: it then depends on the keys."""
    denoiser = NetworkDenoiser(Net(dims), Eps(), Cosine(5.0, -5.0))
    vdm, z_0 = VDM(denoiser, GaussianLikelihood(), shape=(dims,)), torch.randn(3, dims)
    flow = ProbabilityFlow(steps=3, exact_dims=4)
    one, other = (
        flow.log_density(vdm, z_0, noise=Noise(seed, torch.arange(3))).log_prob for seed in (0, 1)
    )
    assert torch.equal(one, other) is (dims <= 4)
    assert ProbabilityFlow().exact_dims == 1024


def test_an_image_alone_and_beside_others(double):
    """An easy row and hard ones, whose steps differ by far."""
    vdm = network_vdm(Cosine(7.9, -10.0))
    vdm.denoiser.network.layers[0].weight.data *= 3
    x = torch.randint(17, (7, 4))
    for how in ({}, {"steps": 6}, {"dequantization": "uniform", **PROBED, "probe": "gaussian"}):
        flow = ProbabilityFlow(tolerance=1e-3, **how)
        whole = flow(vdm, x, noise=Noise(0, torch.arange(7)))
        assert "steps" in how or whole.diagnostics["ode_calls"].unique().numel() > 1
        for chunk, rows in ((3, [6, 1]), (1000, [5, 4, 0, 2])):
            flow.chunk = chunk
            part = flow(vdm, x[rows], noise=Noise(0, torch.tensor(rows)))
            assert torch.allclose(part.nats, whole.nats[rows], rtol=1e-10)
            assert torch.allclose(part.variance, whole.variance[rows], rtol=1e-6)
            for name, value in whole.diagnostics.items():
                assert torch.allclose(part.diagnostics[name], value[rows], rtol=1e-6)


def test_rows_keep_their_own_pace(double):
    """du/ds = -a u: the stiffer a row, the more calls; none is asked after it has arrived."""
    rate, asked = torch.tensor([1.0, 30.0, 200.0]), torch.zeros(3)

    def f(s, u, rows):
        asked[rows] += 1
        return -rate[rows, None] * u

    solution = adaptive(f, torch.ones(3, 1), lambda error, s: error[:, 0].abs(), 1e-6)
    assert ((solution.u[:, 0] - (-rate).exp()).abs() < 1e-6).all()
    assert torch.equal(asked, solution.calls) and asked[0] < asked[1] < asked[2]


def test_a_last_digit_stays_a_last_digit(double):
    """Batch mates decide the last digit of f: steps that answered to it would end 115 apart."""

    def solved(rounding):
        def f(s, u, rows):
            return 300 * (300 * s + rows + rounding).sin()[:, None]

        return adaptive(f, torch.zeros(5, 1), lambda error, s: error[:, 0].abs(), 10.0)

    one, other = solved(0.0), solved(1e-13)
    assert torch.equal(one.calls, other.calls)
    assert torch.allclose(one.u, other.u, rtol=0, atol=1e-10)


def test_what_cannot_be_solved_is_nan_and_spoils_no_other(double):
    def f(s, u, rows):
        steep = 1 / (s[:, None] - 0.5) ** 2
        return torch.where(rows[:, None] == 1, steep, torch.where(rows[:, None] == 2, torch.nan, u))

    solution = adaptive(f, torch.ones(4, 1), lambda error, s: error[:, 0].abs(), 1e-6)
    assert solution.u[[1, 2]].isnan().all()
    assert torch.allclose(solution.u[[0, 3], 0], torch.tensor(math.e), atol=1e-6)


def test_solutions_are_torchdiffeqs(double):
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="torchdiffeq is the reference here")
    vdm, z_0 = network_vdm(Cosine(7.9, -10.0)), torch.randn(3, 4) / 2

    def right_hand_side(log_snr, state):
        """Written anew: the probability flow from eps, its trace by a functional Jacobian."""
        z = state[0]
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        t = vdm.schedule.inverse(log_snr)

        def v(z):
            return 0.5 * sigma**2 * z - 0.5 * (z - alpha * vdm.denoiser(z, t).x)

        jacobian = torch.func.vmap(torch.func.jacrev(lambda row: v(row[None])[0]))(z)
        return v(z), jacobian.diagonal(dim1=1, dim2=2).sum(1)

    ends = torch.tensor([7.9, -10.0])
    tight = {"rtol": 1e-6, "atol": 1e-7, "method": "dopri5"}
    z, volume = torchdiffeq.odeint(right_hand_side, (z_0, torch.zeros(3)), ends, **tight)
    reference = gaussian_log_prob(z[-1], 0.0, 1.0) + volume[-1]
    for how in ({"tolerance": 1e-5}, {"steps": 30}):
        found = ProbabilityFlow(**how).log_density(vdm, z_0).log_prob
        assert torch.allclose(found, reference, rtol=0, atol=1e-4)


def test_the_tableau_is_torchdiffeqs():
    reference = pytest.importorskip("torchdiffeq._impl.dopri5", reason="torchdiffeq: the reference")
    table = reference._DORMAND_PRINCE_SHAMPINE_TABLEAU
    assert table.alpha.tolist() == pytest.approx(NODES)
    for row, ours in zip(table.beta, WEIGHTS, strict=True):
        assert row.tolist() == pytest.approx(ours)
    shampine = table.c_error  # his fourth-order solution is a third nearer
    assert (1.5 * shampine).tolist() == pytest.approx(FIFTH_MINUS_FOURTH)


# From the density of z_0 to the probability of x.


def expected_bound(name, schedule, bins, k, mean, std):
    """The expectation of log w over q(z_0 | x = k) of one-dimensional Gaussian data, by
    quadrature, and log p(k) itself: what log 1/n sum w tends to."""
    (alpha, sigma), centre = amplitudes(schedule.log_snr_max), (2 * k + 1) / bins - 1
    centres = (2 * torch.arange(bins) + 1) / bins - 1
    wide = name == "decoder"
    reach = 9 * sigma / alpha if wide else 1 / bins
    n = 20_001
    where = centre + reach * (2 * torch.arange(n) + 1 - n) / n
    log_p = carried(schedule, mean, std, alpha * where[:, None])
    kernel = -0.5 * ((where[:, None] - centres) * alpha / sigma) ** 2
    if wide:
        log_p = log_p + kernel.log_softmax(1)[:, k]
    noise = torch.ones(n) if name == "uniform" else kernel[:, k].exp()
    step = alpha * 2 * reach / n
    log_q = (noise / (noise.sum() * step)).log()
    log_w = (log_p - log_q)[noise > 0]
    q = log_q.exp()[noise > 0] * step
    return (q * log_w).sum(), (q * log_w.exp()).sum().log()


@pytest.mark.parametrize("name", DEQUANTIZATIONS)
def test_dequantization_is_paid_for(name, double):
    """E log w is the bound and E w is p(x), both by quadrature."""
    bins, n, schedule, std = 5, 4000, Cosine(2.0, -9.0), torch.tensor(0.4)
    vdm = VDM(GaussianDenoiser(schedule, 0.2, std), BinsLikelihood(bins), shape=(1,))
    flow, noise = ProbabilityFlow(1, name, steps=24, chunk=n), Noise(0, torch.arange(n))
    for k in (0, 3):
        log_w = -flow(vdm, torch.full((n, 1), k), noise=noise).nats
        bound, log_p = expected_bound(name, schedule, bins, k, 0.2, std)
        assert abs(log_w.mean() - bound) < 4 * log_w.std() / n**0.5 + 1e-5
        w = (log_w - log_p).exp()
        assert abs(w.mean() - 1) < 4 * w.std() / n**0.5 and w.std() / n**0.5 < 0.1
        assert bound < log_p


@pytest.mark.parametrize("name", DEQUANTIZATIONS)
def test_probabilities_sum_to_at_most_one(name, double):
    """Over all 5 x 5 images of two pixels of which three exist: the exact denoiser of these nearly
    gets there by the bounds that stay near the bin centres."""
    likelihood = BinsLikelihood(5)
    x = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    points = likelihood.normalize(x[[3, 12, 20]])
    vdm = VDM(FiniteDenoiser(Cosine(6.0, -9.0), points), likelihood, shape=(2,))
    flow = ProbabilityFlow(draws=30, dequantization=name, steps=30)
    estimate = flow(vdm, x, noise=Noise(0, torch.arange(25)))
    p = (-estimate.nats).exp()
    assert p.sum() <= 1 + 4 * (p**2 * estimate.variance).sum().sqrt()
    assert p.sum() > (0 if name == "uniform" else 0.93)
    if name != "uniform":
        assert torch.allclose(p[[3, 12, 20]], torch.tensor(1 / 3), atol=0.03)


def test_weights_of_all_images_sum_to_one_by_the_networks_own_decoder(double):
    """Whatever the network: p_ode(z_0) p(x | z_0) is a joint density."""
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    network = MLP((2,), 6, width=8, blocks=1, bins=3)
    for p in network.double().parameters():
        p.data += 0.1 * torch.randn_like(p)
    denoiser = NetworkDenoiser(network, CategoricalParameterization(3), LogLinear(3.0, -8.0))
    vdm = VDM(denoiser, CategoricalLikelihood(3), shape=(2,))
    flow = ProbabilityFlow(draws=8, steps=20, k=40, chunk=3000)
    estimate = flow(vdm, x, noise=Noise(0, torch.arange(9)))
    p = (-estimate.nats).exp()
    error = (p**2 * estimate.variance).sum().sqrt()
    assert abs(p.sum() - 1) < 4 * error + 0.02 and error < 0.05


def test_draws_are_all_that_each_image_gets(double, monkeypatch):
    """Of z_0, those of every set; the sets are what the name says."""
    solve, seen = ProbabilityFlow.log_density, []

    def counted(self, vdm, z_0, *given, **how):
        seen.append(len(z_0))
        return solve(self, vdm, z_0, *given, **how)

    monkeypatch.setattr(ProbabilityFlow, "log_density", counted)
    flow = ProbabilityFlow(draws=2, k=5, steps=1, chunk=7)
    flow(network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (3, 4)))
    assert sum(seen) == 3 * flow.draws == 3 * 2 * 5
    assert flow.extra_repr().endswith("draws=2, k=5")


def test_more_weights_are_tighter(double):
    schedule = Cosine(4.0, -9.0)
    vdm = VDM(GaussianDenoiser(schedule, 0.0, torch.tensor(0.3)), BinsLikelihood(3), shape=(3,))
    x, how = torch.randint(3, (400, 3)), {"dequantization": "uniform", "steps": 12}
    nats = [
        ProbabilityFlow(**how, k=k, chunk=20_000)(vdm, x, noise=Noise(k, torch.arange(400))).nats
        for k in (1, 4, 16)
    ]
    for few, many in pairwise(nats):
        gap = few - many
        assert gap.mean() > 3 * gap.std() / 400**0.5


def test_the_stated_variance_is_the_variance_found(double):
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (1, 4)).expand(600, 4)
    flow = ProbabilityFlow(draws=3, steps=8, **PROBED)
    estimate = flow(vdm, x, noise=Noise(0, torch.arange(600)))
    assert abs(estimate.variance.mean() / estimate.nats.var() - 1) < 0.25
    one = ProbabilityFlow(draws=1, steps=2)(vdm, x[:3])
    assert one.variance.isnan().all() and one.nats.isfinite().all()


# Networks as they are.


class Labelled(Net):
    """Moved by its label, and with dropout."""

    def forward(self, z, level, y=None):
        out = super().forward(z, level)
        out = out if y is None else out + 0.3 * y[:, None]
        return torch.nn.functional.dropout(out, 0.5, self.training)


@pytest.mark.parametrize("how", [{}, {"chunk": 3}, {"steps": 20}, {"dequantization": "uniform"}])
def test_terms_are_those_of_the_ends_and_make_up_the_number(how, double):
    """Each found by another way: the decoder's share from `DEQUANTIZATIONS`, the rest from
    `log_density`."""
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (4, 4))
    noise = Noise(0, torch.arange(4))
    ode = ProbabilityFlow(draws=2, **how)
    found = ode(vdm, x, noise=noise)
    torch.testing.assert_close(-found.elbo.total, found.nats)
    way, ratios, flows, ends = DEQUANTIZATIONS[ode.dequantization], [], [], []
    with torch.no_grad():
        for j in range(2):
            z_0, ratio = way(vdm, x, None, noise.each(j, j + 1))
            ratios.append(ratio)
            flow = ode.log_density(vdm, z_0)
            flows.append(flow.log_prob)
            ends.append(flow.at_end)
    torch.testing.assert_close(found.elbo.reconstruction, sum(ratios) / 2)
    torch.testing.assert_close(found.elbo.rate, -sum(flows) / 2)
    torch.testing.assert_close(found.elbo.prior, -sum(ends) / 2)
    assert ProbabilityFlow(draws=2, k=2)(vdm, x, noise=noise).elbo is None


def test_the_prior_is_the_density_where_the_flow_ends(double):
    vdm = VDM(GaussianDenoiser(Cosine(7.0, -9.0), MEAN, STD), GaussianLikelihood(), shape=(3,))
    z_0 = MEAN + STD * torch.randn(5, 3)
    (alpha, sigma), (alpha_1, sigma_1) = amplitudes(7.0), amplitudes(-9.0)
    spread, spread_1 = (
        (a**2 * STD**2 + s**2).sqrt() for a, s in ((alpha, sigma), (alpha_1, sigma_1))
    )
    z_1 = alpha_1 * MEAN + (z_0 - alpha * MEAN) * spread_1 / spread
    found = ProbabilityFlow(tolerance=1e-7).log_density(vdm, z_0)
    torch.testing.assert_close(found.at_end, gaussian_log_prob(z_1, 0.0, 1.0), rtol=0, atol=1e-5)


def test_it_says_how_it_was_solved(double):
    assert ProbabilityFlow().kind == "upper bound on -log p(x), by an ODE to a tolerance"
    assert ProbabilityFlow(steps=20).kind == "upper bound on -log p(x), by an ODE in 20 fixed steps"


def test_labels_count_and_dropout_does_not(double):
    denoiser = NetworkDenoiser(Labelled(4), Parameterization.registry["v"](), Cosine(7.9, -10.0))
    vdm = VDM(denoiser, BinsLikelihood(17), shape=(4,), classes=10)
    x = torch.randint(17, (6, 4))
    flow, noise, y = ProbabilityFlow(draws=1), Noise(0, torch.arange(6)), torch.arange(6) % 3
    labelled = flow(vdm.train(), x, y, noise=noise).nats
    assert vdm.training
    assert torch.equal(labelled, flow(vdm.eval(), x, y, noise=noise).nats) and not vdm.training
    plain = flow(vdm, x, noise=noise).nats
    assert torch.allclose(labelled[y == 0], plain[y == 0]) and (labelled != plain)[y > 0].all()


def test_a_label_goes_with_its_image(double):
    """Through several draws, and when rows that have arrived are left out."""
    denoiser = NetworkDenoiser(Labelled(4), Parameterization.registry["v"](), Cosine(7.9, -10.0))
    denoiser.network.layers[0].weight.data *= 3
    vdm = VDM(denoiser, BinsLikelihood(17), shape=(4,), classes=10)
    x = torch.randint(17, (3, 4))
    flow, y = ProbabilityFlow(draws=2, tolerance=1e-2), torch.tensor([0, 3, 9])
    alone = [flow(vdm, x[i, None], y[i, None], noise=Noise(0, torch.tensor([i]))) for i in range(3)]
    calls = torch.cat([each.diagnostics["ode_calls"] for each in alone])
    assert calls.unique().numel() > 1
    for rows in (calls.argsort(), calls.argsort(descending=True)):
        together = flow(vdm, x[rows], y[rows], noise=Noise(0, rows)).nats
        assert torch.allclose(together, torch.cat([alone[i].nats for i in rows]), rtol=1e-10)


def test_it_runs_in_inference_mode_and_autocast_as_outside():
    vdm, x, y = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (5, 4)), torch.zeros(5).long()
    flow, noise = ProbabilityFlow(draws=1), Noise(0, torch.arange(5))
    outside = flow(vdm, x, y, noise=noise)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = flow(vdm, x + 0, y + 0, noise=Noise(0, torch.arange(5)))
    assert torch.equal(inside.nats, outside.nats)
    assert all(p.grad is None for p in vdm.parameters())


def test_a_float32_network_gives_the_number_of_a_float64_one():
    vdm, x = network_vdm(Cosine(13.3, -10.0), bins=256), torch.randint(256, (6, 4))
    flow = ProbabilityFlow(draws=1)
    single = flow(vdm, x, noise=Noise(0, torch.arange(6)))
    assert single.nats.dtype == torch.float64
    assert flow.log_density(vdm, torch.randn(2, 4)).log_prob.dtype == torch.float64
    torch.set_default_dtype(torch.float64)
    try:
        double = flow(vdm.double(), x, noise=Noise(0, torch.arange(6)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(single.nats, double.nats, atol=2e-3)


def has_its_trace(network, param):
    """Exact, against the Jacobian; probed, e^T J e."""
    shape, rows = torch.Size((1, 4, 4)), torch.arange(2)
    for p in network.double().parameters():
        p.data += 0.1 * torch.randn_like(p)
    denoiser = NetworkDenoiser(network, param, LogLinear(5.0, -5.0))
    s, u, e = torch.tensor([0.2, 0.6]), torch.randn(2, 17), torch.randn(2, *shape)
    exact, probed = (Flow(denoiser, None, shape, each, torch.float64) for each in (None, e))

    def slope(z):
        return -10.0 * exact.velocity(z.view(2, *shape), 5 - 10 * s, None).flatten()

    jacobian = torch.autograd.functional.jacobian(slope, u[:, :-1].flatten()).view(2, 16, 2, 16)
    blocks, e = torch.stack([jacobian[0, :, 0], jacobian[1, :, 1]]), e.flatten(1)
    assert torch.allclose(exact(s, u, rows)[:, -1], blocks.diagonal(dim1=1, dim2=2).sum(1))
    assert torch.allclose(probed(s, u, rows)[:, -1], torch.einsum("bi,bij,bj->b", e, blocks, e))


@pytest.mark.parametrize(("net", "attention"), [(Conv, True), (UNet, 8)])
def test_every_network_has_its_trace(net, attention, double):
    has_its_trace(net((1, 4, 4), width=8, bins=5, blocks=1, attention=attention), Eps())


@pytest.mark.parametrize("cls", Parameterization.registry.values())
def test_every_parameterization_has_its_trace(cls, double):
    param = cls(bins=5) if "bins" in inspect.signature(cls).parameters else cls()
    channels = param.channels(1, 5)
    has_its_trace(MLP((1, 4, 4), channels, width=8, blocks=1, bins=5), param)


def test_the_way_between_the_ends_does_not_matter(double):
    one, other = network_vdm(Cosine(7.9, -10.0)), network_vdm(Linear(7.9, -10.0))
    other.denoiser.network = one.denoiser.network
    z_0, flow = torch.randn(5, 4) / 2, ProbabilityFlow(steps=12)
    a, b = (flow.log_density(vdm, z_0).log_prob for vdm in (one, other))
    assert torch.allclose(a, b, rtol=1e-9)


def test_other_models_and_bad_numbers_are_refused(double):
    x = torch.zeros(1, 4).long()
    with pytest.raises(TypeError, match=r"ode follows .* VAE has none: use estimator=bound"):
        ProbabilityFlow()(random_vae(BernoulliLikelihood()), x)
    unsolved = ({"tolerance": 0.0}, {"tolerance": math.inf}, {"tolerance": math.nan})
    for wrong in (*unsolved, {"draws": 0}, {"steps": 0}, {"probe": "x"}, {"k": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            ProbabilityFlow(**wrong)
    with pytest.raises(ValueError, match="one of decoder, uniform, truncated_normal, got 'none'"):
        ProbabilityFlow(dequantization="none")
    vdm = network_vdm(Cosine(7.9, -10.0))
    with pytest.raises(ValueError, match=r"k=2: .* D=4 is above exact_dims=3: use k=1"):
        ProbabilityFlow(k=2, exact_dims=3)(vdm, x)
    real = VDM(vdm.denoiser, GaussianLikelihood(), shape=(4,))
    with pytest.raises(ValueError, match="no bins: use dequantization=decoder"):
        ProbabilityFlow(dequantization="uniform")(real, x.double())

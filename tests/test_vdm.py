"""The diffusion bound against exact log p, against the generic hierarchy, and against itself in
other coordinates."""

import re
from functools import partial

import pytest
import torch
from oracles import FiniteDenoiser, GaussianDenoiser, LinearDenoiser, gaussian_log_prob

import genfw
from genfw import (
    VDM,
    AntitheticTime,
    BinsLikelihood,
    Bound,
    Cosine,
    DiscretizedGaussianLikelihood,
    GaussianLikelihood,
    LinearParameterization,
    LogLinear,
    NetworkDenoiser,
    Noise,
    NoiseSchedule,
    Parameterization,
    Unguided,
    UniformLogSNR,
)
from genfw.nets import MLP

SCHEDULES = pytest.mark.parametrize("schedule", NoiseSchedule.registry.values())
LINEAR = [c for c in Parameterization.registry.values() if issubclass(c, LinearParameterization)]
MEAN, STD = torch.tensor([0.4, -0.9, 0.1]).double(), torch.tensor([0.5, 0.2, 1.1]).double()


def gaussian_data(n):
    return MEAN + STD * torch.randn(n, 3)


class Net(torch.nn.Module):
    """A random smooth network of z and the noise level."""

    def __init__(self, dims, hidden=16):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(dims + 1, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, dims)
        )

    def forward(self, z, level, y=None):
        return self.layers(torch.cat([z.flatten(1), level[:, None]], 1)).view(z.shape)


def network_vdm(schedule, bins=17, param="eps", dims=4, **kwargs):
    denoiser = NetworkDenoiser(Net(dims), Parameterization.registry[param](), schedule)
    return VDM(denoiser, BinsLikelihood(bins), shape=(dims,), **kwargs)


@SCHEDULES
@pytest.mark.parametrize("param", LINEAR)
def test_gaussian_data_with_the_exact_denoiser_give_the_exact_log_p(schedule, param, double):
    n, x = 512, gaussian_data(512)
    denoiser = LinearDenoiser(schedule(14.0, -14.0), param(), MEAN, STD)
    vdm = VDM(denoiser, GaussianLikelihood(), shape=(3,))
    exact = gaussian_log_prob(x, MEAN, STD)
    estimate = Bound(sets=2, strata=64, chunk=2**16)(vdm, x, noise=Noise(0, torch.arange(n)))
    error = estimate.variance.sum().sqrt() / n
    assert abs(estimate.nats.mean() + exact.mean()) < 4 * error
    assert error < 0.15


@SCHEDULES
def test_times_drawn_through_the_schedule_give_the_bound_too(schedule, double):
    """The training estimator, -lambda'(t) and all: a wrong slope or density shows here."""
    n, repeats = 2000, 100
    x = gaussian_data(n)
    vdm = VDM(GaussianDenoiser(schedule(4.0, -4.0), MEAN, STD), GaussianLikelihood(), shape=(3,))
    bound = Bound(sets=2, strata=32, chunk=2**16)(vdm, x, noise=Noise(0, torch.arange(n)))
    gap = vdm.elbo(x.repeat(repeats, 1)).total + bound.nats.repeat(repeats)
    error = (gap.var() / (n * repeats) + bound.variance.sum() / n**2).sqrt()
    assert abs(gap.mean()) < 4 * error
    assert error < 0.2


@pytest.mark.parametrize("steps", [None, 1, 7])
def test_parameterizations_give_one_bound(steps, double):
    """The same x_hat in every coordinate: the same bound to 1e-10."""
    x, noise = torch.randint(17, (32, 4)), Noise(0, torch.arange(32))
    schedule, net = Cosine(7.9, -10.0), Net(4)

    class Exact(LinearDenoiser):
        def __init__(self, param):
            super().__init__(schedule, param, 0.0, 0.5)
            self.exact = NetworkDenoiser(net, Parameterization.registry["eps"](), schedule)

    bounds = [
        VDM(Exact(param()), BinsLikelihood(17), steps, shape=(4,)).elbo(x, noise=noise).total
        for param in LINEAR
    ]
    for bound in bounds[1:]:
        assert torch.allclose(bound, bounds[0], rtol=1e-10, atol=0)


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_closed_form_58_equals_the_generic_hierarchy_in_the_mean(schedule, steps, double):
    n = 20_000
    vdm = network_vdm(schedule(4.0, -4.0)).at(steps=steps)
    x = torch.randint(17, (1, 4)).expand(n, 4)
    closed, generic = vdm.elbo(x), vdm.ancestral_elbo(x)
    assert vdm.levels == steps + 1 and len(generic.levels) == steps
    # the two forms share the rate differently between levels and prior; its sum is one number
    for a, b in (
        (closed.total, generic.total),
        (closed.rate, generic.rate),
        (closed.reconstruction, generic.reconstruction),
    ):
        assert abs(a.mean() - b.mean()) < 4.5 * (a.var() / n + b.var() / n).sqrt()


@SCHEDULES
def test_schedules_with_equal_ends_give_one_bound(schedule, double):
    """A network with no exact answer, the same for both: only the end points may matter, not the
    way between."""
    n, x = 100_000, torch.randint(17, (1, 4)).expand(100_000, 4)
    one, other = network_vdm(LogLinear(2.0, -2.5)), network_vdm(schedule(2.0, -2.5))
    other.denoiser.network = one.denoiser.network
    a, b = one.elbo(x).total, other.elbo(x).total
    assert abs(a.mean() - b.mean()) < 4.5 * (a.var() / n + b.var() / n).sqrt()
    moved = network_vdm(LogLinear(4.0, -2.5))
    moved.denoiser.network = one.denoiser.network
    c = moved.elbo(x).total
    assert abs(a.mean() - c.mean()) > 4.5 * (a.var() / n + c.var() / n).sqrt()


def test_more_steps_tighten_the_bound_towards_continuous_time(double):
    """With the exact denoiser the bound rises with T to its limit (theory, section 3), each time by
    more than chance, and the reported number is the one of the hierarchy it is read as."""
    n, x = 500, gaussian_data(500)
    vdm = VDM(GaussianDenoiser(LogLinear(9.0, -9.0), MEAN, STD), GaussianLikelihood(), shape=(3,))
    means, before = [], None
    for steps in (1, 4, 16, 64, None):
        read = vdm.at(steps=steps)
        estimate = Bound(2, 32, chunk=2**16)(read, x, noise=Noise(0, torch.arange(n)))
        means.append(-estimate.nats.mean())
        if before is not None:
            gained = before.nats - estimate.nats
            noise = ((before.variance + estimate.variance).sum() / n**2).sqrt()
            assert gained.mean() > 3 * noise
        if steps is not None:
            chain = read.ancestral_elbo(x).total
            gap = chain + estimate.nats
            assert abs(gap.mean()) < 4 * (gap.var() / n).sqrt()
        before = estimate
    assert means == sorted(means)


def test_prior_term_is_the_kl_at_t_1(double):
    vdm, x = network_vdm(Cosine(7.9, -2.0)), torch.randint(17, (6, 4))
    data = (2 * x + 1) / 17 - 1
    var = torch.tensor(2.0).sigmoid()
    kl = 0.5 * (var + (1 - var) * data**2 - 1 - var.log()).sum(1)
    assert torch.allclose(vdm.elbo(x).prior, kl, rtol=1e-10)


@pytest.mark.parametrize("likelihood", [BinsLikelihood(17), DiscretizedGaussianLikelihood(17)])
def test_reconstruction_is_bayes_at_t_0(likelihood, double):
    """z_0 / alpha_0 = x + noise of width sigma_0 / alpha_0, read by p(x | z_0)."""
    schedule = Cosine(3.0, -6.0)  # blurred on purpose: bins are confused
    n, x = 20_000, torch.full((20_000, 1), 5)
    vdm = VDM(GaussianDenoiser(schedule, 0.0, 1.0), likelihood, shape=(1,))
    width = torch.tensor(-3.0 / 2).exp()
    where = (2 * 5 + 1) / 17 - 1 + width * torch.randn(n, 1)
    expected = likelihood((where, width.expand(n, 1))).log_prob(x)
    got = vdm.elbo(x).reconstruction
    assert abs(got.mean() - expected.mean()) < 4.5 * (got.var() / n + expected.var() / n).sqrt()


def test_an_example_keeps_its_number_whatever_its_batch(double):
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (10, 4))
    order = torch.tensor([7, 2, 5])
    for read in (vdm, vdm.at(steps=5), vdm.for_evaluation()):
        whole = read.elbo(x, noise=Noise(0, torch.arange(10))).total
        part = read.elbo(x[order], noise=Noise(0, order)).total
        assert torch.allclose(part, whole[order], rtol=1e-10)


@pytest.mark.parametrize("steps", [None, 40])
def test_probabilities_of_all_binary_images_sum_to_at_most_one(steps, double):
    """sum_x exp(ELBO(x)) <= 1 over the 16 images of 4 binary pixels. With the exact denoiser of all
    of them, or of some, the sum nearly gets there, so a dropped constant or factor is seen."""
    x = torch.tensor([[i >> b & 1 for b in range(4)] for i in range(16)])
    likelihood = BinsLikelihood(2)
    for known in (x, x[:5]):
        points = likelihood.normalize(known)
        vdm = VDM(FiniteDenoiser(Cosine(8.0, -9.0), points), likelihood, steps, shape=(4,))
        estimate = Bound(sets=4, strata=64, chunk=2**15)(vdm, x, noise=Noise(0, torch.arange(16)))
        p = (-estimate.nats).exp()
        assert p.sum() <= 1 + 4 * (p**2 * estimate.variance).sum().sqrt()
        assert p.sum() > (0.9 if steps is None else 0.5)


def test_the_same_model_is_read_in_steps_in_continuous_time_and_for_evaluation():
    """All but the steps, the sampler that goes with them and the times is the same."""
    guide, times = lambda denoiser: Unguided(denoiser), AntitheticTime()
    vdm = network_vdm(Cosine(7.9, -10.0), times=times, classes=3, guidance=guide)
    for read, steps in ((vdm.at(5), 5), (vdm.at(5).at(), None), (vdm.for_evaluation(), None)):
        assert read.steps == steps and vdm.at(5).for_evaluation().steps == 5
        for name in ("denoiser", "likelihood", "shape", "classes", "guidance"):
            assert getattr(read, name) is getattr(vdm, name), name
    assert vdm.at(5).times is times and vdm.at().sampler is vdm.sampler
    assert isinstance(vdm.for_evaluation().times, UniformLogSNR)


def test_sampling_at_t_steps_is_the_hierarchys_own(double):
    vdm, noise = network_vdm(Cosine(7.9, -10.0)).at(steps=9), Noise(1, torch.arange(6))
    assert torch.equal(vdm.sample(6, noise=noise), vdm.ancestral_sample(6, noise=noise))


def test_the_last_step_is_told_the_label_too(double):
    """p(x | z_0, y) of a network that decodes: with no step before it, all that y changes."""
    param = genfw.CategoricalParameterization(17)
    net = MLP((4,), param.channels(4, 17), classes=2, width=16, blocks=1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    denoiser = NetworkDenoiser(net, param, Cosine(2.0, -10.0))

    class Blind(genfw.Ancestral):
        def step(self, denoiser, z, t, s, y, *, noise, past=()):
            return super().step(denoiser, z, t, s, None, noise=noise, past=past)

    likelihood, n = genfw.CategoricalLikelihood(17), 50
    vdm = VDM(denoiser, likelihood, shape=(4,), sampler=Blind(2), classes=2)
    y, noise = torch.arange(n) % 2, Noise(1, torch.arange(n))
    mixed, zeros, ones = (vdm.sample(n, each, noise=noise) for each in (y, 0 * y, 0 * y + 1))
    assert torch.equal(mixed, torch.where(y[:, None] == 0, zeros, ones))
    assert (zeros != ones).any()


def test_samples_with_the_exact_denoiser_follow_the_data(double):
    n = 10_000
    vdm = VDM(GaussianDenoiser(Cosine(9.0, -9.0), MEAN, STD), GaussianLikelihood(), shape=(3,))
    x = vdm.at(steps=600).sample(n, noise=Noise(0, torch.arange(n)))
    assert ((x.mean(0) - MEAN).abs() < 5 * STD / n**0.5 + 1e-3).all()
    assert ((x.std(0) / STD - 1).abs() < 0.04).all()


def test_what_cannot_be_is_refused(double):
    vdm = network_vdm(Cosine(7.9, -10.0))
    with pytest.raises(ValueError, match=r"vdm.at\(steps=T\)"):
        vdm.ancestral_elbo(torch.randint(17, (2, 4)))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        vdm.at(steps=0)
    with pytest.raises(ValueError, match=r"shape=\(C, H, W\)"):
        VDM(vdm.denoiser, vdm.likelihood).sample(2)


def test_printing_a_model_shows_its_mathematics():
    text = repr(network_vdm(Cosine(7.9, -10.0)))
    assert (
        "continuous time" in text
        and "Cosine(log_snr: 7.9 -> -10)" in text
        and "E log p(x|z_0)" in text
    )


def test_the_decoder_is_bayes_under_a_uniform_prior_however_noisy_z_0_is(double):
    """alpha_0 far from one: there z_0 is neither the data nor is sigma_0 its noise."""
    vdm = network_vdm(Cosine(1.0, -10.0), bins=3, dims=1)
    z = torch.linspace(-2, 2, 9)[:, None]
    alpha, sigma = (f(torch.tensor(0.0)) for f in (vdm.schedule.alpha, vdm.schedule.sigma))
    masses = (-0.5 * ((z - alpha * vdm.likelihood.centres()) / sigma).square()).softmax(1)
    for k in range(3):
        log_mass = vdm.at(steps=5).decode(z, 1).log_prob(torch.full((9, 1), k))
        assert torch.allclose(log_mass, masses[:, k].log())


def asked(vdm, x):
    """Every way to ask a diffusion model about images."""
    ways = {
        "elbo": vdm.elbo,
        "denoising": vdm.denoising,
        "for_evaluation": vdm.for_evaluation().elbo,
        "steps": vdm.at(steps=3).elbo,
        "ancestral_elbo": vdm.at(steps=3).ancestral_elbo,
        "log_weight": vdm.at(steps=3).log_weight,
        "encode": lambda x: vdm.at(steps=3).encode(x, 1),
        "bound": partial(Bound(sets=2, strata=1), vdm),
        "importance_weighted": partial(genfw.ImportanceWeighted(k=2, chunk=4), vdm.at(steps=3)),
        "simple": partial(genfw.Simple(), vdm),
        "iwae": partial(genfw.Iwae(k=2), vdm.at(steps=3)),
        "stl": partial(genfw.Stl(), vdm.at(steps=3)),
    }
    for name in ("decoder", "uniform", "truncated_normal"):
        ways[name] = partial(genfw.ProbabilityFlow(1, name, steps=1), vdm)
    return {name: partial(way, x) for name, way in ways.items()}


def any_shape(shape=None):
    """Its denoiser takes images of any shape."""
    denoiser = GaussianDenoiser(Cosine(4.0, -4.0), 0.1, 0.5)
    return VDM(denoiser, BinsLikelihood(17), shape=shape)


@pytest.mark.parametrize("shape", [(2, 2), (5,), (1, 4)])
def test_images_of_another_shape_are_refused_by_whoever_asks(shape, double):
    said = re.escape(f"of shape (4,), which this VDM was built for, got {shape}")
    for ask in asked(any_shape((4,)), torch.zeros(2, *shape).long()).values():
        with pytest.raises(ValueError, match=said):
            ask()


@pytest.mark.parametrize("built", [None, (2, 2)])
def test_without_a_shape_images_may_have_any(built, double):
    for name, ask in asked(any_shape(built), torch.zeros(2, 2, 2).long()).items():
        assert ask() is not None, name


def test_a_network_with_coarse_weights_is_told_the_level_in_float32():
    """bfloat16 has 8 bits: of 1000 levels it would tell 200 apart."""

    class Told(torch.nn.Linear):
        def forward(self, z, level, y):
            self.level = level
            return super().forward(z)

    net = Told(3, 3).bfloat16()
    denoiser = NetworkDenoiser(net, genfw.Eps(), Cosine(7.9, -10.0))
    prediction = denoiser(torch.randn(1000, 3), torch.linspace(0, 1, 1000))
    assert net.level.dtype == torch.float32 and len(net.level.unique()) == 1000
    assert prediction.x.dtype == torch.float32

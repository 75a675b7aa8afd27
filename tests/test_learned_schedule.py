"""The learned schedule: its end points follow the gradient of the bound, its interior that of the
bound's second moment, and neither touches the network's."""

import copy
import math
import warnings

import pytest
import tiny
import torch
from oracles import GaussianDenoiser

import genfw
from genfw import (
    VDM,
    Elbo,
    GaussianLikelihood,
    Learned,
    LogLinear,
    NoiseSchedule,
    Objective,
    marginal,
)
from genfw.schedule.learned import Monotone
from genfw.train import resolvers
from genfw.train.bits import between
from genfw.train.certificate import _model as described
from genfw.train.compose import compose
from genfw.train.ema import EMA
from genfw.train.errors import ConfigError
from genfw.train.session import session

MEAN, STD, N = torch.tensor([0.4, -0.9]).double(), torch.tensor([0.5, 0.2]).double(), 4000
ENDS = ("log_snr_max", "log_snr_min")


class Grid(genfw.BatchNoise):
    """Times on a fine grid, one eps for all: means over the batch are integrals over t."""

    def time(self):
        return (torch.arange(self.size) + 0.5) / self.size

    def normal(self, purpose, like):
        made = torch.Generator().manual_seed(len(purpose))
        return torch.randn(1, *like.shape[1:], generator=made).expand(like.shape)


@pytest.fixture
def schedule(double):
    """Bent away from where it begins."""
    schedule = Learned(5.0, -6.0, hidden=8)
    for p in schedule.interior.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return schedule


def oracle(schedule):
    """Wrong on purpose: with the exact denoiser the ends hardly matter."""
    return VDM(GaussianDenoiser(schedule, MEAN + 0.3, 2 * STD), GaussianLikelihood(), shape=(2,))


def plain(schedule, x, eps, t):
    """The cost at each t, written out: 1/2 slope ||eps - eps_hat||^2, all gradients as they are."""
    log_snr, denoiser = schedule.log_snr(t), oracle(schedule).denoiser
    alpha, sigma = log_snr.sigmoid().sqrt()[:, None], (-log_snr).sigmoid().sqrt()[:, None]
    error = (eps - denoiser(alpha * x + sigma * eps, t).eps).square().sum(1)
    return 0.5 * schedule.slope(t) * error


def gradients(value, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(parameters))])


@pytest.fixture
def draw():
    noise, x = Grid(N), torch.tensor([[0.7, -1.1]], dtype=torch.float64).expand(N, 2)
    return noise, x, noise.normal("eps", x)


def test_interior_follows_the_second_moment_of_the_estimator(schedule, draw):
    """Its logarithm. Against autograd and finite differences of the mean of cost^2 itself."""
    noise, x, eps = draw
    interior = list(schedule.interior.parameters())
    got = gradients(oracle(schedule).denoising(x, noise=noise).cost.mean(), interior)

    def moment():
        return plain(schedule, x, eps, noise.time()).square().mean().log()

    torch.testing.assert_close(got, gradients(moment(), interior), rtol=1e-3, atol=1e-4)
    p, h = interior[0], 1e-5
    with torch.no_grad():
        p.view(-1)[0] += h
        above = moment()
        p.view(-1)[0] -= 2 * h
        slope = (above - moment()) / (2 * h)
    torch.testing.assert_close(got[0], slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("times", [1e-3, 1e3])
def test_the_interior_does_not_feel_the_size_of_the_error(schedule, draw, times):
    """So the shared clipping of the gradient norm is the network's affair, whatever the bound."""
    noise, x, eps = draw
    vdm = oracle(schedule)

    def interior():
        cost = vdm.denoising(x, noise=noise).cost.mean()
        return gradients(cost, schedule.interior.parameters())

    before, exact = interior(), vdm.denoiser.forward

    def worse(z, t, y=None):
        said = exact(z, t)
        return genfw.Prediction(x, eps - times * (eps - said.eps), said.alpha, said.sigma)

    vdm.denoiser.forward = worse
    torch.testing.assert_close(interior(), before, rtol=1e-6, atol=1e-9)


def test_a_denoiser_without_error_leaves_the_interior_where_it_is(schedule, draw):
    noise, x, eps = draw
    vdm = oracle(schedule)
    vdm.denoiser.forward = lambda z, t, y=None: genfw.Prediction(x, eps, torch.ones(1), eps[:1])
    cost = vdm.denoising(x, noise=noise).cost.mean()
    assert cost == 0 and not gradients(cost, schedule.interior.parameters()).any()


def test_training_by_one_example_at_a_time_says_that_the_interior_learns_nothing(schedule, draw):
    """Its l^2 over the mean of l^2 is 1, whatever it costs."""
    _, x, _ = draw
    vdm = oracle(schedule).train()
    with pytest.warns(UserWarning, match=r"at least 2 .* got 1, .* data.batch_size=16"):
        vdm.elbo(x[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vdm.elbo(x[:2])
        vdm.at(steps=3).elbo(x[:1])  # the bound's own gradient
        oracle(LogLinear(5.0, -6.0)).train().elbo(x[:1])
        vdm.eval().elbo(x[:1])
        with torch.no_grad():
            vdm.train().elbo(x[:1])


def test_end_points_follow_the_bound(schedule, draw):
    noise, x, eps = draw
    vdm = oracle(schedule)
    got = gradients(-vdm.elbo(x, noise=noise).total.mean(), [schedule.moved])

    def bound():
        elbo = vdm.elbo(x, noise=noise)
        cost = plain(schedule, x, eps, noise.time())
        return (cost + elbo.prior - elbo.reconstruction).mean()

    torch.testing.assert_close(got, gradients(bound(), [schedule.moved]), rtol=1e-9, atol=0)
    h, values = 1e-5, []
    for step in (h, -2 * h):
        schedule.moved.data[0] += step
        values.append(bound().item())
    assert got[0].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)
    assert got.abs().min() > 1e-3


def test_gradients_of_network_and_interior_are_apart():
    """The network learns as along a schedule that cannot move; the interior as beside a network
    that cannot. One backward pass gives both, and no weight is left out."""
    torch.set_default_dtype(torch.float64)
    try:
        vdm = tiny.vdm().double()
        vdm.denoiser.schedule = schedule = Learned(4.0, -6.0, hidden=8)
        x, network = torch.randint(3, (64, 1, 2, 2)), vdm.denoiser.network

        def backward(frozen):
            frozen.requires_grad_(False)
            vdm.zero_grad()
            noise = genfw.Noise(0, torch.arange(64))
            (-vdm.elbo(x, noise=noise).total).mean().backward()
            frozen.requires_grad_(True)
            return {k: p.grad for k, p in vdm.named_parameters() if p.grad is not None}

        together = backward(torch.nn.Identity())
        assert together.keys() == dict(vdm.named_parameters()).keys()
        assert all(g.abs().sum() > 0 for k, g in together.items() if "schedule" in k)
        for frozen in (schedule.interior, network):
            for name, gradient in backward(frozen).items():
                torch.testing.assert_close(gradient, together[name], rtol=1e-9, atol=1e-11)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("times", [genfw.UniformLogSNR(), genfw.ImportanceTime()])
def test_interior_is_left_alone_by_times_that_do_not_ask_it(schedule, draw, times):
    noise, x, _ = draw
    vdm = oracle(schedule)
    read = VDM(vdm.denoiser, vdm.likelihood, shape=(2,), times=times)
    elbo = -read.elbo(x, noise=noise).total.mean()
    assert gradients(elbo, schedule.interior.parameters()).abs().max() < 1e-9
    ends = gradients(-read.elbo(x, noise=noise).total.mean(), [schedule.moved])
    uniform = gradients(-vdm.elbo(x, noise=noise).total.mean(), [schedule.moved])
    torch.testing.assert_close(ends, uniform, rtol=1e-3, atol=1e-3)  # two grids of one integral


def test_at_t_steps_the_whole_schedule_follows_the_bound(schedule, draw):
    """There the bound depends on the way between the ends."""
    noise, x, eps = draw
    x, noise = x[:1].expand(3, 2), Grid(3)
    vdm = oracle(schedule).at(steps=3)
    s, t = torch.arange(3) / 3, (torch.arange(3) + 1) / 3
    log_snr = schedule.log_snr(t)
    alpha, sigma = log_snr.sigmoid().sqrt()[:, None], (-log_snr).sigmoid().sqrt()[:, None]
    error = (eps[:3] - vdm.denoiser(alpha * x + sigma * eps[:3], t).eps).square().sum(1)
    written = (0.5 * (schedule.log_snr(s) - log_snr).expm1() * error).sum()
    got = vdm.denoising(x, noise=noise).cost.mean()
    expected = gradients(written, schedule.parameters())
    torch.testing.assert_close(
        gradients(got, schedule.parameters()), expected, rtol=1e-9, atol=1e-12
    )
    assert expected.abs().min() > 0


@pytest.mark.parametrize("steepness", [1.0, 1e3, 1e5])
def test_steep_curves_are_inverted_too(steepness):
    """Newton's method alone is lost where the curve is nearly a stair."""
    interior = Monotone(16)
    with torch.no_grad():
        interior.log_steepness.fill_(math.log(steepness))
        interior.log_line.fill_(-3.0)
        n = torch.linspace(0, 1, 2001, dtype=torch.float64)
        assert torch.allclose(interior(interior.inverse(n)), n, rtol=0, atol=1e-9)


def test_inverse_carries_the_implicit_gradient(schedule):
    log_snr = torch.linspace(-5, 4, 9, requires_grad=True)
    interior = list(schedule.interior.parameters())
    t = schedule.inverse(log_snr)
    assert torch.allclose(schedule.log_snr(t), log_snr, rtol=0, atol=1e-12)
    assert torch.allclose(gradients(t.sum(), [log_snr]), -1 / schedule.slope(t))
    still = schedule.log_snr(schedule.inverse(log_snr)).sum()
    assert gradients(still, interior).abs().max() < 1e-10  # whatever the shape, it stays there


def test_learning_reaches_the_least_variance(double):
    """E[cost^2] >= (integral of the root mean square cost per log SNR)^2, by Cauchy and Schwarz;
    equality where the density follows that root. Fixed ends, the exact denoiser."""
    schedule = Learned(6.0, -6.0, hidden=16, learn_ends=False)
    vdm = VDM(GaussianDenoiser(schedule, MEAN, STD), GaussianLikelihood(), shape=(2,))
    trained = [p for p in vdm.parameters() if p.requires_grad]
    assert len(trained) == len(list(schedule.interior.parameters()))
    adam = torch.optim.AdamW(trained, lr=0.1, fused=True)
    for step in range(150):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        adam.zero_grad()
        vdm.denoising(MEAN + STD * torch.randn(1000, 2)).cost.mean().backward()
        adam.step()

    @torch.no_grad()
    def moment(one):
        made = VDM(GaussianDenoiser(one, MEAN, STD), GaussianLikelihood(), shape=(2,))
        return made.denoising(MEAN + STD * torch.randn(50_000, 2)).cost.square().mean().item()

    with torch.no_grad():
        log_snr = torch.linspace(-6, 6, 100)
        t, x = schedule.inverse(log_snr).repeat(1000), MEAN + STD * torch.randn(100_000, 2)
        q, eps = marginal(x, t, schedule), torch.randn(100_000, 2)
        error = (eps - vdm.denoiser(q.mean + q.std * eps, t).eps).square().sum(1)
        root = (error.square() / 4).view(1000, 100).mean(0).sqrt()
        least = torch.trapezoid(root, log_snr).item() ** 2
    learned = moment(schedule)
    assert 0.97 * least < learned < 1.03 * least
    for cls in NoiseSchedule.registry.values():
        if cls is not Learned and cls.__module__.startswith("genfw."):
            assert learned < 1.03 * moment(cls(6.0, -6.0)), cls


def test_it_trains_is_averaged_and_is_kept(tmp_path):
    """Lightning, fused AdamW, the moving average, a checkpoint, and a stranger who loads it."""
    module = tiny.module()
    module.model.denoiser.schedule = Learned(4.0, -6.0, hidden=8)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.02, fused=True)
    start = copy.deepcopy(module.model.denoiser.schedule)
    trainer = tiny.trainer(tmp_path, 6, callbacks=[EMA(0.5)], gradient_clip_val=1.0)
    trainer.fit(module, tiny.Images())
    schedule, average = (m.denoiser.schedule for m in (module.model, module.average))
    for name, p in schedule.named_parameters():
        assert not torch.equal(p, start.get_parameter(name)), name
        assert not torch.equal(p, average.get_parameter(name)), name
    (tested,) = trainer.test(module, tiny.Images(), verbose=False)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    other = tiny.module()
    other.model.denoiser.schedule = Learned(4.0, -6.0, hidden=8)
    (again,) = tiny.trainer(tmp_path).test(
        other, tiny.Images(), ckpt_path=tmp_path / "kept.ckpt", weights_only=True, verbose=False
    )
    assert again["test/nll"] == tested["test/nll"]


@pytest.mark.filterwarnings("error")
def test_its_end_points_are_read_without_a_warning():
    module = tiny.module()
    module.model.denoiser.schedule = Learned(4.0, -6.0, hidden=8)
    assert between(module.model, 2).tolist() == [-6.0, -1.0, 4.0]
    assert described(module)["log_snr"] == [4.0, -6.0]


def test_weighted_objectives_are_refused_in_the_library(schedule):
    x = torch.zeros(4, 2)
    for name in ("simple", "min_snr", "sigmoid", "beta", "warmup", "cyclic"):
        objective, model = Objective.registry[name](), oracle(schedule)
        objective.advance(0)
        with pytest.raises(ValueError, match=r"learned schedule, .* use objective=elbo"):
            objective(model, x)
        with pytest.raises(ValueError, match=r"learned schedule, .* use objective=elbo"):
            objective.check(model)
        with torch.no_grad():
            objective(model, x)  # nothing is learned here


class Own(Elbo):
    """A bound, whatever its `warmup` is."""

    def __init__(self, warmup):
        super().__init__()


def test_weighted_objectives_are_refused_at_composition():
    resolvers.register()
    with session():
        compose(["model=vdm", "schedule=learned"])
        for objective in ("beta", "edm"):  # of the others tests/test_rules.py knows
            with pytest.raises(
                ConfigError,
                match=f"schedule=learned .* objective={objective} .* use objective=elbo",
            ):
                compose(["model=vdm", "schedule=learned", f"objective={objective}"])
        weighed = ["model=vdm", "model.steps=3", "schedule=learned", "objective=iwae"]
        compose(weighed)
        with pytest.raises(ConfigError, match=r"objective=iwae with warmup=9 .* use objective="):
            compose([*weighed, "objective.warmup=9"])
        theirs = ["trusted=[test_learned_schedule]", "objective._target_=test_learned_schedule.Own"]
        compose(["model=vdm", "schedule=learned", *theirs, "+objective.warmup=9"])

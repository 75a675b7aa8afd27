"""Every registered class keeps the laws of its interface, and every law can be broken."""

from dataclasses import replace

import pytest
import torch
from oracles import Mixture
from torch import nn

import genfw
from genfw import (
    BernoulliLikelihood,
    Categorical,
    CategoricalLikelihood,
    Eps,
    Estimator,
    LatentModel,
    Likelihood,
    LinearParameterization,
    MarkovianHierarchy,
    NoiseSchedule,
    Parameterization,
    Posterior,
    Prediction,
    Sampler,
    TimeGrid,
    TimeSampler,
)
from genfw.nets import MLPDecoder, MLPEncoder
from genfw.parameterization import DiscreteParameterization
from genfw.testing import (
    ESTIMATOR_LAWS,
    GRID_LAWS,
    LAWS,
    LIKELIHOOD_LAWS,
    MODEL_LAWS,
    PARAMETERIZATION_LAWS,
    POSTERIOR_LAWS,
    SAMPLER_LAWS,
    SCHEDULE_LAWS,
    TIME_LAWS,
    check,
)
from genfw.testing.model import a_sample_is_of_its_label
from genfw.testing.small import hvae, mhvae, vae, vdm

BINS = 5


def laws(these):
    return pytest.mark.parametrize("law", these, ids=lambda law: law.__name__)


def registered(interface):
    return pytest.mark.parametrize("cls", interface.registry.values(), ids=interface.registry)


@laws(SCHEDULE_LAWS)
@registered(NoiseSchedule)
def test_schedules(law, cls):
    law(cls)


@laws(PARAMETERIZATION_LAWS)
@registered(Parameterization)
def test_parameterizations(law, cls):
    law(cls, **({"bins": BINS} if issubclass(cls, DiscreteParameterization) else {}))


@laws(LIKELIHOOD_LAWS)
@registered(Likelihood)
def test_likelihoods(law, cls):
    law(cls, **({} if cls.density else {"bins": 2 if cls is BernoulliLikelihood else 17}))


@laws(GRID_LAWS)
@registered(TimeGrid)
def test_grids(law, cls):
    law(cls)


@laws(SAMPLER_LAWS)
@registered(Sampler)
def test_samplers(law, cls):
    law(cls)


@laws(TIME_LAWS)
@registered(TimeSampler)
def test_times(law, cls):
    law(cls)


@laws(POSTERIOR_LAWS)
@registered(Posterior)
def test_posteriors(law, cls):
    law(cls)


ESTIMATORS = {
    genfw.Bound: {"sets": 2, "strata": 3},
    genfw.ImportanceWeighted: {"k": 20, "chunk": 4000},
    genfw.Annealed: {"temperatures": 4, "chains": 4, "leapfrog": 2, "chunk": 4000},
    genfw.ProbabilityFlow: {"steps": 8},
}


@laws(ESTIMATOR_LAWS)
@pytest.mark.parametrize("cls", ESTIMATORS)
def test_estimators(law, cls):
    law(cls, **ESTIMATORS[cls])


def by_categories(shape, bins, classes=None):
    param = genfw.CategoricalParameterization(bins)
    return vdm(shape, bins, classes, param, CategoricalLikelihood(bins))


def of_mixture(shape, bins):
    model = vae(shape, bins)
    means, std = torch.tensor([[-2.0, 0.0], [1.0, 1.0]]), torch.tensor([0.3, 0.8])
    model.prior = lambda n: Mixture(means, std, n)
    return model


def of_real_numbers(shape, bins, classes=None):
    encoder = MLPEncoder(shape, 2, classes=classes, hidden=[8])
    decoder = MLPDecoder(shape, 2, outputs=2, classes=classes, hidden=[8])
    return genfw.VAE(encoder, decoder, genfw.GaussianLikelihood(), 2, classes=classes)


def diffusion_of_real_numbers(shape, bins, classes=None):
    return vdm(shape, 1, classes, likelihood=genfw.GaussianLikelihood())


NETWORKS = MLPEncoder(4, 2), MLPDecoder(4, 2, outputs=3)
ORACLE = genfw.testing.oracles.GaussianDenoiser(genfw.Cosine(8.0, -6.0), 0.0, 1.0)
HIERARCHIES = {"vae": vae, "mhvae": mhvae, "vdm": vdm}
MODELS = {**HIERARCHIES, "hvae": hvae}


def test_every_model_and_estimator_is_put_through():
    for name in genfw.__all__:
        getattr(genfw, name)  # which registers it
    assert set(MODELS) == {cls.name for cls in ours(LatentModel)}
    chains = {cls.name for cls in ours(LatentModel) if issubclass(cls, MarkovianHierarchy)}
    assert set(HIERARCHIES) == chains
    assert set(ESTIMATORS) == set(ours(Estimator))


def ours(interface):
    return [c for c in interface.registry.values() if c.__module__.startswith("genfw.")]


@laws(MODEL_LAWS)
@pytest.mark.parametrize("make", [*MODELS.values(), by_categories, of_mixture])
def test_models(law, make):
    law(make, shape=(1, 2, 2), bins=3)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("make", [of_real_numbers, diffusion_of_real_numbers])
def test_models_of_real_numbers(make, classes):
    check(make, LatentModel, shape=(1, 2, 2), bins=None, classes=classes)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_samples_are_counted(make, unchecked):
    model = make((1, 2, 2), 3)
    assert model.sample(0).shape == (0, 1, 2, 2)
    for wrong in (-1, 2.5):
        with pytest.raises(ValueError, match=f"n: expected an integer of at least 0, got {wrong}"):
            model.sample(wrong)


SIZES = r"latents: expected positive sizes \(D,\) or .*, got "


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: genfw.VAE(*NETWORKS, CategoricalLikelihood(3), "16"), f"{SIZES}'16'"),
        (lambda: genfw.VAE(*NETWORKS, CategoricalLikelihood(3), 16.0), f"{SIZES}16.0"),
        (lambda: genfw.VAE(*NETWORKS, CategoricalLikelihood(3), (2, "2")), rf"{SIZES}\(2, '2'\)"),
        (lambda: MLPEncoder(4, "16"), f"{SIZES}'16'"),
        (lambda: vae((1, 2, 2), 3, "10"), "classes: expected an integer of at least 1, got '10'"),
        (lambda: genfw.ClassifierFree(ORACLE, "3"), "scale: expected a finite number, got '3'"),
    ],
)
def test_what_is_no_number_is_named(make, message, unchecked):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


@pytest.mark.parametrize("make", [*MODELS.values(), by_categories])
def test_conditional_models(make):
    a_sample_is_of_its_label(make, shape=(1, 2, 2), bins=3, classes=3)


@pytest.mark.parametrize("make", [*MODELS.values(), by_categories])
def test_a_model_without_classes_ignores_labels(make):
    """Also where its networks know some: its bound is one on log p(x)."""
    torch.manual_seed(0)
    model = make((1, 2, 2), 3, classes=3).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    model.classes = None
    x, y, noise = (
        torch.randint(3, (8, 1, 2, 2)),
        torch.arange(8) % 3,
        genfw.Noise(0, torch.arange(8)),
    )
    asked = [lambda y: model.elbo(x, y, noise=noise).total]
    asked += [lambda y: model.sample(8, y, noise=noise)]
    if isinstance(model, genfw.Weighs):
        chain = model.at(3) if isinstance(model, genfw.VDM) else model
        asked += [lambda y: chain.log_weight(x, y, noise=noise)]
    if isinstance(model, genfw.VDM):
        flow, between = genfw.ProbabilityFlow(steps=2, draws=1), torch.zeros(8, 1, 2, 2)
        asked += [lambda y: model.decode(between, 1, y).log_prob(x)]
        asked += [lambda y: flow(model, x, y, noise=noise).nats]
    if isinstance(model, genfw.HVAE):
        above = [torch.randn(8, *model.ladder.shapes[-1])]
        asked += [lambda y: model.expected(above, y)]
    for ask in asked:
        with torch.no_grad():
            assert torch.equal(ask(y), ask(None))


@pytest.mark.parametrize("make", [*HIERARCHIES.values(), by_categories])
def test_a_hierarchy_has_levels_one_to_T(make):
    """Level 1 also where there is no T."""
    model, x = make((1, 2, 2), 3), torch.randint(3, (2, 1, 2, 2))
    chain = model.at(2) if isinstance(model, genfw.VDM) else model
    rungs = chain.climb(x)
    below = (x, *(rung.z for rung in rungs))
    for t, rung in enumerate(rungs, 1):
        assert torch.equal(chain.encode(below[t - 1], t).mean, rung.q.mean)
        assert torch.equal(chain.decode(below[t], t).mean, rung.p.mean)
    assert torch.equal(model.encode(x, 1).mean, rungs[0].q.mean)
    assert torch.equal(model.decode(below[1], 1).mean, rungs[0].p.mean)
    for t in (0, -1, chain.levels + 1):
        for ask in (chain.encode, chain.decode):
            for z in below:
                with pytest.raises(
                    ValueError, match=rf"t: expected .* 1\.\.{chain.levels}, got {t}"
                ):
                    ask(z, t)


@pytest.mark.parametrize("make", [*MODELS.values(), by_categories])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_weights_of_another_precision_are_read_in_theirs(make, weights):
    """And latents and likelihoods are not below torch's default, here float64, nor float32."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = make((1, 2, 2), 3).eval().to(weights)
    x, noise = torch.randint(3, (8, 1, 2, 2)), genfw.Noise(0, torch.arange(8))
    for default in (torch.bfloat16, torch.float32, torch.float64):
        torch.set_default_dtype(default)
        least = torch.promote_types(default, torch.float32)
        try:
            total = model.elbo(x, noise=noise).total
            assert model.dtype == total.dtype == least and total.isfinite().all()
            assert model.sample(8, noise=noise).shape == x.shape
            if isinstance(model, genfw.HVAE):
                assert model.expected([torch.randn(8, *model.ladder.shapes[-1])]).dtype == least
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [*MODELS.values(), by_categories])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_default_below_float32_changes_no_number(make, narrow):
    """Weights in float32, and data of 256 values, which half precision cannot tell apart."""
    torch.manual_seed(0)
    model = make((1, 2, 2), 256).eval()
    x, noise = torch.randint(256, (8, 1, 2, 2)), genfw.Noise(0, torch.arange(8))
    with torch.no_grad():
        expected, images = model.elbo(x, noise=noise).total, model.sample(8, noise=noise)
        torch.set_default_dtype(narrow)
        try:
            found, drawn = model.elbo(x, noise=noise).total, model.sample(8, noise=noise)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and drawn.shape == images.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn, images)


# Broken classes: each names the words of the law that finds it.


class Rising(genfw.LogLinear):
    def curve_slope(self, u):
        return -super().curve_slope(u)


class Late(genfw.LogLinear):
    def inverse(self, log_snr):
        return super().inverse(log_snr) ** 2


class Flat(genfw.LogLinear):
    def log_snr(self, t):
        bend = self.log_snr_max + (self.log_snr_min - self.log_snr_max) * t
        return torch.where((t > 0.4) & (t < 0.6), bend * 0 + 0.5, bend)

    curve_inverse = genfw.LogLinear.curve_inverse


class Loud(genfw.LogLinear):
    def alpha(self, t):
        return 1.01 * super().alpha(t)


class Half(Eps):
    def solve(self, output, z, alpha, sigma):
        p = super().solve(output, z, alpha, sigma)
        return Prediction(p.x / 2, p.eps, p.alpha, p.sigma)


class Forgets(Eps):
    """Its target is not what `solve` reads."""

    def target(self, x, eps, alpha, sigma):
        return -eps


class Crosses(LinearParameterization):
    """Its target is z / sigma where alpha = sigma."""

    def coefficients(self, alpha, sigma):
        return 1.0, alpha / sigma


class Centred(Parameterization):
    """The noise, the mean over the batch taken off."""

    def solve(self, output, z, alpha, sigma):
        return Eps().solve(output - output.mean(0), z, alpha, sigma)


class Divides(LinearParameterization):
    def coefficients(self, alpha, sigma):
        return 0.0, 1e30 * (1e20 / sigma)


class Sharp(genfw.CategoricalParameterization):
    """Its mean is of other masses than it states."""

    def solve(self, output, z, alpha, sigma):
        return super().solve(2 * output, z, alpha, sigma)


class Running(genfw.CategoricalParameterization):
    """A prior at a position of what stands before it."""

    def log_prior(self, numbers):
        return numbers.cumsum(-1)


class Seventeen(genfw.CategoricalParameterization):
    """For digits alone."""

    def __init__(self):
        super().__init__(17)


class Leaky(CategoricalLikelihood):
    def forward(self, h):
        made = super().forward(h)
        made.log_probs = made.log_probs + 0.01
        return made


class Last(CategoricalLikelihood):
    def forward(self, h):
        class Always(Categorical):
            def sample(self, noise=None, purpose="sample"):
                return torch.full_like(super().sample(noise, purpose), 0)

        return Always(super().forward(h).log_probs)


class Edges(CategoricalLikelihood):
    def normalize(self, x):
        return 2 * x / (self.bins - 1) - 1.0


class Claims(CategoricalLikelihood):
    takes_pair = True


class Logistic(Likelihood):
    """A likelihood of one's own, of a logistic of which something is changed."""

    outputs, made = 2, genfw.DiscretizedLogistic

    def __init__(self, bins):
        super().__init__()
        self.bins = bins

    def forward(self, h):
        where, log_width = h.unflatten(1, (2, -1)).unbind(1)
        return self.made(where, log_width.clamp(-9, 3).exp(), self.bins)


def logistic(name, **methods):
    """A likelihood with one thing wrong."""
    made = type(name, (genfw.DiscretizedLogistic,), methods)
    return type(name, (Logistic,), {"made": made})


def of_a_mean(self, value):
    return genfw.DiscretizedLogistic.log_prob(self, value) / value[0].numel()


def of_the_first_dimension(self, value):
    return genfw.DiscretizedLogistic(self.where[:, :1], self.width[:, :1], self.bins).log_prob(
        value[:, :1]
    )


def not_keyed(self, noise=None, purpose="sample"):
    return genfw.DiscretizedLogistic.sample(self, None, purpose)


def of_one_number(self, noise=None, purpose="sample"):
    """All dimensions at the same quantile."""
    first = self.where[:, :1]
    u = genfw.noise.draws(noise, first).uniform(purpose, first).expand_as(self.where)
    z = self.where + self.width * u.logit()
    return ((z + 1) * self.bins / 2).floor().clamp(0, self.bins - 1).long()


def of_the_widest(self, where, width, bins):
    genfw.DiscretizedLogistic.__init__(self, where, width.amax(0, keepdim=True), bins)


class Stops(genfw.UniformGrid):
    def between(self, u, schedule):
        return super().between(u, schedule).round(decimals=2)


class Free(genfw.Heun):
    calls = 1


class Forgetful(genfw.DPMSolver):
    remembers = 0


class Whitened(genfw.Euler):
    """The prediction, the mean over the batch taken off."""

    def step(self, denoiser, z, t, s, y, *, noise, past=()):
        z, prediction = super().step(denoiser, z, t, s, y, noise=noise, past=past)
        return z - 0.01 * z.mean(0), prediction


class Remembers(genfw.Euler):
    """Leans on the last prediction, also that of another run."""

    last = None

    def step(self, denoiser, z, t, s, y, *, noise, past=()):
        z, prediction = super().step(denoiser, z, t, s, y, noise=noise, past=past)
        if self.last is not None and self.last.shape == z.shape:
            z = z + 0.01 * self.last
        self.last = prediction.eps
        return z, prediction


class Steered(genfw.Euler):
    """How many steps must be said."""

    def __init__(self, steps, grid=None, *, pull=0.0):
        super().__init__(steps, grid)


class Gridless(genfw.Euler):
    def __init__(self, steps=20):
        super().__init__(steps)


class Doubles(genfw.Euler):
    def step(self, denoiser, z, t, s, y, *, noise, past=()):
        z, prediction = super().step(denoiser, z, t, s, y, noise=noise, past=past)
        return z * s.new_ones(1, dtype=torch.float64), prediction


class Quiet(genfw.Ancestral):
    """Takes the mean of every step."""

    def step(self, denoiser, z, t, s, y, *, noise, past=()):
        prediction = denoiser(z, t, y)
        return genfw.posterior(z, prediction.x, s, t, denoiser.schedule).mean, prediction


class Unlabelled(genfw.Euler):
    def step(self, denoiser, z, t, s, y, *, noise, past=()):
        return super().step(denoiser, z, t, s, None, noise=noise, past=past)


class Stale(genfw.Euler):
    """Predicts at the time it goes to."""

    def step(self, denoiser, z, t, s, y, *, noise, past=()):
        prediction = denoiser(z, s, y)
        alpha, sigma = (
            f(s).to(z.dtype) for f in (denoiser.schedule.alpha, denoiser.schedule.sigma)
        )
        return alpha * prediction.x + sigma * prediction.eps, prediction


class Careless(genfw.UniformLogSNR):
    """Times uniform in log SNR, weighed as if they were uniform in t."""

    def forward(self, u, schedule):
        t, _ = super().forward(u, schedule)
        return t, schedule.slope(t)


class Hasty(genfw.UniformLogSNR):
    """Steps in proportion to log SNR, weighed as if each were drawn as often."""

    def in_steps(self, u, steps, schedule):
        t, measure, dt = super().in_steps(u, steps, schedule)
        return t, measure / dt, torch.ones_like(dt)


class Early(genfw.UniformTime):
    def draw(self, noise, x):
        return super().draw(noise, x).square()


class Shared(genfw.UniformTime):
    def draw(self, noise, x):
        return super().draw(noise, x).flip(0)


class Apart(genfw.FullPosterior):
    def forward(self, h, p):
        return super().forward(h + 0.1, p)


class Fixed(genfw.FullPosterior):
    """Learns the mean alone."""

    def forward(self, h, p):
        q = super().forward(h, p)
        return genfw.Normal(q.mean, torch.ones_like(q.std))


class Unbounded(genfw.Posterior):
    def forward(self, h, p):
        mean, log_std = h.chunk(2, 1)
        return genfw.Normal(mean, log_std.exp())


class Few(genfw.Bound):
    """A bound of few draws, of which something is changed."""

    def __init__(self, chunk=4000):
        super().__init__(2, 3, chunk)

    def forward(self, model, x, y=None, *, noise=None):
        return self.changed(super().forward(model, x, self.told(y), noise=self.drawn(noise)))

    def changed(self, estimate):
        return estimate

    def told(self, y):
        return y

    def drawn(self, noise):
        return noise


def few(**methods):
    """Estimators with one thing wrong."""
    return type("Few", (Few,), methods)


def only(**changes):
    """The same estimate but for these of its numbers."""
    return lambda self, e: replace(e, **{k: f(getattr(e, k)) for k, f in changes.items()})


def coarse(nats):
    return nats.bfloat16().double() if torch.is_autocast_enabled("cpu") else nats


def bare(self, *args, **kwargs):
    """Past what `Estimator` takes care of."""
    return self.forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"changed": only(nats=lambda nats: nats - 0.3)}, "nats above -log p"),
        ({"changed": only(nats=lambda nats: nats + 1.5)}, "nats above -log p"),
        ({"changed": only(nats=lambda nats: nats / 2)}, "nats above -log p"),
        ({"changed": only(nats=lambda nats: -nats)}, "nats above -log p"),
        ({"changed": only(nats=lambda nats: nats - nats.mean())}, "depends on its batch"),
        ({"changed": only(nats=lambda nats: nats.float())}, "nats are torch.float32, not float64"),
        ({"__call__": bare, "changed": only(nats=coarse)}, "nats are lost under autocast"),
        ({"changed": only(variance=lambda variance: variance / 3)}, "stated, .* found"),
        ({"changed": only(variance=lambda variance: variance * 3)}, "stated, .* found"),
        ({"changed": only(variance=lambda variance: variance.sqrt())}, "stated, .* found"),
        ({"told": lambda self, y: None}, r"nats above -log p\(x\|y\)"),
        ({"told": lambda self, y: None if y is None else y.roll(1)}, "batch|nats above"),
        ({"drawn": lambda self, noise: None}, "depends on its batch"),
        ({"drawn": lambda self, noise: noise.fold(self.chunk)}, "depends on the chunk"),
        ({"kind": "unbiased"}, "kind: unbiased"),
        ({"kind": "lower bound on -log p(x)"}, "kind: lower"),
    ],
)
def test_a_broken_estimator_is_found(methods, said):
    with pytest.raises(AssertionError, match=said):
        check(few(**methods))


def test_an_estimator_is_found_whole():
    check(Few)


@pytest.mark.parametrize(
    ("cls", "arguments", "said"),
    [
        (Careless, {}, "the integral of place"),
        (Hasty, {}, "step 1 of 3 counts"),
        (Early, {}, "u is not uniform"),
        (Shared, {}, "u depends on the batch"),
        (Apart, {}, "zeros beside N\\(0, I\\) cost"),
        (Fixed, {}, "nats from the nearest posterior"),
        (Unbounded, {}, "10000 gives"),
        (Stops, {}, "times do not fall"),
        (Free, {}, "asked 10 times, evaluations says 5"),
        (Whitened, {}, "a sample depends on its batch"),
        (Forgetful, {}, "leans on more of the past than remembers=0"),
        (Remembers, {}, "a sample depends on the run before"),
        (Doubles, {}, "samples are torch.float64"),
        (Quiet, {}, "training points|deviation of the samples"),
        (Unlabelled, {}, "mean of the samples"),
        (Stale, {}, "training points"),
        (Rising, {}, "slope is not positive"),
        (Late, {}, "jump|inverse"),
        (Flat, {}, "does not fall"),
        (Loud, {}, "variance is not 1"),
        (Half, {}, "is not z"),
        (Forgets, {}, "a perfect network does not give"),
        (Crosses, {}, "near log SNR 0.01 a prediction is divided by zero"),
        (Centred, {}, "depends on its batch"),
        (Divides, {}, "not finite|perfect network"),
        (Sharp, {"bins": 5}, "the score is not the gradient"),
        (Running, {"bins": 5}, "the prior at a position depends on the others"),
        (Leaky, {"bins": 3}, "masses sum to"),
        (Last, {"bins": 3}, "samples do not follow"),
        (Edges, {"bins": 3}, "not the bin centres"),
        (logistic("Mean", log_prob=of_a_mean), {"bins": 16}, "examples of 3 dimensions sum to"),
        (logistic("First", log_prob=of_the_first_dimension), {"bins": 3}, "sum to"),
        (logistic("Unkeyed", sample=not_keyed), {"bins": 16}, "a sample depends on its batch"),
        (logistic("Locked", sample=of_one_number), {"bins": 3}, "samples do not follow"),
        (logistic("Mates", __init__=of_the_widest), {"bins": 16}, "log_prob depends on its batch"),
        (logistic("Real", mean=property(lambda self: self.where)), {"bins": 16}, "the mean is"),
        (Claims, {"bins": 3}, "takes_pair=True, and yet: likelihood categorical reads a network's"),
    ],
)
def test_a_broken_class_is_found(cls, arguments, said):
    with pytest.raises(AssertionError, match=said):
        check(cls, **arguments)


@pytest.mark.parametrize(
    ("cls", "arguments"), [(Seventeen, {}), (genfw.CategoricalParameterization, {"bins": 2})]
)
def test_a_discrete_parameterization_is_asked_about_its_own_values(cls, arguments):
    check(cls, **arguments)


def test_the_laws_choose_how_many_steps_a_sampler_takes(monkeypatch):
    monkeypatch.setitem(LAWS, Sampler, LAWS[Sampler][:1])
    check(Steered, pull=1.0)


def test_a_likelihood_need_not_know_the_other_kind_of_head():
    class Bare(genfw.BinsLikelihood):
        def forward(self, h):
            where, width = h  # a ValueError for a network's output
            return genfw.BinSoftmax(where, width, self.bins)

    check(Bare, bins=3)


def broken(make, **methods):
    """A function that builds `make`'s model with some of its methods replaced."""

    def build(shape, bins, **more):
        model = make(shape, bins, **more)
        model.__class__ = type("Broken", (type(model),), methods)
        return model

    return build


def shifted(self, x, y=None, *, noise=None):
    elbo = super(type(self), self).elbo(x, y, noise=noise)
    return genfw.ELBO(elbo.reconstruction + 3.0, elbo.levels, elbo.prior)


def averaged(self, x, y=None, *, noise=None):
    elbo = super(type(self), self).elbo(x, y, noise=noise)
    mean = elbo.reconstruction.mean().expand(len(x))
    return genfw.ELBO(mean, elbo.levels, elbo.prior)


def doubled(self, x, y=None, *, noise=None, k=1):
    return super(type(self), self).log_weight(x, y, noise=noise, k=k) + 0.7


def beta_of_all(self, x, y=None, *, noise=None, k=1, beta=1.0):
    return beta * super(type(self), self).log_weight(x, y, noise=noise, k=k)


def beta_squared(self, x, y=None, *, noise=None, k=1, beta=1.0):
    return super(type(self), self).log_weight(x, y, noise=noise, k=k, beta=beta**2)


def beta_off(self, x, y=None, *, noise=None, k=1, beta=0.5):
    return super(type(self), self).log_weight(x, y, noise=noise, k=k, beta=2 * beta)


def halved(self, x, y=None, *, noise=None):
    elbo = super(type(self), self).elbo(x, y, noise=noise)
    return genfw.ELBO(elbo.reconstruction, elbo.levels, elbo.prior / 2)


def black(self, n, y=None, *, noise=None):
    return 0 * super(type(self), self).sample(n, y, noise=noise)


def timid(self, n, y=None, *, noise=None):
    z = 0.7 * self.prior(n).sample(noise.fold("prior"))
    return self.decode(z, 1, y).sample(noise.fold("z0"))


def global_noise(self, n, y=None, *, noise=None):
    return super(type(self), self).sample(n, y)


def unlabelled(self, n, y=None, *, noise=None):
    return super(type(self), self).sample(n, None, noise=noise)


def neighbours(self, n, y=None, *, noise=None):
    return super(type(self), self).sample(n, y.roll(1), noise=noise)


@pytest.mark.parametrize(
    ("method", "replacement", "said"),
    [
        ("sample", unlabelled, "sample: samples are the same whatever the label"),
        ("sample", neighbours, "sample: a sample is not of its label"),
    ],
)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_lost_label_is_found(make, method, replacement, said):
    with pytest.raises(AssertionError, match=said):
        a_sample_is_of_its_label(
            broken(make, **{method: replacement}), shape=(1, 2, 2), bins=3, classes=3
        )


@pytest.mark.parametrize(
    ("make", "method", "replacement", "said"),
    [
        (vae, "elbo", shifted, "sums to"),
        (vae, "elbo", averaged, "depends on its batch"),
        (vae, "elbo", halved, "the mean bound"),
        (vae, "log_weight", doubled, "sums to"),
        (mhvae, "log_weight", beta_of_all, "with beta=0 the mean log w is 0.0000"),
        (mhvae, "log_weight", beta_squared, "no straight line in beta"),
        (mhvae, "log_weight", beta_off, "beta=1 is another log w"),
        (vae, "sample", global_noise, "a sample depends on its batch"),
        (mhvae, "sample", black, "not drawn as often"),
        (vae, "sample", timid, "not drawn as often"),
    ],
)
def test_a_broken_model_is_found(make, method, replacement, said):
    with pytest.raises(AssertionError, match=said):
        every_law(broken(make, **{method: replacement}))


@pytest.mark.parametrize(
    ("make", "bins", "said"),
    [
        (broken(vae, of_density=True), 3, "samples are torch.int64, and of_density=True"),
        (broken(of_real_numbers, of_density=False), None, "torch.float32, and of_density=False"),
        (broken(of_real_numbers, of_density=False), 3, "torch.float32, and of_density=False"),
        (of_real_numbers, 3, "of_density=True, and bins=3: .* bins=None"),
        (lambda shape, bins: vae(shape, 3), None, "of_density=False, and bins=None: "),
    ],
)
def test_a_model_that_is_wrong_about_its_density_is_found(make, bins, said):
    with pytest.raises(AssertionError, match=said):
        check(make, LatentModel, shape=(1, 2, 2), bins=bins)


def every_law(make):
    for law in MODEL_LAWS:
        law(make, shape=(1, 2, 2), bins=3)


def test_only_interfaces_with_laws_can_be_checked():
    assert NoiseSchedule in LAWS
    with pytest.raises(TypeError, match="Linear: expected a subclass of one of NoiseSchedule"):
        check(nn.Linear)


SMALL = {"shape": (1, 2, 2), "bins": 3}


def test_what_a_function_builds_is_checked_as_its_interface():
    check(vae, LatentModel, **SMALL)
    check(lambda high, low: genfw.Cosine(high, low), NoiseSchedule)
    with pytest.raises(AssertionError, match="sums to"):
        check(broken(vae, elbo=shifted), LatentModel, **SMALL)
    with pytest.raises(TypeError, match="Linear: expected one of NoiseSchedule"):
        check(vae, nn.Linear)
    with pytest.raises(TypeError, match=r"check\(vae\): give shape="):
        check(vae, LatentModel, bins=3)


@pytest.mark.parametrize(
    ("cls", "arguments", "said"),
    [
        (genfw.Cosine, {"log_snr_max": 8.0}, "the laws choose log_snr_max; leave it out"),
        (genfw.Cosine, {"log_snr_min": 8.0}, "the laws choose log_snr_min; leave it out"),
        (Steered, {"steps": 8}, r"check\(Steered\): the laws choose steps; leave it out"),
        (Steered, {"grid": None}, "the laws choose grid; leave it out"),
        (Steered, {"push": 3}, r"Steered cannot be built from steps, grid, push .*'push'"),
        (Gridless, {}, r"Gridless cannot be built from steps, grid \(.*'grid'"),
        (genfw.VAE, {"bins": 3}, r"check\(VAE\): give shape=, the smaller the better"),
        (vae, {"bins": 3}, r"expected a class, got <function vae.*check\(make, LatentModel, shape"),
        (
            genfw.VAE,
            SMALL,
            r"VAE cannot be built from shape, bins .*'encoder'.*check\(make, LatentM",
        ),
        (genfw.VDM, SMALL, r"VDM cannot be built from shape, bins \(missing .*check\(make, Latent"),
        (genfw.Cosine, {"powr": 3}, r"Cosine cannot be built from log_snr_max.*, powr .*'powr'"),
    ],
)
def test_a_check_says_which_arguments_it_takes(cls, arguments, said):
    with pytest.raises(TypeError, match=said):
        check(cls, **arguments)

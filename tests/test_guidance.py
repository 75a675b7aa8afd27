"""Guidance of a denoiser: exact on mixtures of Gaussians, and the same in every coordinate."""

import json
import math

import pytest
import torch
from oracles import FiniteDenoiser, GaussianDenoiser
from torch import nn

import genfw
from genfw import (
    Ancestral,
    Autoguidance,
    ClassifierFree,
    ClassifierGuidance,
    Cosine,
    DenoisedClassifierGuidance,
    Denoiser,
    DPMSolver,
    EpsilonScaling,
    Learned,
    LinearParameterization,
    LogLinear,
    LogSNRGrid,
    NetworkDenoiser,
    Noise,
    Prediction,
    Unguided,
)
from genfw.amplitudes import broadcast
from genfw.diffusion.guidance import ByClassifier
from genfw.nets import MLP, NoisyClassifier

MEANS, STD, SHARE = (-0.6, 0.4), 0.2, (0.3, 0.7)
SCHEDULE = Cosine(9.0, -9.0)


class Mixture(Denoiser):
    """The exact denoiser of two Gaussians N(MEANS[y], STD^2) in the first dimension, standard
    normal in the others, and of their mixture where there is no label (None, or 2)."""

    def __init__(self, schedule=SCHEDULE, std=STD):
        super().__init__()
        self.schedule, self.std = schedule, std

    def forward(self, z, t, y=None):
        y = torch.full((len(z),), 2) if y is None else y
        alpha, sigma = (broadcast(f(t), z) for f in (self.schedule.alpha, self.schedule.sigma))
        log_snr = self.schedule.log_snr(t).expand(len(z))
        each = [self._one(z, alpha, sigma, mean) for mean in MEANS]
        share = Bayes(self.std)(z, log_snr).softmax(1)
        known = nn.functional.one_hot(y.clamp_max(1), 2).to(share)
        share = torch.where((y < 2)[:, None], known, share)
        x = sum(broadcast(share[:, k], z) * each[k] for k in range(2))
        return Prediction(x, (z - alpha * x) / sigma, alpha, sigma)

    def _one(self, z, alpha, sigma, mean):
        """E[x | z, y]: every dimension by itself."""
        means, stds = torch.zeros(z.shape[1]), torch.ones(z.shape[1])
        means[0], stds[0] = mean, self.std
        gain = alpha * stds**2 / (alpha**2 * stds**2 + sigma**2)
        return means + gain * (z - alpha * means)


class Bayes(nn.Module):
    """The exact classifier: log p(z | y) + log p(y)."""

    def __init__(self, std=STD):
        super().__init__()
        self.std = std

    def forward(self, z, log_snr):
        alpha, var = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()
        var = alpha**2 * self.std**2 + var
        gaps = z[:, :1] - alpha[:, None] * torch.tensor(MEANS)
        return (-0.5 * gaps**2 / var[:, None] + torch.tensor(SHARE).log()).to(z)


def labelled(cls, **arguments):
    """A random network that listens to its labels, read by a parameterization."""
    torch.manual_seed(0)
    parameterization = cls(**arguments)
    channels = parameterization.channels(3, 5)
    net = MLP((3,), out_channels=channels, classes=2, width=16, blocks=1)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return NetworkDenoiser(net, parameterization, SCHEDULE)


LINEAR = pytest.mark.parametrize(
    "cls",
    [c for c in genfw.Parameterization.registry.values() if issubclass(c, LinearParameterization)],
)


def near(one, other, tolerance=1e-9):
    for a, b in ((one.x, other.x), (one.eps, other.eps), (one.score, other.score)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def batch(double):
    z, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    return z, torch.linspace(0.05, 0.95, 6, dtype=torch.float64), y


@pytest.mark.parametrize("w", [0.0, 0.5, 3.0])
@LINEAR
def test_guidance_commutes_with_the_parameterization(cls, w, batch):
    """To combine the network's outputs, and to combine what they mean, is the same."""
    z, t, y = batch
    denoiser = labelled(cls)
    output, *rest = denoiser._read(z, t, y)
    without = denoiser._read(z, t, None)[0]
    expected = denoiser.parameterization.solve(w * output + (1 - w) * without, *rest)
    near(ClassifierFree(denoiser, w)(z, t, y), expected)


@pytest.mark.parametrize("cls", genfw.Parameterization.registry.values())
def test_every_parameterization_is_guided_to_the_same_score(cls, batch):
    """w s(z | y) + (1 - w) s(z), and z = alpha x + sigma eps still holds."""
    z, t, y = batch
    denoiser = labelled(cls, **({} if issubclass(cls, LinearParameterization) else {"bins": 5}))
    guided = ClassifierFree(denoiser, 2.5)(z, t, y)
    with_label, without = denoiser(z, t, y), denoiser(z, t)
    torch.testing.assert_close(guided.score, 2.5 * with_label.score - 1.5 * without.score)
    torch.testing.assert_close(guided.alpha * guided.x + guided.sigma * guided.eps, z)
    assert not torch.allclose(guided.x, with_label.x)


def test_scale_one_is_plain_and_scale_zero_has_no_label(batch):
    z, t, y = batch
    denoiser = labelled(genfw.V)
    near(ClassifierFree(denoiser, 1.0)(z, t, y), denoiser(z, t, y))
    near(ClassifierFree(denoiser, 1.0, rescale=1.0)(z, t, y), denoiser(z, t, y))
    near(ClassifierFree(denoiser, 0.0)(z, t, y), denoiser(z, t))
    near(Unguided(denoiser)(z, t, y), denoiser(z, t, y))
    near(EpsilonScaling(denoiser, 1.0, None)(z, t, y), denoiser(z, t, y))
    near(ClassifierGuidance(denoiser, Bayes(), 0.0)(z, t, y), denoiser(z, t))


def test_a_scale_is_not_rounded():
    """In float64, whatever torch's default is: 0.1 in float32 is another number."""
    denoiser, t = GaussianDenoiser(SCHEDULE, 0.3, 0.4), torch.tensor(0.4)
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.ones(4, dtype=torch.int64)
    expected = 0.1 * denoiser(z, t, y).x + 0.9 * denoiser(z, t).x
    torch.testing.assert_close(
        ClassifierFree(denoiser, 0.1)(z, t, y).x, expected, rtol=1e-12, atol=0
    )


def test_outside_its_interval_guidance_is_plain(batch):
    z, t, y = batch
    denoiser = labelled(genfw.Eps)
    log_snr = SCHEDULE.log_snr(t)
    inside = (log_snr > -2) & (log_snr < 3)
    assert 0 < inside.sum() < 6
    for rescale in (0.0, 0.5):
        limited = ClassifierFree(denoiser, 4.0, [-2.0, 3.0], rescale)(z, t, y).x
        full = ClassifierFree(denoiser, 4.0, None, rescale)(z, t, y).x
        torch.testing.assert_close(limited[inside], full[inside])
        torch.testing.assert_close(limited[~inside], denoiser(z, t, y).x[~inside])
    grey = FiniteDenoiser(SCHEDULE, torch.full((1, 3), 0.5))  # which has no contrast to give back
    limited = ClassifierFree(grey, 4.0, [-2.0, 3.0], 1.0)(z, t, y).x
    torch.testing.assert_close(limited[~inside], grey(z, t).x[~inside])
    limited = ClassifierGuidance(denoiser, Bayes(), 4.0, [-2.0, 3.0])(z, t, y).x
    torch.testing.assert_close(limited[~inside], denoiser(z, t).x[~inside])
    assert not torch.allclose(limited[inside], denoiser(z, t).x[inside])


@pytest.mark.parametrize("cls", genfw.Parameterization.registry.values())
def test_a_scaled_noise_is_a_scaled_score(cls, batch):
    """In its interval and nowhere else, and z = alpha x + sigma eps still holds."""
    z, t, y = batch
    denoiser = labelled(cls, **({} if issubclass(cls, LinearParameterization) else {"bins": 5}))
    plain, scaled = denoiser(z, t, y), EpsilonScaling(denoiser, 1.3, [-2.0, 3.0])(z, t, y)
    log_snr = SCHEDULE.log_snr(t)
    w = torch.where((log_snr > -2) & (log_snr < 3), 1.3, 1.0)[:, None]
    assert len(w.unique()) == 2
    torch.testing.assert_close(scaled.score, w * plain.score)
    torch.testing.assert_close(scaled.alpha * scaled.x + scaled.sigma * scaled.eps, z)
    near(
        EpsilonScaling(denoiser, 1.3, [-30.0, 30.0])(z, t, y),
        EpsilonScaling(denoiser, 1.3, None)(z, t, y),
    )


def test_guidance_of_guidance_says_both(batch):
    """What two samples are called by differs where they do."""
    z, t, y = batch
    denoiser = labelled(genfw.V)
    outer, inner = (
        EpsilonScaling(ClassifierFree(denoiser, w), 1.5, [-2.0, 3.0]) for w in (2.0, 5.0)
    )
    assert outer.title == "epsilon_scaling(scale=1.5, interval=[-2, 3]) of classifier_free(scale=2)"
    assert outer.title != inner.title
    assert EpsilonScaling(Unguided(denoiser), 1.5, None).title == "epsilon_scaling(scale=1.5)"
    log_snr = SCHEDULE.log_snr(t)
    w = torch.where((log_snr > -2) & (log_snr < 3), 1.5, 1.0)[:, None]
    expected = w * ClassifierFree(denoiser, 2.0)(z, t, y).score
    torch.testing.assert_close(outer(z, t, y).score, expected)


@pytest.mark.parametrize("interval", [(-9.0, 9.0), (-2.01, 1.99)])
def test_a_scaled_flow_narrows_a_gaussian_as_it_must(interval, double):
    """With n = sigma / alpha the flow of y = z / alpha is dy / dn = w n (y - m) / (s^2 + n^2):
    between two noise levels, gaps between samples shrink as (s^2 + n^2)^(w / 2)."""
    w, std = 1.4, 0.5
    guided = EpsilonScaling(GaussianDenoiser(SCHEDULE, 0.3, std), w, interval)
    steps = DPMSolver(900, grid=LogSNRGrid())  # of 0.02: the interval ends in the middle of two
    z_0 = steps(guided, torch.tensor([[-1.0], [0.5]]))

    def shrinks(start, end):
        return ((std**2 + math.exp(-end)) / (std**2 + math.exp(-start))) ** 0.5

    alpha_0, alpha_1 = (SCHEDULE.alpha(torch.tensor(t)) for t in (0.0, 1.0))
    expected = 1.5 * shrinks(-9.0, 9.0) * shrinks(*interval) ** (w - 1) * alpha_0 / alpha_1
    torch.testing.assert_close(z_0[1] - z_0[0], expected[None], rtol=3e-4, atol=0)


@pytest.mark.parametrize("guide", [ClassifierFree, ClassifierGuidance])
def test_the_ends_of_an_interval_are_guided(guide, batch):
    """Where they are those of the schedule too: a sampler's first step begins there."""
    z, _, y = batch
    denoiser = labelled(genfw.Eps)
    other = (Bayes(),) if guide is ClassifierGuidance else ()
    ends = [SCHEDULE.log_snr_min, SCHEDULE.log_snr_max]
    for end in (torch.tensor(0.0), torch.tensor(1.0)):
        limited, whole = (
            guide(denoiser, *other, 4.0, each)(z, end, y).eps for each in (ends, None)
        )
        assert torch.equal(limited, whole)
        assert not torch.equal(whole, denoiser(z, end, y).eps)


def test_rescaling_gives_back_the_contrast(batch):
    z, t, y = batch
    denoiser = labelled(genfw.X0)
    plain, sharp = denoiser(z, t, y).x, ClassifierFree(denoiser, 5.0)(z, t, y).x
    whole, half = (ClassifierFree(denoiser, 5.0, rescale=phi)(z, t, y) for phi in (1.0, 0.5))
    torch.testing.assert_close(whole.x.std(1), plain.std(1))
    torch.testing.assert_close(half.x, 0.5 * whole.x + 0.5 * sharp)
    torch.testing.assert_close(half.alpha * half.x + half.sigma * half.eps, z)
    direction = nn.functional.cosine_similarity(whole.x, sharp)
    torch.testing.assert_close(direction, torch.ones(6))


class Constant(genfw.Denoiser):
    """x_hat of no contrast with a label, or of some of it; y elsewhere."""

    def __init__(self, contrast):
        super().__init__()
        self.schedule, self.contrast = SCHEDULE, contrast

    def forward(self, z, t, y=None):
        x = torch.full_like(z, 0.1 if y is None else 0.7)
        x = x + (0 if y is None else self.contrast * torch.arange(z.shape[1]))
        alpha, sigma = self.schedule.alpha(t).to(z), self.schedule.sigma(t).to(z)
        return genfw.Prediction(x, (z - alpha * x) / sigma, alpha, sigma)


@pytest.mark.parametrize("dims", [1, 7, 784])
def test_without_contrast_there_is_nothing_to_rescale(dims):
    """A constant guess stays as guidance made it; one of contrast beside it is rescaled."""
    z, t, y = torch.randn(4, dims), torch.tensor(0.4), torch.zeros(4, dtype=torch.long)
    for denoiser in (Constant(0.0), Constant(0.1)):
        plain = ClassifierFree(denoiser, 3.0)(z, t, y)
        scaled = ClassifierFree(denoiser, 3.0, rescale=1.0)(z, t, y)
        assert scaled.x.isfinite().all() and scaled.eps.isfinite().all()
        same = torch.equal(scaled.x, plain.x)
        assert same == (denoiser.contrast == 0 or dims == 1)


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_the_exact_classifier_guides_exactly(w, batch):
    """Bayes: s(z) + grad log p(y | z) = s(z | y), so that a classifier and its absence agree."""
    z, t, y = batch
    mixture = Mixture()
    by_classifier = ClassifierGuidance(mixture, Bayes(), w)(z, t, y)
    near(by_classifier, ClassifierFree(mixture, w)(z, t, y), 1e-7)
    if w == 1:
        near(by_classifier, mixture(z, t, y), 1e-7)


def test_gradients_are_taken_wherever_gradients_are_off(batch):
    z, t, y = batch
    denoiser = labelled(genfw.V)
    for cls in (ClassifierGuidance, DenoisedClassifierGuidance):
        guided = cls(denoiser, Bayes(), 2.0)
        expected = guided(z, t, y).x.detach()
        with torch.no_grad():
            torch.testing.assert_close(guided(z, t, y).x, expected)
        with torch.inference_mode():  # as in Lightning's test loop
            torch.testing.assert_close(guided(z + 0, t + 0, y + 0).x, expected)


def test_samples_of_an_exactly_guided_mixture_are_those_of_the_class(double):
    n, y = 4000, torch.arange(4000) % 2
    noise = Noise(0, torch.arange(n))
    z = ClassifierGuidance(Mixture(), Bayes(), 1.0)
    z = Ancestral(100)(z, torch.randn(n, 1), y, noise=noise)[:, 0]
    for k in (0, 1):
        x = z[y == k] / SCHEDULE.alpha(torch.tensor(0.0))
        assert abs(x.mean() - MEANS[k]) < 5 * STD / (n / 2) ** 0.5 + 0.005
        assert abs(x.std() / STD - 1) < 0.1


def test_through_x_hat_the_gradient_is_that_of_the_composition(batch):
    """By finite differences; and near the data, where x_hat is z, both ways agree."""
    z, t, y = batch
    mixture, h = Mixture(), 1e-5
    guided = DenoisedClassifierGuidance(mixture, Bayes(), 1.0)
    gradient = guided.gradient(z, t, y)
    for d in range(3):
        step = h * torch.eye(3)[d]
        rise = guided.evidence(z + step, t, y) - guided.evidence(z - step, t, y)
        torch.testing.assert_close(gradient[:, d], rise / (2 * h), rtol=1e-5, atol=1e-6)
    found = guided(z, t, y)
    expected = mixture(z, t).score + gradient
    torch.testing.assert_close(found.score, expected, rtol=1e-7, atol=1e-7)

    start = torch.full((6,), 1e-4, dtype=torch.float64)
    z_0 = SCHEDULE.alpha(start)[:, None] * torch.randn(6, 3)
    exact = ClassifierGuidance(mixture, Bayes(), 1.0).gradient(z_0, start, y)
    torch.testing.assert_close(guided.gradient(z_0, start, y), exact, rtol=0.05, atol=1e-3)


def test_of_x_hat_the_classifier_is_asked_as_of_a_clean_image(batch):
    """log p(y | alpha_0 x_hat) at the data's end, whatever the noise of z."""
    z, t, y = batch
    x = Mixture()(z, t).x
    clean = (torch.tensor(9.0).sigmoid().sqrt() * x, torch.full((6,), 9.0))
    expected = Bayes()(*clean).log_softmax(1)[torch.arange(6), y]
    found = DenoisedClassifierGuidance(Mixture(), Bayes(), 1.0).evidence(z, t, y)
    torch.testing.assert_close(found, expected)


PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


def small_networks():
    """A denoiser of images that are told labels, and a classifier of them; float32."""
    torch.manual_seed(0)
    denoiser = NetworkDenoiser(MLP((1, 4, 4), classes=2, width=8, blocks=1), genfw.V(), SCHEDULE)
    return denoiser, NoisyClassifier((1, 4, 4), 2, 9.0, -9.0, channels=(8,)).eval()


@PRECISIONS
@pytest.mark.parametrize("guide", genfw.Guidance.registry.values())
def test_guidance_keeps_the_precision_of_z(guide, dtype):
    """Whatever that of the weights, here float32: a model may be trained in another."""
    denoiser, classifier = small_networks()
    needs = {"Autoguidance": (denoiser,)}
    by = (classifier,) if issubclass(guide, ByClassifier) else needs.get(guide.__name__, ())
    z, y = torch.randn(3, 1, 4, 4).to(dtype), torch.tensor([0, 1, 0])
    guided = guide(denoiser, *by)(z, torch.tensor(0.5), y)
    assert guided.x.dtype == guided.eps.dtype == dtype and guided.x.isfinite().all()


@PRECISIONS
def test_the_gradient_of_a_classifier_of_another_precision_is_its_own(dtype):
    """At z as it reads it, to the last digit that z has."""
    denoiser, classifier = small_networks()
    z, t, y = torch.randn(3, 1, 4, 4).to(dtype), torch.tensor(0.5), torch.tensor([0, 1, 0])
    read = z.float().requires_grad_()
    log_snr = SCHEDULE.log_snr(t).float().expand(3)
    own = classifier(read, log_snr).log_softmax(1)[torch.arange(3), y]
    (gradient,) = torch.autograd.grad(own.sum(), read)
    guided = ClassifierGuidance(denoiser, classifier)
    assert gradient.any() and torch.equal(guided.gradient(z, t, y), gradient.to(dtype))
    assert torch.equal(guided.log_prob(z, t, y), own.to(dtype))


def test_a_weaker_model_is_asked_at_the_same_noise_level(batch):
    z, t, y = batch
    weaker = Mixture(LogLinear(12.0, -11.0), std=0.5)
    guided = Autoguidance(Mixture(), weaker, 2.0)(z, t, y)
    same = Mixture(SCHEDULE, std=0.5)(z, t, y)
    near(
        guided,
        Prediction(
            2 * Mixture()(z, t, y).x - same.x,
            2 * Mixture()(z, t, y).eps - same.eps,
            same.alpha,
            same.sigma,
        ),
        1e-6,
    )
    near(Autoguidance(Mixture(), Mixture(), 3.0)(z, t, y), Mixture()(z, t, y))
    for most, least in ((5.0, -9.0), (9.0, -5.0)):
        own = rf"of {most:g} to {least:g}: guide within interval=\[{least:g},{most:g}\]"
        with pytest.raises(ValueError, match=f"log SNR 9 to -9, got one {own}"):
            Autoguidance(Mixture(), Mixture(Cosine(most, least)))


def learned(highest, lowest):
    """A learned schedule whose ends came here from 9 and -9."""
    schedule = Learned(9.0, -9.0)
    schedule.moved.data += torch.tensor([highest - 9.0, lowest + 9.0])
    return schedule


class Straight(genfw.NoiseSchedule):
    """Of a curve that ends where the model does: it has no time at more log SNR."""

    def log_snr(self, t):
        return 8.95 - 17.9 * t


@pytest.mark.parametrize(
    "other",
    [learned(8.93, -8.94), learned(9.08, -9.05), Cosine(8.95, -9.04), Straight(8.95, -8.95)],
)
def test_a_weaker_model_is_asked_at_its_end_where_that_is_near(other, batch, recwarn):
    """Learned ends move while a model trains, so that its own earlier weights end elsewhere."""
    z, _, y = batch
    better, weaker = Mixture(learned(9.0, -9.0)), Mixture(other, std=0.5)
    guided = Autoguidance(better, weaker, 2.0)
    for t in torch.tensor([0.0, 1e-4, 0.4, 0.9999, 1.0], dtype=torch.float64):
        lowest, highest = (other.log_snr(torch.tensor(each)).item() for each in (1.0, 0.0))
        at = better.schedule.log_snr(t).clamp(lowest, highest).detach()
        expected = 2 * better(z, t, y).x - weaker(z, other.inverse(at), y).x
        torch.testing.assert_close(guided(z, t, y).x, expected)
    assert not recwarn.list  # of numbers that carry a gradient


def test_the_interval_that_a_refusal_names_is_taken():
    """By a schedule whose ends are no round numbers."""
    better, weaker = Mixture(learned(9.0, -9.0)), Mixture(learned(8.51237, -8.49876))
    with pytest.raises(ValueError, match="log SNR 9 to -9") as refused:
        Autoguidance(better, weaker)
    interval = json.loads(str(refused.value).partition("interval=")[2])
    Autoguidance(better, weaker, interval=interval)
    assert interval == pytest.approx([-8.49876, 8.51237], abs=0.01)


def test_a_weaker_model_that_reaches_less_far_guides_where_it_does(batch):
    z, t, y = batch
    narrow = Mixture(LogLinear(5.0, -4.0), std=0.5)
    with pytest.raises(ValueError, match=r"6 to -4, got one of 5 to -4: guide within interval="):
        Autoguidance(Mixture(), narrow, interval=[-4.0, 6.0])
    found = Autoguidance(Mixture(), narrow, 2.0, interval=[-4.0, 5.0])(z, t, y).x
    wide = Autoguidance(Mixture(), Mixture(std=0.5), 2.0, interval=[-4.0, 5.0])(z, t, y).x
    torch.testing.assert_close(found, wide)


def test_an_nll_is_of_the_bare_model():
    """Whatever guides a model's samples."""
    torch.manual_seed(0)
    net = MLP((1, 2, 2), classes=2, width=8, blocks=1)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    denoiser = NetworkDenoiser(net, genfw.Eps(), Cosine(4.0, -6.0))

    def vdm(**more):
        return genfw.VDM(
            denoiser,
            genfw.BinsLikelihood(3),
            shape=(1, 2, 2),
            sampler=Ancestral(4),
            classes=2,
            **more,
        )

    plain, guided = vdm(), vdm(guidance=lambda bare: ClassifierFree(bare, 6.0))
    x, y = torch.randint(3, (5, 1, 2, 2)), torch.tensor([0, 1, 1, 0, 1])
    noise = Noise(0, torch.arange(5))
    with torch.no_grad():
        for one, other in (
            (plain, guided),
            (plain.for_evaluation(), guided.for_evaluation()),
            (plain.at(steps=3), guided.at(steps=3)),
        ):
            assert torch.equal(
                one.elbo(x, y, noise=noise).total, other.elbo(x, y, noise=noise).total
            )
        many = Noise(0, torch.arange(64))
        labels = torch.ones(64, dtype=torch.int64)
        assert not torch.equal(
            plain.sample(64, labels, noise=many), guided.sample(64, labels, noise=many)
        )
        sampled = guided.for_evaluation().sample(64, labels, noise=many)
        assert torch.equal(guided.sample(64, labels, noise=many), sampled)


def test_guidance_between_a_label_and_none_needs_a_model_that_knows_labels():
    """Or it would change nothing, and say that it did. A classifier knows labels of its own, and a
    weaker model needs none."""

    def vdm(guidance):
        sampler = Ancestral(4)
        return genfw.VDM(
            Mixture(), genfw.GaussianLikelihood(), shape=(3,), sampler=sampler, guidance=guidance
        )

    y, noise = torch.ones(4, dtype=torch.int64), Noise(0, torch.arange(4))
    free = vdm(lambda bare: ClassifierFree(bare, 7.5))
    for act in (lambda: free.sample(4, y, noise=noise), lambda: free.sample(4), free.guided):
        with pytest.raises(ValueError, match=r"classifier_free needs a cond.*classes=None: build"):
            act()
    plain = vdm(Unguided)
    assert torch.equal(plain.sample(4, y, noise=noise), plain.sample(4, noise=noise))
    for guidance in (
        lambda bare: ClassifierGuidance(bare, Bayes(), 5.0),
        lambda bare: Autoguidance(bare, Mixture(std=0.5), 5.0),
    ):
        drawn = vdm(guidance).sample(4, y, noise=noise)
        assert not torch.allclose(drawn, plain.sample(4, y, noise=noise))


def test_what_cannot_be_guided():
    denoiser = GaussianDenoiser(SCHEDULE, 0.0, 1.0)
    with pytest.raises(ValueError, match="needs labels"):
        ClassifierGuidance(denoiser, Bayes())(torch.randn(2, 1), torch.tensor(0.5))
    for wrong in ([2.0, -2.0], [1.0], [1.0, 2.0, 3.0], [0.0, math.nan]):
        with pytest.raises(ValueError, match="lowest, highest"):
            ClassifierFree(denoiser, interval=wrong)
    with pytest.raises(ValueError, match="finite"):
        ClassifierFree(denoiser, math.inf)
    with pytest.raises(ValueError, match="rescale: expected a number from 0 to 1, got 2"):
        ClassifierFree(denoiser, rescale=2.0)


def test_a_title_says_what_is_done():
    denoiser = GaussianDenoiser(SCHEDULE, 0.0, 1.0)
    assert Unguided(denoiser).title == ""
    assert ClassifierFree(denoiser, 3.0).title == "classifier_free(scale=3)"
    limited = ClassifierFree(denoiser, 1.5, [-3.0, 4.0], 0.7)
    assert limited.title == "classifier_free(scale=1.5, interval=[-3, 4], rescale=0.7)"

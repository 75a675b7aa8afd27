"""The top-down hierarchy."""

import math

import pytest
import torch
from oracles import gaussian_log_prob
from test_model import Laplace
from torch.distributions import Normal as Reference
from torch.distributions import kl_divergence

from genfw import (
    HVAE,
    BernoulliLikelihood,
    CategoricalLikelihood,
    FullPosterior,
    GaussianLikelihood,
    Noise,
    Normal,
    ResidualPosterior,
    Weighs,
)
from genfw.models.posterior import BOUND
from genfw.nets import Ladder

IMAGES = torch.tensor([[i >> b & 1 for b in range(4)] for i in range(16)]).view(16, 1, 2, 2)
EACH = torch.arange(16)


def random_hvae(blocks=(2, 1), **options):
    """z_T at 1x1, the others at 2x2; every level matters, and the posteriors are wide enough to
    weigh all of it."""
    ladder = Ladder((1, 2, 2), 1, width=8, latents=2, blocks=blocks, **options)
    with torch.no_grad():
        for parameter in ladder.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for block in ladder.down:
            block.posterior.last.weight *= 0.3
            block.posterior.last.bias.zero_()[2:] += 0.2
    return HVAE(ladder, BernoulliLikelihood(), options.get("classes")).eval()


class LaplacePosterior(FullPosterior):
    """A Normal by name, with a density of its own."""

    def forward(self, h, p):
        q = super().forward(h, p)
        return Laplace(q.mean, q.std)


class LinearGaussianLadder(torch.nn.Module):
    """p(z_T) = N(0, 1), p(z_t | z_{t+1}) = N(a z_{t+1}, s^2), p(x | z_1) = N(a z_1, s^2), with the
    exact q(z_t | z_{t+1}, x), by Bayes: x | z_t ~ N(a^t z_t, s^2 (1 + a^2 + ... + a^{2 (t - 1)})).

    `bias` bends the posterior's means by so many deviations of the prior. It is told relative to
    the prior unless `full`.
    """

    def __init__(self, levels, full=False, a=0.8, s=0.7, bias=0.0):
        super().__init__()
        self.shapes, self.full = ((2,),) * levels, full
        self.a, self.s, self.bias = a, s, bias

    def read(self, x, y=None):
        return [x]

    def forward(self, draw, n, y=None, seen=None):
        z, a = torch.zeros(n, 2), self.a
        for t in range(len(self.shapes), 0, -1):
            mean, std = (z, 1.0) if t == len(self.shapes) else (a * z, self.s)
            prior = self.head(mean, std)
            if seen is None:
                z = draw(prior, None)
                continue
            variance = self.s**2 * sum(a ** (2 * i) for i in range(t))
            precision = 1 / std**2 + a ** (2 * t) / variance
            exact = (mean / std**2 + a**t * seen[0] / variance) / precision
            exact, deviation = exact + self.bias * std, precision**-0.5
            if not self.full:
                exact, deviation = (exact - mean) / std, deviation / std
            z = draw(prior, self.head(exact, deviation))
        return torch.cat([a * z, torch.full_like(z, math.log(self.s))], 1)

    def head(self, mean, std):
        log_std = torch.full_like(mean, BOUND * math.atanh(math.log(std) / BOUND))
        return torch.cat([mean, log_std], 1)

    def log_prob(self, x):
        variance = 1.0
        for _ in self.shapes:
            variance = self.a**2 * variance + self.s**2
        return gaussian_log_prob(x, 0.0, variance**0.5)


@pytest.mark.parametrize("posterior", [ResidualPosterior(), FullPosterior()])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_the_bound_is_tight_with_the_true_posterior_and_below_otherwise(levels, posterior, double):
    x, n, full = 1.3 * torch.randn(3, 2), 20_000, isinstance(posterior, FullPosterior)
    exact = LinearGaussianLadder(levels, full)
    evidence = exact.log_prob(x)
    model = HVAE(exact, GaussianLikelihood(), posterior=posterior)
    torch.testing.assert_close(model.log_weight(x), evidence)
    total = model.elbo(x.repeat_interleave(n, 0)).total.view(3, n)
    assert ((total.mean(1) - evidence).abs() < 5 * total.std(1) / n**0.5 + 1e-9).all()
    ladder = LinearGaussianLadder(levels, full, bias=0.4)
    bent = HVAE(ladder, GaussianLikelihood(), posterior=posterior)
    total = bent.elbo(x.repeat_interleave(n, 0)).total.view(3, n)
    assert (evidence - total.mean(1) > 0.05).all()
    w = (bent.log_weight(x, k=n).view(3, n) - evidence[:, None]).exp()
    assert ((w.mean(1) - 1).abs() < 5 * w.std(1) / n**0.5).all()


def test_the_terms_written_out(double):
    """Every divergence in closed form, given the draws above; z_T's stands as the prior."""
    model, seen = random_hvae(), []

    class Spy(torch.nn.Module):
        shapes, read = model.ladder.shapes, model.ladder.read

        def forward(self, draw, n, y=None, features=None):
            def spied(prior, posterior):
                z = draw(prior, posterior)
                seen.append((prior, posterior, z))
                return z

            self.h = model.ladder(spied, n, y, features)
            return self.h

    spy, noise = Spy(), Noise(0, EACH)
    elbo = HVAE(spy, model.likelihood).elbo(IMAGES, noise=noise)
    log_p = IMAGES * spy.h - torch.nn.functional.softplus(spy.h)
    torch.testing.assert_close(elbo.reconstruction, log_p.flatten(1).sum(1))
    kl, log_ratio = [], torch.zeros(16)
    for t, (prior, posterior, z) in zip((3, 2, 1), seen, strict=True):
        (mean, log_std), (change, log_change) = prior.chunk(2, 1), posterior.chunk(2, 1)
        p = Reference(mean, (5 * torch.tanh(log_std / 5)).exp())
        q = Reference(mean + p.stddev * change, p.stddev * (5 * torch.tanh(log_change / 5)).exp())
        eps = noise.fold(f"z{t}").normal("sample", mean)
        torch.testing.assert_close(z, q.mean + q.stddev * eps)
        kl.append(kl_divergence(q, p).flatten(1).sum(1))
        log_ratio = log_ratio + (q.log_prob(z) - p.log_prob(z)).flatten(1).sum(1)
    torch.testing.assert_close(elbo.prior, kl[0])
    torch.testing.assert_close(elbo.levels, (kl[2], kl[1]))
    for beta in (1.0, 0.3):
        torch.testing.assert_close(
            model.log_weight(IMAGES, noise=noise, beta=beta), elbo.reconstruction - beta * log_ratio
        )


def test_the_bound_of_a_posterior_of_its_own_kind_is_the_log_weight_at_its_draw(double):
    """By its density, not that of the Normal it is by name; what its units cost is not known."""

    model, noise = random_hvae(), Noise(0, EACH)
    model.posterior = LaplacePosterior()
    bound, log_w = model.elbo(IMAGES, noise=noise).total, model.log_weight(IMAGES, noise=noise)
    torch.testing.assert_close(bound, log_w)
    assert all(cost.isnan().all() for cost in model.costs(IMAGES))


@pytest.mark.parametrize("blocks", [(1,), (2, 1), (0, 3)], ids=str)
def test_probabilities_of_all_binary_images_sum_to_one(blocks, double):
    model, n = random_hvae(blocks), 1000
    log_w = model.log_weight(IMAGES, k=n).view(16, n).detach()
    w = log_w.exp()
    error = (w.var(1) / n).sum().sqrt()
    assert abs(w.mean(1).sum() - 1) < 4 * error and error < 0.03
    total = model.elbo(IMAGES.repeat_interleave(n, 0)).total.view(16, n).detach()
    error = ((total.var(1) + log_w.var(1)) / n).sqrt()
    assert ((total.mean(1) - log_w.mean(1)).abs() < 5 * error).all()
    p = total.mean(1).exp()
    assert p.sum() <= 1 + 4 * (p**2 * total.var(1) / n).sum().sqrt()


@torch.no_grad()
def test_samples_have_the_models_own_frequencies(double):
    model, n = random_hvae(), 10_000
    w = model.log_weight(IMAGES, k=1000).exp().view(16, -1)
    p, variance = w.mean(1), w.var(1) / w.shape[1]
    samples = model.sample(n, noise=Noise(0, torch.arange(n)))
    codes = (samples.flatten(1) * torch.tensor([1, 2, 4, 8])).sum(1)
    gap = torch.bincount(codes, minlength=16) / n - p
    assert (gap.abs() < 5 * (p * (1 - p) / n + variance).sqrt()).all()


@torch.no_grad()
def test_a_sample_draws_its_latents_independently(double):
    """To five standard errors of a correlation that is zero, number by number of z_2 and z_1."""
    model, n, heads, drawn = random_hvae((2,)), 2000, [], []
    for block in model.ladder.down:
        block.prior.register_forward_hook(lambda module, given, out: heads.append(out[:, :4]))
        block.project.register_forward_hook(lambda module, given, out: drawn.append(given[0]))
    model.sample(n, noise=Noise(0, torch.arange(n)))
    priors = [model._prior(head, t) for t, head in zip((2, 1), heads, strict=True)]
    above, below = ((z - p.mean) / p.std for z, p in zip(drawn, priors, strict=True))
    assert ((above * below).mean(0).abs() < 5 / n**0.5).all()
    assert ((below.square().mean(0) - 1).abs() < 5 * (2 / n) ** 0.5).all()


def test_gradients_against_finite_differences(double):
    model, x, noise = random_hvae((1, 1)), IMAGES[3:7], Noise(0, torch.arange(4))
    model.elbo(x, noise=noise).total.sum().backward()
    for name, parameter in model.named_parameters():
        direction, step = torch.randn_like(parameter), 1e-6
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step * direction
                ends.append(model.elbo(x, noise=noise).total.sum())
                parameter -= sign * step * direction
            slope, gradient = (ends[0] - ends[1]) / (2 * step), (parameter.grad * direction).sum()
        torch.testing.assert_close(slope, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_an_example_keeps_its_number_whatever_its_batch_and_k(double):
    model, some = random_hvae(), torch.tensor([11, 2, 7])
    whole = model.elbo(IMAGES, noise=Noise(0, EACH)).total
    torch.testing.assert_close(model.elbo(IMAGES[some], noise=Noise(0, some)).total, whole[some])
    rows, noise = IMAGES[some].repeat_interleave(4, 0), Noise(0, torch.arange(12))
    torch.testing.assert_close(
        model.log_weight(IMAGES[some], noise=noise, k=4), model.log_weight(rows, noise=noise)
    )
    assert isinstance(model, Weighs)


def test_labels_matter_on_both_ways_and_follow_k(double):
    model, y = random_hvae(classes=2), torch.arange(16) % 2
    noise = Noise(0, torch.arange(48))
    rows, labels = IMAGES.repeat_interleave(3, 0), y.repeat_interleave(3, 0)
    weights = model.log_weight(IMAGES, y, noise=noise, k=3)
    torch.testing.assert_close(weights, model.log_weight(rows, labels, noise=noise))
    assert (weights != model.log_weight(IMAGES, 1 - y, noise=noise, k=3)).all()


@torch.no_grad()
def test_a_label_is_told_on_the_way_up_and_on_the_way_down(double):
    ladder, y = random_hvae(classes=2).ladder, torch.arange(16) % 2
    ways = [ladder.read(IMAGES.double(), each) for each in (y, 1 - y)]
    for mine, other in zip(*ways, strict=True):
        assert (mine != other).flatten(1).any(1).all()

    def means(prior, _):
        return prior.chunk(2, 1)[0]

    mine, other = (ladder(means, 16, each) for each in (y, 1 - y))
    assert (mine != other).flatten(1).any(1).all()


def test_before_training_every_prior_is_standard_normal_and_the_data_say_nothing():
    ladder, seen = Ladder((1, 8, 8), 17), []

    def draw(prior, posterior):
        seen.extend([prior, posterior])
        return torch.randn_like(prior.chunk(2, 1)[0])

    assert ladder(draw, 3, seen=ladder.read(torch.randn(3, 1, 8, 8))).shape == (3, 17, 8, 8)
    assert [head.shape[2] for head in seen[::2]] == [2, 4, 4, 8, 8]
    assert not torch.cat([head.flatten() for head in seen]).any()
    assert (
        not HVAE(ladder, CategoricalLikelihood(17)).elbo(torch.zeros(2, 1, 8, 8).long()).rate.any()
    )


def test_the_variance_on_the_way_down_does_not_grow_with_depth():
    """Each of N blocks adds 1/N of what one alone would: with no scaling 64 blocks add 64 times."""

    def power(depth):
        torch.manual_seed(0)
        ladder, h = Ladder((1, 8, 8), 1, blocks=(depth,)), torch.zeros(16, 32, 8, 8)
        for block in ladder.down:
            h = block(h, lambda prior, _: torch.randn_like(prior.chunk(2, 1)[0]), None)
        return h.var().item()

    assert power(64) < 2 * power(1)


@pytest.mark.parametrize(("down", "up"), [(1, 2), (4, 3)])
def test_what_a_block_adds_begins_at_one_over_the_root_of_their_number(down, up):
    """The last convolution and the projection of z: uniform within 1/sqrt(inputs), before."""
    ladder = Ladder((1, 8, 8), 1, latents=16, blocks=(0, down), encoder_blocks=up)
    layers = [(down, each) for b in ladder.down for each in (b.residual.layers[-1], b.project)]
    layers += [(2 * up, block.layers[-1]) for way in ladder.up for block in list(way)[1:]]
    assert len(layers) == 2 * down + 2 * up
    for depth, layer in layers:
        inputs = layer.weight[0].numel()
        for each in (layer.weight, layer.bias):
            assert 0.8 < each.abs().max() * (depth * inputs) ** 0.5 <= 1.0001


@torch.no_grad()
def test_latents_and_data_are_reached_by_additions_only(double):
    """Without what blocks add, h is the starts and the projections of all z; on the way up it is
    the data through the halvings alone."""
    ladder, zs = random_hvae().ladder, []
    for block in ladder.down:
        block.residual.layers[-1].weight.zero_(), block.residual.layers[-1].bias.zero_()
        block.prior.last.weight.zero_(), block.prior.last.bias.zero_()
    for layers in ladder.up:
        layers[1].layers[-1].weight.zero_(), layers[1].layers[-1].bias.zero_()
    seen = ladder.read(IMAGES.double())
    torch.testing.assert_close(seen[0], ladder.enter(IMAGES.double()))
    torch.testing.assert_close(seen[1], ladder.up[1][0](seen[0]))

    def draw(prior, _):
        zs.append(torch.randn_like(prior.chunk(2, 1)[0]))
        return zs[-1]

    left = []
    ladder.leave.register_forward_hook(lambda module, given, out: left.append(given[0]))
    ladder(draw, 16)
    top, *others = (block.project(z) for block, z in zip(ladder.down, zs, strict=True))
    expected = ladder.starts[0] + (ladder.starts[1] + top) + sum(others)
    torch.testing.assert_close(left[0], expected)


@torch.no_grad()
def test_a_posterior_is_told_of_the_data_and_of_the_latents_above(double):
    """Its own two numbers are: q depends on z above by more than its prior."""
    ladder = random_hvae().ladder
    seen = ladder.read(IMAGES.double())

    def told(z, seen):
        heads = []

        def draw(prior, posterior):
            heads.append(posterior)
            return torch.full_like(prior.chunk(2, 1)[0], z)

        ladder(draw, 16, seen=seen)
        return heads

    first, above, data = told(0.0, seen), told(1.0, seen), told(0.0, [-each for each in seen])
    assert torch.equal(first[0], above[0])  # that of z_T, above which there is none
    for before, after in (*zip(first[1:], above[1:]), *zip(first, data)):
        assert not torch.isclose(before, after).all(0).any()


def test_variances_stay_bounded_and_numbers_finite_when_weights_diverge():
    model = random_hvae()
    with torch.no_grad():
        for block in model.ladder.down:
            block.prior.last.bias.fill_(1e4)
            block.posterior.last.bias[2:].fill_(-1e4)
    elbo = model.elbo(IMAGES)
    elbo.total.sum().backward()
    for number in (*elbo.levels, elbo.prior, *(p.grad for p in model.parameters())):
        assert number.isfinite().all()


@torch.no_grad()
def test_temperature_scales_each_level(double):
    model, noise = random_hvae(), Noise(0, torch.arange(8))
    plain = model.sample(8, noise=noise)
    assert torch.equal(model.sample(8, noise=noise, temperature=1.0), plain)
    seen = []
    model.ladder.leave.register_forward_hook(lambda module, given, h: seen.append(h))
    for temperature in (0.0, 0.5, [0.0, 0.0, 1.0], [0.0, 0.0, 0.5], [1.0, 0.0, 0.0]):
        model.sample(8, noise=noise, temperature=temperature)
        model.sample(8, noise=Noise(1, torch.arange(8)), temperature=temperature)
    cold, again, warm, _, top, _, mild, _, fine, _ = seen
    assert torch.equal(cold, again) and torch.equal(cold, cold[:1].expand_as(cold))
    for h in (warm, top, mild, fine):
        assert not torch.allclose(h, cold)
    assert not torch.allclose(top, mild)
    # z_1 alone at 2x2, z_3 alone at 1x1: the last of the list is the top's
    z_3 = []
    model.ladder.down[0].project.register_forward_hook(lambda m, given, out: z_3.append(given[0]))
    for temperature in ([0.0, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]):
        model.sample(8, noise=noise, temperature=temperature)
    half, whole, none = z_3
    torch.testing.assert_close(half - none, 0.5 * (whole - none))
    assert (none == none[:1]).all() and not (whole == none).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ladder((1, 8, 8), 1, blocks=[0, 0]), r"blocks: expected .* got \[0, 0\]"),
        (lambda: Ladder((1, 8, 8), 1, blocks=[1, -1]), r"blocks: expected .* got \[1, -1\]"),
        (
            lambda: Ladder((1, 2, 2), 1, blocks=[1, 1, 1]),
            "blocks: 3 resolutions do not fit an image of 2x2",
        ),
        (
            lambda: Ladder((1, 8, 8), 1, latents=0),
            "latents: expected an integer of at least 1, got 0",
        ),
        (lambda: Ladder((64,), 1), r"shape: expected positive sizes \(C, H, W\)"),
        (lambda: random_hvae().sample(2, temperature=[1.0]), "one for each of 3 levels, got"),
        (lambda: random_hvae().sample(2, temperature=-1.0), "expected one number >= 0"),
        (lambda: random_hvae().sample(2, temperature=math.nan), "expected one number >= 0"),
        (lambda: random_hvae().sample(2, temperature=[1.0, math.nan, 1.0]), "one for each of 3"),
        (lambda: random_hvae().elbo(IMAGES[:, :, :1]), "Ladder reads 1x2x2 per example, got 1x1x2"),
    ],
)
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_full_posteriors_do_not_move_with_the_prior_and_residual_ones_do(double):
    h, low, high = (
        torch.randn(4, 2),
        *(Normal(torch.full((4, 1), m), torch.ones(4, 1)) for m in (0.0, 3.0)),
    )
    assert torch.equal(FullPosterior()(h, low).mean, FullPosterior()(h, high).mean)
    torch.testing.assert_close(ResidualPosterior()(h, high).mean, h[:, :1] + 3)
    torch.testing.assert_close(
        ResidualPosterior()(h, high).kl(high), ResidualPosterior()(h, low).kl(low)
    )


def test_a_ladder_that_is_none_or_lies_is_refused():
    with pytest.raises(TypeError, match="ladder: expected a network with `read`"):
        HVAE(torch.nn.Linear(1, 1), BernoulliLikelihood())
    model = random_hvae()
    model.ladder.shapes = ((3, 2, 2), (3, 2, 2), (3, 1, 1))
    with pytest.raises(ValueError, match=r"gives \(4, 1, 1\) numbers for z_3 of shape \(3, 1, 1\)"):
        model.elbo(IMAGES)

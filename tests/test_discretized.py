"""Masses cut out of densities: against scipy, in the tails, and jointly over the colours."""

import itertools

import numpy as np
import pytest
import torch
from scipy import special, stats

from genfw import (
    BinSoftmax,
    DiscretizedLogistic,
    DiscretizedNormal,
    LogisticMixture,
    LogisticMixtureLikelihood,
    Noise,
)
from genfw.discretized import log_logistic_mass, log_logistic_masses


def every_colour(bins, channels):
    """All K^C values of a pixel, (K^C, C, 1, 1)."""
    x = torch.tensor(list(itertools.product(range(bins), repeat=channels)))
    return x.view(-1, channels, 1, 1)


def mixture(n, channels, bins, size=1.0, components=3):
    """The same random mixture n times."""
    h = size * torch.randn(1, 4 * components * channels, 1, 1)
    return LogisticMixtureLikelihood(bins, components)(h.expand(n, -1, -1, -1))


@pytest.mark.parametrize("mean", [0.3, -1.0, 40.0, -3e3])
@pytest.mark.parametrize("std", [1e-3, 0.05, 1.0, 1e4])
@pytest.mark.parametrize("bins", [2, 17, 256])
def test_discretized_normal_is_a_mass(double, mean, std, bins):
    x = torch.arange(bins).view(bins, 1)
    p = DiscretizedNormal(torch.full((bins, 1), mean), torch.tensor(std), bins).log_prob(x)
    assert p.isfinite().all()
    assert p.logsumexp(0).item() == pytest.approx(0, abs=1e-9)


def test_discretized_normal_against_scipy(double):
    mean, std, bins = 0.2, 0.1, 17
    edges = np.linspace(-1, 1, bins + 1)
    edges[0], edges[-1] = -np.inf, np.inf
    expected = np.diff(stats.norm.cdf(edges, mean, std))
    x = torch.arange(bins).view(bins, 1)
    p = DiscretizedNormal(torch.full((bins, 1), mean), torch.tensor(std), bins).log_prob(x).exp()
    assert np.allclose(p.numpy(), expected, rtol=1e-9, atol=1e-15)


def test_discretized_normal_far_out_keeps_value_and_gradient():
    mean = torch.tensor([[0.9]], requires_grad=True)
    log_p = DiscretizedNormal(mean, torch.tensor(0.01), 256).log_prob(torch.tensor([[3]]))
    log_p.sum().backward()
    right_edge = 2 * 4 / 256 - 1
    assert log_p.item() == pytest.approx(stats.norm.logcdf((right_edge - 0.9) / 0.01), rel=1e-5)
    assert mean.grad.item() < 0 and mean.grad.isfinite().all()


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("deviations", [3.0, 6.0, 1e3, 1e6, 1e7, 1e8, 1e9, 1e12])
def test_discretized_normal_has_the_gradient_of_its_nearest_edge_at_any_distance(
    double, deviations, side
):
    """Bins 100 deviations wide: all of a bin's mass lies at the edge, where -d log Phi(-d) / dd =
    d + 1/d - 2/d^3 ... from the continued fraction of Mills' ratio."""
    edge, std = (2 * 4 / 256 - 1, 2 / 256 / 100)
    mean = torch.tensor([[side * (edge + deviations * std)]], requires_grad=True)
    k = torch.tensor([[3 if side > 0 else 252]])
    log_p = DiscretizedNormal(mean, torch.tensor(std), 256).log_prob(k)
    log_p.sum().backward()
    d = (abs(mean.item()) if mean.item() * side > 0 else -abs(mean.item())) - edge
    d = d / std
    mills = 0.0
    for n in range(200, 0, -1):
        mills = n / (d + mills)
    assert mean.grad.item() == pytest.approx(-side * (d + mills) / std, rel=1e-6)
    assert log_p.item() == pytest.approx(stats.norm.logcdf(-d), rel=1e-9)


def test_discretized_normal_has_its_mean(double):
    where, width, bins = torch.tensor([[0.3, -0.9, 2.0]]), torch.tensor([[0.4, 1e-3, 0.05]]), 17
    p, k = DiscretizedNormal(where, width, bins), torch.arange(bins)
    log_p = torch.stack(
        [
            p_k.log_prob(k[:, None])
            for p_k in (
                DiscretizedNormal(where[:, i : i + 1].expand(bins, 1), width[0, i], bins)
                for i in range(3)
            )
        ]
    )
    torch.testing.assert_close(p.mean[0], log_p.exp() @ k.double())


@pytest.mark.parametrize("width", [1e-3, 0.02, 0.7, 50.0])
@pytest.mark.parametrize("where", [-1.3, -0.02, 0.999])
@pytest.mark.parametrize("bins", [2, 17, 256])
def test_bin_softmax_window_equals_all_bins(double, width, where, bins):
    centres = (2 * torch.arange(bins) + 1) / bins - 1
    expected = (-0.5 * ((where - centres) / width) ** 2).log_softmax(0)
    x = torch.arange(bins).view(bins, 1)
    p = BinSoftmax(torch.full((bins, 1), where), torch.tensor(width), bins)
    assert torch.allclose(p.log_prob(x), expected, rtol=1e-9, atol=1e-12)
    assert p.log_prob(x).logsumexp(0).item() == pytest.approx(0, abs=1e-12)
    assert torch.allclose(p.mean[0], expected.exp() @ torch.arange(bins).double(), atol=1e-9)


@pytest.mark.parametrize("bins", [17, 256])
def test_bin_softmax_at_the_end_of_a_schedule_in_float32(bins):
    """Half a bin is 3.02 sigma_0 / alpha_0: a few bins say what all do, to 1e-6 nats per
    dimension."""
    width, x = torch.tensor(1 / (3.02 * bins)), torch.randint(bins, (16, 3072))
    where = (2 * x + 1) / bins - 1 + width * torch.randn(x.shape)
    p = BinSoftmax(where, width, bins)
    assert p._window()[0].shape[-1] <= 7
    centres = (2 * torch.arange(bins) + 1) / bins - 1
    energy = -0.5 * ((where.double().unsqueeze(-1) - centres.double()) / width.double()) ** 2
    expected = energy.log_softmax(-1).gather(-1, x.unsqueeze(-1)).flatten(1).sum(1)
    assert ((p.log_prob(x) - expected).abs() / 3072 < 1e-6).all()


@pytest.mark.parametrize("where", [0.3, -1.0, 40.0, -3e3])
@pytest.mark.parametrize("width", [1e-6, 1e-3, 0.05, 1.0, 1e6])
@pytest.mark.parametrize("bins", [2, 17, 256])
def test_discretized_logistic_is_a_mass(double, where, width, bins):
    x = torch.arange(bins).view(bins, 1)
    p = DiscretizedLogistic(torch.full((bins, 1), where), torch.tensor(width), bins).log_prob(x)
    assert p.isfinite().all()
    assert p.logsumexp(0).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("where", [0.2, -0.99, 0.985, 1.5])
@pytest.mark.parametrize("width", [0.002, 0.1, 2.0])
@pytest.mark.parametrize("bins", [2, 17, 256])
def test_discretized_logistic_against_scipy_in_every_bin(double, where, width, bins):
    """Only bins 0 and K - 1 reach to infinity: bin 254 of 256 ends where it ends."""
    edges = np.linspace(-1, 1, bins + 1)
    edges[0], edges[-1] = -np.inf, np.inf
    law = stats.logistic(where, width)
    below, above = np.diff(law.cdf(edges)), -np.diff(law.sf(edges))
    expected = np.where(edges[:-1] + edges[1:] < 2 * where, below, above)  # the smaller tail
    x = torch.arange(bins).view(bins, 1)
    p = DiscretizedLogistic(torch.full((bins, 1), where), torch.tensor(width), bins)
    assert np.allclose(p.log_prob(x).exp().numpy(), expected, rtol=1e-9, atol=1e-300)
    assert p.mean[0].item() == pytest.approx(expected @ np.arange(bins), abs=1e-9)


def test_discretized_logistic_far_out_keeps_value_and_gradient():
    where = torch.tensor([[0.9]], requires_grad=True)
    log_p = DiscretizedLogistic(where, torch.tensor(1e-4), 256).log_prob(torch.tensor([[3]]))
    log_p.sum().backward()
    right_edge = 2 * 4 / 256 - 1  # all of the bin's mass but e^-78 lies at its right edge
    assert log_p.item() == pytest.approx((right_edge - 0.9) / 1e-4, rel=1e-6)
    assert where.grad.item() == pytest.approx(-1e4, rel=1e-6)


def test_discretized_logistic_so_wide_that_a_bin_is_nothing_of_it(double):
    """Width of a bin times density at the centre: 2 / K times 1 / (4 s)."""
    p = DiscretizedLogistic(torch.zeros(1, 1), torch.tensor(1e12), 256).log_prob(
        torch.tensor([[100]])
    )
    assert p.item() == pytest.approx(-np.log(2 * 256 * 1e12), rel=1e-12)


def logistics(bins, dtype):
    """Means (1, 1, n) within the data and beyond, with every scale between the narrowest and the
    widest; and all integers (1, K, 1)."""
    made = torch.Generator().manual_seed(0)
    where = 4 * torch.rand(1, 1, 400, generator=made, dtype=dtype) - 2
    width = torch.linspace(-9, 3, 400, dtype=dtype).exp().view(1, 1, 400)
    return where.requires_grad_(), width.requires_grad_(), torch.arange(bins)[:, None]


def with_gradients(log_mass, *of):
    """log masses (1, K, n), and the gradients of a sum of all of them, each weighted anew."""
    weights = torch.linspace(-1, 2, log_mass.numel()).view_as(log_mass)
    return log_mass, *torch.autograd.grad((weights * log_mass).sum(), of)


@pytest.mark.parametrize("bins", [2, 3, 17, 256])
def test_all_logistic_masses_are_those_of_each_integer(double, bins):
    where, width, k = logistics(bins, torch.float64)
    pairs = zip(
        with_gradients(log_logistic_masses(where, width, bins), where, width),
        with_gradients(log_logistic_mass(k, where, width, bins), where, width),
        strict=True,
    )
    for ours, each in pairs:
        torch.testing.assert_close(ours, each, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bins", [2, 16, 256])
def test_all_logistic_masses_in_float32_have_its_precision(bins):
    where, width, k = logistics(bins, torch.float32)
    masses = log_logistic_masses(where, width, bins)
    assert masses.dtype == torch.float32
    exact = log_logistic_mass(k, where, width, bins)  # float64, of the same float32 numbers
    torch.testing.assert_close(masses.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("size", [0.3, 1.0, 5.0, 1e4])
def test_mixture_is_one_mass_over_all_colours(double, channels, size):
    x = every_colour(5, channels)
    log_p = mixture(len(x), channels, 5, size).log_prob(x)
    assert log_p.shape == (len(x),) and log_p.isfinite().all()
    assert log_p.logsumexp(0).item() == pytest.approx(0, abs=1e-9)


def pixelcnn(x, logits, where, log_width, coefficients):
    """log p of images x (b, C, H, W) of 256 values, written from the paper pixel by pixel.

    logits (b, M, H, W); the others (b, M, C, H, W).
    """
    b, channels, height, breadth = x.shape
    total = np.zeros(b)
    for n, i, j in itertools.product(range(b), range(height), range(breadth)):
        pi = special.softmax(logits[n, :, i, j])
        p = 0.0
        for m in range(len(pi)):
            product = pi[m]
            values = [(2 * x[n, c, i, j] + 1) / 256 - 1 for c in range(channels)]
            for c in range(channels):
                mu, s = where[n, m, c, i, j], np.exp(log_width[n, m, c, i, j])
                if channels == 3:
                    red_green, red_blue, green_blue = np.tanh(coefficients[n, m, :, i, j])
                    mu += (0, red_green * values[0], red_blue * values[0])[c]
                    mu += green_blue * values[1] if c == 2 else 0
                k, low, high = x[n, c, i, j], -np.inf, np.inf
                if k > 0:
                    low = (values[c] - 1 / 256 - mu) / s
                if k < 255:
                    high = (values[c] + 1 / 256 - mu) / s
                if low + high > 0:  # the difference in the smaller tail
                    low, high = -high, -low
                product *= special.expit(high) - special.expit(low)
            p += product
        total[n] += np.log(p)
    return total


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_mixture_against_pixelcnn_written_pixel_by_pixel(double, channels):
    components = 4
    h = torch.randn(3, 4, components, channels, 4, 5)  # logits, means, log scales, coefficients
    h[:, 2] = h[:, 2] / 2 - 2.5
    x = torch.randint(256, (3, channels, 4, 5))
    x[0, :, 0, :4] = torch.tensor([0, 1, 254, 255])
    got = LogisticMixtureLikelihood(256, components)(h.flatten(1, 3)).log_prob(x)
    logits, *others = h.unbind(1)
    expected = pixelcnn(x.numpy(), logits.mean(2).numpy(), *(each.numpy() for each in others))
    assert np.allclose(got.numpy(), expected, rtol=1e-9)


def test_mixture_of_one_is_a_discretized_logistic(double):
    where, width = torch.randn(4, 2, 3, 3), torch.rand(4, 2, 3, 3) + 0.01
    one = LogisticMixture(torch.randn(4, 1, 3, 3), where[:, None], width[:, None], 17, None)
    x = torch.randint(17, (4, 2, 3, 3))
    plain = DiscretizedLogistic(where, width, 17)
    assert torch.allclose(one.log_prob(x), plain.log_prob(x), rtol=1e-12)
    assert torch.allclose(one.mean, plain.mean, rtol=1e-12)


@pytest.mark.parametrize("channels", [2, 3])
def test_mixture_samples_have_the_stated_joint_masses(double, channels):
    """Red moves green and blue, green moves blue; the channels of a pixel share a component."""
    n, x = 40_000, every_colour(3, channels)
    where = 0.3 * torch.randn(1, 2, channels, 1, 1) + torch.tensor([-0.5, 0.5]).view(1, 2, 1, 1, 1)
    coupling = torch.tensor([[0.9, -0.8, 0.7], [-0.9, 0.5, -0.6]]).view(1, 2, 3, 1, 1)

    def make(n):
        many = (n, -1, -1, -1, -1)
        return LogisticMixture(
            torch.tensor([0.3, -0.3]).view(1, 2, 1, 1).expand(n, 2, 1, 1),
            where.expand(many),
            torch.tensor(0.3),
            3,
            coupling.expand(many) if channels == 3 else None,
        )

    p = make(len(x)).log_prob(x).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    drawn = make(n).sample(Noise(2, torch.arange(n)))
    assert drawn.shape == (n, channels, 1, 1) and drawn.dtype == torch.long
    number = (drawn.flatten(1) * 3 ** torch.arange(channels).flip(0)).sum(1)
    counts = torch.bincount(number, minlength=len(x))
    assert (n * p).min() > 5
    assert stats.chisquare(counts.numpy(), (n * p).numpy()).pvalue > 1e-3


def test_mixture_draws_belong_to_their_example():
    h = torch.randn(6, 24, 4, 4)
    likelihood = LogisticMixtureLikelihood(256, 2)
    together = likelihood(h).sample(Noise(0, torch.arange(6)))
    alone = likelihood(h[4:5]).sample(Noise(0, torch.tensor([4])))
    assert torch.equal(together[4:5], alone)
    assert (
        together.min() >= 0
        and together.max() < 256
        and likelihood(h).sample().shape == (*(6, 3, 4, 4),)
    )


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("size", [0.5, 3.0, 1e4])
def test_mixture_mean_is_the_expected_integer(double, channels, size):
    """Exactly where no colour follows another. G and B are within 2 % of the range: their means
    are taken at the expected colours before them."""
    x = every_colour(9, channels)
    p = mixture(len(x), channels, 9, size)
    expected, mean = p.log_prob(x).exp() @ x.flatten(1).double(), p.mean[0].flatten()
    exact = 1 if channels == 3 else channels
    assert torch.allclose(mean[:exact], expected[:exact], atol=1e-9)
    assert torch.allclose(mean, expected, atol=0.02 * 9)


def test_mixture_coupling_is_for_three_colours():
    with pytest.raises(ValueError, match="coupling: is for 3 channels"):
        LogisticMixture(
            *(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2, 4), torch.ones(1, 2, 2, 4)),
            bins=4,
            coupling=torch.zeros(1, 2, 2, 4),
        )

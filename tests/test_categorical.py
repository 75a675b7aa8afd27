"""A network as a prior over values: Bayes' rule against itself written out, and the decoder, the
bound and the memory that follow from it."""

import pytest
import torch
from scipy import stats
from test_vdm import network_vdm
from torch import nn

from genfw import (
    VDM,
    BernoulliLikelihood,
    BinsLikelihood,
    BinSoftmax,
    Bound,
    CategoricalLikelihood,
    CategoricalParameterization,
    Cosine,
    DiscreteParameterization,
    LogisticMixtureParameterization,
    LogLinear,
    NetworkDenoiser,
    Noise,
    Parameterization,
)
from genfw.bayes import piecewise
from genfw.nets import Conv
from genfw.testing.memory import Live

DISCRETE = [
    c for c in Parameterization.registry.values() if issubclass(c, DiscreteParameterization)
]
EACH = pytest.mark.parametrize("cls", DISCRETE)


def amplitudes(log_snr):
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def random(cls, bins=5, n=6, shape=(2, 3, 4), size=1.0):
    """A parameterization, an output of its network, z, and alpha and sigma from noise to data."""
    param = cls(bins)
    output = size * torch.randn(n, param.channels(shape[0], bins), *shape[1:])
    return param, output, torch.randn(n, *shape), *amplitudes(torch.linspace(-9, 9, n))


def mixture_masses(numbers, bins):
    """(b, 3, M, *dims) to the masses of the mixture, (b, K, *dims)."""
    weights, where, log_width = numbers.unbind(1)
    m, ones = weights.shape[1], [1] * (weights.ndim - 2)
    where = where + torch.linspace(-1 + 1 / m, 1 - 1 / m, m).view(m, *ones)
    edges = torch.linspace(-1, 1, bins + 1)
    edges[0], edges[-1] = -1e9, 1e9  # as good as infinite, with a gradient
    gap = (edges.view(-1, 1, *ones) - where.unsqueeze(1)) / (log_width.exp() / m).unsqueeze(1)
    left, right = gap[:, :-1], gap[:, 1:]
    flip = torch.where(left + right > 0, -1.0, 1.0)  # the difference in the smaller tail
    masses = flip * ((flip * right).sigmoid() - (flip * left).sigmoid())
    return (weights.softmax(1).unsqueeze(1) * masses).sum(2)


def written_out(param, output, z, alpha, sigma):
    """The K log masses of every dimension, (b, K, *dims), as theory 3.1 has them."""
    ones = [1] * (z.ndim - 1)
    v = ((2 * torch.arange(param.bins) + 1) / param.bins - 1).view(-1, *ones)
    alpha, sigma = (x.view(-1, 1, *ones) for x in (alpha, sigma))
    logits = output.view(len(z), param.outputs, *z.shape[1:])
    if isinstance(param, LogisticMixtureParameterization):
        numbers = logits.view(len(z), 3, param.components, *z.shape[1:])
        logits = mixture_masses(numbers, param.bins).log()
    distance = (z.unsqueeze(1) / alpha - v).square()
    return (logits - 0.5 * (alpha / sigma).square() * distance).log_softmax(1)


@EACH
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)])
def test_x_hat_is_the_posterior_mean_written_out(cls, shape, double):
    param, output, z, alpha, sigma = random(cls, shape=shape)
    p = written_out(param, output, z, alpha, sigma).exp()
    x = torch.einsum("bk...,k->b...", p, (2 * torch.arange(5) + 1) / 5 - 1)
    prediction = param.solve(output, z, alpha, sigma)
    assert torch.allclose(prediction.x, x, rtol=0, atol=1e-12)
    again = prediction.alpha * prediction.x + prediction.sigma * prediction.eps
    assert torch.allclose(again, z, rtol=1e-12)


@EACH
def test_the_posterior_is_the_mass_written_out(cls, double):
    param, output, z, alpha, sigma = random(cls)
    log_p = written_out(param, output, z, alpha, sigma)
    posterior = param.posterior(output, z, alpha, sigma)
    k = torch.arange(5.0)
    for value in range(5):
        log_prob = posterior.log_prob(torch.full(z.shape, value))
        assert torch.allclose(log_prob, log_p[:, value].flatten(1).sum(1), rtol=1e-9)
    mean = torch.einsum("bk...,k->b...", log_p.exp(), k)
    assert torch.allclose(posterior.mean, mean, rtol=1e-9)


def test_samples_of_the_posterior_have_its_masses(double):
    n = 20_000
    param, output, z, alpha, sigma = random(CategoricalParameterization, n=1, shape=(2,))
    alpha, sigma = amplitudes(torch.zeros(1))
    p = written_out(param, output, z, alpha, sigma)[0].exp()
    many = param.posterior(output.expand(n, -1), z.expand(n, -1), alpha, sigma)
    x = many.sample(Noise(0, torch.arange(n)))
    assert torch.equal(x[5:7], many.sample(Noise(0, torch.arange(n)))[5:7])
    for d in range(2):
        counts = torch.bincount(x[:, d], minlength=5)
        assert stats.chisquare(counts.numpy(), (n * p[:, d]).numpy()).pvalue > 1e-3


@EACH
def test_gradients_are_those_of_autograd(cls, double):
    """Of everything: the output, z, and the amplitudes, which a learned schedule moves."""
    param, output, z, *noise = random(cls, bins=3, n=2, shape=(1, 3))
    noise = [x.view(2, 1, 1) for x in noise]
    inputs = [x.clone().requires_grad_() for x in (output, z, *noise)]
    value, v = torch.randint(3, z.shape), (2 * torch.arange(3) + 1) / 3 - 1

    def ours(*inputs):
        posterior = param.posterior(*inputs)
        posterior.pieces = 2
        return posterior.x, posterior.log_prob(value)

    def theirs(*inputs):
        log_p = written_out(param, *inputs[:2], *(x.flatten() for x in inputs[2:]))
        mass = log_p.gather(1, value.unsqueeze(1)).flatten(1).sum(1)
        return torch.einsum("bk...,k->b...", log_p.exp(), v), mass

    for one, other in zip(ours(*inputs), theirs(*inputs), strict=True):
        cotangent = torch.randn_like(one)
        a, b = (torch.autograd.grad(y, inputs, cotangent, retain_graph=True) for y in (one, other))
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=1e-8, atol=1e-10)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)  # as a penalty on the Jacobian asks


def test_pieces_make_no_difference(double):
    a, b = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 7, requires_grad=True)
    k = torch.randint(3, (2, 7))

    def function(k, a, b):
        return (a.gather(1, k.unsqueeze(1)).squeeze(1) * b).sin()

    results = []
    for pieces in (1, 3, 7, 20):
        y = piecewise(function, (k, a, b), pieces)
        results.append((y, *torch.autograd.grad(y.square().sum(), (a, b))))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_zeros_are_bayes_under_the_uniform_prior(double):
    """Which is what `bins` reads at t = 0."""
    _, _, z, alpha, sigma = random(CategoricalParameterization, bins=17)
    zeros = torch.zeros(len(z), 17 * z.shape[1], *z.shape[2:])
    param, width = CategoricalParameterization(17), (sigma / alpha).view(-1, 1, 1, 1)
    kingma = BinSoftmax(z / alpha.view(-1, 1, 1, 1), width, 17)
    posterior, x = param.posterior(zeros, z, alpha, sigma), torch.randint(17, z.shape)
    assert torch.allclose(posterior.mean, kingma.mean, rtol=1e-9, atol=1e-9)
    assert torch.allclose(posterior.log_prob(x), kingma.log_prob(x), rtol=1e-9)


def test_a_mixture_of_zeros_is_nearly_uniform(double):
    prior = LogisticMixtureParameterization(256).log_prior(torch.zeros(1, 30, 1)).exp()
    assert prior.sum().item() == pytest.approx(1, abs=1e-9)
    assert (256 * prior[:, 1:-1] - 1).abs().max() < 0.5


@EACH
def test_where_little_noise_is_left_it_is_the_nearest_value(cls, double):
    param, output, z, *_ = random(cls)
    alpha, sigma = amplitudes(torch.full((6,), 25.0))
    nearest = ((z + 1) * 5 / 2 - 0.5).round().clamp(0, 4)
    v = (2 * nearest + 1) / 5 - 1
    assert torch.allclose(param.solve(output, z, alpha, sigma).x, v, atol=1e-6)


@EACH
@pytest.mark.parametrize("log_snr", [-80.0, -30.0, 30.0, 80.0])
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_numbers_stay_finite(cls, log_snr, size):
    """In float32, at any noise level and for a network that has lost its head."""
    param, output, z, *_ = random(cls, bins=256, size=size)
    alpha, sigma = amplitudes(torch.full((6,), log_snr))
    inputs = [x.requires_grad_() for x in (output, 3 * z)]
    posterior = param.posterior(*inputs, alpha, sigma)
    p = param.solve(*inputs, alpha, sigma)
    found = torch.autograd.grad(p.x.sum() + posterior.mean.sum(), inputs)
    assert all(x.isfinite().all() for x in (p.x, p.eps, *found))
    assert (p.x.abs() <= 1).all()
    assert ((posterior.sample() >= 0) & (posterior.sample() < 256)).all()


def test_an_output_of_another_shape_is_refused():
    param = CategoricalParameterization(5)
    assert param.channels(3, 5) == 15 and LogisticMixtureParameterization(5, 2).channels(3, 5) == 18
    with pytest.raises(ValueError, match="bins=5, the data have 17"):
        param.channels(3, 17)
    with pytest.raises(ValueError, match=r"an output of \(2, 15, 4\), got \(2, 3, 4\): .*=15"):
        param.solve(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2), torch.ones(2))
    for make in (
        lambda: CategoricalParameterization(1),
        lambda: LogisticMixtureParameterization(5, 0),
    ):
        with pytest.raises(ValueError, match="at least"):
            make()


# The decoder, and the bound with it.


class Prior(nn.Module):
    """A network that knows nothing but a prior over values, and counts its calls."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = nn.Parameter(logits), 0

    def forward(self, z, level, y=None):
        self.calls += 1
        return self.logits.flatten(0, 1).expand(len(z), -1)


class Net(nn.Module):
    """A random network of z and the level, with K C outputs."""

    def __init__(self, dims, bins):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dims + 1, 16), nn.Tanh(), nn.Linear(16, bins * dims))

    def forward(self, z, level, y=None):
        return 3 * self.layers(torch.cat([z, level[:, None]], 1))


class Asked(Net):
    """Notes of how many it was asked, and their labels."""

    def __init__(self, dims, bins):
        super().__init__(dims, bins)
        self.asked = []

    def forward(self, z, level, y=None):
        self.asked.append((len(z), None if y is None else y.tolist()))
        return super().forward(z, level)


def discrete_vdm(network, bins, dims=4, ends=(8.0, -12.0), likelihood=None, **more):
    denoiser = NetworkDenoiser(network, CategoricalParameterization(bins), LogLinear(*ends))
    likelihood = CategoricalLikelihood(bins) if likelihood is None else likelihood
    return VDM(denoiser, likelihood, shape=(dims,), **more)


def test_log_marginals_as_logits_give_the_sum_of_marginal_cross_entropies(double):
    """Theory 6, with the network's own decoder: exact for independent dimensions, so the bound is
    tight; and with Kingma's where z_0 tells the values apart."""
    n, bins = 512, 5
    logits = torch.randn(bins, 4)
    log_p = logits.log_softmax(0)
    x = torch.stack([torch.multinomial(log_p[:, d].exp(), n, True) for d in range(4)], 1)
    exact = -log_p.gather(0, x).sum(1).mean()
    far = 2 * torch.tensor(3.02 * bins).log().item() + 3
    for likelihood, top in ((CategoricalLikelihood(bins), 4.0), (BinsLikelihood(bins), far)):
        vdm = discrete_vdm(Prior(logits), bins, ends=(top, -14.0), likelihood=likelihood)
        estimate = Bound(sets=4, strata=64, chunk=2**15)(vdm, x, noise=Noise(0, torch.arange(n)))
        error = estimate.variance.sum().sqrt() / n
        assert abs(estimate.nats.mean() - exact) < 4 * error + 1e-4
        assert error < 0.05
    vdm = discrete_vdm(Prior(logits), bins, ends=(4.0, -14.0), likelihood=BinsLikelihood(bins))
    waste = Bound(4, 64, chunk=2**15)(vdm, x, noise=Noise(0, torch.arange(n))).nats.mean() - exact
    assert waste > 0.1  # at so little SNR a decoder without the prior is far off


@pytest.mark.parametrize("steps", [None, 12])
@pytest.mark.parametrize("network", [Prior(torch.randn(2, 4)), Net(4, 2)])
def test_probabilities_of_all_binary_images_sum_to_at_most_one(steps, network, double):
    x = torch.tensor([[i >> b & 1 for b in range(4)] for i in range(16)])
    vdm = discrete_vdm(network.double(), 2, ends=(3.0, -12.0), steps=steps)
    estimate = Bound(sets=4, strata=64, chunk=2**15)(vdm, x, noise=Noise(0, torch.arange(16)))
    p = (-estimate.nats).exp()
    assert p.sum() <= 1 + 4 * (p**2 * estimate.variance).sum().sqrt()
    assert p.sum() > (0.5 if steps is None else 0.1)


def test_the_decoder_is_a_mass(double):
    x = torch.tensor([[i // 3**d % 3 for d in range(3)] for i in range(27)])
    decoded = discrete_vdm(Net(3, 3), 3, 3).at(steps=5).decode(torch.randn(1, 3).expand(27, 3), 1)
    assert decoded.log_prob(x).logsumexp(0).item() == pytest.approx(0, abs=1e-12)


def test_importance_weights_average_to_probabilities(double):
    """E w = p(x), hence they sum to one over all x; with a KL instead of the draw they do not."""
    x, k = torch.tensor([[i // 3, i % 3] for i in range(9)]), 1000
    vdm = discrete_vdm(Net(2, 3), 3, 2, ends=(2.0, -3.0)).at(steps=6)
    with torch.no_grad():
        noise = Noise(0, torch.arange(9)).each(0, k)
        w = vdm.log_weight(x, noise=noise, k=k).exp().view(9, k)
    error = (w.var(1).sum() / k).sqrt()
    assert abs(w.mean(1).sum() - 1) < 4 * error and error < 0.03


def test_samples_follow_the_prior(double):
    logits, n = torch.randn(3, 2), 3000
    vdm = discrete_vdm(Prior(logits), 3, 2, ends=(2.0, -8.0)).at(steps=30)
    x = vdm.sample(n, noise=Noise(0, torch.arange(n)))
    assert torch.equal(x, vdm.ancestral_sample(n, noise=Noise(0, torch.arange(n))))
    for d in range(2):
        p = logits[:, d].softmax(0)
        share = torch.bincount(x[:, d], minlength=3) / n
        assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 0.02).all()


def test_the_decoder_costs_one_more_call_where_it_is_used(double):
    x = torch.randint(3, (2, 4))
    for likelihood, calls in ((BinsLikelihood(3), 1), (CategoricalLikelihood(3), 2)):
        network = Prior(torch.zeros(3, 4))
        discrete_vdm(network, 3, likelihood=likelihood).elbo(x)
        assert network.calls == calls


def test_a_share_of_the_decoders_says_what_all_say(double):
    """In the mean over draws, of every example and of the gradient; nothing else is touched."""
    network, n = Net(4, 3), 40_000
    one = torch.randint(3, (2, 4))
    x = one.repeat(n // 2, 1)
    whole = discrete_vdm(network, 3, ends=(2.0, -12.0))
    part = VDM(whole.denoiser, whole.likelihood, decoder_share=0.125)
    noise = Noise(0, torch.arange(n))
    a, b = whole.elbo(x, noise=noise), part.elbo(x, noise=noise)
    assert torch.equal(a.rate, b.rate)
    chosen = b.reconstruction != 0
    assert torch.allclose(b.reconstruction[chosen], 8 * a.reconstruction[chosen], rtol=1e-10)
    assert abs(chosen.double().mean() - 0.125) < 4 * (0.125 * 0.875 / n) ** 0.5
    gap = (b.reconstruction - a.reconstruction).view(-1, 2)
    assert (gap.mean(0).abs() < 4 * gap.std(0) / len(gap) ** 0.5).all()
    assert (gap.mean(0).abs() < 0.05 * a.reconstruction.mean().abs()).all()
    gradients = [
        torch.autograd.grad(elbo.reconstruction.mean(), network.layers[0].weight)[0]
        for elbo in (a, b)
    ]
    assert torch.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.99


def test_a_share_of_the_decoders_takes_so_many_calls(double):
    """In training exactly so many of a batch are decoded; in evaluation all."""
    network = Asked(4, 3)
    part, x = discrete_vdm(network, 3, decoder_share=0.25), torch.randint(3, (16, 4))
    for vdm in (part, part.at(steps=2), part.for_evaluation()):
        vdm.elbo(x)
    assert [n for n, _ in network.asked] == [4, 16, 4, 16, 16, 16]


def test_one_of_a_batch_is_decoded_at_least(double):
    vdm = discrete_vdm(Net(4, 3), 3, ends=(2.0, -12.0), decoder_share=1e-9)
    elbo = vdm.elbo(torch.randint(3, (3, 4)))
    elbo.total.sum().backward()
    assert (elbo.reconstruction != 0).sum() == 1


def test_examples_by_themselves_of_which_nobody_is_decoded(double):
    vdm = discrete_vdm(Net(4, 3), 3, decoder_share=1e-9)
    elbo = vdm.elbo(torch.randint(3, (3, 4)), noise=Noise(0, torch.arange(3)))
    elbo.total.sum().backward()
    assert elbo.reconstruction.tolist() == [0, 0, 0]


def test_those_that_are_decoded_are_told_their_labels(double):
    network, y = Asked(4, 3), torch.arange(8)
    vdm = discrete_vdm(network, 3, ends=(2.0, -12.0), decoder_share=0.5, classes=8)
    elbo = vdm.elbo(torch.randint(3, (8, 4)), y, noise=Noise(0, y))
    assert network.asked[0][1] == y[elbo.reconstruction != 0].tolist()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="decoder_share: expected"):
        discrete_vdm(Net(4, 3), 3, decoder_share=share)


def test_the_decoder_trains_the_network():
    network = Net(4, 3)
    elbo = discrete_vdm(network, 3, ends=(2.0, -12.0)).elbo(torch.randint(3, (5, 4)))
    elbo.reconstruction.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())


def test_an_example_keeps_its_number_whatever_its_batch(double):
    vdm, x = discrete_vdm(Net(4, 17), 17), torch.randint(17, (10, 4))
    order = torch.tensor([7, 2, 5])
    whole = vdm.elbo(x, noise=Noise(0, torch.arange(10))).total
    part = vdm.elbo(x[order], noise=Noise(0, order)).total
    assert torch.allclose(part, whole[order], rtol=1e-10)


def test_a_decoder_that_there_is_not_is_refused():
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (2, 4))
    with pytest.raises(TypeError, match="param categorical"):
        VDM(vdm.denoiser, CategoricalLikelihood(17)).elbo(x)
    with pytest.raises(ValueError, match="bins=5, the parameterization bins=3"):
        discrete_vdm(Net(4, 3), 3, likelihood=CategoricalLikelihood(5)).elbo(x % 3)
    with pytest.raises(TypeError, match="bernoulli reads a network's output"):
        discrete_vdm(Net(4, 2), 2, likelihood=BernoulliLikelihood(2)).elbo(x % 2)


# Memory.


@pytest.mark.parametrize(
    ("cls", "what"), [*((cls, "x") for cls in DISCRETE), (CategoricalParameterization, "log_prob")]
)
def test_memory_of_forward_and_backward(cls, what):
    """CIFAR-10 at 256 values: at most 2.5 tensors of (B, C, H, W, K), the output among them."""
    param, b = cls(256) if cls is CategoricalParameterization else cls(256, 2), 2
    z, noise = torch.randn(b, 3, 32, 32), amplitudes(torch.zeros(b))
    channels = param.channels(3, 256)
    with Live() as memory:
        output = torch.zeros(b, channels, 32, 32).requires_grad_()
        posterior = param.posterior(output, z, *noise)
        y = posterior.x if what == "x" else posterior.log_prob(torch.zeros_like(z))
        y.sum().backward()
    ratio = memory.peak / (4 * 256 * z.numel())
    alone = 2 * channels / (3 * 256)  # the output and its gradient
    assert alone <= ratio < 2.5, ratio


def test_memory_of_a_step_of_the_bound():
    """It looks at the network twice; a decoder that an eighth of the examples show is in reach of
    the target."""
    shape, bins = (3, 32, 32), 256
    net = Conv(shape, out_channels=3 * bins, bins=bins, width=4, blocks=1)
    denoiser = NetworkDenoiser(net, CategoricalParameterization(bins), Cosine(7.9, -10.0))
    x, found = torch.randint(bins, (8, *shape)), []
    for share in (1.0, 1 / 8):
        vdm = VDM(denoiser, CategoricalLikelihood(bins), decoder_share=share)
        with Live() as memory:
            vdm.elbo(x).total.sum().backward()
        found.append(memory.peak / (4 * bins * x.numel()))
    assert found[1] < 2.5 < 3 < found[0], found

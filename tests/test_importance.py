"""Importance-weighted estimates, on chains and images whose evidence is known."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import GaussianDenoiser, LinearGaussianChain
from scipy import stats
from test_vae import random_vae

from genfw import (
    VDM,
    BernoulliLikelihood,
    Bound,
    CategoricalLikelihood,
    DiscretizedGaussianLikelihood,
    Estimate,
    ImportanceWeighted,
    LogLinear,
    Noise,
    Normal,
)
from genfw.estimators.weights import (
    effective_sample_size,
    generalized_pareto,
    log_mean,
    log_mean_variance,
    pareto_khat,
    tail,
)
from genfw.train.metrics import NLL

DEPTHS = pytest.mark.parametrize("levels", [1, 2, 5])


def off_chain(levels):
    """An encoder that is not the true posterior, wide enough for weights of finite variance."""
    return LinearGaussianChain(levels, bias=0.4 / levels**0.5, stretch=1.15)


def evaluate(k, model, x, seed=0, chunk=2000):
    return ImportanceWeighted(k, chunk)(model, x, noise=Noise(seed, torch.arange(len(x))))


@DEPTHS
def test_falls_to_the_exact_nll_as_k_grows(levels, double):
    chain, x = off_chain(levels), 1.3 * torch.randn(2000, 2)
    excess = [evaluate(k, chain, x).nats + chain.log_prob(x) for k in (1, 4, 16)]
    excess.append(evaluate(2000, chain, x[:100]).nats + chain.log_prob(x[:100]))
    for coarse, fine in pairwise(excess):
        gap = coarse[: len(fine)] - fine
        assert gap.mean() > (3 if len(fine) > 100 else 0) * gap.std() / len(fine) ** 0.5
    assert abs(excess[-1].mean()) < 4 * excess[-1].std() / 100**0.5 < 0.02


@DEPTHS
def test_one_draw_is_the_bound_in_the_mean(levels, double):
    chain, x = off_chain(levels), 1.3 * torch.randn(4000, 2)
    one = evaluate(1, chain, x)
    bound = Bound(2, 1)(chain, x, noise=Noise(1, torch.arange(4000)))
    gap = one.nats - bound.nats
    assert abs(gap.mean()) < 4 * gap.std() / 4000**0.5
    assert one.variance.isnan().all() and set(one.diagnostics) == {"ess"}


@DEPTHS
def test_with_the_true_posterior_every_draw_counts(levels, double):
    chain, x = LinearGaussianChain(levels), torch.randn(7, 2)
    exact = evaluate(50, chain, x)
    assert torch.allclose(exact.nats, -chain.log_prob(x), atol=1e-10)
    assert torch.allclose(exact.diagnostics["ess"], torch.tensor(50.0))
    assert (exact.diagnostics["khat"] == 0).all() and (exact.variance < 1e-15).all()


@pytest.mark.parametrize("chunk", [1, 7, 60, 101, 10_000])
def test_no_number_depends_on_chunk_or_batch(chunk, double):
    vae, x = random_vae(CategoricalLikelihood(5)), torch.randint(5, (9, 4))
    whole = evaluate(60, vae, x, chunk=120)
    order = torch.randperm(9)
    for rows in order.split(4):
        part = ImportanceWeighted(60, chunk)(vae, x[rows], noise=Noise(0, rows))
        assert torch.allclose(part.nats, whole.nats[rows], rtol=1e-13)
        assert torch.allclose(part.variance, whole.variance[rows], rtol=1e-8)
        for name, value in whole.diagnostics.items():
            assert torch.allclose(part.diagnostics[name], value[rows], rtol=1e-8)


class Shifted(LinearGaussianChain):
    """A chain whose decoders know the label."""

    def decode(self, z, t, y=None):
        p = super().decode(z, t, y)
        return p if y is None else Normal(p.mean + 0.3 * y[:, None], p.std)


@pytest.mark.parametrize("chunk", [4, 12, 100])
def test_a_label_goes_with_its_image(chunk, double):
    chain, x, y = Shifted(2), torch.randn(5, 2), torch.tensor([0, 1, 2, 1, 0])
    estimator = ImportanceWeighted(6, chunk)
    whole = estimator(chain, x, y, noise=Noise(0, torch.arange(5))).nats
    one = [estimator(chain, x[i, None], y[i, None], noise=Noise(0, y[:1] + i)) for i in range(5)]
    assert torch.allclose(torch.cat([each.nats for each in one]), whole, rtol=1e-12)
    unlabelled = estimator(chain, x, noise=Noise(0, torch.arange(5))).nats
    assert torch.equal(whole == unlabelled, y == 0)


def test_never_more_than_chunk_pairs_at_once(double):
    seen = []

    class Watched(LinearGaussianChain):
        def decode(self, z, t, y=None):
            seen.append(len(z))
            return super().decode(z, t, y)

    evaluate(10, Watched(1), torch.randn(6, 2), chunk=25)
    evaluate(10, Watched(1), torch.randn(2, 2), chunk=4)
    assert seen == [20, 20, 20, 4, 4, 2, 4, 4, 2]


def test_probabilities_of_all_binary_images_sum_to_one(double):
    x = torch.tensor([[i >> b & 1 for b in range(4)] for i in range(16)])
    for seed in range(3):
        torch.manual_seed(seed)
        vae = random_vae(BernoulliLikelihood())
        estimate = evaluate(4000, vae, x, seed=seed)
        p = (-estimate.nats).exp()
        error = (p**2 * estimate.variance).sum().sqrt()
        assert abs(p.sum() - 1) < 4 * error and error < 0.02
        few = torch.stack([(-evaluate(2, vae, x, seed=s).nats).exp().sum() for s in range(200)])
        assert few.mean() < 1 + 4 * few.std() / 200**0.5


@pytest.mark.parametrize("k", [10, 300])
def test_the_stated_variance_is_the_variance_found(k, double):
    chain, x = LinearGaussianChain(2, bias=0.4, stretch=1.2), 1.3 * torch.randn(6, 2)
    runs = [evaluate(k, chain, x, seed) for seed in range(400)]
    found = torch.stack([run.nats for run in runs]).var(0)
    stated = torch.stack([run.variance for run in runs]).mean(0)
    assert torch.allclose(stated / found, torch.ones(6), atol=0.4)
    assert abs((stated / found).mean() - 1) < 0.15


def test_the_jackknife_written_out(double):
    log_w = 2 * torch.randn(3, 12)
    left = torch.stack([log_mean(log_w[:, torch.arange(12) != i]) for i in range(12)], 1)
    expected = 11 / 12 * (left - left.mean(1, keepdim=True)).square().sum(1)
    assert torch.allclose(log_mean_variance(log_w), expected)
    one_is_all = torch.zeros(1, 3).index_fill(1, torch.tensor([1]), 100.0)
    assert torch.allclose(log_mean_variance(one_is_all), torch.tensor(100.0**2 * 4 / 9), rtol=0.03)


def test_effective_sample_size(double):
    w = torch.rand(4, 9)
    expected = w.sum(1) ** 2 / (w**2).sum(1)
    assert torch.allclose(effective_sample_size(w.log() + 1000), expected)


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.7, 1.2])
def test_a_generalized_pareto_is_recognised(shape, double):
    n = 500
    x = stats.genpareto(shape, scale=3.0).rvs((40, n), random_state=1)
    k, sigma = generalized_pareto(torch.as_tensor(x).sort(1).values)
    k = (k * (n + 10) - 5) / n  # without the prior
    assert abs(k.mean() - shape) < 0.03 and abs(sigma.mean() / 3 - 1) < 0.03
    fits = [stats.genpareto.fit(row, floc=0) for row in x[:10]]  # by maximum likelihood
    for i, (other, _, scale) in enumerate(fits):
        assert abs(k[i] - other) < 0.04 and abs(sigma[i] / scale - 1) < 0.05


def test_generalized_pareto_written_as_the_paper_has_it():
    """Zhang & Stephens (2009), one sample, by plain loops."""
    x = sorted(stats.genpareto(0.4).rvs(30, random_state=0))
    n, m = 30, 30 + 5
    theta = [1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * x[7]) for j in range(1, m + 1)]
    shape = [sum(math.log1p(-t * v) for v in x) / n for t in theta]
    log_l = [n * (math.log(-t / k) - k - 1) for t, k in zip(theta, shape, strict=True)]
    weight = [1 / sum(math.exp(b - a) for b in log_l) for a in log_l]
    t = sum(w * t for w, t in zip(weight, theta, strict=True))
    k = sum(math.log1p(-t * v) for v in x) / n
    found, sigma = generalized_pareto(torch.tensor([x], dtype=torch.float64))
    assert found.item() == pytest.approx((30 * k + 5) / 40) and sigma.item() == pytest.approx(
        -k / t
    )


@pytest.mark.parametrize("shape", [0.3, 0.9])
def test_khat_of_weights_is_the_index_of_their_tail(shape, double):
    """Pareto weights, whose tail above any point is a generalized Pareto of the same shape."""
    k = 5000
    w = (1 - torch.rand(60, k)).pow(-shape)
    khat, n = pareto_khat(w.log() - 700), tail(k)
    assert n == 213
    expected = (n * shape + 5) / (n + 10)
    assert abs(khat.mean() - expected) < 4 * khat.std() / 60**0.5 + 0.01
    assert 0.5 < khat.std() / ((1 + shape) / n**0.5) < 1.5  # its asymptotic standard error


def plain_khat(log_w):
    """Vehtari et al. (2024) for one row of weights: the excesses above the cutoff that are any."""
    w = sorted(math.exp(each - max(log_w)) for each in log_w)
    cutoff = w[-tail(len(w)) - 1]
    excess = torch.tensor(
        [[each - cutoff for each in w if each - cutoff > 1e-300]], dtype=torch.float64
    )
    return generalized_pareto(excess)[0].item() if excess.numel() > 4 else math.inf


@pytest.mark.parametrize("decimals", [1, 2, 6])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 400.0])
def test_khat_where_weights_tie_or_underflow(double, decimals, scale):
    """Rounded weights, some of which are nothing: what ties with the cutoff is no excess."""
    log_w = (scale * torch.randn(8, 200)).round(decimals=decimals) - 90
    log_w[::2, ::3] = -torch.inf
    expected = torch.tensor([plain_khat(row) for row in log_w.tolist()])
    torch.testing.assert_close(pareto_khat(log_w), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-5, 3e-5, 1e-4])
@pytest.mark.parametrize("k", [100, 5000])
def test_khat_of_weights_that_are_equal_but_for_float32(spread, k):
    """A collapsed posterior: log weights near -90 stand 7.6e-6 apart."""
    khat = pareto_khat((spread * torch.randn(5, k, dtype=torch.float64) - 90).float())
    assert (khat < 0.3).all() and khat.isfinite().all()
    if spread < 1e-5:
        assert (khat == 0).all()


def test_khat_of_a_collapsed_vae_finds_nothing_wrong():
    vae = random_vae(CategoricalLikelihood(3))
    for layer, scale in ((vae.encoder.layers[-1], 1e-6), (vae.decoder.layers[0], 0.0)):
        for p in layer.parameters():
            p.data *= scale
    x = torch.randint(3, (6, 4))
    found = evaluate(500, vae, x).diagnostics
    assert vae.elbo(x).prior.max() < 1e-9
    assert (found["khat"] < 0.3).all() and (found["khat_over_0.7"] == 0).all()


def test_khat_of_hopeless_weights_is_beyond_all_bounds(double):
    """One weight is all of the sum; the others are nothing beside it, or next to nothing."""
    assert (pareto_khat(1000 * torch.randn(20, 100)) > 2).all()
    nothing = torch.full((1, 50), -torch.inf)
    one = nothing.clone()
    one[0, 7] = -3.0
    assert (pareto_khat(torch.cat([nothing, one])) == math.inf).all()
    with pytest.raises(ValueError, match="at least 21"):
        pareto_khat(torch.zeros(1, 20))


def test_diffusion_in_finite_steps_and_not_in_continuous_time(double):
    schedule = LogLinear(1.0, -6.0)
    vdm = VDM(GaussianDenoiser(schedule, 0.1, 0.7), DiscretizedGaussianLikelihood(3), 3, shape=(2,))
    x = torch.tensor([[i, j] for i in range(3) for j in range(3)])
    estimate = evaluate(2000, vdm, x)
    p = (-estimate.nats).exp()
    assert abs(p.sum() - 1) < 4 * (p**2 * estimate.variance).sum().sqrt()
    with pytest.raises(ValueError, match=r"vdm.at\(steps=T\)"):
        evaluate(2, vdm.at(None), x)


def test_bad_numbers_are_refused():
    for k in (0, -1):
        with pytest.raises(ValueError, match="k: expected an integer of at least 1"):
            ImportanceWeighted(k)
    with pytest.raises(ValueError, match="chunk: expected"):
        ImportanceWeighted(chunk=0)


def test_means_of_diagnostics_are_reported():
    nll, b = NLL(diagnostics=("ess", "khat")), torch.zeros(2, dtype=torch.float64)
    for first in (1.0, 5.0):
        nll.update(Estimate(b, b, diagnostics={"ess": torch.tensor([first, 3.0]).double()}), dims=4)
    values = nll.compute()
    assert values["ess"] == 3.0 and "khat" not in values
    with pytest.raises(ValueError, match="diagnostic other: not among"):
        nll.update(Estimate(b, b, diagnostics={"other": b}), dims=4)

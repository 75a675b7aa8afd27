"""Against scipy, and in the tails."""

import math

import pytest
import torch
from oracles import Mixture
from scipy import stats

from genfw import (
    Bernoulli,
    BinSoftmax,
    Categorical,
    DiscretizedLogistic,
    DiscretizedNormal,
    LogisticMixture,
    Noise,
    Normal,
)
from genfw.bayes import DiscretePosterior
from genfw.distributions import divergence, normal_head


def test_normal_log_prob_and_kl_against_torch(double):
    a, b = (Normal(torch.randn(5, 3, 2), torch.rand(5, 3, 2) + 0.2) for _ in range(2))
    x = torch.randn(5, 3, 2)
    torch_a, torch_b = (torch.distributions.Normal(d.mean, d.std) for d in (a, b))
    assert torch.allclose(a.log_prob(x), torch_a.log_prob(x).sum((1, 2)), rtol=1e-12)
    kl = torch.distributions.kl_divergence(torch_a, torch_b).sum((1, 2))
    assert torch.allclose(a.kl(b), kl, rtol=1e-12)


@pytest.mark.parametrize("log_snr", [-10.0, -20.0])
def test_a_small_divergence_is_not_lost_in_float32(log_snr):
    """The prior term: variance sigma^2 = 1 - alpha^2, mean alpha x, and almost nothing of both."""
    signal, noise = (torch.tensor(s * log_snr).double().sigmoid() for s in (1, -1))
    x = torch.linspace(-1, 1, 64).double()
    exact = 0.5 * (signal * x.square() - signal - (-signal).log1p()).sum()
    q = Normal((signal.sqrt() * x).float()[None], noise.sqrt().float())
    got = q.kl(Normal(torch.zeros(1, 64), torch.ones(())))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), rel=1e-4)


def test_a_scalar_std_counts_once_per_dimension(double):
    mean = torch.randn(4, 3)
    full, scalar = Normal(mean, torch.full((4, 3), 0.1)), Normal(mean, torch.tensor(0.1))
    x = torch.randn(4, 3)
    assert torch.equal(full.log_prob(x), scalar.log_prob(x))
    assert torch.equal(full.kl(Normal(x, torch.ones(()))), scalar.kl(Normal(x, torch.ones(()))))


def spread(x):
    """Positive, and the same in any precision that x is exact in."""
    return x.abs().clamp(0.25)


MADE = {  # of n rows, over two dimensions, of three values where there are values
    "normal": lambda n, r: Normal(r(n, 2), spread(r(n, 2))),
    "categorical": lambda n, r: Categorical(r(n, 3, 2)),
    "bernoulli": lambda n, r: Bernoulli(r(n, 2)),
    "bins": lambda n, r: BinSoftmax(r(n, 2), spread(r(n, 2)), 3),
    "discretized normal": lambda n, r: DiscretizedNormal(r(n, 2), spread(r(n, 2)), 3),
    "discretized logistic": lambda n, r: DiscretizedLogistic(r(n, 2), spread(r(n, 2)), 3),
    "mixture": lambda n, r: LogisticMixture(
        r(n, 2, 2), r(n, 2, 1, 2), spread(r(n, 2, 1, 2)), 3, None
    ),
    "coupled mixture": lambda n, r: LogisticMixture(
        r(n, 2, 2), r(n, 2, 3, 2), spread(r(n, 2, 3, 2)), 3, r(n, 2, 3, 2).clamp(-1, 1)
    ),
    "posterior": lambda n, r: DiscretePosterior(
        r(n, 3, 2), r(n, 2), torch.tensor(0.75).to(r(1)), torch.tensor(0.5).to(r(1)), 3
    ),
}
each_made = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


@each_made
def test_one_row_stands_for_all(make, double):
    """Several draws z of one image, or several images under one z; other numbers are refused."""
    several, one = make(5, torch.randn), make(1, torch.randn)
    x = torch.randint(2, (5, *one.mean.shape[1:]))
    torch.testing.assert_close(several.log_prob(x[:1]), several.log_prob(x[:1].expand_as(x)))
    torch.testing.assert_close(one.log_prob(x), torch.cat([one.log_prob(each[None]) for each in x]))
    for wrong in (x[:2], torch.cat([x, x])):
        with pytest.raises(ValueError, match=f"x: expected 5 examples.* got {len(wrong)}"):
            several.log_prob(wrong)


@each_made
def test_nothing_is_summed_in_half_precision(make):
    """Two thousand dimensions."""

    def wide(*shape):
        seeded = torch.Generator().manual_seed(sum(shape))
        return torch.randn(*shape[:-1], 1000 * shape[-1], generator=seeded).bfloat16()

    def exact(*shape):
        return wide(*shape).double()

    half, double = make(2, wide), make(2, exact)
    x = torch.randint(2, (2, *half.mean.shape[1:]))
    found = half.log_prob(x)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), double.log_prob(x), rtol=1e-5)
    if isinstance(half, Normal):
        to_prior = [each.kl(Normal(0 * each.mean, 2 * each.std)) for each in (half, double)]
        assert torch.allclose(to_prior[0].double(), to_prior[1], rtol=1e-5)


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2), (0, 1, 2), ()])
def test_rows_that_are_one_in_memory_count_as_rows(double, which, b):
    """What an importance-weighted evaluation makes: many draws beside one image."""
    rows = torch.randn(1, 3, 2), torch.randn(1, 3, 2), torch.rand(1, 3, 2) + 0.2
    more = torch.rand(b, 3, 2)
    x, mean, std = (r.expand(b, 3, 2) if i in which else r + more for i, r in enumerate(rows))
    normal = torch.distributions.Normal(mean, std).log_prob(x).sum((1, 2))
    assert torch.allclose(Normal(mean, std).log_prob(x), normal, rtol=1e-12)
    bits = torch.distributions.Bernoulli(logits=mean).log_prob((x > 0).double()).sum((1, 2))
    seen = (x > 0).byte()
    seen = seen[:1].expand(b, 3, 2) if 0 in which else seen
    assert torch.allclose(Bernoulli(mean).log_prob(seen), bits, rtol=1e-12)


def test_a_repeated_row_gets_the_gradient_of_all(double):
    z, mean, std = torch.randn(5, 3), torch.randn(1, 3), torch.rand(1, 3) + 0.2
    ones = [x.clone().requires_grad_() for x in (mean, std)]
    each = [x.repeat(5, 1).requires_grad_() for x in (mean, std)]
    Normal(*(x.expand(5, 3) for x in ones)).log_prob(z).sum().backward()
    Normal(*each).log_prob(z).sum().backward()
    for one, many in zip(ones, each):
        assert torch.allclose(one.grad, many.grad.sum(0, keepdim=True), rtol=1e-12)


def test_normal_samples_follow_it_and_carry_gradients(double):
    mean = torch.full((40_000, 1), 2.0, requires_grad=True)
    z = Normal(mean, torch.tensor(0.5)).sample(Noise(0, torch.arange(40_000)))
    assert stats.kstest(z.detach().numpy()[:, 0], stats.norm(2, 0.5).cdf).pvalue > 1e-3
    z.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))


def test_normal_head_reads_mean_then_log_std(double):
    h = torch.randn(2, 6, 3)
    q = normal_head(h)
    assert torch.equal(q.mean, h[:, :3]) and torch.equal(q.std, h[:, 3:].exp())
    wild = normal_head(torch.full((1, 2), 1e9))
    assert wild.std.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda n: Categorical(torch.tensor([0.1, 2.0, -1.0, 0.5]).view(1, 4, 1).expand(n, 4, 1)),
        lambda n: DiscretizedNormal(torch.full((n, 1), 0.1), torch.tensor(0.6), 4),
        lambda n: BinSoftmax(torch.full((n, 1), 0.1), torch.tensor(0.6), 4),
        lambda n: DiscretizedLogistic(torch.full((n, 1), 0.1), torch.tensor(0.3), 4),
        lambda n: LogisticMixture(
            torch.tensor([0.2, -0.4]).expand(n, 2),
            torch.tensor([[-0.6], [0.3]]).expand(n, 2, 1),
            torch.tensor([[0.05], [0.4]]).expand(n, 2, 1),
            4,
            None,
        ),
        lambda n: Bernoulli(torch.full((n, 1), -0.7)),
    ],
    ids=["categorical", "normal", "bin_softmax", "logistic", "mixture", "bernoulli"],
)
def test_samples_have_the_stated_masses(double, make):
    n = 40_000
    x = make(n).sample(Noise(1, torch.arange(n)))
    assert not x.is_floating_point() and x.shape == (n, 1)
    values = 2 if isinstance(make(1), Bernoulli) else 4
    p = make(values).log_prob(torch.arange(values).view(values, 1)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    counts = torch.bincount(x.flatten(), minlength=values)
    assert stats.chisquare(counts.numpy(), (n * p).numpy()).pvalue > 1e-3
    assert make(1).mean.item() == pytest.approx((p @ torch.arange(values).double()).item())


def test_values_of_another_shape_are_refused_not_broadcast():
    """Images without the axis of channels, which the network has: as many as there are rows."""
    one, dims = torch.zeros(3, 1, 3, 3), torch.ones(3, 1, 3, 3)
    for over in (
        Normal(one, dims),
        Bernoulli(one),
        Categorical(torch.zeros(3, 4, 1, 3, 3)),
        BinSoftmax(one, dims, 4),
        DiscretizedNormal(one, dims, 4),
        DiscretizedLogistic(one, dims, 4),
        LogisticMixture(torch.zeros(3, 2, 3, 3), one[:, None], dims[:, None], 4, None),
        DiscretePosterior(
            torch.zeros(3, 4, 1, 3, 3), one, torch.ones(()), torch.ones(()), 4, lambda x: x, 4
        ),
    ):
        over.log_prob(torch.zeros(3, 1, 3, 3).long())
        for shape in ((3, 3, 3), (3, 3, 3, 3), (3, 1, 3)):
            with pytest.raises(ValueError, match=r"expected examples of shape \(1, 3, 3\), which"):
                over.log_prob(torch.zeros(shape).long())


def test_categorical_mean_and_layout(double):
    logits = torch.randn(2, 5, 3, 4)
    x = torch.randint(5, (2, 3, 4))
    expected = sum(
        logits[:, :, i, j].log_softmax(1).gather(1, x[:, i, j, None])[:, 0]
        for i in range(3)
        for j in range(4)
    )
    assert torch.allclose(Categorical(logits).log_prob(x), expected)
    assert math.isclose(
        Categorical(logits).mean[1, 2, 3],
        (logits[1, :, 2, 3].softmax(0) @ torch.arange(5).double()).item(),
    )


def test_the_mean_of_categories_is_as_fine_as_their_masses_under_autocast():
    """As their log masses are, which autocast leaves in float32."""
    k = Categorical(3 * torch.randn(2, 256, 3, 4))
    expected = k.mean
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(k.mean, expected)
    exact = (k.log_probs.double().exp() * torch.arange(256).view(-1, 1, 1)).sum(1)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=0)


def test_normal_head_is_the_identity_in_its_range(double):
    log_std = torch.tensor([[-1e9, -9.0, -8.5, -4.5, 0.0, 2.9, 3.0, 1e9]])
    expected = torch.tensor([[-9.0, -9.0, -8.5, -4.5, 0.0, 2.9, 3.0, 3.0]])
    q = normal_head(torch.cat([torch.zeros(1, 8), log_std], 1))
    torch.testing.assert_close(q.std.log(), expected)


def test_a_divergence_is_the_closed_form_of_two_normals_and_unbiased_otherwise(double):
    n, std = 40_000, torch.tensor([0.3, 1.2])
    q, means = Normal(torch.tensor([[0.4]]), torch.tensor([[0.7]])), torch.tensor([[-1.0], [2.0]])
    many = Normal(q.mean.expand(n, 1), q.std.expand(n, 1))
    z = many.sample(Noise(0, torch.arange(n)))
    p = Mixture(means, std, n)
    grid = torch.linspace(-8, 8, 4001)[:, None]
    log_q = q.log_prob(grid)
    exact = torch.trapezoid(log_q.exp() * (log_q - p.log_prob(grid)), grid[:, 0])
    found = divergence(many, p, z)
    assert abs(found.mean() - exact) < 4 * found.std() / n**0.5 < 0.05
    normal = Normal(means[:1], std[:1])
    assert torch.equal(divergence(q, normal, z[:1]), q.kl(normal))


def test_a_divergence_at_a_draw_is_float32_as_the_other_and_loses_little():
    """Of two that are the same it is 0 at every draw, with and without a mixture's detour."""
    torch.manual_seed(0)
    mean = torch.randn(1, 500)
    q = Normal(mean.expand(64, 500), torch.full((64, 500), 1e-2))
    found = divergence(q, Mixture(mean, torch.tensor([1e-2]), 64), q.sample())
    assert found.dtype == torch.float32 and found.abs().max() < 2e-3

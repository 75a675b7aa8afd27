"""The chain of one level."""

import pytest
import torch
from oracles import Mixture

from genfw import (
    VAE,
    BernoulliLikelihood,
    Bound,
    CategoricalLikelihood,
    Elbo,
    FreeBits,
    ImportanceWeighted,
    Iwae,
    Noise,
    Stl,
)


class Map(torch.nn.Module):
    """A random smooth map of flat vectors."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(inputs, 16), torch.nn.Tanh(), torch.nn.Linear(16, outputs)
        )

    def forward(self, x, y=None):
        return self.layers(x)


def random_vae(likelihood, dims=4, latents=2):
    return VAE(Map(dims, 2 * latents), Map(latents, dims * likelihood.outputs), likelihood, latents)


def test_the_bound_written_out(double):
    """Luo (19): E log p(x|z) - KL, every piece by hand."""
    vae, x = random_vae(CategoricalLikelihood(5)), torch.randint(5, (8, 4))
    noise = Noise(0, torch.arange(8))
    elbo = vae.elbo(x, noise=noise)
    mean, log_std = vae.encoder((2 * x + 1) / 5 - 1).chunk(2, 1)
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(1)
    z = mean + log_std.exp() * noise.fold("z1").normal("sample", mean)
    logits = vae.decoder(z).view(8, 5, 4).log_softmax(1)
    log_p = logits.gather(1, x[:, None])[:, 0].sum(1)
    assert torch.allclose(elbo.prior, kl) and torch.allclose(elbo.reconstruction, log_p)
    assert elbo.levels == () and torch.allclose(elbo.total, log_p - kl)


def test_probabilities_of_all_binary_images_sum_to_at_most_one(double):
    x = torch.tensor([[i >> b & 1 for b in range(4)] for i in range(16)])
    for seed in range(3):
        torch.manual_seed(seed)
        vae = random_vae(BernoulliLikelihood())
        estimate = Bound(sets=2, strata=100)(vae, x, noise=Noise(0, torch.arange(16)))
        p = (-estimate.nats).exp()
        assert p.sum() <= 1 + 4 * (p**2 * estimate.variance).sum().sqrt()
        n = 4000  # and the weights, whose mean is p(x) exactly, sum to one
        w = vae.log_weight(x.repeat_interleave(n, 0)).exp().view(16, n)
        assert abs(w.mean(1).sum() - 1) < 4 * (w.var(1) / n).sum().sqrt()


def test_samples_have_the_models_own_frequencies(double):
    torch.manual_seed(1)
    vae, n = random_vae(BernoulliLikelihood(), dims=2), 50_000
    x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    p = vae.log_weight(x.repeat_interleave(n, 0)).exp().view(4, n).mean(1)
    samples = vae.sample(n, noise=Noise(0, torch.arange(n)))
    counts = torch.bincount(2 * samples[:, 0] + samples[:, 1], minlength=4) / n
    assert torch.allclose(counts, p, atol=0.012)


def test_gradients_against_finite_differences(double):
    vae, x = random_vae(CategoricalLikelihood(3)), torch.randint(3, (4, 4))
    noise = Noise(0, torch.arange(4))
    for parameter in vae.parameters():
        vae.zero_grad()
        vae.elbo(x, noise=noise).total.sum().backward()
        with torch.no_grad():
            direction, step = torch.randn_like(parameter), 1e-6
            gradient = (parameter.grad * direction).sum()
            parameter += step * direction
            up = vae.elbo(x, noise=noise).total.sum()
            parameter -= 2 * step * direction
            down = vae.elbo(x, noise=noise).total.sum()
            parameter += step * direction
        assert torch.allclose((up - down) / (2 * step), gradient, rtol=1e-5, atol=1e-7)


def test_latent_sizes_that_do_not_match_are_refused():
    vae = VAE(Map(4, 6), Map(2, 4), BernoulliLikelihood(), latents=2)
    with pytest.raises(
        ValueError, match=r"encoder 1 gives \(6,\) numbers for z_1 of shape \(2,\): expected \(4,\)"
    ):
        vae.elbo(torch.randint(2, (2, 4)))


def test_half_precision_stops_at_the_networks():
    """Every KL, log-sum-exp and bound in float32 or better, whatever the networks are in."""
    vae, x = random_vae(CategoricalLikelihood(5)), torch.randint(5, (8, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        elbo = vae.elbo(x)
    assert elbo.reconstruction.dtype == elbo.prior.dtype == torch.float32


def of_one(n, latents=2):
    """N(0, I), but no Normal."""
    return Mixture(torch.zeros(1, latents), torch.ones(1), n)


def test_a_mixture_of_one_as_prior_gives_the_normals_numbers(double):
    """The bound in the mean, where the normal has a divergence and the mixture a draw of it;
    importance weights and samples exactly."""
    vae, n = random_vae(CategoricalLikelihood(5)), 4000
    x = torch.randint(5, (2, 4)).repeat_interleave(n, 0)
    noise, few = Noise(0, torch.arange(2 * n)), Noise(0, torch.arange(50))
    weighted = ImportanceWeighted(k=5, chunk=100)
    plain, weights, drawn = vae.elbo(x), weighted(vae, x[:50], noise=few).nats, vae.sample(50)
    sampled = vae.sample(50, noise=few)
    vae.prior = of_one
    mixed = vae.elbo(x, noise=noise)
    gap = (mixed.prior - plain.prior).view(2, n)
    assert (gap.mean(1).abs() < 4 * gap.std(1) / n**0.5).all() and (gap.std(1) > 0.1).all()
    assert torch.allclose(mixed.prior - mixed.total, 2 * mixed.prior - mixed.reconstruction)
    assert torch.allclose(weighted(vae, x[:50], noise=few).nats, weights, rtol=1e-12)
    assert torch.equal(vae.sample(50, noise=few), sampled) and drawn.shape == sampled.shape


def test_the_bound_under_a_mixture_is_one_log_weight_in_float32_too():
    """log p(x, z) - log q(z | x) at the same draw; keyed, so a batch does not matter."""
    vae, x, noise = random_vae(CategoricalLikelihood(5)), torch.randint(5, (8, 4)), Noise(3, EIGHT)
    vae.prior = lambda n: Mixture(torch.tensor([[-1.0, 0.0], [2.0, 1.0]]), torch.ones(2), n)
    total = vae.elbo(x, noise=noise).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, vae.log_weight(x, noise=noise))
    part = vae.elbo(x[[5, 2]], noise=Noise(3, EIGHT[[5, 2]])).total
    torch.testing.assert_close(part, total[[5, 2]])


EIGHT = torch.arange(8)


def test_a_learned_prior_is_trained_whatever_the_objective(double):
    vae, x, means = (
        random_vae(CategoricalLikelihood(5)),
        torch.randint(5, (8, 4)),
        torch.randn(3, 2),
    )
    means.requires_grad_()
    vae.prior = lambda n: Mixture(means, torch.ones(3), n)
    for objective in (Elbo(), Iwae(3), Stl()):
        (gradient,) = torch.autograd.grad(objective(vae, x).sum(), means)
        assert gradient.abs().min() > 0
    with pytest.raises(TypeError, match="VAE's prior is no Normal: use per=batch_level"):
        FreeBits(0.1, "batch_dimension")(vae, x)

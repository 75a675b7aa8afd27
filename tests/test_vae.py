"""The chain of one level."""

import pytest
import torch

from genfw import VAE, BernoulliLikelihood, Bound, CategoricalLikelihood, Noise


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

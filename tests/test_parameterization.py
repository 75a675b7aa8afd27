"""All coordinates say the same."""

import pytest
import torch

from genfw import (
    Cosine,
    Edm,
    Eps,
    LinearParameterization,
    NetworkDenoiser,
    Parameterization,
    Score,
    V,
)

LINEAR = [c for c in Parameterization.registry.values() if issubclass(c, LinearParameterization)]


@pytest.fixture
def point(double):
    """(x, eps, z, alpha, sigma) at log SNR from -12 to 14."""
    log_snr = torch.linspace(-12, 14, 9)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    x, eps = torch.randn(9, 2, 3), torch.randn(9, 2, 3)
    return x, eps, alpha.view(9, 1, 1) * x + sigma.view(9, 1, 1) * eps, alpha, sigma


def test_named_coordinates(point):
    """Each target against its own definition, written out."""
    x, eps, _, alpha, sigma = point
    a, s = alpha.view(9, 1, 1), sigma.view(9, 1, 1)
    expected = {"x0": x, "eps": eps, "score": -eps / s, "v": a * eps - s * x, "flow": eps - x}
    # Karras et al.: the network gives (x - c_skip y) / c_out of y = x + (sigma / alpha) eps
    width = s / a
    skip, out = 0.25 / (width**2 + 0.25), width * 0.5 / (width**2 + 0.25).sqrt()
    expected["edm"] = (x - skip * (x + width * eps)) / out
    assert set(expected) == {c.name for c in LINEAR}
    for name, target in expected.items():
        param = Parameterization.registry[name]()
        assert torch.allclose(param.target(x, eps, alpha, sigma), target)


def test_all_say_the_same_of_one_x_hat(point):
    """In x, eps, score and v, to 1e-10, through any two of them."""
    x, _, z, alpha, sigma = point
    a, s = alpha.view(9, 1, 1), sigma.view(9, 1, 1)
    eps = (z - a * x) / s
    said = []
    for cls in LINEAR:
        output = cls().target(x, eps, alpha, sigma) / cls().scale(a, s)
        said.append(cls().solve(output, z, alpha, sigma))
    for p in said:
        for name in ("x", "eps", "score", "v"):
            one, other = getattr(p, name), getattr(said[0], name)
            assert (one - other).norm() <= 1e-10 * other.norm(), name


def test_edm_of_unit_variance_is_minus_v(point):
    _, _, z, alpha, sigma = point
    output = torch.randn_like(z)
    edm, v = (p.solve(y, z, alpha, sigma) for p, y in ((Edm(1.0), output), (V(), -output)))
    assert torch.allclose(edm.x, v.x, rtol=1e-12) and torch.allclose(edm.eps, v.eps, rtol=1e-12)
    assert torch.allclose(Edm(1.0).input_scale(alpha, sigma), torch.ones(9))


def test_edm_gives_the_network_an_input_of_unit_variance(double):
    """And asks for a target of unit variance, of data with the stated deviation."""
    seen, network = [], torch.nn.Identity()
    network.forward = lambda z, level, y: seen.append(z) or z
    schedule, t, n = Cosine(8.0, -8.0), torch.tensor([0.1, 0.5, 0.9]), 100_000
    x, eps = 0.3 * torch.randn(3, n), torch.randn(3, n)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    NetworkDenoiser(network, Edm(0.3), schedule)(alpha * x + sigma * eps, t)
    target = Edm(0.3).target(x, eps, alpha, sigma)
    for unit in (seen[0], target):
        assert ((unit.var(1) - 1).abs() < 5 * (2 / n) ** 0.5).all()
    with pytest.raises(ValueError, match="finite positive number, got 0"):
        Edm(0.0)


def test_the_scaled_score_network_outputs_minus_eps(point):
    _, _, z, alpha, sigma = point
    output = torch.randn_like(z)
    scaled, raw, eps = Score(), Score(raw=True), Eps()
    by_eps = eps.solve(-output, z, alpha, sigma)
    assert torch.allclose(scaled.solve(output, z, alpha, sigma).x, by_eps.x)
    by_raw = raw.solve(by_eps.score, z, alpha, sigma)
    assert torch.allclose(by_raw.x, by_eps.x)


def test_score_is_the_gradient_of_the_log_marginal(double):
    """Tweedie, Luo (133), on Gaussian data whose marginal is known."""
    from oracles import GaussianDenoiser

    from genfw import Cosine

    schedule, mean, std = Cosine(9.0, -9.0), torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
    t = torch.linspace(0, 1, 7)
    z = torch.randn(7, 2, requires_grad=True)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    marginal = torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt())
    (gradient,) = torch.autograd.grad(marginal.log_prob(z).sum(), z)
    prediction = GaussianDenoiser(schedule, mean, std)(z.detach(), t)
    assert torch.allclose(prediction.score, gradient, rtol=1e-9)
    assert torch.allclose((alpha * prediction.x - z) / sigma**2, gradient, rtol=1e-9)
    assert torch.allclose(prediction.v, V().target(prediction.x, prediction.eps, alpha, sigma))


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"latent's shape \(2, 3\), got \(2, 4\)"):
        Eps().solve(torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(2), torch.ones(2))


def test_five_lines_make_a_new_one(point):
    class Velocity(LinearParameterization):
        def coefficients(self, alpha, sigma):
            return 1.0, -1.0

    x, eps, z, alpha, sigma = point
    prediction = Velocity().solve(x - eps, z, alpha, sigma)
    assert torch.allclose(prediction.x, x, rtol=0, atol=1e-9)

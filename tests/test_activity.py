"""What latents do, against exact answers: costs of levels and units, and which of them follow the
data."""

import math

import oracles
import pytest
import torch
from test_diagnostics import chain, conv, hvae, noise, vae

import genfw
from genfw.noise import Noise
from genfw.train.activity import ACTIVE, Findings, look
from genfw.train.latents import latents_of


def test_levels_of_a_chain_against_the_exact_answer(double):
    """z_1 = g_1 x + ..., z_2 = g_2 z_1 + ...: every expectation is one of normals."""
    model = oracles.LinearGaussianChain(2, bias=0.0, stretch=1.3)
    x, draws = torch.randn(200, 2) * torch.tensor([1.0, 2.5]), 200
    found = look(model, x, None, noise(200), draws).findings()
    gain = [model.a * model.var[t] / model.var[t - 1] for t in (1, 2)]
    var = [1.69 * (model.var[t] - gain[t - 1] ** 2 * model.var[t - 1]) for t in (1, 2)]
    square = var[0] + gain[0] ** 2 * x.square()  # E z_1^2, per image and dimension
    miss = (1 - model.a * gain[1]) ** 2 * square + model.a**2 * var[1]  # E (z_1 - a z_2)^2
    kl_1 = -0.5 * (1 + math.log(var[0])) + 0.5 * (math.log(model.s**2) + miss / model.s**2)
    kl_2 = 0.5 * (var[1] + gain[1] ** 2 * square - 1 - math.log(var[1]))
    torch.testing.assert_close(found.kl[0], kl_1.mean(0), atol=0.03, rtol=0)  # ± 0.008
    torch.testing.assert_close(found.kl[1], kl_2.mean(0), atol=0.01, rtol=0)  # ± 0.0025

    spread = x.var(0)
    torch.testing.assert_close(found.activity[0], gain[0] ** 2 * spread)
    exact = (gain[0] * gain[1]) ** 2 * spread
    error = 2 * gain[1] ** 2 * (var[0] / draws * exact / 200) ** 0.5  # of Var_x, to first order
    assert ((found.activity[1] - exact).abs() < 5 * error + 1e-3).all()


@pytest.mark.parametrize("draws", [2, 4])
def test_draws_are_not_taken_for_activity(draws, double):
    """z_2 depends on z_1, and z_1 on no data: whatever moves is the draws' own doing. To four
    standard errors, those of the variance over images and of the variance over draws together."""
    model, n = oracles.LinearGaussianChain(2), 2000
    blind = genfw.Normal(torch.zeros(n, 2), torch.ones(n, 2))
    encode = model.encode
    model.encode = lambda z, t, y=None: blind if t == 1 else encode(z, t, y)
    found = look(model, torch.randn(n, 2), None, noise(n), draws).findings()
    assert found.activity[0].abs().max() < 1e-12
    moved = (model.a * model.var[2] / model.var[1]) ** 2 / draws  # what the draws alone would show
    assert moved > 10 * ACTIVE
    error = moved * (2 / n + 2 / ((draws - 1) * n)) ** 0.5
    assert found.activity[1].abs().max() < 4 * error < moved / draws


@pytest.mark.parametrize("made", [vae, conv, chain, hvae])
def test_units_add_up_to_the_terms_of_the_bound(made):
    model, x = made(), torch.randint(3, (6, 1, 2, 2))
    found = look(model, x, None, noise(6), 2).findings()
    bounds = [model.elbo(x, noise=noise(6).fold(j)) for j in range(2)]
    terms = torch.stack([torch.stack([*b.levels, b.prior]) for b in bounds]).double().mean((0, 2))
    torch.testing.assert_close(torch.stack([kl.sum() for kl in found.kl]), terms)
    posteriors = latents_of(model).posteriors(x)
    sizes = [z[0].numel() for _, z in posteriors]
    assert [len(kl) for kl in found.kl] == [len(each) for each in found.activity] == sizes


def test_sums_of_batches_add_up():
    x, model = torch.randint(3, (6, 1, 2, 2)), chain()
    whole = look(model, x, None, noise(6), 3).findings()
    index = torch.arange(6)
    parts = [look(model, x[i], None, Noise(3, index[i]), 3) for i in (slice(2), slice(2, 6))]
    halves = (parts[0] + parts[1]).findings()
    for a, b in zip(halves.kl, whole.kl, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(halves.activity, whole.activity, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_collapse_needs_activity_and_cost():
    dead, active = torch.zeros(2), torch.tensor([0.0, 1.0])
    costs = [torch.tensor(kl) for kl in ([0.03, 0.02], [1.0, 2.0], [1.0, 2.0], [-3.0, 1.0])]
    found = Findings(costs, [active, dead, active, active])
    assert found.collapsed() == [1, 2]
    found = Findings([torch.ones(3)], [torch.tensor([0.1, 0.5, 0.3])])
    assert found.most_active(1, 2).tolist() == [1, 2]


def test_a_unit_is_active_above_a_hundredth():
    """As Burda et al. count them: by Var_x of the posterior mean."""
    for variance, collapsed in ((0.0099, [1]), (0.0101, [])):
        found = Findings([torch.tensor([0.0, 3.0])], [torch.tensor([0.0, variance])])
        assert found.collapsed() == collapsed


def test_a_unit_that_moves_or_costs_alone_tells_nothing():
    kl, activity = torch.tensor([0.2, 0.2, 0.05, 0.0]), torch.tensor([0.5, 0.0, 0.5, 0.0])
    found = Findings([kl, kl[:1]], [activity, activity[:1]])
    assert [each.tolist() for each in found.informative()] == [[True, False, False, False], [True]]
    lines = found.table().splitlines()
    assert lines[0] == "level,unit,kl,activity" and lines[2] == "1,1,0.2,0"
    assert [line[:4] for line in lines[1:]] == ["1,0,", "1,1,", "1,2,", "1,3,", "2,0,"]

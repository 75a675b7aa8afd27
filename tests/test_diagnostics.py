"""Diagnostics say what is so: costs and active units against exact answers, an alarm where a level
is dead, pictures of the latents they claim to show."""

import csv
import math
import warnings

import oracles
import pytest
import tiny
import torch
from torch.distributions import kl_divergence

import genfw
from genfw.noise import Noise
from genfw.train.diagnostics import (
    ACTIVE,
    Diagnostics,
    Findings,
    interpolation,
    look,
    spread,
    traversal,
    write,
)
from genfw.train.latents import Chain, Means, latents_of
from genfw.train.module import LatentModule


def noise(n):
    return Noise(3, torch.arange(n))


class Linear(torch.nn.Module):
    """A linear layer that takes labels and reshapes."""

    def __init__(self, inputs, outputs, shape=None):
        super().__init__()
        self.layer = torch.nn.Linear(inputs, outputs)
        self.shape = shape

    def forward(self, x, y=None):
        h = self.layer(x.flatten(1))
        return h if self.shape is None else h.view(len(h), *self.shape)


def vae():
    return genfw.VAE(Linear(4, 6), Linear(3, 12, (3, 2, 2)), genfw.CategoricalLikelihood(3), 3)


def conv():
    """Latents of three axes."""
    networks = Linear(4, 24, (4, 2, 3)), Linear(12, 12, (3, 2, 2))
    return genfw.VAE(*networks, genfw.CategoricalLikelihood(3), (2, 2, 3))


def chain():
    encoders, decoders = [Linear(4, 6), Linear(3, 4)], [Linear(3, 12, (3, 2, 2)), Linear(2, 6)]
    return genfw.MHVAE(encoders, decoders, genfw.CategoricalLikelihood(3), [3, 2])


def hvae():
    ladder = genfw.nets.Ladder((1, 2, 2), 3, width=8, latents=2, blocks=[1, 1])
    for p in ladder.parameters():  # posteriors begin as the priors
        p.data += 0.1 * torch.randn_like(p)
    return genfw.HVAE(ladder, genfw.CategoricalLikelihood(3)).eval()


def module(model, lr=1e-4):
    return LatentModule(
        model, genfw.Elbo(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr)
    )


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


@pytest.mark.parametrize("made", [vae, conv, hvae])
def test_a_unit_costs_its_own_divergence(made):
    """As torch has it, unit by unit, in the order of the posterior's numbers."""
    model, x = made(), torch.randint(3, (6, 1, 2, 2))
    costs = latents_of(model).costs(x, noise=noise(6))
    _, pairs = model.divergences(x, noise=noise(6))
    for cost, (q, p) in zip(costs, pairs, strict=True):
        exact = kl_divergence(*(torch.distributions.Normal(d.mean, d.std) for d in (q, p)))
        torch.testing.assert_close(cost, exact.flatten(1), rtol=1e-4, atol=1e-6)


def test_in_a_chain_a_unit_costs_a_log_ratio_at_its_draw():
    model, x = chain(), torch.randint(3, (6, 1, 2, 2))
    first, second = model.climb(x, noise=noise(6))
    q, p = (torch.distributions.Normal(d.mean, d.std) for d in (first.q, second.p))
    cost = Chain(model).costs(x, noise=noise(6))[0]
    torch.testing.assert_close(cost, q.log_prob(first.z) - p.log_prob(first.z))


def test_what_units_cost_is_known_of_normals():
    model = oracles.LinearGaussianChain(2)
    decode = model.decode
    model.decode = lambda z, t, y=None: decode(z, t) if t == 1 else genfw.Bernoulli(z)
    with pytest.raises(TypeError, match="is a Bernoulli, and what single units cost"):
        Chain(model).costs(torch.randn(3, 2), noise=noise(3))


def test_under_a_prior_that_is_no_normal_units_have_activity_and_no_cost(tmp_path):
    model = chain()
    model.prior = lambda n: oracles.Mixture(torch.eye(2), torch.ones(2), n)
    found = look(model, torch.randint(3, (6, 1, 2, 2)), None, noise(6), 2).findings()
    assert found.kl[0].isfinite().all() and found.kl[1].isnan().all()
    assert all(each.isfinite().all() for each in found.activity)
    trainer = tiny.trainer(tmp_path, 1, callbacks=[Diagnostics(3, draws=2, every=0)])
    (logged,) = trainer.validate(module(model), tiny.Images(), verbose=False)
    of_units = {key for key in logged if key[-2:] in ("_1", "_2")}
    names = ("kl_1", "informative_units_1", "active_units_1", "active_units_2")
    assert of_units == {f"val/{name}" for name in names}


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


def test_who_is_looked_at():
    assert isinstance(latents_of(vae()), Chain)
    assert latents_of(hvae()) is not None
    assert latents_of(tiny.vdm()) is None
    assert latents_of(tiny.vdm().at(4)) is None


@pytest.mark.parametrize("made", [vae, chain, hvae])
def test_logged_and_drawn(tmp_path, made):
    net = made()
    diagnostics = Diagnostics(bins=3, images=4, draws=2, patience=99, every=2, columns=5)
    trainer = tiny.trainer(tmp_path, 4, val_check_interval=2, callbacks=[diagnostics])
    lightning = module(net)
    trainer.fit(lightning, tiny.Images(batch=3))
    levels = range(1, net.levels + 1)
    kinds = ("kl", "active_units", "informative_units")
    names = {f"{kind}_{t}" for kind in kinds for t in levels}
    names |= {"rate", "distortion"}
    assert {f"val/{name}" for name in names} <= trainer.callback_metrics.keys()
    assert int(diagnostics.sums.count) == 4  # of five images, in batches of three
    pictures = {"interpolation.png", *(f"traversal_{t}.png" for t in levels)}
    assert {file.name for file in tmp_path.glob("*.png")} == pictures
    tested = trainer.test(lightning, tiny.Images(), verbose=False)[0]
    assert {f"test/{name}" for name in names} <= tested.keys()
    table = list(csv.DictReader((tmp_path / "units.csv").open()))
    for t in levels:
        units = [(float(u["kl"]), float(u["activity"])) for u in table if u["level"] == str(t)]
        assert sum(kl for kl, _ in units) == pytest.approx(tested[f"test/kl_{t}"], rel=1e-4)
        assert sum(moved > 0.01 for _, moved in units) == tested[f"test/active_units_{t}"]
        both = sum(moved > 0.01 and kl > 0.1 for kl, moved in units)
        assert both == tested[f"test/informative_units_{t}"]
    rate = tested["test/levels"] + tested["test/prior"]  # of all images, not of the four
    assert tested["test/rate"] == pytest.approx(rate, rel=1e-5)
    assert tested["test/distortion"] == pytest.approx(-tested["test/reconstruction"], rel=1e-5)
    held = sum(tested[f"test/kl_{t}"] for t in levels)
    assert tested["test/rate"] != pytest.approx(held, rel=1e-5)


def test_an_estimator_without_terms_has_no_rate(tmp_path):
    lightning = LatentModule(
        vae(), genfw.Elbo(), optimizer=torch.optim.SGD, estimator=genfw.ImportanceWeighted(k=3)
    )
    trainer = tiny.trainer(tmp_path, callbacks=[Diagnostics(3, draws=2)])
    tested = trainer.test(lightning, tiny.Images(), verbose=False)[0]
    assert "test/kl_1" in tested and not {"test/rate", "test/distortion"} & tested.keys()


@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_what_is_looked_at_is_of_all_classes(tmp_path, order):
    """Ten classes of fifty images, as folders give them or dealt out like cards."""
    data = tiny.Images(val=500, batch=20)
    of = torch.arange(500) // 50 if order == "sorted" else torch.arange(500) % 10
    seen = []

    class Watched(Diagnostics):
        def _look(self, trainer, module, batch, split):
            before = 0 if self.sums is None else int(self.sums.count)
            super()._look(trainer, module, batch, split)
            seen.append(int(self.sums.count) - before if self.sums else 0)

    diagnostics = Watched(bins=3, images=50, draws=2)
    tiny.trainer(tmp_path, 1, callbacks=[diagnostics]).validate(module(vae()), data, verbose=False)
    assert sum(seen) == 50
    chosen = spread(500, 50)
    per_class = torch.bincount(of[chosen], minlength=10)
    assert seen == torch.bincount(chosen // 20, minlength=25).tolist()
    assert per_class.min() >= 1 and per_class.max() <= 12  # 5 +- 2.1 each
    some = data.images["val"][chosen[[0, -1]]]
    assert (diagnostics.pair[0] == some).all()
    assert (spread(10, 50) == torch.arange(10)).all()


def test_nothing_for_a_diffusion_model(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*collapsed.*")
        trainer = tiny.trainer(
            tmp_path, 2, val_check_interval=1, callbacks=[Diagnostics(3, patience=1, every=1)]
        )
        trainer.fit(tiny.module(), tiny.Images())
    assert not any("kl_" in key or "rate" in key for key in trainer.callback_metrics)
    assert not list(tmp_path.glob("*.png"))


def fit(folder, model, patience, callback=None):
    callback = callback or Diagnostics(3, draws=2, patience=patience, every=0)
    trainer = tiny.trainer(folder, 4, val_check_interval=1, callbacks=[callback])
    trainer.fit(module(model, lr=0.0), tiny.Images())
    return callback


def test_alarm_names_the_dead_level_once(tmp_path):
    model = chain()
    with torch.no_grad():
        for p in model.encoders[0].parameters():
            p.mul_(3)  # z_1 is alive
        for p in model.encoders[1].parameters():
            p.zero_()  # q(z_2 | z_1) = N(0, I)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, model, patience=3)
    said = [str(each.message) for each in caught if "collapsed" in str(each.message)]
    assert len(said) == 1
    assert said[0].startswith("level 2 of 2 has collapsed: z_2 costs 0.000 nats and 0 of")


def test_no_alarm_before_its_time_nor_for_the_living(tmp_path):
    dead = vae()
    with torch.no_grad():
        for p in dead.encoder.parameters():
            p.zero_()
    alive = vae()
    with torch.no_grad():
        alive.encoder.layer.weight.mul_(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*collapsed.*")
        fit(tmp_path, alive, patience=1)
        early = fit(tmp_path, dead, patience=5)
        again = Diagnostics(3, draws=2, patience=5, every=0)
        again.load_state_dict(early.state_dict())
    with pytest.warns(UserWarning, match="level 1 of 1 has collapsed"):
        fit(tmp_path, dead, 5, again)


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


def test_a_full_disk_costs_the_table_not_the_run(tmp_path, capsys):
    write("level\n", tmp_path / "missing" / "units.csv")
    assert "no table" in capsys.readouterr().err


def shown(picture, columns, side=2, zoom=16):
    """The images of a grid, (rows, columns, side, side), out of their enlarged pixels."""
    size = picture.size
    sheet = torch.tensor(list(picture.tobytes())).view(size[1], size[0])[::zoom, ::zoom]
    rows = (sheet.shape[0] - 1) // (side + 1)
    tiles = [
        sheet[1 + r * (side + 1) :][:side, 1 + c * (side + 1) :][:, :side]
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(tiles).view(rows, columns, side, side)


@pytest.mark.parametrize("made", [chain, hvae])
def test_interpolation_begins_and_ends_where_the_images_are(made):
    model, x = made(), torch.tensor([[0, 1, 2, 2], [2, 1, 0, 0]]).view(2, 1, 2, 2)
    with torch.no_grad():
        latents = latents_of(model)
        rows = shown(interpolation(latents, x, None, bins=3, columns=5), 5)
        means = [z for _, z in latents.posteriors(x, noise=Means())]
        ends = [latents.expected(means[t:]) * 127.5 for t in range(2)]
        middle = latents.expected([(z[:1] + z[1:]) / 2 for z in means]) * 127.5
    assert rows.shape[0] == 2
    for row, end in zip(rows, ends, strict=True):
        assert (row[0] == (x[0, 0] * 127.5).round()).all()
        assert (row[4] == (x[1, 0] * 127.5).round()).all()
        assert (row[1] - end[0, 0]).abs().max() < 1.01
        assert (row[3] - end[1, 0]).abs().max() < 1.01
    assert (rows[0, 2] - middle[0, 0]).abs().max() < 1.01


class Painter(torch.nn.Module):
    """Paints every image in the value that is its label."""

    def forward(self, z, y):
        return (100.0 * torch.nn.functional.one_hot(y, 3))[..., None, None].expand(-1, 3, 2, 2)


def test_interpolation_has_the_label_of_the_nearer_image():
    likelihood = genfw.CategoricalLikelihood(3)
    latents = latents_of(genfw.VAE(Linear(4, 6), Painter(), likelihood, 3, classes=3))
    x, y = torch.ones(2, 1, 2, 2, dtype=torch.int64), torch.tensor([0, 2])
    with torch.no_grad():
        row = shown(interpolation(latents, x, y, bins=3, columns=6), 6)[0]
    assert row.flatten(1).float().mean(1).tolist() == [128, 0, 0, 255, 255, 128]


def test_a_run_draws_units_three_deviations_to_either_side():
    """The square root of A_u, which is a variance; none of one that is estimated below 0."""
    model, x, y = vae(), torch.randint(3, (2, 1, 2, 2)), torch.zeros(2, dtype=torch.int64)
    activity = torch.tensor([0.25, 4.0, -0.1])
    pictures = Diagnostics(3)._pictures(module(model), x, y, Findings([activity], [activity]))
    with torch.no_grad():
        drawn, other = (
            traversal(latents_of(model), x[:1], y[:1], 1, [1, 0, 2], torch.tensor(scale), 3)
            for scale in ([0.5, 2.0, 0.0], [0.25, 4.0, 0.0])
        )
    assert pictures["traversal_1"].tobytes() == drawn.tobytes() != other.tobytes()


@pytest.mark.parametrize("made", [chain, hvae])
def test_traversal_moves_one_unit(made):
    model, x = made(), torch.tensor([0, 1, 2, 2]).view(1, 1, 2, 2)
    scale = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        latents = latents_of(model)
        picture = traversal(latents, x, None, 2, [1], scale, bins=3, columns=3)
        _, (_, z) = latents.posteriors(x, noise=Means())
        for column, shift in enumerate((-6.0, 0.0, 6.0)):
            flat = z.flatten(1).clone()
            flat[0, 1] += shift
            expected = latents.expected([flat.view_as(z)])[0, 0] * 127.5
            assert (shown(picture, 3)[0, column] - expected).abs().max() < 1.01


def test_expected_image_of_all_latents_is_the_likelihoods_mean():
    """The latents are given from z_t up, z_T last, in a chain and in a ladder."""
    x = torch.randint(3, (4, 1, 2, 2))
    model = hvae()
    zs = [z for _, z in model.posteriors(x, noise=noise(4))]
    way = model._descend(x, None, noise(4))[0]
    torch.testing.assert_close(model.expected(zs), way.mean)
    model = chain()
    z = torch.randn(4, 2)
    expected = model.decode(model.decode(z, 2).mean, 1).mean
    torch.testing.assert_close(Chain(model).expected([z]), expected)


@pytest.mark.parametrize("wrong", [{"images": 1}, {"draws": 1}])
def test_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected an integer of at least 2"):
        Diagnostics(3, **wrong)

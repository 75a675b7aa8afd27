"""Diagnostics say what is so: what they log is of the images they look at, an alarm where a level
is dead, pictures of the latents they claim to show."""

import csv
import warnings
from unittest.mock import Mock

import oracles
import pytest
import tiny
import torch
from torch.distributions import kl_divergence

import genfw
from genfw.noise import Noise
from genfw.train.activity import Findings, look, spread
from genfw.train.diagnostics import Diagnostics, write
from genfw.train.latents import Chain, latents_of
from genfw.train.module import LatentModule
from genfw.train.pictures import traversal


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


def test_a_rank_that_saw_no_image_keeps_none_waiting(lockstep):
    """Of two ranks one has looked: both find and log what it saw."""
    model = chain()
    with torch.no_grad():
        seen = look(model, torch.randint(3, (6, 1, 2, 2)), None, noise(6), 2)

    def rank(sums):
        callback, lightning = Diagnostics(3), Mock(spec=LatentModule, evaluated=model)
        lightning.nll = Mock(compute=dict)
        lightning.device = torch.device("cpu")
        callback.sums = sums
        found = callback._report(Mock(spec=tiny.L.Trainer, sanity_checking=False), lightning, "val")
        return found.table(), lightning.log.mock_calls

    one, other = lockstep(lambda: rank(seen), lambda: rank(None))
    assert one[0] == other[0] == seen.findings().table()
    assert one[1] == other[1] and len(one[1]) == 6


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


def test_a_full_disk_costs_the_table_not_the_run(tmp_path, capsys):
    write("level\n", tmp_path / "missing" / "units.csv")
    assert "no table" in capsys.readouterr().err


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

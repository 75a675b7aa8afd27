"""Training minimises the objective and nothing else; reports measure the model and nothing else."""

import contextlib
import math
from functools import partial
from itertools import pairwise

import pytest
import tiny
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from omegaconf import OmegaConf
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import genfw
from genfw import ELBO, Estimate
from genfw.nets import MLPDecoder, MLPEncoder
from genfw.noise import Noise, mix
from genfw.train.bits import BitAccounting
from genfw.train.certificate import certify
from genfw.train.data.images import as_batch
from genfw.train.in_order import in_order
from genfw.train.metrics import NLL
from genfw.train.module import LatentModule, on_schedule, warmup_cosine
from genfw.train.resolvers import fused
from genfw.train.run_table import table


def estimates(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    terms = torch.rand(4, n, generator=g, dtype=torch.float64)
    reconstruction, first, second, prior = -100 * terms[0], *(10 * terms[1:])
    elbo = ELBO(reconstruction, (first, second), prior)
    return Estimate(nats=-elbo.total, variance=terms[1], elbo=elbo)


def part(estimate, rows):
    elbo = estimate.elbo
    return Estimate(
        estimate.nats[rows],
        estimate.variance[rows],
        ELBO(elbo.reconstruction[rows], tuple(v[rows] for v in elbo.levels), elbo.prior[rows]),
    )


def test_nll_is_the_mean_over_images_whatever_the_batches():
    everything, metric, rank0, rank1 = estimates(11), NLL(), NLL(), NLL()
    for start, stop in (
        (0, 4),
        (4, 10),
        (10, 11),
    ):  # the mean of batch means would be another number
        metric.update(part(everything, slice(start, stop)), dims=6)
    rank0.update(part(everything, slice(0, 8)), dims=6)
    rank1.update(part(everything, slice(8, 11)), dims=6)
    for state in rank0.metric_state:  # what torchmetrics does between ranks: every state is summed
        assert rank0._reductions[state] is not None
        setattr(rank0, state, getattr(rank0, state) + getattr(rank1, state))

    nats = everything.nats
    expected = {
        "nll": nats.mean(),
        "bpd": nats.mean() / (6 * math.log(2)),
        "nll_stderr": everything.variance.sum().sqrt() / 11,
        "nll_std": nats.std(),
        "reconstruction": everything.elbo.reconstruction.mean(),
        "levels": sum(everything.elbo.levels).mean(),
        "prior": everything.elbo.prior.mean(),
        "count": torch.tensor(11),
    }
    for found in (metric.compute(), rank0.compute()):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0, check_dtype=False)
    found = metric.compute()
    split = -found["reconstruction"] + found["levels"] + found["prior"]
    torch.testing.assert_close(split, found["nll"])


def test_nll_names_images_that_are_not_finite():
    metric = NLL()
    metric.update(part(estimates(4), slice(0, 4)), dims=2)
    bad = torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64)
    metric.update(Estimate(bad, torch.zeros(3, dtype=torch.float64)), dims=2)
    found = metric.compute()
    assert found["nonfinite"] == 2
    assert not found["nll"].isfinite()
    assert "levels" not in found  # one estimate came without terms


def test_nll_of_nothing():
    with pytest.raises(ValueError, match="no images"):
        NLL().compute()


class Recording(genfw.Objective):
    """The bound, writing down what each micro-batch was given."""

    def __init__(self):
        super().__init__()
        self.given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, model, x, y=None, *, noise=None):
        eps = torch.get_rng_state()
        self.given.append((noise.time(), torch.randn(3)))
        torch.set_rng_state(eps)
        return -model.elbo(x, y, noise=noise).total


def test_step_randomness_is_a_function_of_seed_step_and_chunk(tmp_path):
    runs = []
    for disturbance in (0, 1):
        objective = Recording()
        module = tiny.module(objective)
        torch.manual_seed(disturbance)  # what happened before does not matter
        trainer = tiny.trainer(tmp_path, 3, accumulate_grad_batches=2)
        trainer.fit(module, tiny.Images(train=16, batch=4))
        runs.append(objective.given)
    assert len(runs[0]) == 6
    for (t, eps), (t_again, eps_again) in zip(*runs, strict=True):
        assert (t == t_again).all()
        assert (eps == eps_again).all()
    for i, (_, eps) in enumerate(runs[0]):  # and never the same twice
        assert not any((eps == other).all() for _, other in runs[0][:i])
    for i in range(0, 6, 2):  # the micro-batches of a step cover [0, 1) together
        times = torch.cat([runs[0][i][0], runs[0][i + 1][0]]).sort().values
        torch.testing.assert_close(times.diff().float(), torch.full((7,), 1 / 8))
    expected = torch.Generator().manual_seed(mix(0, 1, 1))
    assert (runs[0][3][1] == torch.randn(3, generator=expected)).all()


def test_seed_changes_the_draws(tmp_path):
    drawn = []
    for seed in (0, 1):
        objective = Recording()
        trainer = tiny.trainer(tmp_path, 1)
        trainer.fit(tiny.module(objective, seed=seed), tiny.Images())
        drawn.append(objective.given[0][1])
    assert (drawn[0] != drawn[1]).all()


class Thousandfold(genfw.Objective):
    """The bound, weighted absurdly."""

    def forward(self, model, x, y=None, *, noise=None):
        return -1000 * model.elbo(x, y, noise=noise).total + 5


def test_objective_cannot_reach_a_reported_number(tmp_path):
    reports = []
    for objective in (genfw.Elbo(), Thousandfold(), genfw.Simple()):
        trainer = tiny.trainer(tmp_path, 2, val_check_interval=2)
        module = tiny.module(objective, lr=0.0)
        trainer.fit(module, tiny.Images())
        val = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        reports.append(val | trainer.test(module, tiny.Images(), verbose=False)[0])
    assert reports[0] == reports[1] == reports[2]
    keys = {"nll", "bpd", "nll_stderr", "nll_std", "reconstruction", "levels", "prior", "count"}
    assert {f"{split}/{key}" for split in ("val", "test") for key in keys} == reports[0].keys()
    assert reports[0]["test/count"] == 7


def test_only_the_bound_is_logged_in_bits(tmp_path):
    for objective, bits in ((genfw.Elbo(), True), (genfw.Simple(), False), (Thousandfold(), False)):
        trainer = tiny.trainer(tmp_path, 1)
        trainer.fit(tiny.module(objective), tiny.Images())
        assert "train/objective" in trainer.callback_metrics
        assert ("train/objective_bpd" in trainer.callback_metrics) == bits


def test_reported_nll_is_the_estimators_and_knows_no_batches(tmp_path):
    images = tiny.Images()
    x = images.images["test"]
    model = tiny.vdm()
    expected = genfw.Bound(sets=2, strata=2)(
        model, x, noise=Noise(mix(0, "test"), torch.arange(len(x)))
    )
    for batch in (2, 7):
        found = tiny.trainer(tmp_path).test(tiny.module(), tiny.Images(batch=batch), verbose=False)[
            0
        ]
        assert found["test/nll"] == pytest.approx(float(expected.nats.mean()), rel=1e-6)
        error = float(expected.variance.sum().sqrt()) / len(x)
        assert found["test/nll_stderr"] == pytest.approx(error, rel=1e-5)


def loader(images, batch, kind="(x,)", shuffle=False):
    """As somebody has one who never heard of genfw."""
    x, y = images.long(), torch.zeros(len(images), dtype=torch.int32)
    sets = {"x": x, "(x,)": TensorDataset(x), "(x, y)": TensorDataset(x, y)}
    return DataLoader(sets[kind], batch, shuffle=shuffle)


@pytest.mark.parametrize(("kind", "batch"), [("x", 3), ("(x,)", 2), ("(x,)", 7), ("(x, y)", 4)])
def test_ordinary_batches_are_evaluated_as_ours(tmp_path, kind, batch):
    """Example by example: noise is of the place in the loader's order, each time anew."""
    ours, trainer = tiny.Images(), tiny.trainer(tmp_path)
    expected = trainer.test(tiny.module(), ours, verbose=False)
    module = tiny.module()
    for _ in range(2):
        found = trainer.test(module, loader(ours.images["test"], batch, kind), verbose=False)
        assert found == [pytest.approx(expected[0], rel=1e-6)]


@pytest.mark.parametrize("act", ["test", "validate", "fit"])
def test_an_order_that_changes_is_no_place(tmp_path, act):
    images = torch.zeros(8, *tiny.SHAPE)
    kept, shuffled = (loader(images, 4, shuffle=each) for each in (False, True))
    given = [kept, [shuffled]] if act == "fit" else [shuffled]
    with pytest.raises(ValueError, match=r"keeps its order.*use shuffle=False"):
        getattr(tiny.trainer(tmp_path, 2), act)(tiny.module(), *given)


def test_an_order_of_ranks_that_changes_is_none_either():
    data = torch.zeros(8, *tiny.SHAPE)
    for shuffle in (False, True):
        sampler = DistributedSampler(data, 2, 0, shuffle=shuffle)
        refused = pytest.raises(ValueError) if shuffle else contextlib.nullcontext()
        with refused:
            in_order(DataLoader(data, 2, sampler=sampler))


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_example_of_two_ranks_or_of_none_is_refused(drop_last):
    """Seven on two ranks: one more, or one less, than there are."""
    data = torch.zeros(7, *tiny.SHAPE)
    sampler = DistributedSampler(data, 2, 0, shuffle=False, drop_last=drop_last)
    given = 6 if drop_last else 8
    with pytest.raises(ValueError, match=f"every example once, and of 7 .* gives {given} to 2"):
        in_order(DataLoader(data, 2, sampler=sampler))


def batches(sampler, drop_last=False):
    return BatchSampler(sampler, 2, drop_last)


@pytest.mark.parametrize(
    "given",
    [
        lambda x: {"sampler": WeightedRandomSampler([1.0] * len(x), len(x))},
        lambda x: {"sampler": SubsetRandomSampler(range(len(x)))},
        lambda x: {"batch_sampler": batches(RandomSampler(x))},
        lambda x: {"batch_sampler": batches(DistributedSampler(x, 2, 0))},
    ],
)
@pytest.mark.parametrize(
    "within",
    [lambda it: [[it]], lambda it: {"a": it}, lambda it: CombinedLoader([it])],
    ids=["list", "dict", "combined"],
)
def test_an_order_that_changes_is_found_wherever_it_is(given, within):
    x = torch.zeros(8, *tiny.SHAPE)
    with pytest.raises(ValueError, match="keeps its order"):
        in_order(within(DataLoader(x, **given(x))))


@pytest.mark.parametrize("left", [0, 1])
def test_a_last_batch_that_is_left_out_is_refused(left):
    x = torch.zeros(6 + left, *tiny.SHAPE)
    for loader in (
        DataLoader(x, 2, drop_last=True),
        DataLoader(x, batch_sampler=batches(SequentialSampler(x), drop_last=True)),
    ):
        with pytest.raises(ValueError) if left else contextlib.nullcontext() as refused:
            in_order(loader)
        assert not left or "every example once, and of 7 the last batch" in str(refused.value)


class Breaks(genfw.Estimator):
    """Ten nats an image, and an end in the second batch, once."""

    kind = draws = "one"

    def __init__(self, error):
        super().__init__()
        self.errors = [None, error]

    def forward(self, model, x, y=None, *, noise=None):
        if self.errors and (error := self.errors.pop(0)):
            raise error
        nats = torch.full((len(x),), 10.0)
        return Estimate(nats=nats, variance=torch.zeros(len(x)))


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=repr)
def test_an_evaluation_that_was_broken_off_is_no_part_of_the_next(tmp_path, error):
    module, data = tiny.module(), tiny.Images(val=10, test=7)
    module.validation_estimator = Breaks(error)
    bits = BitAccounting(2)
    first = tiny.trainer(tmp_path, callbacks=[bits])
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        first.validate(module, data, verbose=False)
    again = tiny.trainer(tmp_path, callbacks=[bits])
    (validated,) = again.validate(module, data, verbose=False)
    assert validated["val/nll"] == 10 and validated["val/count"] == 10
    module.estimator = module.validation_estimator
    (tested,) = again.test(module, DataLoader(TensorDataset(data.images["test"]), 4), verbose=False)
    assert tested["test/nll"] == 10 and tested["test/count"] == 7


def test_that_of_training_may_and_of_batches_that_know_their_examples_may(tmp_path):
    trainer, ours = tiny.trainer(tmp_path), tiny.Images()
    train, val = loader(ours.images["train"], 4, shuffle=True), loader(ours.images["val"], 4)
    trainer.fit(module := tiny.module(), train, val)
    shuffled = DataLoader(ours.test_dataloader().dataset, 4, shuffle=True)
    one, other = (trainer.test(module, each, verbose=False) for each in (ours, shuffled))
    assert one == [pytest.approx(other[0], rel=1e-6)]


def test_ordinary_batches_train_as_ours(tmp_path):
    """To the bit, and what is validated on the way too."""
    ours, modules = tiny.Images(), (tiny.module(), tiny.module())
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 2}
    given = [ours], [loader(ours.images[split], 4) for split in ("train", "val")]
    trainers = [tiny.trainer(tmp_path, 3, **settings) for _ in modules]
    for trainer, module, data in zip(trainers, modules, given, strict=True):
        trainer.fit(module, *data)
    one, other = (trainer.callback_metrics["val/nll"] for trainer in trainers)
    assert one == other
    for p, q in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(p, q)


def test_places_are_those_of_the_data_on_every_rank():
    for n, world in ((8, 1), (8, 2), (9, 3)):
        data, seen = torch.arange(n)[:, None, None, None], []
        for rank in range(world):
            sampler = DistributedSampler(data, world, rank, shuffle=False)
            first = 0
            for x in DataLoader(data, 2, sampler=sampler):
                batch = as_batch(x, first=first, rank=rank, world=world)
                first += len(x)
                assert (batch.index == x.flatten()).all()
                seen += batch.index.tolist()
        assert sorted(seen) == list(range(n)), "and no two examples share one"


@pytest.mark.parametrize(
    ("given", "labelled", "says"),
    [
        (torch.rand(4, 1, 2, 2), False, r"x, \(x,\) or \(x, y\) of integers.*torch.float32 \(4, 1"),
        (torch.zeros(4, 2, 2, dtype=torch.int64), False, r"\(b, C, H, W\).*int64 \(4, 2, 2\)"),
        ({"image": 1}, False, "got dict"),
        ([torch.zeros(4, 1, 2, 2).byte()] * 3, False, "got list"),
        ((torch.zeros(4, 1, 2, 2).byte(), ["a"] * 4), False, "uint8 .*, list"),
        (torch.zeros(2, 1, 2, 2).byte(), True, r"batches \(x, y\) of integers"),
    ],
)
def test_other_batches_are_refused(given, labelled, says):
    with pytest.raises(TypeError, match=says):
        as_batch(given, labelled)


class Elsewhere(genfw.LatentModel):
    """A density whose likelihood nobody finds."""

    of_density = True

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def elbo(self, x, y=None, *, noise=None):
        return self.inner.elbo(x, y, noise=noise)

    def sample(self, n, y=None, *, noise=None):
        return self.inner.sample(n, y, noise=noise)


@pytest.mark.parametrize("wrapped", [lambda model: model, Elsewhere], ids=["likelihood", "density"])
def test_a_density_is_said_to_be_one_and_has_no_bits(tmp_path, wrapped):
    """A plain loader of real numbers is enough; integers are none."""
    torch.manual_seed(0)
    encoder, decoder = MLPEncoder((3,), 2), MLPDecoder((3,), 2, outputs=2)
    model = wrapped(genfw.VAE(encoder, decoder, genfw.GaussianLikelihood(), latents=2))
    module = LatentModule(model, genfw.Elbo(), torch.optim.SGD)
    x = 0.01 * torch.randn(8, 3)
    trainer = tiny.trainer(tmp_path, 2)
    trainer.fit(module, DataLoader(TensorDataset(x), 4), DataLoader(TensorDataset(x), 4))
    assert {"val/nll", "train/objective"} <= {*trainer.callback_metrics}
    assert not [key for key in trainer.callback_metrics if "bpd" in key]
    (tested,) = trainer.test(module, DataLoader(TensorDataset(x), 4), verbose=False)
    result = certify(module, tiny.Images(), tested, tmp_path / "best.ckpt")["result"]
    assert result["nll"] == tested["test/nll"] and result["nll_stderr"] > 0
    assert result["bpd"] is result["bpd_stderr"] is None and result["terms"] == {}
    assert "a density of real numbers" in result["kind"]
    sheet = table(tested, module)
    shown = [cell for column in sheet.columns for cell in column.cells]
    assert "nats" in str(shown) and "density" in str(shown) and "bits" not in str(shown)
    with pytest.raises(
        TypeError, match=r"of real numbers, x \(b, ...\).*got Tensor of torch.int64"
    ):
        as_batch(torch.zeros(4, 3, dtype=torch.int64), real=True)


def test_reports_are_float32_under_mixed_precision(tmp_path):
    found = [
        tiny.trainer(tmp_path, precision=precision).test(
            tiny.module(), tiny.Images(), verbose=False
        )[0]
        for precision in ("32-true", "bf16-mixed")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_default_optimizer_trains_with_clipping(tmp_path, precision):
    trainer = OmegaConf.create({"precision": precision, "gradient_clip_val": 1.0})
    module = tiny.module()
    module.optimizer = partial(torch.optim.AdamW, fused=fused(trainer))
    before = [p.clone() for p in module.parameters()]
    tiny.trainer(tmp_path, 2, **trainer).fit(module, tiny.Images())
    assert not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def rounding():
    backends = torch.backends
    operators = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    return torch.get_float32_matmul_precision(), *(each.fp32_precision for each in operators)


def test_reports_know_no_tf32_and_training_keeps_it():
    """The numbers themselves differ on a GPU only."""
    before, module = rounding(), tiny.module()
    try:
        torch.set_float32_matmul_precision("high")
        for cudnn in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = cudnn
            chosen = rounding()
            with contextlib.suppress(KeyError), module.evaluating():
                assert rounding() == ("highest", "ieee", "ieee", "ieee")
                raise KeyError
            assert rounding() == chosen
    finally:
        torch.backends.cudnn.conv.fp32_precision = before[1]
        torch.set_float32_matmul_precision(before[0])


def test_the_arithmetic_of_a_report_is_found_where_it_was_computed(tmp_path):
    for precision, dtype in (
        ("32-true", "float32"),
        ("bf16-mixed", "float32"),
        ("64-true", "float64"),
    ):
        module = tiny.module()
        tiny.trainer(tmp_path, precision=precision).test(module, tiny.Images(), verbose=False)
        assert module.arithmetic == {"dtype": dtype, "tf32": False}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_no_report_of_weights_below_float32(tmp_path, precision):
    with pytest.raises(ValueError, match=r"float16.*float32.*trainer.precision=bf16-mixed"):
        tiny.trainer(tmp_path, precision=precision).test(tiny.module(), tiny.Images())


def test_objective_must_keep_examples_apart(tmp_path):
    class Mean(genfw.Objective):
        def forward(self, model, x, y=None, *, noise=None):
            return -model.elbo(x, y, noise=noise).total.mean()[None]

    with pytest.raises(Exception, match=r"example|type"):
        tiny.trainer(tmp_path, 1).fit(tiny.module(Mean()), tiny.Images())


def test_warmup_cosine():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    schedule = warmup_cosine(optimizer, steps=100, warmup=4)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[52] == pytest.approx(1.0)  # half way of the cosine, (52 - 4) / 96
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_schedule_advances_with_optimizer_steps_and_knows_their_number(tmp_path):
    module = tiny.module()
    module.scheduler = lambda optimizer, steps: warmup_cosine(optimizer, steps, warmup=0)
    trainer = tiny.trainer(tmp_path, 4, accumulate_grad_batches=2)
    trainer.fit(module, tiny.Images())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_a_run_that_is_given_more_steps_has_the_rate_of_a_longer_one():
    """Not that of its end, which is 0."""

    def scheduled(steps, done):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
        schedule = warmup_cosine(optimizer, steps)
        for _ in range(done):
            optimizer.step()
            schedule.step()
        return optimizer, schedule

    for steps, done in ((40, 40), (40, 23), (80, 40)):
        ended, longer, taken_up = scheduled(steps, done), scheduled(80, done), scheduled(80, 0)
        for mine, kept in zip(taken_up, ended, strict=True):
            mine.load_state_dict(kept.state_dict())
        on_schedule([taken_up[1]])
        rates = [each.param_groups[0]["lr"] for each, _ in (taken_up, longer)]
        assert rates[0] == rates[1] > 0, (steps, done)
        assert taken_up[1].get_last_lr() == longer[1].get_last_lr()

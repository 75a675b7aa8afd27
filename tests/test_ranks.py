"""Two ranks tell the story of one: the same images, times, noise, losses, numbers and samples.

One rank with two micro-batches a step, and two ranks with one each, train in float64, where what is
left between them is the order of sums; two ranks hold all weights each, or half of them. Each draw
of training is watched from inside.
"""

import csv
import itertools
import json
from dataclasses import dataclass

import pytest
import ranks
import torch
from ranks import MODELS, SMALL

STEPS = 4
COMMAND = (
    *(*SMALL, f"trainer.max_steps={STEPS}", "trainer.precision=64-true", "metrics=default"),
    *("trainer.val_check_interval=4", "trainer.limit_test_batches=null", "estimator.sets=2"),
    *("validation_estimator.sets=2", "model.classes=10", "label_dropout=0.5"),
    *("metrics.fid.samples=71", "metrics.fid.chunk=10", "metrics.fid.every=0"),
)
MODEL = (*(each for each in MODELS["vdm"] if "bits" not in each), "times=uniform")
"""Not with `times=importance`: a second micro-batch there knows what the first one of its step
cost, which no rank knows of another."""


def watch(folder):
    """In a rank, before it begins: keeps what it draws and sees."""
    import os

    from genfw.noise import BatchNoise
    from genfw.train import callbacks
    from genfw.train.module import LatentModule

    seen = {name: [] for name in ("train", "time", "normal", "uniform", "val", "test", "samples")}
    step, evaluate, draw = (
        LatentModule.training_step,
        LatentModule._evaluate,
        callbacks.draw_samples,
    )

    def training_step(self, batch, batch_idx):
        seen["train"].append(batch.index)
        return step(self, batch, batch_idx)

    def evaluated(self, batch, estimator, split):
        if split == "test":
            seen[split].append(batch.index)
        return evaluate(self, batch, estimator, split)

    def drawn(model, numbers, *arguments):
        images = draw(model, numbers, *arguments)
        seen["samples"].append((torch.tensor(numbers), images))
        torch.save(seen, f"{folder}/seen{os.environ.get('RANK', 0)}.pt")
        return images

    def kept(name):
        method = getattr(BatchNoise, name)

        def draws(self, *arguments):
            values = method(self, *arguments)
            seen[name].append(values.detach().clone())
            return values

        setattr(BatchNoise, name, draws)

    LatentModule.training_step, LatentModule._evaluate = training_step, evaluated
    callbacks.draw_samples = drawn
    for name in ("time", "normal", "uniform"):
        kept(name)


@dataclass
class Run:
    """A finished run, and what each of its ranks saw."""

    folder: object
    said: str
    seen: list

    @property
    def losses(self):
        with (self.folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        name = "train/objective"
        return torch.tensor([float(r[name]) for r in rows if r[name]], dtype=torch.float64)

    @property
    def bits(self):
        """Of every interval of log SNR and split, with their errors, row by row."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [(k, float(v)) for row in rows for k, v in row.items() if "bpd_at" in k and v]

    def read(self, name):
        return json.loads((self.folder / f"{name}.json").read_text())


def trained(folder, world, strategy, *more):
    accumulate = f"trainer.accumulate_grad_batches={2 // world}"
    given = (*COMMAND, *more, accumulate, f"hydra.run.dir={folder}/run")
    ended = ranks.run(*given, world=world, strategy=strategy, prepare=watch)
    assert ended.codes == [0] * world, ended.said
    seen = [torch.load(folder / "run" / f"seen{rank}.pt") for rank in range(world)]
    return Run(folder / "run", ended.said, seen)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("one"), 1, "auto", *MODEL)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def both(one, request, tmp_path_factory):
    return [one, trained(tmp_path_factory.mktemp("two"), 2, request.param, *MODEL)]


def test_training_sees_the_same_images_times_and_noise(both):
    """Draw by draw: chunk = micro-batch x world size + rank."""
    (one,), two = both[0].seen, both[1].seen
    for name in ("train", "time", "normal", "uniform"):
        each = len(one[name]) // (2 * STEPS)  # draws of a micro-batch
        for step, rank in itertools.product(range(STEPS), range(2)):
            mine = one[name][(2 * step + rank) * each :][:each]
            theirs = two[rank][name][step * each :][:each]
            assert each and all(map(torch.equal, mine, theirs)), (name, step, rank)


def test_no_two_ranks_draw_the_same(both):
    """Were the rank left out of a key, every rank would draw the times of the first."""
    first, second = both[1].seen
    for name in ("train", "time", "normal", "uniform"):
        for mine, theirs in zip(first[name], second[name], strict=True):
            assert not set(mine.flatten().tolist()) & set(theirs.flatten().tolist()), name
    together = torch.stack(
        [torch.cat(pair) for pair in zip(first["time"], second["time"], strict=True)]
    )
    cells = (together * together.shape[1]).long().sort(1).values
    assert (cells == torch.arange(together.shape[1])).all()  # a time in each: stratified over both


def test_the_same_loss_curve_and_weights(both):
    assert len(both[0].losses) == STEPS
    torch.testing.assert_close(both[0].losses, both[1].losses, rtol=1e-12, atol=0)
    mine, theirs = (
        torch.load(each.folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for each in both
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_same_bits_at_every_noise_level(both):
    one, two = both[0].bits, both[1].bits
    assert [key for key, _ in one] == [key for key, _ in two]
    assert {key.split("/")[0] for key, _ in one} == {"train", "val", "test"}
    for (key, mine), (_, theirs) in zip(one, two, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-9), key


def test_evaluation_sees_every_image_once(both):
    """447 images, which two ranks cannot share evenly."""
    for run in both:
        seen = [torch.cat(each["test"]) for each in run.seen]
        assert max(map(len, seen)) - min(map(len, seen)) == (len(seen) - 1)
        assert torch.cat(seen).sort().values.tolist() == list(range(447))
        assert run.read("results")["test/count"] == 447


def test_the_same_numbers(both):
    one, two = (each.read("results") for each in both)
    assert one.keys() == two.keys()
    for key in ("test/nll", "test/nll_stderr", "test/nll_std", "test/levels", "val/nll"):
        assert two[key] == pytest.approx(one[key], rel=1e-6), key
    assert two["test/fd_digits"] == pytest.approx(one["test/fd_digits"], rel=1e-4)


def test_the_same_samples(both):
    drawn = []
    for run in both:
        chunks = [chunk for each in run.seen for chunk in each["samples"]]
        numbers, images = (torch.cat(each) for each in zip(*chunks, strict=True))
        assert numbers.sort().values.tolist() == list(range(71))
        drawn.append(images[numbers.argsort()])
    assert torch.equal(*drawn)
    assert len(drawn[0].unique(dim=0)) == 71


def test_what_is_kept_is_written_once_and_the_same(both):
    one, two = (each.read("certificate") for each in both)
    assert one["result"]["nll"] == pytest.approx(two["result"]["nll"], rel=1e-6)
    for each in (one, two):
        del each["result"], each["model"]["sha256"]  # of weights that differ in the last bit
    assert one == two
    files = [{p.name for p in each.folder.iterdir() if p.suffix != ".pt"} for each in both]
    assert files[0] == files[1]
    assert both[1].said.count("run folder:") == 2  # as one rank says it: at the start, at the end

"""The classifier of noisy images: its net, what it is trained on, how it is judged, and opened."""

import csv
import math
import os
import shutil
import signal
from itertools import pairwise
from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import ranks
import tiny
import torch
from omegaconf import OmegaConf
from oracles import GaussianDenoiser
from torch import nn

import genfw
from genfw.__main__ import main
from genfw.classifier import classify
from genfw.nets import NoisyClassifier
from genfw.noise import Noise, mix
from genfw.train.checkpoint import AtomicIO, read
from genfw.train.classifier import ClassifierModule, fitting, knows_the_noise
from genfw.train.compose import unchecked
from genfw.train.config import build
from genfw.train.data.images import Batch
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.keeper import Keeper
from genfw.train.runs import command
from genfw.train.session import session
from genfw.train.signals import Signals


def net(**more):
    made = {"shape": (1, 8, 8), "classes": 3, "log_snr_max": 6.0, "log_snr_min": -8.0}
    return NoisyClassifier(**(made | {"channels": (8, 16)} | more)).eval()


def test_the_noise_level_matters_between_the_ends_and_not_beyond_them():
    z, classifier = torch.randn(5, 1, 8, 8), net()

    def at(log_snr):
        return classifier(z, torch.full((5,), log_snr))

    assert torch.equal(at(6.0), at(20.0)) and torch.equal(at(-8.0), at(-30.0))
    inside = [at(each) for each in (-8.0, -3.0, 0.0, 4.0, 6.0)]
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(inside))


def test_an_example_does_not_see_its_batch_and_has_a_gradient():
    classifier = net()
    z, log_snr = torch.randn(4, 1, 8, 8, requires_grad=True), torch.linspace(-5, 5, 4)
    together = classifier(z, log_snr)
    torch.testing.assert_close(together[1:2], classifier(z[1:2], log_snr[1:2]))
    (gradient,) = torch.autograd.grad(together[2].max(), z)
    assert gradient[2].abs().min() > 0 and not gradient[[0, 1, 3]].any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"classes": 1}, "classes: expected at least 2, got 1"),
        ({"log_snr_min": 6.0}, "log_snr_min: expected less than log_snr_max=6.0, got 6.0"),
        ({"shape": (64,)}, "expected positive sizes"),
        ({"channels": (8,) * 6}, "6 resolutions do not fit an image of 8x8"),
    ],
)
def test_what_no_classifier_can_be(more, message):
    with pytest.raises(ValueError, match=message):
        net(**more)


def test_no_level_is_no_validation():
    with pytest.raises(ConfigError, match="levels: expected at least 1, got 0"):
        ClassifierModule(
            net(), genfw.Cosine(4.0, -8.0), genfw.UniformTime(), 5, torch.optim.SGD, levels=0
        )


class TwoImages(nn.Module):
    """The exact classifier of two images in noise, all black and all white, K = 5."""

    def forward(self, z, log_snr):
        alpha, var = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()
        gaps = torch.stack([z - alpha[:, None, None, None] * x for x in (-0.8, 0.8)], 1)
        return -0.5 * gaps.square().flatten(2).sum(2) / var[:, None]


def test_an_exact_classifier_is_as_good_as_it_can_be_at_every_level():
    r"""Two points a distance d apart, in noise: accuracy :math:`\Phi(d\, \alpha / 2 \sigma)`,
    to five standard errors; d^2 = 4 * 1.6^2."""
    module = ClassifierModule(
        TwoImages(), genfw.Cosine(4.0, -8.0), genfw.UniformTime(), 5, torch.optim.SGD, levels=6
    )
    n = 4000
    y = torch.arange(n) % 2
    batch = Batch(4 * y[:, None, None, None].expand(n, 1, 2, 2), y, torch.arange(n))
    found = module.by_level(batch, Noise(0, batch.index))
    assert list(found) == pytest.approx([3, 1, -1, -3, -5, -7], abs=1e-6)
    for log_snr, (nll, right) in found.items():
        d = 3.2 * math.exp(log_snr / 2)
        exact = 0.5 * (1 + math.erf(d / 2 / 2**0.5))
        assert abs(right.mean() - exact) < 5 * (exact * (1 - exact) / n) ** 0.5 + 1e-3
        # the log odds of a sample are N(d^2 / 2, d^2): integrate their softplus
        odds = d**2 / 2 + d * torch.linspace(-8, 8, 2001, dtype=torch.float64)
        weight = torch.exp(-0.5 * torch.linspace(-8, 8, 2001, dtype=torch.float64) ** 2)
        expected = (nn.functional.softplus(-odds) * weight).sum() / weight.sum()
        assert abs(nll.mean() - expected) < 5 * nll.std() / n**0.5 + 1e-3


class Recorder(TwoImages):
    """The exact classifier; keeps what it is asked."""

    def forward(self, z, log_snr):
        self.asked = z, log_snr, super().forward(z, log_snr)
        return self.asked[-1]


def test_it_learns_from_z_t_at_the_noise_level_it_is_told():
    """(z - alpha x) / sigma is standard normal, alpha and sigma those of the log SNR that came with
    z, at every level; levels are drawn by `times`; and the loss is the NLL of the image's label."""
    schedule, recorder = genfw.Cosine(4.0, -8.0), Recorder()
    module = ClassifierModule(recorder, schedule, genfw.UniformTime(), 5, torch.optim.SGD)
    trainer = Mock(spec=L.Trainer, global_step=0, world_size=1, global_rank=0)
    trainer.accumulate_grad_batches, trainer.log_every_n_steps = 1, 10
    module.trainer = trainer
    n = 4000
    y = torch.arange(n) % 2
    loss = module.training_step(Batch(4 * y.view(n, 1, 1, 1).expand(n, 1, 2, 2), y, y), 0)
    z, log_snr, logits = recorder.asked
    alpha, sigma = (each.sigmoid().sqrt().view(n, 1, 1, 1) for each in (log_snr, -log_snr))
    eps = (z - alpha * (1.6 * y - 0.8).view(n, 1, 1, 1)) / sigma
    for some in log_snr.argsort().chunk(4):
        assert abs(eps[some].mean()) < 5 / (4 * len(some)) ** 0.5
        assert abs(eps[some].std() - 1) < 5 / (8 * len(some)) ** 0.5
    t = schedule.inverse(log_snr.double()).sort().values  # stratified: one in each n-th
    assert (t - (torch.arange(n) + 0.5) / n).abs().max() < 1 / n
    nll = nn.functional.cross_entropy(logits, y)
    assert torch.isclose(loss, nll) and nll < 0.5 < nn.functional.cross_entropy(logits, 1 - y)


def test_what_is_logged_is_of_all_images_whatever_their_batches(tmp_path):
    """Seven, in batches of four and three."""
    schedule, data = genfw.Cosine(4.0, -8.0), tiny.Images(test=7, batch=4)
    module = ClassifierModule(
        TwoImages(), schedule, genfw.UniformTime(), 5, torch.optim.SGD, levels=3
    )
    (logged,) = tiny.trainer(tmp_path).test(module, data, verbose=False)
    y, index = torch.zeros(7, dtype=torch.int64), torch.arange(7)
    batch = Batch(data.images["test"], y, index)
    levels = module.by_level(batch, Noise(mix(0, "test"), index)).values()
    nll, right = (torch.stack(each) for each in zip(*levels, strict=True))
    assert logged["test/nll"] == pytest.approx(float(nll.mean()), rel=1e-6)
    assert logged["test/accuracy"] == pytest.approx(float(right.mean()), rel=1e-6)
    for values in (nll, right):  # which are not the means of the batches'
        halves = (values[:, :4].mean() + values[:, 4:].mean()) / 2
        assert float(halves) != pytest.approx(float(values.mean()), rel=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "run"
    quick = ("trainer.max_steps=40", "trainer.val_check_interval=20", "optimizer.lr=0.005")
    given = (*quick, "classifier.channels=[16,16]", "levels=3", f"hydra.run.dir={folder}")
    assert command(classify, given) == 0
    return folder


def test_forty_steps_teach_it_something_where_there_is_little_noise(trained):
    """And nothing where there is only noise."""
    results = OmegaConf.load(trained / "results.json")
    at = {float(k.rpartition("_")[2]): v for k, v in results.items() if "accuracy_at" in k}
    assert len(at) == 3 and at[max(at)] > 0.5 and at[min(at)] < 0.25
    assert results["test/accuracy"] == pytest.approx(sum(at.values()) / 3, abs=1e-6)
    assert "val/accuracy_at" in (trained / "metrics.csv").read_text().splitlines()[0]
    assert (trained / "checkpoints" / "last.ckpt").is_file()


FACTS = {"shape": [1, 8, 8], "bins": 17, "classes": 10}
BY_CLASSIFIER = {"_target_": "genfw.ClassifierGuidance", "interval": None}


def of_model(facts=FACTS, **guidance):
    """What a classifier must fit: a diffusion model's data, and what it is for."""
    guidance = BY_CLASSIFIER | guidance
    return OmegaConf.create({"data": facts, "guidance": guidance, "trusted": []})


def test_it_is_opened_with_the_weights_it_was_tested_with(trained):
    classifier = fitting(of_model(), str(trained))
    best = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, best[name])
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    of_file = fitting(of_model(), str(trained / "checkpoints" / "last.ckpt"))
    assert repr(of_file) == repr(classifier)


@pytest.mark.parametrize(
    ("fact", "value"), [("shape", [1, 28, 28]), ("bins", 2), ("classes", 7)], ids=str
)
def test_of_other_data_it_is_refused(trained, fact, value):
    config = of_model(FACTS | {fact: value})
    with pytest.raises(GenfwError, match=f"classifier of images with data.{fact}=") as error:
        fitting(config, str(trained))
    assert str(value) in str(error.value) and "\n" not in str(error.value)


def guided_to(lowest, trained, guide=genfw.ClassifierGuidance, **more):
    """A denoiser whose learned noise ends here, guided by the classifier, as a command asks."""
    schedule = genfw.Learned(9.0, -10.0)
    schedule.moved.data[1] += lowest + 10.0
    config = of_model(classifier=str(trained), **more)
    classifier, interval = fitting(config, str(trained)), config.guidance.interval
    guided = guide(GaussianDenoiser(schedule, 0.0, 1.0), classifier, interval=interval)
    knows_the_noise(config, guided)


def test_of_noise_it_never_saw_it_is_not_asked(trained):
    """Below the least log SNR it was trained at it would answer as there. Where a learned schedule
    ends is in its weights, and in its config.yaml where it began."""
    for lowest, interval in ((-12.0, None), (-10.2, None), (-12.0, [-11.0, 100.0])):
        begins = max(lowest, -11.0) if interval else lowest
        words = rf"down to -10, and guidance begins at {begins:g}.*interval=\[-10,100\]"
        with pytest.raises(ConfigError, match=words):
            guided_to(lowest, trained, interval=interval)
    guided_to(-12.0, trained, interval=[-10.0, 100.0])
    guided_to(-10.05, trained)  # as good as there
    guided_to(-9.0, trained)
    guided_to(-12.0, trained, genfw.DenoisedClassifierGuidance)  # which asks at the data's end


TINY = (
    *("classifier.channels=[8,8]", "levels=1", "scheduler=none", "optimizer.lr=0.005"),
    *("trainer.max_steps=4", "trainer.val_check_interval=2"),
)


def test_the_loss_is_that_of_the_whole_step(tmp_path, monkeypatch):
    step, losses = ClassifierModule.training_step, []

    def watched(self, batch, batch_idx):
        losses.append(float(loss := step(self, batch, batch_idx)))
        return loss

    monkeypatch.setattr(ClassifierModule, "training_step", watched)
    more = ("trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1")
    assert command(classify, (*TINY, *more, f"hydra.run.dir={tmp_path}/run")) == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        found = [row["train/objective"] for row in csv.DictReader(file)]
    logged = [float(each) for each in found if each]
    assert logged == pytest.approx([sum(losses[i : i + 2]) / 2 for i in range(0, 8, 2)])


def test_one_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    """By a signal in its third step; `python -m genfw resume=` and this command's are one."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(classify, (*TINY, f"hydra.run.dir={whole}")) == 0
    step = ClassifierModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierModule, "training_step", interrupted)
        assert command(classify, (*TINY, f"hydra.run.dir={stopped}")) == 143
    assert f"python -m genfw resume={stopped}" in capsys.readouterr().err
    assert not (stopped / "results.json").exists()
    assert read(stopped / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert main([f"resume={stopped}"]) == 0
    one, other = (read(each / "checkpoints" / "last.ckpt") for each in (whole, stopped))
    assert one["global_step"] == other["global_step"] == 4
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    results = [OmegaConf.load(each / "results.json") for each in (whole, stopped)]
    assert results[0] == results[1]
    capsys.readouterr()
    assert command(classify, (f"resume={stopped}",)) == 0
    assert "is finished, at step 4" in capsys.readouterr().out
    assert command(classify, (f"resume={stopped}", "classifier.dropout=0.5")) == 2
    assert "keeps its classifier.dropout" in capsys.readouterr().err


def test_a_run_without_a_number_is_no_success(tmp_path, monkeypatch, capsys):
    """It has its results, with null for what is no number; resumed, it says so again."""

    def lost(self, batch, batch_idx):
        self.log("test/nll", torch.nan, batch_size=len(batch.image))

    monkeypatch.setattr(ClassifierModule, "test_step", lost)
    quick = ("trainer.max_steps=1", "logger=none", f"hydra.run.dir={tmp_path}")
    assert command(classify, (*TINY, *quick)) == 1
    assert "the test NLL is not finite: there is no number to report" in capsys.readouterr().err
    assert OmegaConf.load(tmp_path / "results.json")["test/nll"] is None
    assert main([f"resume={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "the test NLL is not finite; " in said and "genfw.evaluate" not in said


def test_data_are_looked_at_before_it_begins(tmp_path, capsys):
    """Too few images for a step are found before the run says that it runs, or tells W&B."""
    assert command(classify, (*TINY, "data.batch_size=2000", f"hydra.run.dir={tmp_path}")) == 2
    said = capsys.readouterr()
    assert "give a smaller data.batch_size" in said.err and "run folder" not in said.out


def test_ranks_agree_on_which_weights_are_best(tmp_path):
    """Of an accuracy and NLL that are those of all their images."""
    place, small = (
        f"hydra.run.dir={tmp_path}/run",
        ("trainer.accelerator=cpu", "data.batch_size=80"),
    )
    ended = ranks.run(*TINY, *small, place, world=2, module="genfw.classifier")
    assert ended.codes == [0, 0] and ended.said.count("run folder:") == 2, ended.said
    best = read(tmp_path / "run" / "checkpoints" / "best.ckpt")["genfw"]["best"]
    kept = OmegaConf.load(tmp_path / "run" / "results.json")
    assert math.isfinite(best)
    data = build(OmegaConf.load(tmp_path / "run" / "config.yaml").data)
    opened = fitting(of_model(), str(tmp_path / "run"))
    (alone,) = tiny.trainer(tmp_path).test(opened, data, verbose=False)
    for key, value in alone.items():  # of 447 images, which are not two halves
        assert kept[key] == pytest.approx(value, rel=1e-6), key


def test_the_first_rank_says_which_weights_are_best(tmp_path):
    """One that found a number of its own keeps in step."""
    keeper = Keeper(tmp_path, AtomicIO(), Signals())
    (tmp_path / "last.ckpt").touch()
    trainer = Mock(spec=L.Trainer, global_step=0, is_global_zero=False)
    for mine, firsts, best in ((9.0, 2.0, 2.0), (1.0, 2.5, 2.0)):
        trainer.strategy.broadcast = Mock(side_effect=[firsts, None])
        keeper.consider(trainer, torch.tensor(mine))
        assert keeper.best == best


MINE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def forward(self, z, log_snr):
        return self.layer(z.flatten(1))
"""


def test_a_network_of_ones_own_is_trained_and_opened(tmp_path, monkeypatch):
    (tmp_path / "my_classifier.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    others = ("channels", "dropout", "log_snr_max", "log_snr_min")
    given = ("classifier._target_=my_classifier.Net", *(f"~classifier.{each}" for each in others))
    quick = ("trainer.max_steps=1", "levels=1", "logger=none")
    assert command(classify, (*given, *quick, f"hydra.run.dir={folder}")) == 0
    with pytest.raises(ConfigError, match="not among what a config may import"):
        fitting(of_model(), str(folder))
    model = of_model()
    model.trusted = ["my_classifier"]
    assert type(fitting(model, str(folder)).classifier).__name__ == "Net"


def test_wandb_hears_of_its_run(tmp_path, monkeypatch):
    """Configuration, numbers as they come, those of the end, and how it went."""
    run, opened = Mock(id="abc", disabled=False, offline=True), Mock()
    run.settings.sync_dir = "x"
    opened.return_value = run
    monkeypatch.setattr("wandb.init", opened)
    given = ("logger=wandb", "logger.wandb.mode=offline", f"hydra.run.dir={tmp_path}")
    assert command(classify, (*TINY, *given)) == 0
    assert opened.call_args.kwargs["config"]["levels"] == 1
    logged = [call.args[0] for call in run.log.call_args_list]
    assert any("val/accuracy" in row for row in logged)
    assert "test/accuracy" in run.summary.update.call_args.args[0]
    run.finish.assert_called_once_with(exit_code=0)


def test_its_callbacks_are_callbacks(tmp_path, capsys):
    ink = "+callbacks.ink._target_=torchmetrics.MeanMetric"
    assert command(classify, (*TINY, ink, f"hydra.run.dir={tmp_path}")) == 2
    assert "torchmetrics.MeanMetric: expected a Lightning Callback" in capsys.readouterr().err


def test_a_model_that_trains_has_no_labels_to_be_guided_to(capsys):
    guided = ("guidance=classifier", "guidance.classifier=/nowhere")
    assert main(list(guided)) == 2
    assert "leave guidance to python -m genfw.sample" in capsys.readouterr().err
    with session():  # but a finished run may be
        assert unchecked(guided).guidance.classifier == "/nowhere"


def altered(trained, folder, key, value):
    shutil.copytree(trained, folder)
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, key, value)
    config.trusted = ["os"]
    OmegaConf.save(config, folder / "config.yaml")
    return str(folder)


def test_a_folder_does_not_vouch_for_itself(trained, tmp_path):
    """Whatever its config.yaml says is to be imported, or its checkpoint to be run."""
    model = of_model()
    for i, target in enumerate(("os.system", "genfw.train.config.importlib.import_module")):
        place = altered(trained, tmp_path / str(i), "classifier._target_", target)
        with pytest.raises(GenfwError, match=r"not among what a config may|cannot be built"):
            fitting(model, place)
    place = altered(trained, tmp_path / "other", "classifier.channels", [16, 32])
    with pytest.raises(GenfwError, match=r"does not fit its config\.yaml"):
        fitting(model, place)
    file = tmp_path / "other" / "checkpoints" / "best.ckpt"
    AtomicIO().save_checkpoint({"state_dict": nn.Linear(1, 1)}, file)  # a pickled object
    with pytest.raises(GenfwError, match="holds what a checkpoint must not"):
        fitting(model, place)
    file.unlink()
    with pytest.raises(GenfwError, match="there is no checkpoint"):
        fitting(model, place)
    with pytest.raises(GenfwError, match=r"guidance.classifier=/nope: there is no"):
        fitting(model, "/nope")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("seeed=1",), "Did you mean seed?"),
        (("classifier.dropuot=0.1",), "classifier.dropout"),
        (("model=vae",), "model: a classifier has none. Its groups: data, schedule, "),
        (("--multirun",), "--multirun: expected group=option or key=value"),
        (("resume=/nope",), "resume=/nope: there is no"),
    ],
    ids=str,
)
def test_a_wrong_command_line_gets_a_short_answer(arguments, words, capsys):
    assert command(classify, arguments) == 2
    answer = capsys.readouterr().err
    assert words in answer and len(answer.splitlines()) < 6

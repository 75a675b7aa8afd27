"""Models that are told labels, runs that train them, and the images they are asked for."""

import json
import re
import shutil
import sys
from unittest.mock import Mock

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image as PIL
from rich import progress
from test_job import FID, VDM, composed
from test_laws import MODELS

import genfw
from genfw import Noise, Unguided, evaluate, sample
from genfw.__main__ import main
from genfw.classifier import classify
from genfw.export import export
from genfw.export import load as load_exported
from genfw.model import Labelled
from genfw.nets import Conv
from genfw.noise import BatchNoise, mix
from genfw.train.callbacks import Frechet
from genfw.train.errors import ConfigError
from genfw.train.frechet import FrechetDistance
from genfw.train.job import run
from genfw.train.module import drop_labels, reseed
from genfw.train.parts import guides, restore
from genfw.train.pictures import draw_samples
from genfw.train.progress import watched
from genfw.train.resume import _its_mathematics
from genfw.train.runs import command, read
from genfw.values import check_labels

CALM = [each for each in VDM if not each.startswith(("callbacks", "sampler", "trainer.max"))]
QUICK = (
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks=none", "sampler.steps=4"),
    *("validation_estimator.strata=1", "estimator.sets=2"),
)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    chosen = ("model.classes=10", "guidance=classifier_free", "guidance.scale=2.0")
    return folder, run(composed(*CALM, *FID, *QUICK, *chosen, "logger=csv"), folder)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional")
    run(composed(*CALM, *QUICK, "logger=none", "metrics=none"), folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Of one step: what it says does not matter here."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    small = ("trainer.max_steps=1", "classifier.channels=[8,8]", "levels=1", "logger=none")
    assert command(classify, (*small, f"hydra.run.dir={folder}")) == 0
    return folder


def test_labels_are_dropped_by_the_stream_of_the_step():
    y = torch.arange(10).repeat(500)

    def dropped(step, share=0.2):
        reseed(mix(0, step, 0), y.device)
        return drop_labels(y, 10, share, BatchNoise(len(y)))

    assert torch.equal(dropped(3), dropped(3)) and not torch.equal(dropped(3), dropped(4))
    hidden = dropped(3) == 10
    assert abs(hidden.double().mean() - 0.2) < 5 * (0.2 * 0.8 / 5000) ** 0.5
    assert torch.equal(dropped(3)[~hidden], y[~hidden])
    state = torch.get_rng_state()
    assert torch.equal(drop_labels(y, None, 0.2, BatchNoise(len(y))), y)
    assert torch.equal(drop_labels(y, 10, 0.0, BatchNoise(len(y))), y)
    assert torch.equal(torch.get_rng_state(), state)  # runs without labels are what they were


def test_no_label_is_one_label():
    """None and `classes` are the same vector, example by example."""
    net = Conv((1, 4, 4), classes=3, width=8, blocks=1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    z, level = torch.randn(4, 1, 4, 4), torch.rand(4)
    some = net(z, level, torch.tensor([3, 0, 3, 2]))
    assert torch.allclose(some[[0, 2]], net(z, level)[[0, 2]], atol=1e-6)
    assert not torch.allclose(some[[1, 3]], net(z, level)[[1, 3]], atol=1e-3)


def test_a_reported_nll_is_given_the_label_and_nothing_is_dropped(conditional):
    folder, results = conditional
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["result"]["given"] == results["test/given"]
    assert "-log p(x | y)" in results["test/given"]
    assert certificate["result"]["kind"] == "upper bound on -log p(x | y)"
    _, config, _ = read([f"run={folder}"], {}, "")
    module, data = restore(config, folder / "checkpoints" / "best.ckpt")
    split = data.split("test")
    x, y = torch.tensor(split.images), torch.tensor(split.labels)
    noise = Noise(mix(module.seed, "test"), torch.arange(len(x)))
    with module.evaluating() as model:
        told = module.estimator(model, x, y, noise=noise).nats.mean()
        not_told = module.estimator(model, x, noise=noise).nats.mean()
    assert float(told) == pytest.approx(results["test/nll"], rel=1e-6)
    assert float(not_told) != pytest.approx(results["test/nll"], rel=1e-6)


def test_a_frechet_distance_of_guided_samples_says_so(conditional):
    folder, results = conditional
    assert results["test/fd_digits_classifier_free_scale_2"] > 0
    assert "test/fd_digits" not in results
    assert "val/fd_digits_classifier_free_scale_2" in (folder / "metrics.csv").read_text()


def test_an_unconditional_certificate_is_as_before(without):
    certificate = json.loads((without / "certificate.json").read_text())
    assert "given" not in certificate["result"]


def test_an_nll_is_not_guided(conditional, capsys):
    for given in ("guidance=none", "guidance.scale=7.5"):
        assert command(evaluate.evaluate, [f"run={conditional[0]}", given]) == 2
        assert f"{given}: says how samples are drawn" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["vae", "mhvae", "hvae", "vdm"])
def test_every_model_can_be_conditional(model):
    """Its bound and its samples depend on the label; where it has no classes they do not."""
    from genfw.train.parts import assemble

    config = composed(f"model={model}")
    for classes in (10, None):
        config.model.classes = classes
        module, _ = assemble(config)
        for p in module.model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        x, noise = torch.randint(17, (4, 1, 8, 8)), Noise(0, torch.arange(4))
        with torch.no_grad():
            one, other = (
                module.model.eval().elbo(x, torch.full((4,), y), noise=noise).total for y in (1, 2)
            )
        assert torch.equal(one, other) is (classes is None)
        assert ("given y in 0..9" in repr(module.model)) is (classes == 10)


@pytest.mark.parametrize("model", ["vae", "mhvae", "hvae", "vdm"])
def test_a_run_with_labels_cannot_be_read_as_one_without(model, tmp_path):
    """Its networks would be told them, and its certificate would call the number one of p(x)."""
    config = composed(f"model={model}", "model.classes=10")
    OmegaConf.resolve(config)
    for place in ("model", "net", "encoder", "decoder"):
        if place in config:
            config[place].classes = None
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"model\..*classes=10, but the model has .*=null"):
        read([f"run={tmp_path}"], {}, "")


def said(folder, *arguments):
    return command(sample.sample, [f"run={folder}", *arguments])


def opened(folder, *arguments):
    _, config, _ = read([f"run={folder}", *arguments], {}, "")
    return restore(config, folder / "checkpoints" / "best.ckpt")[0]


def test_samples_of_a_class(conditional, tmp_path):
    folder, _ = conditional
    out = tmp_path / "sevens.npz"
    grid = ("grid=karras", "grid.rho=3.0")
    given = ("label=7", "guidance.scale=3.0", "sampler.steps=6", *grid, "format=npz", f"out={out}")
    assert said(folder, "n=5", "chunk=2", "device=cpu", *given) == 0
    held = dict(np.load(out))
    assert held["images"].shape == (5, 1, 8, 8) and held["labels"].tolist() == [7] * 5
    assert str(held["guidance"]) == "classifier_free(scale=3)"
    assert "steps=6" in str(held["sampler"]) and str(held["label"]) == "7"
    assert str(held["grid"]) == "karras(rho=3)"
    module, y = opened(folder, *given[1:5]), torch.full((7,), 7)
    with module.evaluating() as model:  # whatever the chunk and number
        drawn = model.sample(7, y, noise=Noise(mix(0, "sample"), torch.arange(7)))
        assert (drawn[:5].numpy() == held["images"]).all()
        model.sampler.steps = 7
        drawn = model.sample(5, y[:5], noise=Noise(mix(0, "sample"), torch.arange(5)))
        assert (drawn.numpy() != held["images"]).any()  # the steps of the sampler count


def test_a_guided_grid_says_so(conditional):
    folder, _ = conditional
    assert said(folder, "n=20", "label=all") == 0
    file = folder / "samples_20_seed0_label_all_classifier_free_scale_2.png"
    picture = PIL.open(file)
    assert picture.text["guidance"] == "classifier_free(scale=2)"
    assert picture.text["run"] == str(folder) and picture.text["seed"] == "0"
    assert said(folder, "n=20", "label=0,1", "guidance=none", "checkpoint=last") == 0
    plain = PIL.open(folder / "samples_20_seed0_label_0_1_last.png")
    assert plain.text["guidance"] == "none" and plain.text["label"] == "0,1"
    assert plain.text["checkpoint"] == "last" and plain.text["grid"] == "uniform"


def test_a_run_without_labels_is_guided_by_another(without, capsys):
    weaker = f"guidance.weaker={without / 'checkpoints' / 'last.ckpt'}"
    assert said(without, "n=4", "guidance=autoguidance", weaker, "format=png") == 0
    folder = without / f"samples_4_seed0_autoguidance_scale_2_{without.name}_last"
    assert [file.name for file in sorted(folder.iterdir())] == [f"{i:05d}.png" for i in range(4)]


def test_a_larger_set_in_the_same_folder_is_not_mixed_with_a_smaller(conditional, tmp_path, capsys):
    out = ("format=png", f"out={tmp_path}", "label=1")
    assert said(conditional[0], "n=3", *out) == 0
    assert said(conditional[0], "n=2", *out) == 2
    assert "00002.png to 00002.png are there already" in capsys.readouterr().err
    assert said(conditional[0], "n=3", "seed=1", *out) == 0


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("model.steps=5", "model.steps=5: changes nothing here; sampler, grid, guidance, trusted"),
        ("label_dropout=0.5", "label_dropout=0.5: changes nothing here"),
        ("estimator=ode", "estimator=ode: changes nothing here"),
        ("guidance.scale=3", "guidance has no scale; choose one that has: guidance=<name>"),
        ("sampler.stepps=3", "Did you mean sampler.steps?"),
    ],
)
def test_what_samples_do_not_depend_on_is_refused(given, answer, without, capsys):
    assert said(without, given) == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize("act", [sample.sample, evaluate.evaluate, export, classify])
def test_every_command_says_what_it_is_for(act, capsys):
    for flag in ("--help", "-h"):
        assert command(act, [flag]) == 0
        assert f"python -m {act.__module__} " in capsys.readouterr().out


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_label_outside_the_models_own_is_refused(make):
    """In the bound and in samples, 3 of 3 standing for none; a model without any takes all."""
    model, x = make((1, 2, 2), 3, classes=3), torch.zeros(2, 1, 2, 2, dtype=torch.int64)
    for wrong in (torch.tensor([0, 4]), torch.tensor([-1, 2])):
        message = rf"labels: expected 0..2, or 3 for none, got {wrong.min()}..{wrong.max()}: set cl"
        for act in (lambda y: model.elbo(x, y), lambda y: model.sample(2, y)):
            with pytest.raises(ValueError, match=message):
                act(wrong)
    model.elbo(x, torch.tensor([0, 3])), model.sample(2, torch.tensor([3, 2], dtype=torch.uint8))
    make((1, 2, 2), 3).elbo(x, torch.tensor([-1, 99]))


def test_labels_are_looked_at_where_no_device_is_waited_for(monkeypatch):
    """A device that is neither a CPU nor NVIDIA's has no assertion of its own: there a training
    step looks at none."""
    monkeypatch.delattr(torch, "_assert_async")
    elsewhere, wrong = torch.zeros(2, dtype=torch.int64, device="meta"), torch.tensor([0, 4])
    check_labels(elsewhere, 3)
    with torch.no_grad(), pytest.raises(ValueError, match=r"0\.\.2, or 3 for none, got 0\.\.4"):
        check_labels(wrong, 3)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_network_knows_as_many_labels_as_its_model(make):
    """Else "no label" is one of its classes, or labels change nothing. Some may do without labels,
    and a network that does not say how many it knows is left to know."""

    def of(classes, model):
        """A model of `classes`, of the networks of another."""
        match model:
            case genfw.HVAE():
                return genfw.HVAE(model.ladder, model.likelihood, classes)
            case genfw.VDM():
                return genfw.VDM(model.denoiser, model.likelihood, shape=(1, 2, 2), classes=classes)
        networks = [*model.encoders], [*model.decoders]
        return genfw.MHVAE(*networks, model.likelihood, model.latents, classes)

    model = make((1, 2, 2), 3, classes=3)
    networks = [each for each in model.modules() if isinstance(each, Labelled)][1:]
    assert len(networks) == {"vae": 2, "mhvae": 4}.get(model.name, 1)
    for network in networks:
        for their in (2, 4):
            network.classes = their
            words = rf"the model has 3, and its {type(network).__name__} .* classes={their}: build"
            with pytest.raises(ValueError, match=words):
                of(3, model)
            of(None, model)
        network.classes = None
        if network is not networks[-1]:
            assert of(3, model).classes == 3
    with pytest.raises(ValueError, match=r"the model has 3, and its .* classes=None: build"):
        of(3, model)
    del network.classes
    assert of(3, model).classes == 3


WRONG = [
    (("format=gif",), ["format=gif", "grid, png or npz"]),
    (("n=0",), ["n=0: expected at least 1"]),
    (("chunk=0",), ["chunk=0: expected at least 1"]),
    (("device=nope",), ["device=nope: "]),
    (("out=images.npz",), ["format=grid writes .png; for .npz give format=npz"]),
    (("out=images.png", "format=png"), ["format=png writes a folder; for .png give format=grid"]),
    (("out=/dev/null/x", "n=1"), ["/dev/null", "; give out=<path>"]),
    (("out=/dev/null", "n=1", "format=png"), ["/dev/null", "; give out=<path>"]),
    (("out=/tmp",), ["out=/tmp: expected a file", "a folder: out=/tmp/samples.png"]),
    (("out=/no/",), ["out=/no/: expected a file", "a folder: out=/no/samples.png"]),
    (("out=/no/", "format=npz"), ["a folder: out=/no/samples.npz"]),
    (("guidance.rescale=2.0",), ["guidance.rescale=2.0: expected a number in [0, 1]"]),
    (("guidance.interval=[3.0,-3.0]",), ["interval: expected [lowest, highest] log SNR"]),
    (("guidance=classifier_fre",), ["classifier_free"]),
    (("guidance=autoguidance", "guidance.weaker=/nope"), ["guidance.weaker=/nope", "config.yaml"]),
]


def test_labels_that_can_be_asked_for(conditional):
    config = OmegaConf.load(conditional[0] / "config.yaml")
    assert sample.labels(None, config) == sample.labels("all", config) == list(range(10))
    assert sample.labels(7, config) == [7] and sample.labels("2,0,2", config) == [2, 0, 2]
    assert sample.labels("none", config) == [10]  # which stands for no label
    of_digits = [(each, "0,1,2, all or none") for each in ("seven", "0,0_1", "1.0", "[1.0]")]
    for wrong, words in ((11, "labels are 0..9"), (-1, "no class -1"), *of_digits):
        with pytest.raises(ConfigError, match=f"label={re.escape(str(wrong))}: .*{words}"):
            sample.labels(wrong, config)
    config.label_dropout = 0.0
    with pytest.raises(ConfigError, match="label=none: this model was never without a label"):
        sample.labels("none", config)


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_of_a_conditional_run(conditional, arguments, words, capsys):
    assert said(conditional[0], *arguments) == 2
    answer = capsys.readouterr().err
    assert all(word in answer for word in words) and "Traceback" not in answer


def test_wrong_of_a_run_without_labels(without, capsys):
    for label in ("7", "none", "all"):
        assert said(without, f"label={label}") == 2
        assert f"label={label}: this model knows no labels" in capsys.readouterr().err
    mistaken = f"guidance.classifier={without}"
    assert said(without, "guidance=classifier", mistaken, "label=7") == 2
    answer = capsys.readouterr().err
    assert "the run of a classifier" in answer and "genfw.VDM" in answer
    by_classifier = composed("guidance=classifier", mistaken, "model.classes=10")
    with pytest.raises(ConfigError, match="guides to a class"):
        sample.labels("none", by_classifier)
    assert said(without, "guidance=classifier_free") == 2
    assert "needs a conditional model" in capsys.readouterr().err


def test_wrong_of_the_run_of_a_classifier(classifier, without, capsys):
    for act in (sample.sample, evaluate.evaluate):
        assert command(act, [f"run={classifier}"]) == 2
        assert "expected the run of a model" in capsys.readouterr().err
    config = OmegaConf.load(without / "config.yaml")
    config.guidance = {"_target_": "genfw.Autoguidance", "weaker": str(classifier)}
    with pytest.raises(ConfigError, match="expected a model's run, got a classifier's"):
        guides(config)
    config.guidance.weaker = str(without)
    config.data.bins = 2
    with pytest.raises(ConfigError, match=r"a model of images with data.bins=17, .* data.bins=2"):
        guides(config)


def test_what_guidance_does_not_take_is_found_before_training(tmp_path):
    config = composed(*CALM, *QUICK, "model.classes=10", "guidance=classifier_free")
    config.guidance.rescale = 2.0
    with pytest.raises(ConfigError, match=r"guidance .*rescale: expected a number from 0 to 1"):
        run(config, tmp_path)


def test_labels_go_round_where_nobody_asks(conditional):
    folder, _ = conditional
    with opened(folder).evaluating() as model:
        drawn = draw_samples(model, range(12), 0, 5)  # in chunks too
        y, noise = torch.arange(12) % 10, Noise(0, torch.arange(12))
        assert torch.equal(drawn, model.sample(12, y, noise=noise))
        drawn = draw_samples(model, range(12), 0, 5, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
        asked = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
        assert torch.equal(drawn, model.sample(12, asked, noise=noise))


def test_a_classifier_guides_a_run_that_knows_no_labels(without, classifier):
    guided = ("guidance=classifier", f"guidance.classifier={classifier}", "guidance.scale=2.0")
    assert said(without, "n=20", *guided, "label=all") == 0
    picture = PIL.open(without / "samples_20_seed0_label_all_classifier_scale_2_run.png")
    assert picture.text["guidance"] == "classifier(scale=2)"
    assert picture.text["classifier"] == str(classifier)
    module, noise = opened(without, *guided), Noise(0, torch.arange(20))
    y = torch.arange(20) % 10
    with module.evaluating() as model:
        drawn = model.sample(20, y, noise=noise)
        guide = model.guidance
        model.guidance = lambda bare: guide(bare, scale=300.0)
        assert (model.sample(20, y, noise=noise) != drawn).any()


def copied(folder, place, guidance, **more):
    """A run as it would be with this guidance in its config.yaml."""
    shutil.copytree(folder, place)
    config = OmegaConf.load(place / "config.yaml")
    config.guidance = config.model.guidance = guidance
    OmegaConf.update(config, "label_dropout", more.get("label_dropout", config.label_dropout))
    OmegaConf.save(config, place / "config.yaml")
    return place


PLAIN = {"_target_": "genfw.Unguided", "_partial_": True}
BY_NOBODY = [
    {"_target_": "genfw.ClassifierGuidance", "_partial_": True, "classifier": "gone", "scale": 2.0},
    {"_target_": "genfw.Autoguidance", "_partial_": True, "weaker": "gone", "scale": 2.0},
]


@pytest.mark.parametrize("guidance", BY_NOBODY, ids=["classifier", "weaker"])
def test_what_guides_may_be_gone_where_nothing_is_sampled(guidance, conditional, tmp_path, capsys):
    """A bound and weights are of the bare model; and such a run can be another's weaker one."""
    folder, _ = conditional
    orphan = copied(folder, tmp_path / "orphan", guidance)
    assert command(evaluate.evaluate, [f"run={orphan}", "verify=true"]) == 0
    assert "certificate holds" in capsys.readouterr().out
    assert command(export, [f"run={orphan}"]) == 0
    assert "as export takes no other run with it: gone" in capsys.readouterr().out
    plain = load_exported(orphan / "model.safetensors")
    assert isinstance(plain.guided(), Unguided) and plain.sample(1).shape == (1, 1, 8, 8)
    config = OmegaConf.load(folder / "config.yaml")
    config.guidance = {"_target_": "genfw.Autoguidance", "_partial_": True, "weaker": str(orphan)}
    assert guides(config)["guidance"].keywords["weaker"] is not None
    kind = "weaker" if "weaker" in guidance else "classifier"
    (orphan / "results.json").unlink()
    for act in (lambda: said(orphan, "n=1"), lambda: main([f"resume={orphan}"])):
        assert act() == 2
        answer = capsys.readouterr().err
        assert f"guidance.{kind}=" in answer and "gone: there is no" in answer
        assert f"where it has moved, give guidance.{kind}=<its folder>" in answer


def test_an_export_keeps_the_guidance_that_needs_no_other_run(conditional, tmp_path):
    out = tmp_path / "x.safetensors"
    assert command(export, [f"run={conditional[0]}", f"out={out}"]) == 0
    assert load_exported(out).guided().title == "classifier_free(scale=2)"


class Begun(Exception):
    """A run has come as far as to begin."""


def begins(*_):
    raise Begun


def test_a_run_goes_on_where_what_guides_it_has_moved(conditional, tmp_path, monkeypatch):
    """As told now; and wherever it is opened from, by its whole path in config.yaml."""
    orphan = copied(conditional[0], tmp_path / "orphan", BY_NOBODY[0])
    (orphan / "results.json").unlink()
    (orphan / "config.yaml").rename(tmp_path / "config.yaml")
    monkeypatch.setattr("genfw.train.job.assemble", begins)
    monkeypatch.chdir(tmp_path)
    for given, place in (
        ("guidance.classifier=here/it", "here/it"),
        ("data.num_workers=0", "gone"),
    ):
        config = read(["resume=.", given], {}, "", "resume", _its_mathematics)[1]
        with pytest.raises(Begun):
            run(config, orphan)
        kept = OmegaConf.load(orphan / "config.yaml")
        assert kept.guidance.classifier == kept.model.guidance.classifier == f"{tmp_path}/{place}"
        (orphan / "config.yaml").unlink()


def test_a_weaker_model_is_not_told_what_it_never_heard(conditional, without, tmp_path, capsys):
    """No label, of one that was trained with all of them."""
    folder = conditional[0]
    attentive = copied(folder, tmp_path / "weaker", PLAIN, label_dropout=0.0)
    asked = ("n=2", "guidance=autoguidance", f"guidance.weaker={attentive}")
    assert said(folder, *asked, "label=1") == 0
    for refused in ((folder, *asked, "label=none"), (without, *asked)):
        assert said(*refused) == 2
        answer = capsys.readouterr().err
        assert f"guidance.weaker={attentive}: a model that was never without a label" in answer
        assert "label_dropout=0" in answer
    file = f"guidance.weaker={folder / 'checkpoints' / 'last.ckpt'}"
    for fine in ((folder, "label=none"), (without,)):
        assert said(*fine, "n=2", "guidance=autoguidance", file) == 0


def test_samples_of_no_label(conditional):
    """Those of the model when it is told nothing, which no guidance moves, nor is said to."""
    folder, _ = conditional
    assert said(folder, "n=6", "label=none", "format=npz") == 0
    held = np.load(folder / "samples_6_seed0_label_none.npz")
    assert held["labels"].tolist() == [-1] * 6 and str(held["label"]) == "none"
    assert str(held["guidance"]) == "none"
    with opened(folder).evaluating() as model:
        model.guidance = Unguided
        plain = model.sample(6, None, noise=Noise(mix(0, "sample"), torch.arange(6)))
    assert (held["images"] == plain.numpy()).all()


def test_the_way_from_noise_to_a_sample(conditional):
    """A frame per step, one before the first, and the images; told what made them."""
    folder, _ = conditional
    assert said(folder, "n=9", "label=4", "trajectory=true", "sampler.steps=5") == 0
    name = "samples_9_seed0_label_4_sampler.steps_5_classifier_free_scale_2"
    gif, png = (PIL.open(folder / f"{name}.{ending}") for ending in ("gif", "png"))
    assert gif.n_frames == 5 + 2 and gif.size == png.size
    assert b"guidance: classifier_free(scale=2)" in gif.info["comment"]
    gif.seek(6)
    last = np.asarray(gif.convert("L")).astype(int)
    assert abs(last - np.asarray(png).astype(int)).max() <= 1
    gif.seek(0)
    first = np.asarray(gif.convert("L")).astype(int)
    assert abs(first - last).mean() > 20


def test_only_diffusion_models_have_a_way(tmp_path, capsys):
    OmegaConf.save(composed("model=vae"), tmp_path / "config.yaml", resolve=True)
    assert said(tmp_path, "trajectory=true") == 2
    assert "genfw.VAE goes no way" in capsys.readouterr().err


@pytest.fixture
def bars(monkeypatch):
    """A terminal, and the bars that are shown on it: what each counts to, and how far it came."""
    shown = []

    class Bar(progress.Progress):
        def add_task(self, *arguments, total, **more):
            shown.append([total, 0])
            return super().add_task(*arguments, total=total, **more)

        def advance(self, *arguments):
            shown[-1][1] += 1

    monkeypatch.setattr(progress, "Progress", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    return shown


def test_a_bar_counts_every_call_of_the_guided_denoiser(conditional, bars, monkeypatch):
    """On a terminal; the samples are the same as without it."""
    module = opened(conditional[0])
    with module.evaluating() as model:
        guide, plain = model.guidance, draw_samples(model, range(6), 0, 4)
        with watched(model, 2):
            assert torch.equal(draw_samples(model, range(6), 0, 4), plain)
        assert model.guidance is guide and bars == [[8, 8]]
        with watched(model, 2, wanted=False):
            assert model.guidance is guide
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
        with watched(model, 2):
            assert model.guidance is guide and len(bars) == 1


def test_the_way_from_noise_has_a_bar_too(conditional, bars, tmp_path):
    given = ("n=4", "label=1", "trajectory=true", f"out={tmp_path / 'ones'}")
    assert said(conditional[0], *given) == 0
    assert bars == [[4, 4], [4, 4]]


@pytest.mark.parametrize(
    ("testing", "first", "expected"),
    [(True, True, [[8, 8]]), (False, True, []), (True, False, [])],
    ids=["test", "validation", "another rank"],
)
def test_samples_of_a_frechet_distance_have_a_bar(conditional, bars, testing, first, expected):
    """At the test: while a model trains, the bar of training stands there."""
    module = opened(conditional[0])
    frechet = Frechet("digits", (1, 8, 8), 17, chunk=4)
    frechet.referred = True
    trainer = Mock(spec=L.Trainer, global_rank=0, world_size=1, callbacks=[])
    trainer.testing, trainer.is_global_zero = testing, first
    distance = Mock(spec=FrechetDistance)
    distance.compute.return_value = 1.0
    frechet._compute(distance, trainer, module, 6)
    assert bars == expected
    assert [len(each.args[0]) for each in distance.update.call_args_list] == [4, 2]

"""conf/ says what the classes say: one folder per interface, one file per registered class."""

import importlib
import inspect
import math
import pkgutil
from enum import Enum
from pathlib import Path

import lightning.pytorch as L
import pytest
import tiny
import torch
from omegaconf import OmegaConf

import genfw
from genfw.objective.denoising import DenoisingObjective
from genfw.registry import Registered
from genfw.sample import labels
from genfw.train import resolvers
from genfw.train.checkpoint import AtomicIO
from genfw.train.compose import compose
from genfw.train.config import build, conf_folder, locate
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.module import LatentModule
from genfw.train.rules.guidance import guidance_reads_model, samples_have_labels
from genfw.train.rules.model import likelihood_reads_model
from genfw.train.schema import ConfFiles, from_signature
from genfw.train.session import session
from genfw.train.signals import Signals

for module in pkgutil.walk_packages(genfw.__path__, "genfw."):
    if not module.name.startswith(("genfw.train", "genfw.__main__")):
        importlib.import_module(module.name)
resolvers.register()

CONF = conf_folder()
GROUPS = {  # those of genfw itself: tests register classes of their own
    group: {
        name: cls
        for name, cls in interface.registry.items()
        if cls.__module__.startswith("genfw.") and "<locals>" not in cls.__qualname__
    }
    for group, interface in Registered.groups.items()
    if interface.__module__.startswith("genfw.") and "genfw.train" not in interface.__module__
}
CLASSES = [(group, name) for group, classes in GROUPS.items() for name in classes]
FACTS = {"data": {"shape": [1, 8, 8], "bins": 17, "classes": 10}}
FACTS["model"] = {"latents": 3, "classes": None}
WRAPS = {"guidance": {"denoiser"}}  # given when the model samples: their files are partial
FACTS["param"] = {"_target_": "genfw.V"}
FACTS["grid"] = {"_target_": "genfw.KarrasGrid", "rho": 7.0}
FACTS["likelihood"] = {"_target_": "genfw.CategoricalLikelihood", "bins": 17}


def conf_node(group, name):
    """The part of a conf file that names the class."""
    content = OmegaConf.load(CONF / group / f"{name}.yaml")
    content.pop("defaults", None)
    return content.model if group == "model" else content


@pytest.mark.parametrize("group", GROUPS)
def test_one_file_per_registered_class(group):
    files = {file.stem for file in (CONF / group).glob("*.yaml")}
    assert files == set(GROUPS[group])


@pytest.mark.parametrize(("group", "name"), CLASSES)
def test_file_names_its_class_and_its_arguments(group, name):
    cls = GROUPS[group][name]
    node = conf_node(group, name)
    assert locate(node._target_) is cls
    said, known = ConfFiles([CONF]).schema(node._target_), from_signature(cls)
    assert list(said.arguments) == [k for k in known.arguments if k not in WRAPS.get(group, ())]
    for key, argument in said.arguments.items():
        types = known.arguments[key].types
        if types is not None:
            assert argument.types is not None, f"{key}: state its types in a comment"
            assert argument.types <= types, f"{key}: {argument.types} where the class takes {types}"


def test_what_may_be_none_may_be_left_out():
    """As in the config.yaml of a run older than the argument."""
    arguments = ConfFiles([CONF]).schema("genfw.Ancestral").arguments
    assert not arguments["grid"].required and arguments["grid"].default is None
    assert ConfFiles([CONF]).schema("genfw.Cosine").arguments["log_snr_max"].required


@pytest.mark.parametrize(("group", "name"), [each for each in CLASSES if each[0] != "model"])
def test_class_can_be_built_from_its_file(group, name):
    facts = {**FACTS, "data": {**FACTS["data"], "bins": 2 if name == "bernoulli" else 17}}
    config = OmegaConf.create({**facts, "node": conf_node(group, name)})
    built = build(config.node)
    assert (built.args[1] if group in WRAPS else type(built)) is GROUPS[group][name]


@pytest.mark.parametrize("model", GROUPS["model"])
def test_model_can_be_built(model):
    with session():
        config = compose([f"model={model}"])
    assert type(build(config.model)) is GROUPS["model"][model]


@pytest.mark.parametrize("model", sorted({*GROUPS["model"]} - {"vdm"}))
def test_what_weighs_noise_levels_needs_some(model):
    """By the name that was typed, whatever the class is called."""
    weighted = [k for k, c in GROUPS["objective"].items() if issubclass(c, DenoisingObjective)]
    assert len(weighted) >= 5
    with session():
        for name in weighted:
            with pytest.raises(ConfigError, match=f"objective={name}, model={model}: .*=elbo"):
                compose([f"model={model}", f"objective={name}"])


def guided(name, **more):
    node = conf_node("guidance", name)
    runs = dict.fromkeys(OmegaConf.missing_keys(node), "outputs/another")
    node.update(runs)
    return OmegaConf.create({**FACTS, "guidance": node, **more})


@pytest.mark.parametrize("name", GROUPS["guidance"])
def test_what_asks_a_model_without_a_label_needs_one_that_knows_that(name):
    """By the name that was typed, whatever the class is called."""
    attentive = {"model": {"classes": 10}, "label_dropout": 0.0}
    guidance_reads_model(guided(name, **attentive | {"label_dropout": 0.1}))
    if name in ("classifier_free", "classifier", "classifier_denoised"):
        with pytest.raises(ConfigError, match=f"^guidance={name} .*label_dropout=0.1$"):
            guidance_reads_model(guided(name, **attentive))
    else:
        guidance_reads_model(guided(name, **attentive))


@pytest.mark.parametrize("name", GROUPS["guidance"])
def test_a_classifier_guides_to_labels_that_somebody_gives(name):
    """Which nobody does while a model without classes trains."""
    config = guided(name)
    if name in ("classifier", "classifier_denoised"):
        with pytest.raises(ConfigError, match=f"guidance={name} needs labels.*genfw.sample"):
            samples_have_labels(config)
        assert labels(None, config) == list(range(10))
        with pytest.raises(ConfigError, match=f"guidance={name} guides to a class"):
            labels("none", config)
    else:
        samples_have_labels(config)
        assert labels(None, config) is None


@pytest.mark.parametrize("likelihood", GROUPS["likelihood"])
@pytest.mark.parametrize("model", GROUPS["model"])
def test_a_likelihood_that_cannot_read_a_model_is_refused_by_name(model, likelihood):
    """A diffusion model decodes a value in noise, the others what the network says of it."""
    reads = {"bins", "discretized_gaussian", "gaussian", "categorical"}
    unreadable = likelihood not in reads if model == "vdm" else likelihood == "bins"
    nodes = {"model": conf_node("model", model), "likelihood": conf_node("likelihood", likelihood)}
    config = OmegaConf.create(nodes)
    if unreadable:
        with pytest.raises(ConfigError, match=f"^likelihood={likelihood} .*model={model} decodes"):
            likelihood_reads_model(config)
    else:
        likelihood_reads_model(config)


def test_likelihood_outputs_are_those_of_the_classes():
    for name, cls in GROUPS["likelihood"].items():
        bins = 2 if name == "bernoulli" else 5
        node = OmegaConf.create({"_target_": f"genfw.{cls.__name__}", "bins": bins})
        if name == "gaussian":
            del node["bins"]
        assert resolvers.outputs(node) == build(node).outputs
        if name == "logistic_mixture":
            node.components = 3
            assert resolvers.outputs(node) == build(node).outputs == 12


@pytest.mark.parametrize("net", ["mlp", "conv", "unet"])
def test_fourier_features_are_of_z_whatever_the_network_is_given_of_it(net):
    """Where they are not faded, at noise levels of the data end. edm gives the network z / r."""
    z, t, said = 0.8 * torch.randn(6, 1, 8, 8), torch.linspace(0, 0.05, 6), []
    for param in ("v", "edm"):
        with session():
            config = compose([f"param={param}", f"net={net}", "data=digits"])
        vdm = build(config.model)
        vdm.denoiser.network.fourier.register_forward_hook(lambda *seen: said.append(seen[-1]))
        vdm.denoiser(z, t)
    assert said[0][:, 1:].abs().amax((1, 2, 3)).min() > 0.01
    torch.testing.assert_close(said[0][:, 1:], said[1][:, 1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GROUPS["param"])
def test_network_gives_what_the_parameterization_reads(name):
    with session():
        config = compose([f"param={name}", "data=cifar10"])
    param = build(config.param)
    assert config.net.out_channels == param.channels(3, 256)
    assert (config.likelihood._target_ == "genfw.CategoricalLikelihood") is isinstance(
        param, genfw.DiscreteParameterization
    )


OURS = {  # where genfw's default is a choice of its own
    *("lr", "betas", "max_steps", "max_epochs", "gradient_clip_val", "use_distributed_sampler"),
    *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
    *("log_every_n_steps", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
}
FOREIGN = {
    "lightning.pytorch.Trainer": (
        L.Trainer,
        {"logger", "callbacks", "plugins", "enable_autolog_hparams", "model_registry"},
    ),
    "torch.optim.AdamW": (torch.optim.AdamW, {"params"}),
}


@pytest.mark.parametrize("target", FOREIGN)
def test_file_of_a_foreign_class_keeps_up_with_it(target):
    cls, elsewhere = FOREIGN[target]
    said, known = ConfFiles([CONF]).schema(target), inspect.signature(cls).parameters
    assert set(said.arguments) == set(known) - elsewhere
    for key, argument in said.arguments.items():
        if key not in OURS:
            assert argument.default == known[key].default, key


def _walk(content):
    if OmegaConf.is_dict(content):
        if "_target_" in content:
            yield content
        for key in content:
            yield from _walk(content._get_node(key))


@pytest.mark.parametrize(
    "target",
    sorted(
        {
            node._target_
            for file in CONF.rglob("*.yaml")
            for node in _walk(OmegaConf.load(file))
            if node._target_.startswith("genfw.train.")
        }
    ),
)
def test_top_floor_files_name_real_arguments(target):
    said, known = ConfFiles([CONF]).schema(target), from_signature(locate(target))
    assert set(said.arguments) <= set(known.arguments)
    given_by_the_job = {"optimizer", "steps", "folder", "files", "signals"}
    missing = {key for key, each in known.arguments.items() if each.required}
    assert missing - set(said.arguments) <= given_by_the_job


FOR_DIGITS = {  # a thousand images are learned by heart without it; a class knows no data
    ("genfw.nets.ConvEncoder", "dropout"),
    ("genfw.nets.ConvDecoder", "dropout"),
    ("genfw.nets.MLPEncoder", "dropout"),
    ("genfw.nets.MLPDecoder", "dropout"),
    ("genfw.nets.Ladder", "dropout"),
}


@pytest.mark.parametrize(
    "target",
    sorted(
        {
            node._target_
            for file in CONF.rglob("*.yaml")
            for node in _walk(OmegaConf.load(file))
            if node._target_.startswith("genfw.") and ".data." not in node._target_
        }
    ),
)
def test_a_default_is_the_same_in_a_notebook(target):
    """What a class takes where nothing is said is what its file says."""
    said, known = ConfFiles([CONF]).schema(target), from_signature(locate(target))
    for key, argument in said.arguments.items():
        default = known.arguments[key].default
        default = default.value if isinstance(default, Enum) else default
        if argument.required or known.arguments[key].required or callable(default):
            continue
        same = argument.default == (list(default) if isinstance(default, tuple) else default)
        assert same is ((target, key) not in FOR_DIGITS), (key, argument.default, default)


def test_a_notebook_measures_and_samples_as_a_run_does():
    model = genfw.VDM(tiny.vdm().denoiser, genfw.BinsLikelihood(tiny.BINS), shape=tiny.SHAPE)
    assert model.sampler.steps == conf_node("sampler", "ancestral").steps
    module = LatentModule(model, genfw.Elbo(), torch.optim.SGD)
    while_training = OmegaConf.load(CONF / "config.yaml").validation_estimator
    assert repr(module.validation_estimator) == repr(build(while_training))
    assert repr(module.estimator) == repr(build(conf_node("estimator", "bound")))


def _ranged():
    """Every number that a file says the range of, where a constructor sees it at once."""
    files, ranged = ConfFiles([CONF]), []
    for file in sorted(CONF.rglob("*.yaml")):
        for node in _walk(OmegaConf.load(file)):
            target = node._target_
            models = [f"genfw.{each.__name__}" for each in GROUPS["model"].values()]
            if target.startswith("genfw.") and target not in models and "_partial_" not in node:
                for key, argument in files.schema(target).arguments.items():
                    if argument.range is not None and key in node:
                        name = f"{file.stem}-{key}"
                        ranged.append(pytest.param(node, key, argument.range, id=name))
    return ranged


@pytest.mark.parametrize(("node", "key", "within"), _ranged())
def test_class_refuses_what_its_file_does(node, key, within, tmp_path):
    own = {
        "net": {"classes": None},
        "seed": 0,
        "schedule": {"log_snr_max": 5.0, "log_snr_min": -5.0},
    }
    given = {"path": "x", "shape": [1, 8, 8], "classes": 2}
    plain = OmegaConf.to_container(node, resolve=False)
    plain = {k: given[k] if v == "???" else v for k, v in plain.items() if k != "defaults"}
    more = {}
    if node._target_ == "genfw.train.keeper.Keeper":
        more = {"folder": tmp_path, "files": AtomicIO(), "signals": Signals()}
    value = plain[key]
    whole = isinstance(value[0] if isinstance(value, list) else value, int | type(None) | str)
    step = 1 if whole else 0.25
    out = [within.low - step * within.with_low, within.high + step * within.with_high]
    for each in (int(n) if whole else n for n in out if math.isfinite(n)):
        wrong = [each, *value[1:]] if isinstance(value, list) else each
        config = OmegaConf.create({**FACTS, **own, "node": {**plain, key: wrong}})
        with pytest.raises(GenfwError, match=rf"{key}|{each}"):
            build(config.node, **more)


def test_ranges_are_of_their_own_node():
    """callbacks/default.yaml has several keys of one name."""
    files = ConfFiles([CONF])
    said = [
        files.schema(f"genfw.train.{name}").arguments["every"].range
        for name in ("callbacks.Progress", "callbacks.Pictures")
    ]
    assert [0 in each for each in said] == [False, True]


@pytest.mark.parametrize("name", GROUPS["schedule"])
def test_end_points_follow_the_number_of_values(name):
    with session():
        config = compose([f"schedule={name}", "data.raw_bins=100"])
    for schedule in (config.schedule, config.model.denoiser.schedule):
        assert schedule.log_snr_max == pytest.approx(2 * math.log(3.02 * 100))


CHOICES = {"sgm": {"param": "genfw.Score", "objective": "genfw.Simple"}}


@pytest.mark.parametrize("experiment", sorted(f.stem for f in (CONF / "experiment").glob("*.yaml")))
def test_experiment_composes(experiment):
    """To the choices it stands for, and says what it trains on in its name or its comment."""
    with session():
        config = compose([f"experiment={experiment}"])
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text().split("defaults:")[0]
    assert config.data.name in experiment + text.lower()
    for group, choice in CHOICES.get(experiment, {}).items():
        assert config[group]._target_ == choice


@pytest.mark.parametrize("experiment", ["digits_vae", "iwae_l1"])
def test_what_is_off_may_be_spoken_of_in_an_experiment_and_not_on_the_command_line(experiment):
    off = [f"experiment={experiment}", "callbacks=none", "metrics=none"]
    with session():
        config = compose(off)
        with pytest.raises(ConfigError, match=r"metrics.fid"):
            compose([*off, "metrics.fid.every=3"])
    own = {"iwae_l1": {"start_at_mean"}}.get(experiment, set())  # which it brings itself
    assert set(config.callbacks) == own and not config.metrics


def test_every_option_of_the_other_groups_composes():
    with session():
        for file in CONF.glob("*/*.yaml"):
            group = file.parent.name
            if group not in (*GROUPS, "experiment"):
                given = ["data.path=x", "data.shape=[3,8,8]", "data.classes=2"]
                compose([f"{group}={file.stem}", *(given if file.stem == "folder" else [])])


def test_none_switches_a_group_off():
    with session():
        config = compose([f"{g}=none" for g in ("scheduler", "callbacks", "logger", "metrics")])
    assert config.scheduler is None
    assert config.callbacks == config.logger == config.metrics == {}


def test_packages_in_pyproject_are_the_folders():
    import tomllib

    root = Path(__file__).parents[1]
    tool = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    where = {name: name.replace(".", "/") for name in tool["packages"]} | tool["package-dir"]
    listed = {where[name].replace("/", ".") for name in tool["packages"]}
    folders = {
        ".".join(file.parent.relative_to(root).parts) for file in (root / "genfw").rglob("*.py")
    }
    assert listed - {"conf"} == folders

"""Somebody else's class, on genfw's command line, without a line in genfw."""

import copy
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf, open_dict

from genfw import Bound, evaluate
from genfw.__main__ import main
from genfw.train import plugins, resume, runs
from genfw.train.compose import compose, unchecked
from genfw.train.config import build, conf_folder, locate
from genfw.train.errors import ConfigError
from genfw.train.parts import implemented, make_callbacks
from genfw.train.schema import ConfFiles, from_signature
from genfw.train.session import searched, session

ROOT = Path(__file__).parents[1]

FLOW = '''
from genfw import LinearParameterization


class Velocity(LinearParameterization, name="velocity"):
    """x - eps: the velocity of the straight path from noise to data."""

    def coefficients(self, alpha, sigma):
        return 1.0, -1.0
'''

SCHEDULE = """
from genfw import NoiseSchedule


class Power(NoiseSchedule, name="power"):
    def __init__(self, log_snr_max: float, log_snr_min: float, power: float = 2.0):
        self.__dict__["power"] = power
        super().__init__(log_snr_max, log_snr_min)

    def log_snr(self, t):
        return -self.power * (t / (1.0001 - t).clamp(min=1e-12)).log()
"""


@pytest.fixture
def package(tmp_path):
    """A package as pip would install it: a folder, and its entry point."""
    site = tmp_path / "site"
    (site / "tiny").mkdir(parents=True)
    (site / "tiny" / "__init__.py").write_text("")
    (site / "tiny" / "flows.py").write_text(FLOW + SCHEDULE)
    info = site / "tiny-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[genfw.plugins]\ntiny = tiny.flows\n")
    return site


def genfw(*arguments, site=None, cwd=ROOT):
    path = os.pathsep.join(map(str, filter(None, [ROOT, site])))
    return subprocess.run(
        [sys.executable, "-m", "genfw", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def composed(*arguments, **where):
    done = genfw("--cfg", "job", *arguments, **where)
    assert done.returncode == 0, done.stderr
    return OmegaConf.create(done.stdout)


def test_name_without_yaml(package):
    assert composed("param=velocity", site=package).param == {"_target_": "tiny.flows.Velocity"}


def test_defaults_come_from_the_signature(package):
    schedule = composed("schedule=power", "schedule.power=3", site=package).schedule
    assert schedule.power == 3
    assert schedule.log_snr_min == -10.0
    for wrong in ("schedule.pwer=3", "+schedule.pwer=3", "schedule.power=x"):
        done = genfw("schedule=power", wrong, site=package)
        assert done.returncode == 2
        assert "schedule.power" in done.stderr
        assert "Traceback" not in done.stderr


def test_name_in_an_experiment(package):
    folder = package / "tiny" / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "straight.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /param: velocity\nseed: 7\n"
    )
    config = composed("experiment=straight", site=package)
    assert (config.param._target_, config.seed) == ("tiny.flows.Velocity", 7)
    assert "straight" in genfw("--help", site=package).stdout


def test_own_conf_folder_needs_no_import(package):
    folder = package / "tiny" / "conf" / "param"
    folder.mkdir(parents=True)
    (folder / "straight.yaml").write_text("_target_: tiny.flows.Velocity\n")
    (package / "tiny" / "flows.py").write_text("raise SystemExit('imported')")
    assert composed("param=straight", site=package).param._target_ == "tiny.flows.Velocity"


def test_help_lists_plugins(package):
    assert "tiny (tiny.flows)" in genfw("--help", site=package).stdout


def test_broken_plugin_is_named_and_only_where_it_matters(package):
    (package / "tiny" / "flows.py").write_text("import not_there")
    done = genfw("param=velocity", site=package)
    assert done.returncode == 2
    assert "plug-in tiny" in done.stderr
    assert "not_there" in done.stderr
    composed("param=v", site=package)


def test_typo_with_a_plugin_installed(package):
    done = genfw("param=velocty", site=package)
    assert done.returncode == 2
    assert "param=velocity" in done.stderr


def test_file_beside_the_person(tmp_path):
    (tmp_path / "my_file.py").write_text(FLOW)
    config = composed("param._target_=my_file.Velocity", cwd=tmp_path)
    assert config.param._target_ == "my_file.Velocity"
    done = genfw("param._target_=my_file.Velocity", "+param.foo=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "param.foo" in done.stderr
    done = genfw("param._target_=my_file.Velocty", cwd=tmp_path)
    assert "Velocity" in done.stderr


def test_a_name_that_is_taken_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "their_file.py").write_text(FLOW.replace('name="velocity"', 'name="flow"'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--cfg", "job", "param._target_=their_file.Velocity"]) == 2
    said = capsys.readouterr().err
    assert "param='flow' is already genfw.parameterization.Flow: give their_file.Velocity" in said
    assert len(said.splitlines()) == 1


OWN = """
import genfw


class Own(genfw.VAE):
    def __init__(self, encoder, decoder, likelihood, latents: int):
        super().__init__(encoder, decoder, likelihood, latents)


class Soft(genfw.CategoricalLikelihood):
    pass
"""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A file beside the person."""
    (tmp_path / "beside_me.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("beside_me", None)


def test_a_typed_likelihood_is_trusted_where_its_outputs_are_asked_for(beside):
    with session():
        config = compose(["model=vae", "likelihood._target_=beside_me.Soft"])
    assert config.decoder.outputs == 17 and config.trusted == ["beside_me.Soft"]


def test_a_model_that_knows_no_labels_may_stand_for_one_that_does(beside):
    with session():
        config = compose(["model=vae", "model._target_=beside_me.Own"])
        model = build(config.model)
        with pytest.raises(ConfigError, match=r"Add 'model.classes=null' to leave"):
            compose(["model=vae", "model._target_=beside_me.Own", "model.classes=10"])
        with pytest.raises(ConfigError, match=r"~model.classes: model.classes is null"):
            compose(["model=vae", "model._target_=beside_me.Own", "~model.classes"])
    assert type(model).__name__ == "Own" and config.encoder.classes is None


@pytest.mark.parametrize(
    ("group", "interface"), [("param", "Parameterization"), ("likelihood", "Likelihood")]
)
def test_a_class_is_of_the_kind_of_its_group(group, interface, beside):
    chosen = {group: {"_target_": "beside_me.Own"}, "trusted": ["beside_me"]}
    with pytest.raises(ConfigError, match=rf"{group}._target_=beside_me.Own: .*genfw.{interface}"):
        implemented(OmegaConf.create(chosen))
    implemented(OmegaConf.create({"model": {"_target_": "genfw.VAE"}, "guidance": None}))


@pytest.mark.parametrize("group", ["callbacks", "metrics"])
def test_metrics_are_callbacks(group, beside):
    groups = {"callbacks": {"off": None}, "metrics": {}, "trusted": ["torchmetrics"]}
    groups[group] = {"ink": {"_target_": "torchmetrics.MeanMetric"}}
    with pytest.raises(ConfigError, match=rf"{group}.ink._target_=.*a Lightning Callback.*a Mean"):
        make_callbacks(OmegaConf.create(groups))


# ---- examples/plugin, which has laws of its own --------------------------------------------------


@pytest.fixture
def example(monkeypatch):
    """As pip would install it, also where its classes were imported before without its YAML."""
    store = copy.deepcopy(ConfigStore.instance().repo)
    store.get("model", {}).pop("mixture_vae.yaml", None)
    monkeypatch.setattr(ConfigStore.instance(), "repo", store)
    monkeypatch.syspath_prepend(ROOT / "examples" / "plugin")
    project = tomllib.loads((ROOT / "examples" / "plugin" / "pyproject.toml").read_text())
    (announced,) = project["project"]["entry-points"][plugins.GROUP].items()
    monkeypatch.setattr(plugins, "installed", lambda: [EntryPoint(*announced, plugins.GROUP)])
    return announced[1]


def test_model_of_the_example_is_built_from_its_file(example):
    with session():
        model = build(compose(["model=mixture_vae", "model.components=3"]).model)
    assert model.elbo(torch.zeros(2, 1, 8, 8).long()).total.shape == (2,)
    assert "3 normals, z in R^16" in repr(model)


def test_file_of_the_example_names_real_arguments(example):
    (folder,) = plugins.conf_folders()
    (target,) = (each for each in ConfFiles([folder]).files if each.startswith(example))
    said = ConfFiles([folder]).schema(target).arguments
    assert [*from_signature(locate(target, [example])).arguments] == [*said]


def test_class_of_the_example_without_a_file_has_its_signatures_defaults(example):
    module = importlib.import_module(example)
    assert plugins.defaults(module.Blend) == {
        "_target_": "genfw_mixture.blend.Blend",
        "power": 2.0,
    }


# ---- a conf folder of one's own, --config-dir ----------------------------------------------------


COPIED = {
    "model": "vdm",
    "param": "v",
    "schedule": "linear",
    "net": "conv",
    "likelihood": "bins",
    "sampler": "ddim",
    "grid": "karras",
    "times": "log_snr",
    "guidance": "none",
    "estimator": "ode",
    "objective": "elbo",
    "optimizer": "adamw",
    "metrics": "none",
}


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A folder with an option `own` in every group, a copy of one of genfw's."""
    monkeypatch.chdir(tmp_path)
    for group, option in COPIED.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        text = (conf_folder() / group / f"{option}.yaml").read_text()
        (tmp_path / "conf" / group / "own.yaml").write_text(text)
    return tmp_path / "conf"


def test_a_folder_may_be_named_in_three_ways(conf, monkeypatch):
    monkeypatch.syspath_prepend(conf.parent)
    for each in (conf, "conf", f"'file://{conf}'", "pkg://conf"):
        assert searched(["seed=1", f"hydra.searchpath=[{each}]"]) == [conf]


def test_every_group_may_have_options_there(conf, capsys):
    copies = [f"{group}=own" for group in COPIED]
    assert main([f"--config-dir={conf}", "--cfg", "job", *copies]) == 0
    composed = OmegaConf.create(capsys.readouterr().out)
    for group in {*COPIED} - {"guidance", "metrics"}:
        said = OmegaConf.load(conf / group / "own.yaml")
        assert composed[group]._target_ == said.get(group, said)._target_


def test_help_names_them(conf, capsys):
    for by in ("--config-dir=conf", "hydra.searchpath=[conf]"):
        assert main([by, "--help", "seed=1"]) == 0
        assert len(re.findall(r"  \*?own\b", capsys.readouterr().out)) >= len(COPIED)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("param=owm", "Did you mean param=own?"),
        ("model=own param=own sampler=owm", "Did you mean sampler=own?"),
        ("model=vae param=own", "It belongs to model=own, model=vdm"),
        ("param=own param.x=1", "param.x: there is no such key"),
    ],
)
def test_advice_knows_them(wrong, said, conf, capsys):
    assert main(["hydra.searchpath=[conf]", "--cfg", "job", *wrong.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_folder_is_one_sentence(conf, capsys):
    nope = ("--config-dir=nope", "--config-dir=nope --help", "hydra.searchpath=[nope]")
    for by in (*nope, "hydra.searchpath=[pkg://no_such.conf]"):
        assert main(by.split()) == 2
        said = capsys.readouterr().err
        assert "there is no folder" in said and len(said.splitlines()) == 1
    assert runs.command(runs.read, ["run=.", "--config-dir=nope"]) == 2
    assert "there is no folder nope" in capsys.readouterr().err
    assert main(["hydra.searchpath=conf"]) == 2
    assert "expected a list" in capsys.readouterr().err


def test_every_command_looks_there(conf, monkeypatch):
    given = []
    monkeypatch.setattr(resume, "resume", given.append)
    for by in ("--config-dir=conf", "--config-dir conf", "-cd conf"):
        assert main(["resume=.", *by.split()]) == 0
        assert runs.command(given.append, ["resume=.", *by.split()]) == 0
    expected = ["resume=.", f"hydra.searchpath=['{conf}']"]
    assert given == [expected] * 6
    assert evaluate.named(Bound(), "best", expected[1:]) == evaluate.named(Bound(), "best", [])


def test_what_is_chosen_anew_of_a_run_may_be_there(conf):
    with session():
        config = unchecked([])
    with open_dict(config):
        config.pop("hydra")
    OmegaConf.save(config, "config.yaml", resolve=True)
    anew = ["hydra.searchpath=[conf]", "estimator=own", "estimator.tolerance=0.1"]
    estimator = runs.read(["run=.", *anew], {}, "")[1].estimator
    assert (estimator._target_, estimator.tolerance) == ("genfw.ProbabilityFlow", 0.1)


SHORT = ("trainer.max_steps=2", "estimator.strata=2", "logger=csv", "metrics=none")
SMALL = ("sampler.steps=2", "net.width=8", "net.blocks=1", "hydra.run.dir=run")


@pytest.mark.slow
def test_plugin_runs(package, tmp_path):
    done = genfw("param=velocity", *SHORT, *SMALL, site=package, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test/nll"] > 0


@pytest.mark.slow
def test_file_runs_and_in_a_sweep_too(tmp_path):
    (tmp_path / "my_file.py").write_text(FLOW)
    done = genfw("--multirun", "param._target_=my_file.Velocity", *SHORT, *SMALL[:-1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results.json")
    assert json.loads(results.read_text())["test/nll"] > 0
    assert list(OmegaConf.load(results.parent / "config.yaml").trusted) == ["my_file.Velocity"]

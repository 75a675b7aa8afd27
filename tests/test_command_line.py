"""A wrong command line gets a short answer that names what was meant, before torch is imported."""

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ranks
import torch
from omegaconf import OmegaConf

from genfw.__main__ import main
from genfw.train import help
from genfw.train.compose import compose
from genfw.train.config import allowed, build, conf_folder, locate, nearest
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.jobs import quoted
from genfw.train.overrides import jobs
from genfw.train.run_folder import abandon, named_anew, own_folder
from genfw.train.session import session

ROOT = Path(__file__).parents[1]


def genfw(*arguments, cwd=ROOT, **environment):
    """python -m genfw, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "genfw", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


# (command line, what the answer must contain)
WRONG = [
    # names of options, groups and keys
    ("param=epz", ["param=eps", "categorical, edm, eps, flow, logistic_mixture, score, v, x0"]),
    ("schedule=cosin", ["schedule=cosine", "linear"]),
    ("objective=ebo", ["objective=elbo"]),
    ("data=digit", ["data=digits", "mnist"]),
    ("param=linear", ["schedule=linear"]),
    ("experiment=nope", ["digits_vae"]),
    ("callbacks=null", ["none"]),
    ("modle=vdm", ["model"]),
    ("trainer.max_step=5", ["trainer.max_steps"]),
    ("callbacks.ema.deca=0.1", ["callbacks.ema.decay"]),
    ("lr=0.1", ["optimizer.lr"]),
    ("metrics.ink._target_=mine.Ink", ["metrics.ink", "add a node: '+metrics.ink._target_=mine"]),
    ("hydra.run.dri=x", ["hydra.run.dri"]),
    # groups that belong to another model
    ("model=vae param=x0", ["model=vae", "net@encoder", "likelihood", "model=vdm"]),
    ("model=vae sampler.steps=4", ["sampler", "model=vdm"]),
    ("model=vae net=mlp", ["net@decoder", "model=vdm"]),
    ("net@encoder=conv_encoder", ["model=vae"]),
    # keys added with +
    ("+trainer.foo=1", ["trainer.foo", "max_steps"]),
    ("+trainer.max_step=1", ["trainer.max_steps"]),
    ("+model.foo=1", ["model.foo", "steps"]),
    ("+optimizer.wait_decay=1", ["optimizer.weight_decay"]),
    ("++net.widht=1", ["net.width"]),
    ("+foo=1", ["foo"]),
    ("+callbacks.mine.x=1", ["callbacks.mine"]),
    ("+data.source.foo=1", ["data.source.foo"]),
    # types
    ("optimizer.lr=abc", ["optimizer.lr", "float", "abc"]),
    ("schedule.log_snr_max=[1]", ["schedule.log_snr_max", "float"]),
    ("schedule.log_snr_min=null", ["schedule.log_snr_min", "float", "null"]),
    ("seed=1.5", ["seed", "int"]),
    ("net.width=4.5", ["net.width", "int"]),
    ("net=conv net.attention=1", ["net.attention", "bool"]),
    ("model.steps=many", ["model.steps", "int or None"]),
    ("optimizer.betas=0.9", ["optimizer.betas", "list"]),
    ("optimizer.betas=[a,b]", ["optimizer.betas[0]", "float"]),
    ("data.shape=3", ["data.shape", "list"]),
    ("data.binarize=dynamyc", ["dynamic"]),
    ("model.denoiser.network=foo", ["model.denoiser.network"]),
    ("trusted=os", ["trusted", "[os]"]),
    # what must be given
    ("data=folder", ["data.path", "data.shape", "data.classes"]),
    ("seed=???", ["seed", "must be given"]),
    ("~schedule.log_snr_max", ["schedule.log_snr_max"]),
    ("~seed", ["seed"]),
    # syntax and flags
    ("seed", ["seed", "key=value"]),
    ("seed=[1", ["seed=[1"]),
    ("param=eps,x0", ["--multirun"]),
    ("seed=${nope}", ["seed", "nope"]),
    # runs that cannot be
    ("seed=-1", ["seed=-1", "at least 0"]),
    ("optimizer.lr=-1", ["optimizer.lr=-1"]),
    ("optimizer.weight_decay=-0.1", ["optimizer.weight_decay=-0.1", "at least 0"]),
    ("trainer.max_steps=-1", ["no end", "trainer.max_epochs"]),
    ("trainer.max_steps=-5", ["trainer.max_steps=-5", "no end"]),
    ("trainer.max_steps=0", ["trainer.max_steps=0", "at least 1"]),
    ("trainer.accumulate_grad_batches=0", ["accumulate_grad_batches=0", "at least 1"]),
    ("trainer.gradient_clip_val=-1", ["gradient_clip_val=-1", "at least 0"]),
    ("trainer.val_check_interval=0", ["val_check_interval=0", "at least 1"]),
    ("trainer.val_check_interval=-0.5", ["val_check_interval=-0.5"]),
    ("trainer.log_every_n_steps=0", ["log_every_n_steps=0", "at least 1"]),
    ("trainer=ddp trainer.devices=0", ["trainer.devices=0", "at least 1"]),
    ("trainer.strategy=fsdp", ["trainer.strategy=fsdp", "use trainer=fsdp", "trainer=ddp"]),
    ("trainer=fsdp trainer.precision=16-mixed", ["precision=16-mixed", "bf16-mixed"]),
    (
        "trainer=fsdp optimizer._target_=torch.optim.Rprop ~optimizer.betas ~optimizer.eps "
        "~optimizer.weight_decay ~optimizer.amsgrad ~optimizer.fused",
        ["torch.optim.Rprop", "AdamW", "trainer=ddp"],
    ),
    ("data.batch_size=0", ["data.batch_size=0", "at least 1"]),
    ("data.eval_batch_size=-1", ["data.eval_batch_size=-1", "at least 1"]),
    ("data.num_workers=-1", ["data.num_workers=-1", "at least 0"]),
    ("optimizer.betas=[0.9,1]", ["optimizer.betas[1]=1", "number in [0, 1)"]),
    ("optimizer.lr=nan", ["optimizer.lr=nan", "at least 0"]),
    ("sampler.steps=0", ["sampler.steps=0", "integer of at least 1"]),
    ("sampler=unipc sampler.order=4", ["sampler.order=4", "in [1, 3]"]),
    ("model.steps=0", ["model.steps=0", "at least 1"]),
    ("net.blocks=-1", ["net.blocks=-1", "at least 1"]),
    ("net=unet net.multipliers=[1,0]", ["net.multipliers[1]=0", "at least 1"]),
    ("net.dropout=1.5", ["net.dropout=1.5", "in [0, 1]"]),
    ("model=vae model.latents=0", ["latents=0", "at least 1"]),
    ("model=mhvae model.latents=[4,0]", ["latents", "0", "at least 1"]),
    ("estimator.sets=1", ["estimator.sets=1", "at least 2"]),
    ("validation_estimator.strata=0", ["validation_estimator.strata=0", "at least 1"]),
    ("grid=karras grid.rho=inf", ["grid.rho=inf", "above 0"]),
    ("times=importance times.floor=0.0", ["times.floor=0.0", "in (0, 1]"]),
    ("callbacks.ema.decay=1.5", ["callbacks.ema.decay=1.5", "in [0, 1)"]),
    ("callbacks.progress.every=0", ["callbacks.progress.every=0", "at least 1"]),
    ("callbacks.pictures.every=-1", ["callbacks.pictures.every=-1", "at least 0"]),
    ("metrics.fid.samples=0", ["metrics.fid.samples=0", "at least 2"]),
    ("checkpoint.every=0", ["checkpoint.every=0", "at least 1"]),
    ("checkpoint.failures=0", ["checkpoint.failures=0", "at least 1"]),
    ("trainer.precision=fp12", ["trainer.precision=fp12", "bf16-mixed", "32-true"]),
    ("trainer.limit_train_batches=-1", ["limit_train_batches=-1", "at least 0"]),
    ("trainer.val_check_interval=2.5", ["val_check_interval=2.5", "integer"]),
    ("data.raw_bins=1", ["data.raw_bins=1", "in [2, 256]"]),
    ("--multirun sampler.steps=2,0", ["sampler.steps=0", "at least 1"]),
    ("hydra.run.dir=/proc/genfw", ["hydra.run.dir", "cannot make the folder /proc/genfw"]),
    ("scheduler.warmup=-5", ["scheduler.warmup=-5", "at least 0"]),
    ("trainer.enable_checkpointing=false", ["enable_checkpointing"]),
    ("net.classes=10", ["net.classes=10", "model.classes=null", "set model.classes"]),
    ("model=mhvae model.encoders.1.classes=10", ["encoders[1].classes=10", "model.classes=null"]),
    ("model.classes=7", ["model.classes=7", "10 classes", "model.classes=10"]),
    ("model.classes=10 label_dropout=1", ["label_dropout=1", "[0, 1)"]),
    ("guidance=classifier_free", ["guidance=classifier_free", "conditional", "model.classes=null"]),
    ("model.classes=10 label_dropout=0.0 guidance=classifier_free", ["label_dropout=0", "0.1"]),
    ("guidance=classifier", ["guidance.classifier must be given"]),
    ("guidance=autoguidance", ["guidance.weaker must be given"]),
    ("model=vae guidance=classifier_free", ["guidance", "model=vdm"]),
    ("trainer.precision=bf16-true", ["precision=bf16-true", "float32", "bf16-mixed"]),
    ("trainer.precision=16-true", ["precision=16-true", "float32", "bf16-mixed"]),
    ("trainer.precision=transformer-engine", ["float32", "bf16-mixed"]),
    ("data=mnist data.path=/nope", ["data.path=/nope", "no such folder"]),
    ("--multrun", ["--multrun", "--help"]),
    # other commands
    (
        "run=outputs/one",
        ["genfw.sample (or .evaluate, .export) run=outputs/one", "resume=outputs/"],
    ),
    ("run=one n=3", ["run=one: python -m genfw trains", "genfw.sample"]),
    ("evaluate run=one", ["evaluate: python -m genfw trains", ".evaluate, .export) run=one"]),
    ("resume=one --multirun", ["--multirun: not understood", "python -m genfw sweep=<folder>"]),
    ("--config-path=/nope", ["/nope"]),
    ("--config-name=nope", ["nope"]),
    ("--multirun param=eps,epz", ["param=eps"]),
    (
        "--multirun schedule=linear,learned objective=elbo,simple",
        ["schedule=learned objective=simple"],
    ),
    ("trainer.limit_train_batches=0", ["limit_train_batches=0", "at least one batch"]),
    ("trainer.limit_test_batches=0.0", ["limit_test_batches=0", "at least one batch"]),
    ("--multirun seed=0 hydra.launcher.n_jobs=0", ["n_jobs=0", "at least 1"]),
    ("sweep=/nope", ["/nope", "sweep.json"]),
    ("sweep=/nope seed=1", ["seed=1", "stay what they were"]),
    ("--multirun trainer.max_steps=5,many", ["trainer.max_steps", "int"]),
    # what may be imported
    ("param._target_=nofile.Flow", ["nofile"]),
    ("param._target_=genfw.Epz", ["Eps"]),
    ("schedule._target_=genfw.Linear", ["~schedule.shift", "beta_min"]),
    # combinations
    ("likelihood.bins=3", ["17"]),
    ("likelihood=bernoulli", ["data.binarize"]),
    ("likelihood=categorical", ["param=categorical", "likelihood=bins"]),
    ("param=v likelihood=categorical", ["param=categorical", "genfw.V"]),
    ("param=categorical likelihood=bernoulli data.binarize=dynamic", ["likelihood=bernoulli"]),
    ("param=categorical param.bins=3", ["param.bins=3", "17"]),
    ("schedule.log_snr_min=-inf", ["finite", "-inf"]),
    ("schedule.log_snr_min=-100", ["zero in float32", "param=v"]),
    ("schedule.log_snr_max=-11", ["log_snr_max=-11", "log_snr_min=-10", "the larger"]),
    ("param=x0 schedule.log_snr_max=800", ["log_snr_max=800", "zero in float32"]),
    ("schedule=sigmoid schedule.start=3", ["schedule.start=3", "schedule.end=3.0", "the smaller"]),
    ("schedule=sigmoid schedule.start=5.0 schedule.end=-5.0", ["start=5.0", "end=-5.0"]),
    ("schedule=sigmoid schedule.start=-inf", ["schedule.start=-inf", "finite"]),
    ("schedule=linear schedule.beta_min=30", ["schedule.beta_min=30", "beta_max=20.0"]),
    ("schedule=cosine schedule.shift=inf", ["schedule.shift=inf", "finite"]),
    ("schedule=laplace schedule.mean=inf", ["schedule.mean=inf", "finite"]),
    ("data.bins=3", ["data.bins=3", "17 values", "data.raw_bins"]),
    ("data.bins=17 data.binarize=dynamic", ["data.bins=17", "2 values", "data.binarize=dynamic"]),
    ("objective=sigmoid objective.bias=nan", ["objective.bias=nan", "a number"]),
    ("model.shape=[1,4,4]", ["model.shape=[1, 4, 4]", "[1, 8, 8]", "alone"]),
    ("param=categorical net.out_channels=3", ["net.out_channels=3", "reads 17"]),
    ("estimator=ode estimator.probe=normal", ["estimator.probe", "rademacher, gaussian"]),
    ("likelihood=discretized_logistic", ["bins"]),
    ("likelihood=logistic_mixture", ["bins"]),
    ("model=vae likelihood=bins", ["categorical"]),
    ("model=vae net@encoder=mlp", ["net@encoder", "mlp_encoder"]),
    ("net=unet model=vdm +net.latents=2", ["net.latents"]),
    ("model=vdm net=mlp_decoder +model.latents=2", ["model.latents"]),
    ("model=vdm net=conv_encoder net.latents=2", ["net cannot be ConvEncoder", "net=conv"]),
    ("model=vae objective=simple", ["objective=elbo"]),
    ("model=vdm objective=iwae", ["iwae", "continuous time", "model.steps=100"]),
    ("model=vdm objective=dreg objective.k=5", ["dreg", "continuous time", "objective=elbo"]),
    ("model=vdm objective=free_bits", ["free_bits", "noise", "objective=elbo"]),
    ("model=vdm objective=l2", ["l2", "noise", "objective=elbo"]),
    ("model=vae objective=free_bits objective.per=level", ["objective.per", "batch_level"]),
    ("model=mhvae objective=free_bits objective.per=batch_dimension", ["per=batch_level"]),
    ("model=mhvae model.latents=16", ["model.latents=16", "each of 2 levels", "[16,8]"]),
    ("model=mhvae model.latents=[16]", ["model.latents=[16]", "each of 2 levels", "encoders"]),
    ("model=mhvae model.latents=[16,a]", ["model.latents[1]", "int or list", "'a'"]),
    ("model=mhvae model.latents=[[4,4.5,4],8]", ["model.latents[0][1]", "int", "4.5"]),
    ("model=mhvae model.latents=[[4,0,4],8]", ["model.latents[0][1]=0", "at least 1"]),
    ("model=vae model.latents=[4,a,4]", ["model.latents[1]", "expected int", "'a'"]),
    # networks that do not fit their neighbours
    ("model=vae encoder.latents=8", ["encoder.latents=8", "z_1 has the size 16", "alone"]),
    ("model=vae decoder.latents=[8]", ["decoder.latents=[8]", "z_1 has the size 16", "alone"]),
    ("model=vae decoder.outputs=3", ["decoder.outputs=3", "likelihood reads 17"]),
    ("model=vae encoder.shape=[1,4,4]", ["encoder.shape=[1, 4, 4]", "[1, 8, 8] (data.shape)"]),
    ("model=mhvae decoder.latents=5", ["decoder.latents=5", "z_1 has the size 16"]),
    (
        "model=mhvae model.decoders.1.latents=5",
        ["decoders[1].latents=5", "z_2 has the size 8"],
    ),
    ("model=mhvae model.encoders.1.shape=5", ["model.encoders[1].shape=5", "z_1 has the size 16"]),
    ("model=mhvae model.decoders.1.outputs=3", ["model.decoders[1].outputs=3", "2 numbers"]),
    ("model=hvae model.ladder.outputs=2", ["model.ladder.outputs=2", "likelihood reads 17"]),
    ("model=hvae model.ladder.shape=[1,4,4]", ["model.ladder.shape=[1, 4, 4]", "[1, 8, 8]"]),
    ("model=mhvae model.decoders=[]", ["model.latents=[16, 8]", "these are 2 and 0"]),
    ("model=hvae objective=dreg", ["objective=dreg", "top down", "use objective=iwae"]),
    ("model=hvae objective=stl", ["objective=stl", "top down", "use objective=elbo"]),
    ("model=hvae objective=l2", ["objective=l2", "likelihood=discretized_gaussian"]),
    ("model=vae objective=iwae objective.k=many", ["objective.k", "int"]),
    ("model=vae estimator=ode", ["estimator=ode", "vae", "importance_weighted"]),
    ("estimator=ode estimator.k=4 data=cifar10", ["estimator.k=4", "D=3072", "exact_dims=1024"]),
    ("estimator=ode estimator.k=4 estimator.exact_dims=0", ["estimator.k=1"]),
    ("likelihood=gaussian", ["17", "likelihood=bins or discretized_gaussian"]),
    ("model=vae likelihood=gaussian", ["17", "likelihood=discretized_gaussian"]),
    ("times=importance model.steps=5", ["times=importance", "model.steps=5", "times=uniform"]),
    ("--multirun seed=0,1 hydra/launcher=ray", ["pip install hydra-ray-launcher"]),
    ("--multirun seed=0,1 hydra/launcher=loocal", ["loocal", "local"]),
]


@pytest.mark.parametrize(
    "model", sorted(file.stem for file in (conf_folder() / "model").glob("*.yaml"))
)
def test_every_model_trains_where_nothing_else_was_imported(tmp_path, model):
    """As from a shell: these tests have imported all of genfw."""
    chosen = ranks.MODELS.get(model, (f"model={model}",))
    small = (*ranks.SMALL, *chosen, "trainer.max_steps=1", "trainer.limit_val_batches=1")
    ended = ranks.run(*small, f"hydra.run.dir={tmp_path}/run")
    assert ended.codes == [0], ended.said


@pytest.mark.parametrize(("command", "said"), WRONG, ids=[command for command, _ in WRONG])
def test_wrong_command(command, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert len((out + err).splitlines()) <= 8
    assert max(map(len, err.splitlines())) < 400
    for words in said:
        assert words in err
    assert not list(tmp_path.iterdir()), "a run that cannot start leaves no folder"


LATE = [  # only the data themselves can tell, or a class that has no file of its own
    ("data.batch_size=5000", ["a step takes 5000 images, train has 1000", "data.batch_size"]),
    ("data.classes=3", ["expected labels 0..2", "data.classes=3"]),
    ("data.raw_bins=4", ["pixels 0..3", "found 16"]),
    ("trainer.gradient_clip_algorithm=length", ["gradient_clip_algorithm"]),
]


@pytest.mark.parametrize(("command", "said"), LATE, ids=[command for command, _ in LATE])
def test_what_is_found_late_leaves_no_folder_either(command, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "trainer.accelerator=cpu"]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and len((out + err).splitlines()) <= 8
    for words in said:
        assert words in err
    assert not list((tmp_path / "outputs").iterdir())


def test_a_folder_that_was_named_or_has_more_in_it_stays(tmp_path):
    config = OmegaConf.create({"run": {"dir": str(tmp_path)}, "anew": {"dir": "${start:}"}})
    assert not named_anew(config, "run.dir") and named_anew(config, "anew.dir")
    for name, stays in (("config.yaml", False), ("metrics.csv", True)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        abandon(folder)
        assert folder.exists() is stays


RIGHT = [
    "optimizer.lr=1",
    "trainer.devices=2",
    "trainer.devices=-1",
    "trainer.val_check_interval=0.5",
    "trainer.devices=[0,1]",
    "trainer.limit_val_batches=0.5",
    "trainer.precision=bf16-mixed",
    "trainer.precision=64-true",
    "model.steps=1000",
    "callbacks.ema=null",
    "~callbacks.ema",
    "~logger.wandb",
    "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor",
    "times=log_snr",
    "model.classes=${data.classes}",
    "model.classes=10 guidance=classifier_free guidance.scale=2 guidance.interval=[-3,3]",
    "model=vae model.classes=10",
    "model=mhvae model.classes=10",
    "model=hvae model.classes=10",
    "data.binarize=dynamic",
    "model=vae data.binarize=static likelihood=bernoulli",
    "model=vae net@encoder=mlp_encoder net@decoder=mlp_decoder model.latents=4",
    "model=vae objective=free_bits objective.per=example_level objective.nats=1",
    "model=vae model.latents=[4,4,4]",
    "model=mhvae model.latents=[[4,4,4],16]",
    "model=mhvae model.latents=[[4,4,4],[8,2,2],4]",
    "model=hvae posterior=full",
    "model=hvae objective=free_bits objective.per=batch_dimension",
    "model=vdm model.steps=4 objective=iwae objective.k=2",
    "experiment=digits_vae seed=3",
    "experiment=digits_vdm param=x0",
    "param=edm param.data_std=0.4",
    "param=v schedule=linear schedule.log_snr_min=-100",
    "param=logistic_mixture param.components=4 net=mlp",
    "experiment=digits_vdm param=categorical",
    "param=categorical likelihood=bins",
    "schedule._target_=genfw.LogLinear ~schedule.shift",
    "estimator=ode estimator.k=4",
    "data=cifar10 estimator=ode",
    "times=antithetic model.steps=5",
    "likelihood=discretized_gaussian",
    "model=vae likelihood=discretized_gaussian",
]


@pytest.mark.parametrize("command", RIGHT)
def test_right_command(command):
    with session():
        compose(command.split())


@pytest.mark.parametrize("latents", ["[8,4]", "[8,6,4]", "[[2,4,4],8,6,4]"])
def test_a_chain_has_a_level_for_each_of_its_latents(latents):
    with session():
        config = compose(["model=mhvae", f"model.latents={latents}", "model.encoders.1.hidden=[5]"])
    model, x = build(config.model), torch.zeros(2, 1, 8, 8).long()
    assert model.levels == latents.count(",") + 1 - 2 * latents.count("[2")
    assert len(model.elbo(x).levels) == model.levels - 1
    assert all(each.layers[0].out_features == 5 for each in model.encoders[1:])


def test_help_is_quick_and_complete():
    started = time.monotonic()
    done = genfw("--help")
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert seconds < 5  # 0.3 s on a quiet machine
    for word in ("model=vae", "*eps", "*cosine", "digits", "outputs/", "--multirun"):
        assert word in done.stdout
    assert len(re.findall(r"^  python -m genfw\b(?! \[)", done.stdout, re.M)) == 5
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("arguments", [["--help"], ["param=epz"], ["--cfg", "job"], ["+model.x=1"]])
def test_no_torch_before_a_configuration_is_right(arguments):
    code = (
        "import sys\nfrom genfw.__main__ import main\n"
        f"main({arguments})\n"
        "heavy = {'torch', 'lightning', 'wandb', 'torchmetrics', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_help_names_every_option():
    text = help.text([conf_folder()])
    for file in conf_folder().glob("*/*.yaml"):
        assert re.search(rf"[ *]{file.stem}\b", text), file


def test_the_examples_of_the_help_are_right():
    commands = re.findall(r"^  python -m genfw(?! \[)(.*?)(?:\s{2,}|$)", help.TEXT, re.M)
    assert len(commands) == 5
    with session():
        for command in commands:
            for job in jobs(command.replace("--multirun", "").split()):
                compose(job)


def test_cfg_prints_the_configuration(capsys):
    assert main(["--cfg", "job", "param=v"]) == 0
    assert OmegaConf.create(capsys.readouterr().out).param._target_ == "genfw.V"


def test_nearest():
    known = ["trainer.max_steps", "trainer.min_steps", "optimizer.lr", "seed"]
    assert nearest("trainer.max_step", known) == "trainer.max_steps"
    assert nearest("lr", known) == "optimizer.lr"
    assert nearest("sede", known) == "seed"
    assert nearest("trainer.foo", known) is None


def test_jobs_are_all_combinations():
    assert jobs(["a=1,2", "b=x", "c=range(2)"]) == [
        ["a=1", "b=x", "c=0"],
        ["a=1", "b=x", "c=1"],
        ["a=2", "b=x", "c=0"],
        ["a=2", "b=x", "c=1"],
    ]


# ---- what may be imported ------------------------------------------------------------------------

UNTRUSTED = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.open",
    "webbrowser.open",
    "torch.load",
    "torch.hub.load",
    "pickle.loads",
    "lightning.pytorch.LightningModule.load_from_checkpoint",
    "genfwx.Eps",
    "torch.optimx.AdamW",
    "lightning.pytorch.callbacks",
    "os",
    "genfw..os",
]
# Allowed by their first words, and refused for where they lead.
SMUGGLED = [
    "genfw.train.config.importlib.import_module",
    "genfw.train.jobs.subprocess.Popen",
    "genfw.train.module.LatentModule.load_from_checkpoint",
    "genfw.train.config.build",
    "torch.optim.optimizer.torch.load",
    "lightning.pytorch.callbacks.model_checkpoint.os.system",
    "lightning.pytorch.loggers.wandb.os.system",
]


@pytest.mark.parametrize("target", UNTRUSTED + SMUGGLED)
def test_untrusted_target_is_not_built(target):
    config = OmegaConf.create({"node": {"_target_": target}})
    with pytest.raises(ConfigError):
        build(config.node)


@pytest.mark.parametrize("target", UNTRUSTED)
def test_untrusted_target_in_a_file_is_refused(target, tmp_path, capsys):
    folder = tmp_path / "conf"
    shutil.copytree(conf_folder(), folder)
    (folder / "param" / "evil.yaml").write_text(f"_target_: {target}\n")
    assert main(["--config-path", str(folder), "--cfg", "job", "param=evil"]) == 2
    assert "trust" in capsys.readouterr().err


def test_refused_module_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="trusted"):
        locate("evil.Flow")
    with pytest.raises(SystemExit):
        locate("evil.Flow", trusted=["evil"])


def test_trust_is_by_whole_names():
    assert allowed("mine.flows.Flow", ["mine"])
    assert allowed("mine.flows.Flow", ["mine.flows.Flow"])
    assert not allowed("mine.flows.Flow", ["min", "mine.flow"])


# ---- building ------------------------------------------------------------------------------------


def test_interpolation_builds_twice():
    config = OmegaConf.create(
        {
            "schedule": {"_target_": "genfw.LogLinear", "log_snr_max": 5.0, "log_snr_min": -5.0},
            "both": {"a": "${schedule}", "b": "${schedule}"},
        }
    )
    both = build(config.both)
    assert type(both["a"]) is type(both["b"])
    assert both["a"] is not both["b"]


def test_partial_waits_and_given_arguments_win():
    node = {"_target_": "genfw.LogLinear", "_partial_": True, "log_snr_max": 5.0}
    made = build(OmegaConf.create(node), log_snr_max=6.0)(log_snr_min=-1.0)
    assert (made.log_snr_max, made.log_snr_min) == (6.0, -1.0)


def test_a_refused_value_names_its_place():
    config = OmegaConf.create({"sampler": {"_target_": "genfw.Ancestral", "steps": 0}})
    with pytest.raises(ConfigError, match=r"sampler \(genfw.Ancestral\).*at least 1"):
        build(config.sampler)


# ---- run folders ---------------------------------------------------------------------------------


def test_twenty_starts_in_a_second_have_twenty_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = iter(["a", "a", "a", "b"])  # even where the random names repeat
    OmegaConf.register_new_resolver("start", lambda: next(names), use_cache=True, replace=True)
    configs = [OmegaConf.create({"run": {"dir": "outputs/${start:}"}}) for _ in range(2)]
    assert [own_folder(each, "run.dir").name for each in configs] == ["a", "b"]
    from genfw.train.run_folder import start_name

    twice = iter([f"{n // 2}" for n in range(60)])  # two at a time that want the same
    for names in (lambda: next(twice), start_name):
        OmegaConf.register_new_resolver("start", names, use_cache=True, replace=True)
        configs = [OmegaConf.create({"run": {"dir": "outputs/${start:}"}}) for _ in range(20)]
        with ThreadPoolExecutor(20) as pool:
            folders = list(pool.map(lambda each: own_folder(each, "run.dir"), configs))
        assert len(set(folders)) == 20
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[a-z2-7]{6}", f.name) for f in folders)


def test_named_folder_may_exist_but_not_be_a_file_nor_hold_a_run(tmp_path, monkeypatch):
    config = OmegaConf.create({"run": {"dir": str(tmp_path)}})
    assert own_folder(config, "run.dir") == tmp_path
    (tmp_path / "config.yaml").touch()
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}
    for name, value in torchrun.items():  # of whose ranks the first one looks
        with pytest.raises(GenfwError, match="holds a run already"):
            own_folder(config, "run.dir")
        monkeypatch.setenv(name, value)
    with pytest.raises(GenfwError, match="holds a run already"):
        own_folder(config, "run.dir")
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        patch.setenv("LOCAL_RANK", "1")
        assert own_folder(config, "run.dir") == tmp_path
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # it starts the command again
    assert own_folder(config, "run.dir") == tmp_path
    (tmp_path / "file").touch()
    config.run.dir = str(tmp_path / "file")
    with pytest.raises(GenfwError, match="is a file"):
        own_folder(config, "run.dir")


def there(folder):
    return {each: each.is_dir() or each.read_text() for each in folder.rglob("*")}


def failed(folder, *more):
    """What a run leaves that fails before its first checkpoint, and more."""
    for name in (".hydra/config.yaml", "genfw.log", "run.lock", "config.yaml", "error.txt", *more):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.mkdir() if name.endswith("/") else file.write_text(name)
    return OmegaConf.create({"run": {"dir": str(folder)}})


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("more", ["checkpoints/", "output.txt", "checkpoints/last.ckpt.tmp"])
def test_a_folder_whose_run_never_began_is_free_again(more, killed, tmp_path):
    """Whether it failed or was killed, be it while it wrote its first checkpoint."""
    config = failed(tmp_path / "run", more)
    if killed:
        (tmp_path / "run" / "error.txt").unlink()
    assert own_folder(config, "run.dir") == tmp_path / "run"
    stays = {".hydra", "genfw.log", "run.lock"} | ({more} & {"output.txt"})
    assert {each.name for each in (tmp_path / "run").iterdir()} == stays
    assert [*tmp_path.iterdir()] == [tmp_path / "run"]


def test_what_a_failed_run_logged_is_set_aside(tmp_path, capsys):
    lost = {}
    for n in (1, 2):
        config = failed(tmp_path / "run", "metrics.csv", "wandb/offline-run-1/run.wandb")
        assert own_folder(config, "run.dir") == tmp_path / "run"
        aside = tmp_path / f"run.before-{n}"
        assert f"set aside in {aside}" in capsys.readouterr().out
        lost[n] = {str(file.relative_to(aside)) for file in aside.rglob("*") if file.is_file()}
    expected = {"config.yaml", "error.txt", "metrics.csv", "wandb/offline-run-1/run.wandb"}
    assert lost == {1: expected, 2: expected}
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    "more",
    [
        *("checkpoints/last.ckpt", "checkpoints/notes.txt", "results.json"),
        *("evaluation.json", "samples/000001.png", "notes.txt", ".git/config", "another/"),
    ],
)
def test_a_folder_with_anything_else_in_it_is_not(more, tmp_path):
    config = failed(tmp_path, more)
    before = there(tmp_path)
    with pytest.raises(ConfigError, match="holds a run already"):
        own_folder(config, "run.dir")
    assert there(tmp_path) == before


def test_nor_is_one_without_a_lock(tmp_path):
    """Which a run of ours has before anything else."""
    config = failed(tmp_path)
    (tmp_path / "run.lock").unlink()
    before = there(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a run already.* python -m genfw resume="):
        own_folder(config, "run.dir")
    assert there(tmp_path) == before


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOLCK])
def test_nor_one_where_another_process_may_be(number, tmp_path, monkeypatch):
    config = failed(tmp_path)
    before = there(tmp_path)

    def taken(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", taken)
    with pytest.raises(ConfigError, match="holds a run already"):
        own_folder(config, "run.dir")
    assert there(tmp_path) == before


def test_wrong_data_leave_the_folder_they_were_given_to_the_right_ones(tmp_path, capsys):
    given = ["trainer.accelerator=cpu", f"hydra.run.dir={tmp_path}"]
    assert main(["data.batch_size=5000", *given]) == 2
    assert (tmp_path / "config.yaml").exists() and (tmp_path / "error.txt").exists()
    own_folder(OmegaConf.create({"run": {"dir": str(tmp_path)}}), "run.dir")
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("name", ["plain", "a b", "it's", "a=b,c", "back\\slash", "[x]"])
def test_any_folder_name_survives_hydra(name, tmp_path):
    with session():
        config = compose([f"hydra.run.dir={quoted(tmp_path / name)}"])
    assert config.hydra.run.dir == str(tmp_path / name)


SHORT = ("trainer.max_steps=2", "estimator.strata=2", "logger=csv", "metrics=none")
SMALL = ("sampler.steps=2", "net.width=8", "net.blocks=1")


@pytest.mark.slow
def test_run_from_anywhere(tmp_path):
    done = genfw(*SHORT, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert {"results.json", "samples.png", ".hydra", "genfw.log"} <= {
        f.name for f in folder.iterdir()
    }


@pytest.mark.slow
def test_sweep_goes_on_after_a_failed_job(tmp_path):
    done = genfw(
        *("--multirun", "data.batch_size=2000,8", "data.name='a=b, c'"),
        *SHORT,
        *SMALL,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"job 0 \(data.batch_size=2000\): failed: .*batch", done.stdout), done.stdout
    assert "sweep=" in done.stderr, "the line to go on with"
    (sweep,) = (tmp_path / "multirun").iterdir()
    assert not (sweep / "0" / "results.json").exists()
    assert (sweep / "1" / "results.json").exists()
    assert OmegaConf.load(sweep / "1" / "config.yaml").data.name == "a=b, c"


TELL = """
import os, signal, time
import lightning.pytorch as L

class Tell(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)
"""


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_with_the_job_that_was_saved(tmp_path):
    """Its first job tells the sweep to stop, which tells the job."""
    (tmp_path / "mine.py").write_text(TELL)
    short = (*SHORT[1:], "trainer.max_steps=5", "trainer.accelerator=cpu", "model=vae")
    done = genfw(
        *("--multirun", "seed=0", "+callbacks.tell._target_=mine.Tell", *short), cwd=tmp_path
    )
    assert done.returncode == 143, done.stdout + done.stderr
    (sweep,) = (tmp_path / "multirun").iterdir()
    assert "job 0: interrupted" in done.stdout
    assert f"python -m genfw sweep={sweep.relative_to(tmp_path)}" in done.stderr
    done = genfw(f"sweep={sweep}", "trusted=[mine]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (sweep / "0.before-1").exists(), "it did not start anew"


@pytest.mark.slow
def test_wheel_carries_its_configuration(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("genfw", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    (source / "README.md").touch()
    subprocess.run([*command, "-w", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    done = genfw("--cfg", "job", "param=v", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert "genfw.V" in done.stdout
    assert (tmp_path / "site/hydra_plugins/genfw.py").is_file(), "where Hydra finds the launcher"
    packed = {
        p.relative_to(tmp_path / "site/genfw/conf")
        for p in (tmp_path / "site/genfw/conf").rglob("*.yaml")
    }
    assert packed == {p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml")}
    weights = (tmp_path / "site").rglob("*.safetensors")
    assert {p.name for p in weights} == {p.name for p in (ROOT / "genfw").rglob("*.safetensors")}

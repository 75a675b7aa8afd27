"""One run, from a composed configuration to a folder with everything that is worth keeping:

config.yaml             the configuration, all interpolations resolved
run.lock                held while the run is running
checkpoints/best.ckpt   best validation NLL; last.ckpt, previous.ckpt: the last two saves
metrics.csv             every logged number, row by row
wandb/, wandb_id.txt    the W&B run
samples/, denoising/    pictures during training
samples.png and others  pictures of the best weights
results.json            final numbers, flat
certificate.json        what was measured, of what, and how (genfw.estimators.report)
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

import genfw
from genfw.diffusion.denoiser import Denoiser, NetworkDenoiser
from genfw.diffusion.denoising import Denoises
from genfw.diffusion.guidance import Guide
from genfw.elbo import bits_per_dim
from genfw.estimators.estimator import Estimator
from genfw.estimators.report import Certificate, plain
from genfw.model import LatentModel
from genfw.models.vdm import VDM
from genfw.objective import Objective
from genfw.registry import Registered
from genfw.train.callbacks import Frechet, Pictures, show, steered
from genfw.train.certificate import certify, given, kind
from genfw.train.checkpoint import AtomicIO, read
from genfw.train.classifier import fitting, knows_the_noise, same_data
from genfw.train.config import build, locate, trusted_by
from genfw.train.data.module import ImageData
from genfw.train.errors import (
    ConfigError,
    GenfwError,
    Stopped,
    not_finite,
    one_line,
    resume_line,
)
from genfw.train.files import replace_text, store
from genfw.train.keeper import Keeper
from genfw.train.loggers import Wandb, git_commit
from genfw.train.memory import keep_freed_memory
from genfw.train.module import LatentModule
from genfw.train.pictures import save
from genfw.train.rules import weaker_hears_no_label
from genfw.train.runs import other, told_from_anywhere, unguided
from genfw.train.sharding import FSDP2
from genfw.train.signals import Interruption, Signals, stop
from genfw.train.slurm import first_rank

Results = dict[str, Any]


def run(config: DictConfig, folder: Path, begin: Path | None = None) -> Results:
    """Trains, then tests the best weights.

    Args:
        config: composed and checked.
        folder: the run folder, which exists and is this run's alone.
        begin: the checkpoint of this folder to go on from.

    Returns:
        What is in results.json: `val/nll` of the best checkpoint and everything of the test, in
        nats; `test/bpd` in bits; seconds, parameters, versions.

    Raises:
        Stopped: a signal asked for it, a loss or the tested NLL is not finite, or nothing could be
            saved any more.
    """
    prepare()
    started = time.monotonic()
    told_from_anywhere(config)
    resolved = container(config)
    if not (folder / "config.yaml").exists():
        keep_config(resolved, folder)  # a signal from here on can be gone on from
    loggers: list[Logger] = [build(node, folder=folder) for node in nodes(config.logger)]
    with obedient(folder) as signals, finished(loggers, signals):
        L.seed_everything(config.seed, workers=True, verbose=False)
        module, data = assemble(config)
        served(module.model, module.objective, module.estimator, module.validation_estimator)
        steerable(module, config)
        files = AtomicIO()
        keeper = build(
            config.checkpoint,
            folder=folder / "checkpoints",
            files=files,
            signals=signals,
            begin=begin,
        )
        callbacks = make_callbacks(config)
        trainer = make_trainer(config, folder, loggers, [signals, *callbacks, keeper], files)
        if isinstance(data, ImageData):
            data.check(trainer)
        keeper.check(trainer, module)
        keep_config(resolved, folder)  # nothing is refused any more
        announce(config, folder, module, trainer)
        for logger in loggers:
            logger.log_hyperparams({**resolved, "git": git_commit()})
        fitted = time.monotonic()
        fit(trainer, module, data, keeper)
        fitted = time.monotonic() - fitted
        keeper.look_at_the_last(trainer, module, data)
        best = keeper.path
        tested = trainer.test(module, data, ckpt_path=best, weights_only=True, verbose=False)
        results: Results = {
            **_validated(keeper.best, config),
            **tested[0],
            **_references(callbacks, module.model),
            **{f"test/{name}": said for name, said in given(module).items()},
            "parameters": sum(p.numel() for p in module.model.parameters()),
            "seconds": round(time.monotonic() - started, 1),
            "seconds/fit": round(fitted, 1),
            **versions(),
        }
        if trainer.is_global_zero:
            Console().print(table(results, module))
        certificate = certify(module, data, tested[0], best, versions())
        finish_pictures(module, trainer, callbacks, folder)
        try:
            if trainer.is_global_zero:
                stored(results, certificate, folder)
        finally:  # a full disk leaves the number to W&B, and W&B's end leaves it to the disk
            for logger in loggers:
                if isinstance(logger, Wandb):
                    logger.summarize({**results, "certificate": certificate})
        if wrong := not_finite(results):
            raise Stopped(f"{wrong}: there is no number to report")
        return results


def stored(results: Results, certificate: Certificate, folder: Path) -> None:
    """Writes results.json last: a run with it is whole.

    Raises:
        GenfwError: the disk is full, and how to go on.
    """
    advice = f"then test again: {resume_line(folder)}"
    store(folder / "certificate.json", plain(certificate), advice)
    store(folder / "results.json", plain(results), advice)
    print(f"run folder: {folder}")


@contextmanager
def finished(loggers: list[Logger], signals: Signals) -> Iterator[None]:
    """Tells W&B at the end how the run went, by its exit code."""
    code = 1
    try:
        yield
        code = 0
    except Stopped as stopped:
        code = stopped.exit_code
        raise
    except Interruption:
        code = signals.received
        raise
    finally:
        for logger in loggers:
            if isinstance(logger, Wandb):
                logger.finish(exit_code=code)
                if logger.where:
                    print(logger.where)


@contextmanager
def obedient(folder: Path) -> Iterator[Signals]:
    """Signals in a run.

    Raises:
        Stopped: one came while there was nothing to save.
    """
    with Signals() as signals:
        try:
            yield signals
        except Interruption:
            said = f"interrupted; to go on: {resume_line(folder)}"
            raise Stopped(said, signals.received) from None


def fit(
    trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, keeper: Keeper
) -> None:
    """Trains; Ctrl-C ends it with a table of what there is.

    Raises:
        Stopped: by a signal, after the step was saved.
        KeyboardInterrupt: by Ctrl-C in a hurry, which Lightning turns into an exit with code 1.
    """
    try:
        try:
            trainer.fit(module, data, ckpt_path=keeper.begin, weights_only=True)
        except Interruption:
            stop(keeper.signals.received, trainer)
    except Stopped as stopped:
        if stopped.exit_code == 130 and trainer.is_global_zero:
            Console().print(so_far(trainer, keeper))
        raise
    except SystemExit as stopped:
        if not isinstance(stopped.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None


def assemble(config: DictConfig) -> tuple[LatentModule, L.LightningDataModule]:
    """The module and its data.

    Raises:
        ConfigError: a value that a constructor refuses, or a network that gives too little.
    """
    implemented(config)
    data = build(config.data)
    torch.manual_seed(config.seed)
    model = build(config.model, **guides(config))
    read_alike(model, config)
    module = LatentModule(
        model,
        build(config.objective),
        optimizer=build(config.optimizer),
        scheduler=build(config.scheduler),
        estimator=build(config.estimator),
        validation_estimator=build(config.validation_estimator),
        seed=config.seed,
        label_dropout=config.get("label_dropout", 0.0),
    )
    return module, data


def implemented(config: DictConfig) -> None:
    """Asks each class of a group, which may be somebody else's, whether it is of its kind. Networks
    need be none.

    Raises:
        ConfigError: one of them does not implement the group's interface.
    """
    for group, interface in Registered.groups.items():
        target = OmegaConf.select(config, f"{group}._target_")
        if not target or group in ("net", "data"):
            continue
        made = locate(target, trusted_by(config))
        if isinstance(made, type) and not issubclass(made, interface):
            raise ConfigError(
                f"{group}._target_={target}: expected a subclass of genfw.{interface.__name__}, "
                f"which {made.__name__} is not"
            )


def read_alike(model: LatentModel, config: DictConfig) -> None:
    """Asks a parameterization, which may be somebody else's, how many channels it reads.

    Raises:
        ConfigError: the network gives another number.
    """
    given = OmegaConf.select(config, "net.out_channels")
    if isinstance(model, VDM) and isinstance(model.denoiser, NetworkDenoiser) and given:
        param = model.denoiser.parameterization
        wanted = param.channels(config.data.shape[0], config.data.bins)
        if given != wanted:
            raise ConfigError(
                f"net.out_channels={given}, but {config.param._target_} reads {wanted}: set "
                f"net.out_channels={wanted}"
            )


def guides(config: DictConfig) -> dict[str, Guide]:
    """The guidance of a diffusion model's samples, with what it names, a run folder, as a model.

    Raises:
        ConfigError: there is no such run, or not one of the same data.
        GenfwError: its weights cannot be read.
    """
    node = config.get("guidance")
    if node is None:
        return {}
    given: dict[str, nn.Module] = {}
    if "weaker" in node:
        given["weaker"] = _weaker(config, node.weaker)
    if "classifier" in node:
        given["classifier"] = fitting(config, node.classifier)
    return {"guidance": build(node, **given)}


def _weaker(config: DictConfig, place: str) -> Denoiser:
    """The denoiser of another run, from its folder or from one of its checkpoints."""
    theirs, checkpoint = other(place, "guidance.weaker", config)
    if "model" not in theirs:
        raise ConfigError(f"guidance.weaker={place}: expected a model's run, got a classifier's")
    same_data(theirs, config, f"guidance.weaker={place}: a model")
    if config.model.classes is None:
        weaker_hears_no_label(theirs, place)
    unguided(theirs)
    model = restore(theirs, checkpoint)[0].evaluated
    if not isinstance(model, VDM):
        raise ConfigError(
            f"guidance.weaker={place}: expected the run of a diffusion model, got a "
            f"{type(model).__name__}"
        )
    return model.denoiser.requires_grad_(False).eval()


def restore(config: DictConfig, file: Path) -> tuple[LatentModule, L.LightningDataModule]:
    """As `assemble`, with the weights of a checkpoint, raw and averaged.

    Raises:
        GenfwError: the file is not there, cannot be read, or holds another model.
    """
    checkpoint = read(file)
    module, data = assemble(config)
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise GenfwError(f"{file} does not fit its config.yaml: {one_line(error)}") from error
    steerable(module, config)
    return module, data


def steerable(module: LatentModule, config: DictConfig) -> None:
    """Finds out what guidance does not take before it is needed.

    Raises:
        ConfigError: a value out of range, or a model that it does not fit.
    """
    if isinstance(module.model, VDM):
        try:
            guided = module.model.guided()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"guidance: {' '.join(str(error).split())}") from error
        knows_the_noise(config, guided)


def served(model: LatentModel, *by: Objective | Estimator) -> None:
    """Finds out what a model cannot be trained or measured by before it is.

    Raises:
        ConfigError: one of `by` says so.
    """
    for one in by:
        try:
            one.check(model)
        except (TypeError, ValueError) as error:
            raise ConfigError(" ".join(str(error).split())) from error


def make_callbacks(config: DictConfig) -> list[L.Callback]:
    """Those of the configuration; metrics beside the likelihood are callbacks too."""
    made = [
        _callback(f"{group}.{name}", node)
        for group in ("callbacks", "metrics")
        for name, node in (config.get(group) or {}).items()
        if node is not None
    ]
    if not config.trainer.enable_progress_bar:
        made = [one for one in made if not isinstance(one, ProgressBar)]
    return made


def _callback(place: str, node: DictConfig) -> L.Callback:
    """
    Raises:
        ConfigError: it is something else.
    """
    made = build(node)
    if not isinstance(made, L.Callback):
        raise ConfigError(
            f"{place}._target_={node.get('_target_')}: expected a Lightning Callback, which may "
            f"log what it measures, got a {type(made).__name__}"
        )
    return made


def make_trainer(
    config: DictConfig,
    folder: Path,
    loggers: list[Logger],
    callbacks: list[L.Callback],
    files: AtomicIO,
) -> L.Trainer:
    """Lightning's Trainer as configured; without a progress bar among the callbacks it has none,
    where Lightning's own would show epochs of a run that counts steps."""
    return build(
        config.trainer,
        logger=loggers or False,
        callbacks=callbacks,
        plugins=[files],
        default_root_dir=str(folder),
        val_check_interval=validation_interval(config.trainer),
        enable_progress_bar=any(isinstance(one, ProgressBar) for one in callbacks),
    )


def nodes(group: DictConfig | None) -> list[Any]:
    """What a group holds, but for what is switched off (`~callbacks.ema`, `callbacks.ema=null`)."""
    return [node for node in (group or {}).values() if node is not None]


def validation_interval(trainer: DictConfig) -> int | float:
    """Steps between validations, at most the run's own, in Lightning's unit: micro-batches."""
    interval = trainer.val_check_interval
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is not None:
        return interval
    steps = interval if trainer.max_steps < 1 else min(interval, trainer.max_steps)
    return steps * trainer.accumulate_grad_batches


def finish_pictures(
    module: LatentModule, trainer: L.Trainer, callbacks: list[L.Callback], folder: Path
) -> None:
    """samples.png and the like, of the weights that were tested."""
    module.to(trainer.strategy.root_device)  # Lightning has taken it to the CPU
    for pictures in callbacks:
        if isinstance(pictures, Pictures):
            for kind, picture in pictures.draw(trainer, module, pictures.images).items():
                show(trainer, f"test/{kind}", save(picture, folder / f"{kind}.png"))


def announce(config: DictConfig, folder: Path, module: LatentModule, trainer: L.Trainer) -> None:
    """What is about to run, in two lines."""
    if trainer.is_global_zero:
        size = sum(p.numel() for p in module.model.parameters())
        shape = "x".join(str(n) for n in config.data.shape)
        model, objective = type(module.model).__name__, type(module.objective).__name__
        print(
            f"{model} of {shape} images with {config.data.bins} values, objective {objective}, "
            f"{size / 1e6:.2f} M parameters, {trainer.strategy.root_device}, seed {config.seed}"
        )
        print(f"run folder: {folder}", flush=True)


def table(results: Mapping[str, Any], module: LatentModule) -> Table:
    """The end of a run, for the eye.

    Args:
        results: of the test, as in results.json.
        module: what was tested, and by which estimator.
    """
    test = {
        key.removeprefix("test/"): value
        for key, value in results.items()
        if key.startswith("test/")
    }
    sheet = Table("test set", "")
    name = "NLL given labels" if "given" in test else "NLL"
    if wrong := not_finite(results):
        sheet.add_row(name, f"{test['nll']:.2f} nats: {wrong}")
    else:
        error, bits = test["nll_stderr"], test["bpd"] / test["nll"]
        how = "standard error" if math.isfinite(error) else "one draw, no standard error"
        sheet.add_row(name, f"{_give_or_take(test['nll'], error, 2)} nats ({how})")
        sheet.add_row("", f"{_give_or_take(test['bpd'], error * bits, 4)} bits/dim")
    sheet.add_row("kind", kind(module))
    if "levels" in test:
        sheet.add_row("  reconstruction", f"{-test['reconstruction']:.2f} nats")
        if test["levels"]:
            levels = "levels (denoising)" if isinstance(module.model, Denoises) else "levels"
            sheet.add_row(f"  {levels}", f"{test['levels']:.2f} nats")
        sheet.add_row("  prior", f"{test['prior']:.2f} nats")
    for key, value in test.items():
        if f"{key}_samples" in test:
            what = f"{test[f'{key}_samples']:.0f} samples, {test[f'{key}_reference']}"
            sheet.add_row(key, f"{value:.2f} ({what})")
    announced = [name for each in Estimator.registry.values() for name in each.diagnostics]
    for name in dict.fromkeys(announced):
        if name in test:
            sheet.add_row(name, f"{test[name]:.4g} (mean over images)")
    images = f"{test['count']:.0f}"
    if not wrong and test["count"] > 1:
        images += f", NLL spread over them {test['nll_std']:.1f} nats"
    sheet.add_row("images", images)
    return sheet


def _give_or_take(value: float, error: float, digits: int) -> str:
    """A number, and its standard error where it has one."""
    more = f" ± {error:.{digits}f}" if math.isfinite(error) else ""
    return f"{value:.{digits}f}{more}"


def so_far(trainer: L.Trainer, keeper: Keeper) -> Table:
    """The end of a run that was interrupted."""
    sheet = Table("so far", "")
    sheet.add_row("step", f"{trainer.global_step}")
    known = trainer.callback_metrics
    for key, name in (("train/objective", "objective"), ("val/nll", "validation NLL")):
        if key in known:
            sheet.add_row(name, f"{float(known[key]):.2f} nats")
    if math.isfinite(keeper.best):
        sheet.add_row("best validation NLL", f"{keeper.best:.2f} nats")
    return sheet


def keep_config(resolved: Mapping[str, Any], folder: Path) -> None:
    """config.yaml, and no results: those of a run that goes on are yet to come."""
    if not first_rank():
        return
    replace_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(resolved))))
    for name in ("results.json", "certificate.json"):
        (folder / name).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """What computed these numbers."""
    packages = ("torch", "lightning", "torchmetrics", "numpy")
    return {
        "versions/python": platform.python_version(),
        "versions/genfw": genfw.__version__,
        **{f"versions/{package}": version(package) for package in packages},
    }


def container(config: DictConfig) -> dict[str, Any]:
    """Plain dictionaries, every interpolation resolved."""
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def prepare() -> None:
    """The process: memory is kept, Lightning knows our strategy, and its advertisements and its
    advice about what is meant to be so are not shown."""
    keep_freed_memory()
    FSDP2.register_strategies()
    subprocess_script._ChildProcessObserver._terminate_all = end_all
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*litlogger.*",
        ".*LeafSpec.*",
        ".*in eval mode at the start of training.*",
        ".*your dataloader is not resumable.*",  # it is: genfw.train.batches
        ".*overridden `on_after_batch_transfer`.*",  # which leaves batches of ours alone
        ".*returned a view tensor.*",  # of a network, and nobody writes into it
        ".*sync_dist=True.*",  # what is logged was summed over the ranks already
    ):
        warnings.filterwarnings("ignore", message=message)


def end_all(self: subprocess_script._ChildProcessObserver) -> None:
    """What Lightning does when a rank that it started has failed: kill the others, and the first
    rank, which ends with 1 and not as one that was killed; the rank has said what it was."""
    for process in self._child_processes:
        process.kill()
    os._exit(1)


def _references(callbacks: list[L.Callback], model: LatentModel) -> Results:
    """What Frechet distances were measured from."""
    distances = [one.distance for one in callbacks if isinstance(one, Frechet)]
    records = [one.record for one in distances if one is not None and one.record is not None]
    return {
        f"test/{record.key}{steered(model)}_reference": (
            f"{record.reference_count} images of {record.reference}, features {record.extractor}"
        )
        for record in records
    }


def _validated(best: float, config: DictConfig) -> Results:
    if not math.isfinite(best):
        return {}
    dims = int(torch.tensor(list(config.data.shape)).prod())
    return {"val/nll": best, "val/bpd": float(bits_per_dim(torch.tensor(best).double(), dims))}

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

`tested` and `ended` are of any run, of a classifier's too (`genfw.train.classifier_job`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from genfw.elbo import bits_per_dim
from genfw.estimators.report import plain
from genfw.model import LatentModel
from genfw.train.callbacks import Frechet, Pictures
from genfw.train.certificate import certify, given, versions
from genfw.train.checkpoint import AtomicIO
from genfw.train.config import build
from genfw.train.data.module import ImageData
from genfw.train.errors import Stopped, not_finite, resume_line
from genfw.train.files import replace_text, store
from genfw.train.keeper import Keeper
from genfw.train.loggers import Wandb, git_commit, show
from genfw.train.module import LatentModule
from genfw.train.parts import assemble, make_callbacks, make_trainer, nodes, served, steerable
from genfw.train.pictures import save, steered
from genfw.train.process import prepare
from genfw.train.run_table import so_far, table
from genfw.train.runs import told_from_anywhere
from genfw.train.signals import Interruption, Signals, stop
from genfw.train.slurm import first_rank

Results = dict[str, Any]
Module = TypeVar("Module", bound=L.LightningModule)


def run(config: DictConfig, folder: Path, begin: Path | None = None) -> Results:
    """Trains a model, then tests the best weights: see `tested` and `ended`.

    Returns:
        What is in results.json: `val/nll` of the best checkpoint and everything of the test, in
        nats; `test/bpd` in bits, but of a density; seconds, parameters, versions.
    """
    started = time.monotonic()
    told_from_anywhere(config)
    with tested(config, folder, begin, parts, partial(announcement, config)) as done:
        module = done.module
        results: Results = {
            **_validated(done.keeper.best, module),
            **done.numbers,
            **_references(done.callbacks, module.model),
            **{f"test/{name}": said for name, said in given(module).items()},
            "parameters": sum(p.numel() for p in module.model.parameters()),
            "seconds": round(time.monotonic() - started, 1),
            "seconds/fit": round(done.seconds, 1),
            **versions(),
        }
        certificate = certify(module, done.data, done.numbers, done.keeper.path)
        if done.trainer.is_global_zero:
            Console().print(table(results, module, certificate["data"].get("of")))
        finish_pictures(done, folder)
        return ended(done.trainer, folder, results, certificate=certificate)


@dataclass(frozen=True)
class Tested(Generic[Module]):
    """The parts of a run, what the test of its best weights gave, and seconds of training."""

    module: Module
    data: L.LightningDataModule
    trainer: L.Trainer
    callbacks: list[L.Callback]
    keeper: Keeper
    numbers: Mapping[str, Any]
    seconds: float


@contextmanager
def tested(
    config: DictConfig,
    folder: Path,
    begin: Path | None,
    assemble: Callable[[DictConfig], tuple[Module, L.LightningDataModule]],
    said: Callable[[Module, L.Trainer], str],
) -> Iterator[Tested[Module]]:
    """Trains whatever it is, and tests its best weights. Within, signals are still obeyed, and W&B
    is told how it went.

    Args:
        config: composed and checked.
        folder: the run folder, which exists and is this run's alone.
        begin: the checkpoint of this folder to go on from.
        assemble: makes the module and its data.
        said: what is about to run, in a line.

    Raises:
        Stopped: a signal asked for it, a loss is not finite, or nothing could be saved any more.
    """
    prepare()
    if not (folder / "config.yaml").exists():
        keep_config(config, folder)  # a signal from here on can be gone on from
    loggers: list[Logger] = [build(node, folder=folder) for node in nodes(config.logger)]
    with obedient(folder) as signals, finished(loggers, signals):
        L.seed_everything(config.seed, workers=True, verbose=False)
        module, data = assemble(config)
        files = AtomicIO()
        make = partial(build, config.checkpoint) if "checkpoint" in config else Keeper
        keeper = make(folder=folder / "checkpoints", files=files, signals=signals, begin=begin)
        callbacks = make_callbacks(config)
        trainer = make_trainer(config, folder, loggers, [signals, *callbacks, keeper], files)
        if isinstance(data, ImageData):
            data.check(trainer)
        keeper.check(trainer, module)
        keep_config(config, folder)  # nothing is refused any more
        if trainer.is_global_zero:
            print(f"{said(module, trainer)}\nrun folder: {folder}", flush=True)
        resolved: Any = OmegaConf.to_container(config, resolve=True)
        for logger in loggers:
            logger.log_hyperparams({**resolved, "git": git_commit()})
        began = time.monotonic()
        fit(trainer, module, data, keeper)
        seconds = time.monotonic() - began
        keeper.look_at_the_last(trainer, module, data)
        best = keeper.path
        (numbers,) = trainer.test(module, data, ckpt_path=best, weights_only=True, verbose=False)
        yield Tested(module, data, trainer, callbacks, keeper, numbers, seconds)


def ended(trainer: L.Trainer, folder: Path, results: Results, **more: Results) -> Results:
    """Writes results.json, after `more`: a run with it is whole. Final numbers go to W&B too.

    Raises:
        GenfwError: the disk is full, and how to go on.
        Stopped: the tested NLL is not finite.
    """
    advice = f"then test again: {resume_line(folder)}"
    try:
        if trainer.is_global_zero:
            for name, held in {**more, "results": results}.items():
                store(folder / f"{name}.json", plain(held), advice)
            print(f"run folder: {folder}")
    finally:  # a full disk leaves the number to W&B, and W&B's end leaves it to the disk
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                logger.summarize({**results, **more})
    if wrong := not_finite(results):
        raise Stopped(f"{wrong}: there is no number to report")
    return results


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


def finish_pictures(run: Tested[LatentModule], folder: Path) -> None:
    """samples.png and the like, of the weights that were tested."""
    run.module.to(run.trainer.strategy.root_device)  # Lightning has taken it to the CPU
    for pictures in run.callbacks:
        if isinstance(pictures, Pictures):
            for kind, picture in pictures.draw(run.trainer, run.module, pictures.images).items():
                show(run.trainer, f"test/{kind}", save(picture, folder / f"{kind}.png"))


def parts(config: DictConfig) -> tuple[LatentModule, L.LightningDataModule]:
    """A model in its module, and data.

    Raises:
        ConfigError: what `assemble` refuses, or something that the model is not served by.
    """
    module, data = assemble(config)
    served(module.model, module.objective, module.estimator, module.validation_estimator)
    steerable(module, config)
    return module, data


def announcement(config: DictConfig, module: LatentModule, trainer: L.Trainer) -> str:
    """What is about to run, in a line."""
    size = sum(p.numel() for p in module.model.parameters())
    shape = "x".join(str(n) for n in config.data.shape)
    model, objective = type(module.model).__name__, type(module.objective).__name__
    values = "real" if config.data.bins is None else config.data.bins
    return (
        f"{model} of {shape} images with {values} values, objective {objective}, "
        f"{size / 1e6:.2f} M parameters, {trainer.strategy.root_device}, seed {config.seed}"
    )


def keep_config(config: DictConfig, folder: Path) -> None:
    """config.yaml, and no results: those of a run that goes on are yet to come."""
    if not first_rank():
        return
    replace_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    for name in ("results.json", "certificate.json"):
        (folder / name).unlink(missing_ok=True)


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


def _validated(best: float, module: LatentModule) -> Results:
    if not math.isfinite(best):
        return {}
    if module.model.of_density:
        return {"val/nll": best}
    bpd = bits_per_dim(torch.tensor(best).double(), module.dims)
    return {"val/nll": best, "val/bpd": float(bpd)}

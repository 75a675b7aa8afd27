"""One run, from a composed configuration to a folder with everything that is worth keeping:

config.yaml             the configuration, all interpolations resolved
checkpoints/best.ckpt   best validation NLL; last.ckpt: last step; both raw and averaged
metrics.csv             every logged number, row by row
wandb/, wandb_id.txt    the W&B run
samples/, denoising/    pictures during training
samples.png and others  pictures of the best weights
results.json            final numbers, flat
certificate.json        what was measured, of what, and how (genfw.estimators.report)
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

import genfw
from genfw.diffusion.denoiser import Denoiser
from genfw.diffusion.guidance import Guide
from genfw.elbo import bits_per_dim
from genfw.model import LatentModel
from genfw.models.vdm import VDM
from genfw.train.callbacks import Frechet, Pictures, show, steered
from genfw.train.certificate import certify, given
from genfw.train.config import build
from genfw.train.errors import GenfwError
from genfw.train.loggers import Wandb, git_commit, one_line
from genfw.train.memory import keep_freed_memory
from genfw.train.module import LatentModule
from genfw.train.pictures import save
from genfw.train.runs import load

Results = dict[str, Any]


def run(config: DictConfig, folder: Path) -> Results:
    """Trains, then tests the best weights.

    Args:
        config: composed and checked.
        folder: the run folder, which exists and is this run's alone.

    Returns:
        What is in results.json: `val/nll` of the best checkpoint and everything of the test, in
        nats; `test/bpd` in bits; seconds, parameters, versions.
    """
    prepare()
    started = time.monotonic()
    resolved = container(config)
    OmegaConf.save(OmegaConf.create(resolved), folder / "config.yaml")
    loggers: list[Logger] = [build(node, folder=folder) for node in nodes(config.logger)]
    failed = 1
    try:
        L.seed_everything(config.seed, workers=True, verbose=False)
        module, data = assemble(config)
        keep = ModelCheckpoint(
            dirpath=str(folder / "checkpoints"),
            filename="best",
            monitor="val/nll",
            save_last=True,
            enable_version_counter=False,
        )
        callbacks = make_callbacks(config)
        trainer = make_trainer(config, folder, loggers, [*callbacks, keep])
        announce(config, folder, module, trainer)
        for logger in loggers:
            logger.log_hyperparams({**resolved, "git": git_commit()})
        fitted = time.monotonic()
        fit(trainer, module, data, folder / "checkpoints" / "last.ckpt")
        fitted = time.monotonic() - fitted
        best = choose(trainer, module, data, keep)
        tested = trainer.test(module, data, ckpt_path=best, weights_only=True, verbose=False)
        results: Results = {
            **_validated(keep, config),
            **tested[0],
            **_references(callbacks, module.model),
            **{f"test/{name}": said for name, said in given(module).items()},
            "parameters": sum(p.numel() for p in module.model.parameters()),
            "seconds": round(time.monotonic() - started, 1),
            "seconds/fit": round(fitted, 1),
            **versions(),
        }
        certificate = certify(module, data, tested[0], best, versions())
        if trainer.is_global_zero:
            write(folder / "results.json", results)
            write(folder / "certificate.json", certificate)
            finish_pictures(module, trainer, callbacks, folder)
            Console().print(table(results))
            print(f"run folder: {folder}")
        for logger in loggers:
            if isinstance(logger, Wandb):
                logger.summarize({**results, "certificate": certificate})
        failed = 0
        return results
    finally:
        for logger in loggers:
            if isinstance(logger, Wandb):
                logger.finish(exit_code=failed)
                print(logger.where)


def fit(trainer: L.Trainer, module: LatentModule, data: L.LightningDataModule, last: Path) -> None:
    """Trains and saves the last weights, also when Ctrl-C ends it.

    Raises:
        KeyboardInterrupt: Ctrl-C, which Lightning turns into an exit with code 1.
    """
    try:
        trainer.fit(module, data)
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        trainer.save_checkpoint(last)
        print(f"interrupted at step {trainer.global_step}; weights in {last}", flush=True)
        raise KeyboardInterrupt from None
    trainer.save_checkpoint(last)


def choose(
    trainer: L.Trainer, module: LatentModule, data: L.LightningDataModule, keep: ModelCheckpoint
) -> Path:
    """The checkpoint of the best validation NLL, the steps after the last validation included."""
    folder = Path(keep.dirpath or "")
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    validated = trainer.validate(module, data, verbose=False)
    if not validated or "val/nll" not in validated[0]:
        return Path(keep.best_model_path or last)
    nll = torch.tensor(validated[0]["val/nll"])
    if keep.best_model_score is None or nll < keep.best_model_score.cpu():
        keep.best_model_score = nll
        if trainer.is_global_zero:
            shutil.copyfile(last, best)
        trainer.strategy.barrier()
        return best
    return Path(keep.best_model_path)


def assemble(config: DictConfig) -> tuple[LatentModule, L.LightningDataModule]:
    """The module and its data."""
    data = build(config.data)
    torch.manual_seed(config.seed)
    module = LatentModule(
        build(config.model, **guides(config)),
        build(config.objective),
        optimizer=build(config.optimizer),
        scheduler=build(config.scheduler),
        estimator=build(config.estimator),
        validation_estimator=build(config.validation_estimator),
        seed=config.seed,
        label_dropout=config.get("label_dropout", 0.0),
    )
    return module, data


def guides(config: DictConfig) -> dict[str, Guide]:
    """The guidance of a diffusion model's samples, with what it names, a run folder, as a model.

    Raises:
        GenfwError: there is no such run, or not one of the same data.
    """
    node = config.get("guidance")
    if node is None:
        return {}
    if "classifier" in node:
        raise GenfwError(
            f"guidance.classifier={node.classifier}: no command trains a classifier of noisy z "
            "yet; in a notebook: VDM(guidance=partial(ClassifierGuidance, classifier=...))"
        )
    given = {"weaker": _weaker(config, node.weaker)} if "weaker" in node else {}
    return {"guidance": build(node, **given)}


def _weaker(config: DictConfig, place: str) -> Denoiser:
    """The denoiser of another run, from its folder or from one of its checkpoints."""
    file = Path(place)
    folder = file.parent.parent if file.suffix == ".ckpt" else file
    checkpoint = file if file.suffix == ".ckpt" else folder / "checkpoints" / "best.ckpt"
    theirs = load(folder, "guidance.weaker")
    if list(theirs.data.shape) != list(config.data.shape):
        raise GenfwError(
            f"guidance.weaker={place}: a model of {list(theirs.data.shape)} images, and this one "
            f"is of {list(config.data.shape)}"
        )
    model = restore(theirs, checkpoint)[0].evaluated
    if not isinstance(model, VDM):
        raise GenfwError(
            f"guidance.weaker={place}: expected the run of a diffusion model, got a "
            f"{type(model).__name__}"
        )
    return model.denoiser.requires_grad_(False).eval()


def restore(config: DictConfig, file: Path) -> tuple[LatentModule, L.LightningDataModule]:
    """As `assemble`, with the weights of a checkpoint, raw and averaged.

    Raises:
        GenfwError: the file is not there, cannot be read, or holds another model.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise GenfwError(f"there is no checkpoint {file}") from error
    except Exception as error:
        raise GenfwError(f"{file} cannot be read: {one_line(error)}") from error
    module, data = assemble(config)
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise GenfwError(f"{file} does not fit its config.yaml: {one_line(error)}") from error
    return module, data


def make_callbacks(config: DictConfig) -> list[L.Callback]:
    """Those of the configuration; metrics beside the likelihood are callbacks too."""
    made = [build(node) for node in (*nodes(config.callbacks), *nodes(config.metrics))]
    if not config.trainer.enable_progress_bar:
        made = [one for one in made if not isinstance(one, ProgressBar)]
    return made


def make_trainer(
    config: DictConfig, folder: Path, loggers: list[Logger], callbacks: list[L.Callback]
) -> L.Trainer:
    """Lightning's Trainer as configured."""
    return build(
        config.trainer,
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=str(folder),
        val_check_interval=validation_interval(config.trainer),
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
    for pictures in callbacks:
        if isinstance(pictures, Pictures):
            for kind, picture in pictures.draw(module, pictures.images).items():
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


def table(results: Mapping[str, Any]) -> Table:
    """The end of a run, for the eye."""
    test = {
        key.removeprefix("test/"): value
        for key, value in results.items()
        if key.startswith("test/")
    }
    sheet = Table("test set", "")
    name = "NLL given labels" if "given" in test else "NLL"
    sheet.add_row(name, f"{test['nll']:.2f} ± {test['nll_stderr']:.2f} nats (standard error)")
    sheet.add_row(
        "", f"{test['bpd']:.4f} ± {test['nll_stderr'] * test['bpd'] / test['nll']:.4f} bits/dim"
    )
    if "levels" in test:
        sheet.add_row("  reconstruction", f"{-test['reconstruction']:.2f} nats")
        if test["levels"]:
            sheet.add_row("  levels (denoising)", f"{test['levels']:.2f} nats")
        sheet.add_row("  prior", f"{test['prior']:.2f} nats")
    for key, value in test.items():
        if f"{key}_samples" in test:
            what = f"{test[f'{key}_samples']:.0f} samples, {test[f'{key}_reference']}"
            sheet.add_row(key, f"{value:.2f} ({what})")
    sheet.add_row("images", f"{test['count']:.0f}, NLL spread over them {test['nll_std']:.1f} nats")
    return sheet


def write(file: Path, value: Mapping[str, Any]) -> None:
    """As JSON."""
    file.write_text(json.dumps(value, indent=2) + "\n")


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
    """The process: memory is kept, and Lightning's advertisements and its advice about what is
    meant to be so are not shown."""
    keep_freed_memory()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*litlogger.*",
        ".*LeafSpec.*",
        ".*in eval mode at the start of training.*",
        ".*sync_dist=True.*",  # what is logged was summed over the ranks already
    ):
        warnings.filterwarnings("ignore", message=message)


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


def _validated(keep: ModelCheckpoint, config: DictConfig) -> Results:
    if keep.best_model_score is None:
        return {}
    nll = keep.best_model_score.double()
    dims = int(torch.tensor(list(config.data.shape)).prod())
    return {"val/nll": float(nll), "val/bpd": float(bits_per_dim(nll, dims))}

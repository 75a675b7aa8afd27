"""The parts of a run, built from its checked configuration: module, data, guidance, callbacks,
trainer. What they refuse is refused here, before anything has begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from genfw.diffusion.denoiser import Denoiser, NetworkDenoiser
from genfw.diffusion.guidance import Guide
from genfw.estimators.estimator import Estimator
from genfw.model import LatentModel
from genfw.models.vdm import VDM
from genfw.objective import Objective
from genfw.registry import Registered
from genfw.train.checkpoint import AtomicIO, read
from genfw.train.classifier import fitting, knows_the_noise, same_data
from genfw.train.config import build, locate, trusted_by
from genfw.train.errors import ConfigError, GenfwError, one_line
from genfw.train.module import LatentModule, in_precision
from genfw.train.rules.guidance import weaker_hears_no_label
from genfw.train.runs import other, unguided


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
    return in_precision(module, config), data


def implemented(config: DictConfig) -> None:
    """Asks each class of a group, which may be somebody else's, whether it is of its kind. Networks
    need be none.

    Raises:
        ConfigError: one of them does not implement the group's interface.
    """
    trusted = trusted_by(config)
    made = {
        str(group): locate(node._target_, trusted)
        for group, node in config.items()
        if isinstance(node, DictConfig) and "_target_" in node and group not in ("net", "data")
    }
    for group, cls in made.items():  # all are there: a model opens the groups of its parts
        interface = Registered.groups.get(group)
        if interface and isinstance(cls, type) and not issubclass(cls, interface):
            raise ConfigError(
                f"{group}._target_={config[group]._target_}: expected a subclass of "
                f"genfw.{interface.__name__}, which {cls.__name__} is not"
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
            if isinstance(one, Objective):  # of a learned schedule a subclass may say nothing
                Objective.check(one, model)
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
    """A callback that somebody configured.

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

"""One run of `python -m genfw.classifier`, from a composed configuration to its folder:
config.yaml, checkpoints/, metrics.csv (accuracy by log SNR) and results.json.

It is saved, stopped and taken up again as the run of a model is (`genfw.train.job`).
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from genfw.estimators.report import plain
from genfw.train import job
from genfw.train.certificate import versions
from genfw.train.checkpoint import AtomicIO
from genfw.train.classifier import assemble
from genfw.train.config import build
from genfw.train.data.module import ImageData
from genfw.train.errors import Stopped, not_finite, resume_line
from genfw.train.files import store
from genfw.train.keeper import Keeper
from genfw.train.loggers import git_commit
from genfw.train.parts import make_callbacks, make_trainer, nodes
from genfw.train.process import prepare


def run(config: DictConfig, folder: Path, begin: Path | None = None) -> job.Results:
    """Trains, then tests the best weights.

    Args:
        config: composed and checked.
        folder: the run folder, which exists and is this run's alone.
        begin: the checkpoint of this folder to go on from.

    Returns:
        What is in results.json.

    Raises:
        Stopped: a signal asked for it, the tested NLL is not finite, or nothing could be saved any
            more.
    """
    prepare()
    resolved = job.container(config)
    if not (folder / "config.yaml").exists():
        job.keep_config(resolved, folder)
    loggers: list[Logger] = [build(node, folder=folder) for node in nodes(config.logger)]
    with job.obedient(folder) as signals, job.finished(loggers, signals):
        L.seed_everything(config.seed, workers=True, verbose=False)
        module, data = assemble(config), build(config.data)
        callbacks = make_callbacks(config)
        files = AtomicIO()
        keeper = Keeper(folder / "checkpoints", files, signals, begin)
        trainer = make_trainer(config, folder, loggers, [signals, *callbacks, keeper], files)
        if isinstance(data, ImageData):
            data.check(trainer)
        keeper.check(trainer, module)
        job.keep_config(resolved, folder)
        if trainer.is_global_zero:
            said = module.classifier.extra_repr()
            print(f"classifier of {said}\nrun folder: {folder}", flush=True)
        for logger in loggers:
            logger.log_hyperparams({**resolved, "git": git_commit()})
        job.fit(trainer, module, data, keeper)
        keeper.look_at_the_last(trainer, module, data)
        (tested,) = trainer.test(
            module, data, ckpt_path=keeper.path, weights_only=True, verbose=False
        )
        results: job.Results = {**tested, **versions()}
        job.summarize(loggers, results)
        if trainer.is_global_zero:
            for key, value in tested.items():
                print(f"{key:28}{value:.4f}")
            advice = f"then test again: {resume_line(folder)}"
            store(folder / "results.json", plain(results), advice)
            print(f"run folder: {folder}")
        if wrong := not_finite(results):
            raise Stopped(f"{wrong}: there is no number to report")
        return results

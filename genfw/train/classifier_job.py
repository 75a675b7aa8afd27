"""One run of `python -m genfw.classifier`, from a composed configuration to its folder:
config.yaml, checkpoints/, metrics.csv (accuracy by log SNR) and results.json.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from omegaconf import DictConfig

from genfw.train.certificate import versions
from genfw.train.classifier import ClassifierModule, assemble
from genfw.train.config import build
from genfw.train.job import Results, ended, tested


def run(config: DictConfig, folder: Path, begin: Path | None = None) -> Results:
    """As `genfw.train.job.run`, of a classifier."""
    with tested(config, folder, begin, parts, announcement) as done:
        if done.trainer.is_global_zero:
            for key, value in done.numbers.items():
                print(f"{key:28}{value:.4f}")
        return ended(done.trainer, folder, {**done.numbers, **versions()})


def parts(config: DictConfig) -> tuple[ClassifierModule, L.LightningDataModule]:
    """The module, with new weights, and its data."""
    return assemble(config), build(config.data)


def announcement(module: ClassifierModule, trainer: L.Trainer) -> str:
    """What is about to run, in a line."""
    return f"classifier of {module.classifier.extra_repr()}"

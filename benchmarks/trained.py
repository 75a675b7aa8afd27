"""A run's diffusion model, as its reported numbers see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig

from genfw import VDM
from genfw.train.errors import ConfigError
from genfw.train.module import LatentModule
from genfw.train.parts import restore
from genfw.train.process import prepare
from genfw.train.runs import checkpoint
from genfw.types import Image


@contextmanager
def trained_vdm(
    folder: Path, config: DictConfig, name: str, device: str = "cpu"
) -> Iterator[tuple[VDM, LatentModule, L.LightningDataModule]]:
    """The averaged weights of a checkpoint in evaluation, their module, and the run's data.

    Raises:
        ConfigError: there is no such checkpoint, or it is of another family.
    """
    prepare()
    module, data = restore(config, checkpoint(folder, name))
    with module.to(device).evaluating() as model:
        if not isinstance(model, VDM):
            raise ConfigError(f"run={folder}: expected a VDM, got {type(model).__name__}")
        yield model, module, data


def images(data: L.LightningDataModule, split: str, count: int) -> Image:
    """The first of a split."""
    return torch.tensor(data.split(split).images[:count])  # pyright: ignore

"""The smallest real thing to train: a diffusion model of 2 x 2 images with three values."""

import errno
import os

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

import genfw
from genfw.nets import MLP
from genfw.train.data import Batch
from genfw.train.module import LatentModule

SHAPE, BINS = (1, 2, 2), 3


class Images(L.LightningDataModule):
    """Random images, in batches that come in the same order every time."""

    def __init__(self, train: int = 16, val: int = 5, test: int = 7, batch: int = 4):
        super().__init__()
        made = torch.Generator().manual_seed(1)
        self.images = {
            split: torch.randint(BINS, (n, *SHAPE), generator=made, dtype=torch.uint8)
            for split, n in (("train", train), ("val", val), ("test", test))
        }
        self.batch = batch

    def _batches(self, split: str) -> DataLoader:
        images = self.images[split]
        rows = [
            Batch(images[i], torch.tensor(0), torch.tensor(i, dtype=torch.int64))
            for i in range(len(images))
        ]
        return DataLoader(rows, self.batch)

    def train_dataloader(self) -> DataLoader:
        return self._batches("train")

    def val_dataloader(self) -> DataLoader:
        return self._batches("val")

    def test_dataloader(self) -> DataLoader:
        return self._batches("test")


def vdm() -> genfw.VDM:
    torch.manual_seed(3)
    net = MLP(SHAPE, width=8, blocks=1)
    for p in net.parameters():  # networks begin at zero output, which hides mistakes
        p.data += 0.1 * torch.randn_like(p)
    schedule = genfw.Cosine(log_snr_max=4.0, log_snr_min=-6.0)
    denoiser = genfw.NetworkDenoiser(net, genfw.Eps(), schedule)
    return genfw.VDM(
        denoiser, genfw.BinsLikelihood(BINS), shape=SHAPE, sampler=genfw.Ancestral(steps=4)
    )


def module(
    objective: genfw.Objective | None = None, lr: float = 0.05, seed: int = 0
) -> LatentModule:
    return LatentModule(
        vdm(),
        genfw.Elbo() if objective is None else objective,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        estimator=genfw.Bound(sets=2, strata=2),
        validation_estimator=genfw.Bound(sets=2, strata=2),
        seed=seed,
    )


def trainer(folder, steps: int = 4, **more) -> L.Trainer:
    settings = {
        "max_steps": steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder),
    }
    return L.Trainer(**(settings | more))


def full(*_):
    """Stands in for a write: the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

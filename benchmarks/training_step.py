"""What a training step costs: python benchmarks/training_step.py [rounds] [threads]

The same VAE, 784-[200 tanh, 200 tanh]-50, Bernoulli, batches of 100 images binarized anew each
time, fused AdamW, trained in three ways in turn, the best of all rounds of each:

* bare: a loop, no logging, no average of the weights.
* stock: `Trainer.fit` of a LightningModule of twenty lines that logs the loss and bits/dim at every
  step as the manual shows, EMAWeightAveraging, CSVLogger, a DataLoader over a TensorDataset.
* genfw: `Trainer.fit` of a LatentModule with what `python -m genfw` brings: keyed noise, EMA,
  Stability (gradient norm, skips), Watch (throughput, memory), the same logger and numbers,
  ImageData.

Seconds are of optimizer steps alone, from the 50th to the last. Targets: genfw at most 1.15 of
stock; the ratio to the bare loop is reported.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from functools import partial

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

import genfw
from genfw.nets import MLPDecoder, MLPEncoder
from genfw.train.data import ImageData, Source, Split, Splits
from genfw.train.ema import EMA
from genfw.train.module import LatentModule
from genfw.train.stability import Stability
from genfw.train.watch import Watch

SHAPE, BATCH, IMAGES, STEPS, FIRST = (1, 28, 28), 100, 10_000, 450, 50


class Random(Source):
    """Images 0..255 that no network learns: speed does not depend on them."""

    def read(self, shape, path):
        made = torch.Generator().manual_seed(0)
        images = torch.randint(256, (IMAGES, *SHAPE), generator=made, dtype=torch.uint8)
        split = Split(images.numpy(), torch.zeros(IMAGES).long().numpy())
        return Splits(split, split, split)


class Clock:
    """Seconds of a step, from the one after FIRST to STEPS; called after each. There are none until
    all were seen, and later steps change nothing."""

    def __init__(self):
        self.steps = 0

    def __call__(self) -> None:
        self.steps += 1
        if self.steps == FIRST:
            self.start = time.perf_counter()
        if self.steps == STEPS:
            self.seconds = (time.perf_counter() - self.start) / (STEPS - FIRST)


class Ticks(L.Callback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_batch_end(self, trainer, *args):
        self.clock()


class Stock(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = vae()

    def training_step(self, batch, batch_idx):
        (image,) = batch
        x = torch.bernoulli(image.float() / 255).to(torch.uint8)
        loss = -self.model.elbo(x).total.mean()
        self.log("train/objective", loss, prog_bar=True)
        self.log("train/objective_bpd", genfw.bits_per_dim(loss.detach(), 784))
        return loss

    def configure_optimizers(self):
        return optimizer(self.parameters())


def vae() -> genfw.VAE:
    hidden = {"hidden": [200, 200], "activation": "tanh"}
    encoder = MLPEncoder(SHAPE, 50, **hidden)
    decoder = MLPDecoder(SHAPE, 50, outputs=1, **hidden)
    return genfw.VAE(encoder, decoder, genfw.BernoulliLikelihood(), 50)


optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, fused=True)


def bare() -> float:
    model, images = vae(), torch.from_numpy(Random().read(SHAPE, None).train.images)
    adam, clock = optimizer(model.parameters()), Clock()
    for _ in range(STEPS):
        rows = torch.randint(IMAGES, (BATCH,))
        x = torch.bernoulli(images[rows].float() / 255).to(torch.uint8)
        adam.zero_grad()
        (-model.elbo(x).total.mean()).backward()
        adam.step()
        clock()
    return clock.seconds


def fit(module: L.LightningModule, data, *callbacks: L.Callback) -> float:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[*callbacks, Ticks(clock)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        trainer.fit(module, data)
    return clock.seconds


def stock() -> float:
    images = torch.from_numpy(Random().read(SHAPE, None).train.images)
    loader = DataLoader(TensorDataset(images), BATCH, shuffle=True)
    return fit(Stock(), loader, EMAWeightAveraging(decay=0.999))


def ours() -> float:
    data = ImageData(Random(), SHAPE, 2, 1, raw_bins=256, batch_size=BATCH, binarize="dynamic")
    return fit(LatentModule(vae(), genfw.Elbo(), optimizer), data, EMA(), Stability(), Watch())


def main() -> None:
    given = [int(each) for each in sys.argv[1:]]
    rounds, threads = (*given, *(5, 1)[len(given) :])
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    ways = {"bare": bare, "stock": stock, "genfw": ours}
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            torch.manual_seed(0)
            times[name].append(way())
    best = {name: min(each) for name, each in times.items()}
    print(
        f"{rounds} rounds of {STEPS - FIRST} steps, {threads} thread(s), torch {torch.__version__}"
    )
    for name, each in times.items():
        print(
            f"{name:6s} {1e3 * best[name]:.2f} ms a step ({1e3 * max(each):.2f} the slowest round)"
        )
    ratio = best["genfw"] / best["stock"]
    print(f"genfw / bare = {best['genfw'] / best['bare']:.2f}")
    print(f"{'ok    ' if ratio <= 1.15 else 'MISSED'}  genfw / stock = {ratio:.2f}, target 1.15")


if __name__ == "__main__":
    main()

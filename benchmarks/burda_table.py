"""Cells of the table of Burda et al. (2015) on one GPU: python benchmarks/burda_table.py
path=<folder of MNIST parquet files> [out=<folder>] [seed=0] [device=cuda] [cell=seconds:batch ...]

    python benchmarks/burda_table.py path=data/mnist iwae_l1_k5=60:1000 iwae_l1_k50=120:500

Each cell is an experiment of genfw's (`conf/experiment/iwae_l1_k5.yaml`): its model, its objective,
its optimizer, warm-up and half a cosine, averaged weights, images binarized anew each time. Through
`Trainer.fit` such a small network waits for Python at every step; here a whole step (coins, bound,
gradient, AdamW, average) is one CUDA graph. A cell trains for about so many seconds, and the number
of steps that the schedule is made for follows from the time of the first ones. A warm-up of the
objective takes the share of the training that it takes in the experiment. The averaged weights of
the end are tested, on all test images, by the experiment's own estimator.

Every cell is written to <out>/burda_table.csv as it is there.
"""

from __future__ import annotations

import copy
import csv
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from genfw import Bound, ImportanceWeighted
from genfw.model import LatentModel
from genfw.noise import BatchNoise, Noise, mix
from genfw.objective import Objective
from genfw.train.compose import compose
from genfw.train.config import build
from genfw.train.data import ImageData
from genfw.train.ema import lerp_
from genfw.train.session import session
from genfw.train.start_at_mean import _bernoulli_decoder

WARMUP, CALIBRATION, DECAY = 100, 300, 0.999


class Training:
    """Steps of one cell, each a replay of the first on a GPU.

    Args:
        highest: learning rate.
        planned: steps of the experiment, by which its objective counts.
    """

    def __init__(
        self,
        model: LatentModel,
        objective: Objective,
        data: ImageData,
        *,
        highest: float,
        betas: tuple[float, float],
        planned: int,
        batch: int,
        device: torch.device,
    ):
        self.device, self.batch = device, batch
        self.highest, self.planned = highest, planned
        self.model, self.data = model, data
        images = torch.from_numpy(data.raw.train.images)
        mean = images.double().mean(0) / (data.raw_bins - 1)
        _bernoulli_decoder(model).start_at(mean.clamp(0.001, 0.999).logit())
        model.to(device)
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.objective = objective.to(device)
        self.objective.advance(0)
        self.images = images.to(device)
        self.rows = torch.zeros(batch, dtype=torch.long, device=device)
        self.rate = torch.tensor(0.0, device=device)
        graph = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.rate if graph else 0.0,
            betas=betas,
            weight_decay=0.0,
            fused=True,
            capturable=graph,
        )
        self.loss = torch.zeros((), device=device)
        self.order = torch.randperm(len(images))
        self.at = 0
        self.act: Callable[[], None] = self.captured() if graph else self.step

    def step(self) -> None:
        """Coins, bound, gradient, AdamW, average."""
        probability = self.images[self.rows].float() / (self.data.raw_bins - 1)
        x = (torch.rand_like(probability) < probability).to(torch.uint8)
        nats = self.objective(self.model, x, None, noise=BatchNoise(self.batch, self.device))
        self.loss.copy_(nats.mean().detach())
        self.optimizer.zero_grad(set_to_none=False)
        nats.mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            lerp_(self.average, self.model, 1 - DECAY)

    def captured(self) -> Callable[[], None]:
        """The same as a graph; its first run leaves the weights as they are, the rate being 0."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def run(self, steps: Iterable[int], of: int, rate: Callable[[int], float]) -> None:
        """Some of so many steps."""
        for i in steps:
            self.objective.advance(i * self.planned // of)
            if self.at + self.batch > len(self.order):
                self.order, self.at = torch.randperm(len(self.order)), 0
            rows = self.order[self.at : self.at + self.batch]
            self.at += self.batch
            self.rows.copy_(rows, non_blocking=True)
            if isinstance(self.optimizer.param_groups[0]["lr"], torch.Tensor):
                self.rate.fill_(rate(i))
            else:
                self.optimizer.param_groups[0]["lr"] = rate(i)
            self.act()
        self.wait()

    def rehearse(self, times: int) -> None:
        """The first step, with no effect."""
        self.run([0] * times, 1, lambda i: 0.0)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def train(self, seconds: float) -> tuple[int, float]:
        """Steps, and milliseconds of each."""
        beginning = min(CALIBRATION, 20 if self.device.type == "cpu" else CALIBRATION)
        self.rehearse(50 if self.device.type == "cuda" else 1)
        start = time.perf_counter()
        self.rehearse(beginning)
        each = (time.perf_counter() - start) / beginning
        steps = max(WARMUP + 1, int(seconds / each))

        def rate(step: int) -> float:
            if step < WARMUP:
                return self.highest * (step + 1) / (WARMUP + 1)
            progress = (step - WARMUP) / (steps - WARMUP)
            return self.highest * 0.5 * (1 + math.cos(math.pi * progress))

        start = time.perf_counter()
        for i in range(0, steps, 5000):
            self.run(range(i, min(i + 5000, steps)), steps, rate)
            print(f"  step {i}: {float(self.loss):.2f}", flush=True)
        return steps, 1e3 * (time.perf_counter() - start) / steps

    def test(self, k: int, images: int | None, chunk: int) -> tuple[float, float, float]:
        """NLL by k weights, its standard error, and the bound, nats."""
        x = torch.from_numpy(self.data.split("test").images[:images]).to(self.device)
        noise = Noise(mix(0, "test"), torch.arange(len(x), device=self.device))
        found, bounds = [], []
        for i in range(0, len(x), 1000):
            part = slice(i, i + 1000)
            found.append(ImportanceWeighted(k, chunk)(self.average, x[part], noise=noise.of(part)))
            bounds.append(Bound(2, 8, chunk=8000)(self.average, x[part], noise=noise.of(part)).nats)
        variance = torch.cat([each.variance for each in found])
        nats = torch.cat([each.nats for each in found])
        error = variance.sum().sqrt() / len(x)
        return float(nats.mean()), float(error), float(torch.cat(bounds).mean())


def cell(experiment: str, path: str, batch: int, device: torch.device, seed: int) -> Training:
    with session():
        config = compose([f"experiment={experiment}", f"data.path={path}", f"seed={seed}"])
    torch.manual_seed(seed)
    return Training(
        build(config.model),
        build(config.objective),
        build(config.data),
        highest=config.optimizer.lr,
        betas=tuple(config.optimizer.betas),
        planned=config.trainer.max_steps,
        batch=batch,
        device=device,
    )


def main() -> None:
    given = dict(each.split("=", 1) for each in sys.argv[1:])
    path, out = given.pop("path"), Path(given.pop("out", "."))
    device, seed = torch.device(given.pop("device", "cuda")), int(given.pop("seed", "0"))
    images = int(given.pop("images", 0)) or None
    k = int(given.pop("k", 5000))
    names = ("cell", "seed", "nll", "stderr", "bound", "passes", "steps", "batch", "ms", "minutes")
    file = out / "burda_table.csv"
    torch.set_float32_matmul_precision("high")
    for experiment, said in given.items():
        seconds, batch = said.split(":")
        start = time.perf_counter()
        training = cell(experiment, path, int(batch), device, seed)
        steps, each = training.train(float(seconds))
        trained = time.perf_counter() - start
        torch.set_float32_matmul_precision("highest")
        nll, error, bound = training.test(k, images, 100_000 if device.type == "cuda" else 2500)
        torch.set_float32_matmul_precision("high")
        passes = steps * int(batch) / len(training.images)
        values = (experiment, seed, nll, error, bound, passes, steps, batch, each, trained / 60)
        new = not file.exists()
        with file.open("a", newline="") as stream:
            writer = csv.writer(stream)
            if new:
                writer.writerow(names)
            writer.writerow(values)
        print(
            f"{experiment}: {nll:.2f} ± {error:.3f} nats, bound {bound:.2f}, {passes:.0f} passes "
            f"of {steps} steps of {batch}, {each:.2f} ms each, {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

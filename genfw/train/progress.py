"""How far a run has come: a bar over its steps, and one over samples that are drawn."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar
from rich import progress as rich
from rich.console import Console

from genfw.check import at_least
from genfw.diffusion.denoiser import Denoiser
from genfw.diffusion.guidance import Guidance
from genfw.model import LatentModel
from genfw.models.vdm import VDM


class Progress(ProgressBar):
    """One bar over the optimizer steps of the whole run; off a terminal, lines.

    It shows the objective (nats) and the bits/dim of the last validation.

    Args:
        every: steps between lines where there is no terminal.

    Raises:
        ValueError: every below 1.
    """

    def __init__(self, every: int = 100):
        super().__init__()
        self.every = at_least(1, "every", every)
        self.enabled = True
        self.bar: rich.Progress | None = None
        self.total: int | None = None
        self.started, self.first, self.said = 0.0, 0, 0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self.total = int(steps) if math.isfinite(steps) else None
        self.started, self.first = time.monotonic(), trainer.global_step
        if self.enabled and sys.stdout.isatty():
            self.bar = rich.Progress(
                rich.TextColumn("training"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.description}"),
            )
            self.bar.add_task("", total=self.total, completed=self.first)
            self.bar.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if self.bar is not None:
            shown = "  ".join(f"{name} {value}" for name, value in _shown(trainer).items())
            self.bar.update(self.bar.task_ids[0], completed=step, description=shown)
        elif self.enabled and step >= self.said + self.every:
            self.said = step
            print(self._line(trainer), flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _line(self, trainer: L.Trainer) -> str:
        step, seconds = trainer.global_step, time.monotonic() - self.started
        parts = [f"step {step}" + (f"/{self.total}" if self.total else "")]
        parts += [f"{name} {value}" for name, value in _shown(trainer).items()]
        parts.append(f"{seconds:.0f} s")
        if self.total:
            left = seconds * (self.total - step) / max(1, step - self.first)
            parts.append(f"{left:.0f} s left")
        return "  ".join(parts)


def _shown(trainer: L.Trainer) -> dict[str, str]:
    named = {
        "train/objective": "objective",
        "val/bpd": "val bits/dim",
        "val/accuracy": "val accuracy",
    }
    values = trainer.callback_metrics
    if not {"val/bpd", "val/accuracy"} & values.keys():  # a density has nats alone
        named["val/nll"] = "val nats"
    return {name: f"{float(values[key]):.3f}" for key, name in named.items() if key in values}


@contextmanager
def watched(model: LatentModel, batches: int, wanted: bool = True) -> Iterator[None]:
    """A bar while a diffusion model draws so many batches of samples, where there is a terminal and
    it is wanted (that of training may still stand there).

    It counts calls of the guided denoiser, of which `Sampler.evaluations` make a batch.
    """
    if not (wanted and isinstance(model, VDM) and sys.stderr.isatty()):
        yield
        return
    guide = model.guidance
    with rich.Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sampling", total=batches * model.sampler.evaluations)

        def counted(denoiser: Denoiser) -> Guidance:
            guided = guide(denoiser)
            guided.register_forward_hook(lambda *_: bar.advance(task))
            return guided

        model.guidance = counted
        try:
            yield
        finally:
            model.guidance = guide

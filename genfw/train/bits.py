r"""Where a diffusion model spends its bits: the denoising term of the bound, by interval of log
SNR,

.. math:: \tfrac12 \int_{\lambda_i}^{\lambda_{i+1}} E \|\epsilon - \hat\epsilon\|^2 d\lambda.

Every random draw of the bound is charged to the interval its noise level lies in; the intervals sum
to the denoising term that the same draws give. The draws are those that validation, test and
training make anyway: nothing is computed for the accounts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as L
import torch
from PIL import Image as PIL
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from genfw.check import at_least_one
from genfw.diffusion.denoising import Denoising, register_denoising_hook
from genfw.elbo import bits_per_dim
from genfw.models.vdm import VDM
from genfw.train.data.images import Batch
from genfw.train.loggers import show
from genfw.train.module import LatentModule, logs
from genfw.train.occasions import Every, over_ranks, skipped
from genfw.train.pictures import save

Drawn: TypeAlias = tuple[Tensor, Tensor]
"""log SNR and cost, (images, draws of each)."""

PENDING = 100
"""Training batches that are kept before they are summed, all at once."""


class BitAccounting(L.Callback):
    """Logs `<split>/bpd_at_<log SNR in the middle>`, the bits/dim that an interval costs, and its
    standard error over images `..._stderr`, for val, test and train. Does nothing for models other
    than a VDM.

    In training these are the bits of the bound whatever the objective weighs, of all steps since
    the last row. In validation and test they sum to the denoising part of `<split>/bpd`; estimators
    that draw no denoising term leave none. They are bits of a KL, and a model of a density has them
    too.

    `bits.png` in the run folder is of the last weights that were drawn, bits/dim per unit of log
    SNR, so that areas are bits/dim.

    Args:
        intervals: equal ones between the end points that the schedule has at first; the outermost
            hold what comes to lie beyond.
        every: validations between pictures; 0: only at the test.

    Raises:
        ValueError: no interval.
    """

    def __init__(self, intervals: int = 10, every: int = 5):
        self.intervals = at_least_one("intervals", intervals)
        self.turns = Every(every)
        self.edges: Tensor | None = None
        self.drawn: list[Drawn] = []
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.batches: defaultdict[str, list[Drawn]] = defaultdict(list)
        self.handle: RemovableHandle | None = None
        self.sums: dict[str, Tensor] = {}
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._open(pl_module, batch)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        if logs(trainer):
            self._charge("train")
            self._report(pl_module, "train")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._charge("train")
        self._unhook()

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._open(pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._charge("val")
        self._unhook()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(pl_module, "val")
        if self.turns.due(trainer):
            self._draw(trainer, "val")

    def on_test_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._open(pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._charge("test")
        self._unhook()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(pl_module, "test")
        self._draw(trainer, "test")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._unhook()
        self.batches.clear()  # what was broken off is no part of what comes
        self.sums.clear()

    def state_dict(self) -> dict[str, Any]:
        edges = None if self.edges is None else self.edges.tolist()
        return {**self.turns.state_dict(), "edges": edges}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.turns.load_state_dict(state_dict)
        edges = state_dict["edges"]
        self.edges = None if edges is None else torch.tensor(edges, dtype=torch.float64)

    def _open(self, module: L.LightningModule, batch: Batch) -> None:
        assert isinstance(module, LatentModule)
        if isinstance(module.model, VDM):
            if self.edges is None:
                self.edges = between(module.model, self.intervals)
            self.images, self.dims = len(batch.image), batch.image[0].numel()
            self.handle = register_denoising_hook(self._remember)

    def _remember(self, draw: Denoising) -> None:
        """Rows of an example stand side by side; one draw of each may come in several parts."""
        with torch.no_grad():
            self.parts.append((draw.log_snr.detach(), draw.cost))
        if sum(len(log_snr) for log_snr, _ in self.parts) >= self.images:
            log_snr, cost = (torch.cat(each) for each in zip(*self.parts, strict=True))
            self.drawn.append((log_snr.view(self.images, -1), cost.view(self.images, -1)))
            self.parts.clear()

    def _unhook(self) -> None:
        self.drawn.clear()
        self.parts.clear()
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def _charge(self, split: str) -> None:
        """Puts down what this batch has drawn since the last time."""
        if self.drawn:
            log_snr, cost = (torch.cat(each, 1) for each in zip(*self.drawn, strict=True))
            self.batches[split].append((log_snr, cost))
            self.drawn.clear()
            if split != "train" or len(self.batches[split]) == PENDING:
                self._sum(split)

    def _sum(self, split: str) -> None:
        if self.edges is not None:
            for batches in alike(self.batches.pop(split, [])):
                new = spent(*batches, self.edges)
                self.sums[split] = self.sums[split] + new if split in self.sums else new

    def _report(self, module: L.LightningModule, split: str) -> None:
        """Logs the sums of all ranks and starts new ones."""
        assert isinstance(module, LatentModule)
        self.found.pop(split, None)
        if not isinstance(module.model, VDM):
            return
        self._sum(split)
        nothing = torch.zeros(3, self.intervals, dtype=torch.float64, device=module.device)
        (sums,) = over_ranks([self.sums.pop(split, nothing)])
        if self.edges is None or sums[0, 0] == 0:
            return
        nats, error = findings(sums)
        bits, error = bits_per_dim(nats, self.dims), bits_per_dim(error, self.dims)
        self.found[split] = bits.cpu(), error.cpu()
        middles = (self.edges[1:] + self.edges[:-1]) / 2
        for middle, each, its in zip(middles.tolist(), bits.float(), error.float(), strict=True):
            module.log(f"{split}/bpd_at_{middle:.2f}", each)
            module.log(f"{split}/bpd_at_{middle:.2f}_stderr", its)

    def _draw(self, trainer: L.Trainer, split: str) -> None:
        if not trainer.is_global_zero or split not in self.found or self.edges is None:
            return
        beside = {name: self.found[name] for name in (split, "train") if name in self.found}
        with skipped("picture of bits"):
            path = Path(trainer.default_root_dir) / "bits.png"
            show(trainer, f"{split}/bits", save(chart(self.edges.cpu(), beside), path))


def between(model: VDM, intervals: int) -> Tensor:
    """(intervals + 1,) log SNR, equally spaced from the schedule's lower end point to its upper."""
    high, low = model.schedule.ends
    return torch.linspace(low, high, intervals + 1, dtype=torch.float64)


def alike(batches: Sequence[Drawn]) -> Iterator[Drawn]:
    """The batches as fewer: those in a row that have equally many draws of each image, as one."""
    for _, same in groupby(batches, key=lambda batch: batch[0].shape[1]):
        log_snr, cost = zip(*same, strict=True)
        yield torch.cat(log_snr), torch.cat(cost)


def spent(log_snr: Tensor, cost: Tensor, edges: Tensor) -> Tensor:
    """(3, intervals) float64, sums over images of 1, nats and nats squared; those of batches and
    ranks add up. The nats of an image are a mean over its draws.

    Args:
        log_snr, cost: (images, draws of each).
        edges: (intervals + 1,) log SNR, rising.
    """
    where = torch.bucketize(log_snr, edges[1:-1].to(log_snr))
    zeros = torch.zeros(len(cost), len(edges) - 1, dtype=torch.float64, device=cost.device)
    nats = zeros.scatter_add(1, where, cost.double() / cost.shape[1])
    return torch.stack([torch.ones_like(nats), nats, nats.square()]).sum(1)


def findings(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Nats per image of every interval, and their standard error over images, (intervals,) each."""
    count, total, squares = sums
    mean = total / count
    variance = (squares - count * mean.square()) / (count - 1).clamp_min(1)
    return mean, (variance.clamp_min(0) / count).sqrt()


def chart(edges: Tensor, found: dict[str, tuple[Tensor, Tensor]]) -> PIL.Image:
    """Bits/dim per unit of log SNR: the first split as bars with two standard errors, others as
    steps. `found`: (bits/dim, standard error) by split."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    left, width = edges[:-1].numpy(), edges.diff()
    for i, (split, (bits, error)) in enumerate(found.items()):
        height, margin = (bits / width).numpy(), (2 * error / width).numpy()
        label = f"{split}: {float(bits.sum()):.3f} bits/dim"
        if i == 0:
            axes.bar(left, height, width.numpy(), yerr=margin, align="edge", label=label, alpha=0.6)
        else:
            axes.stairs(height, edges.numpy(), color="black", label=label)
    axes.set(xlabel="log SNR (noise to data)", ylabel="bits/dim per unit of log SNR")
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    axes.legend(frameon=False)
    canvas.draw()
    pixels = bytes(canvas.buffer_rgba())
    return PIL.frombytes("RGBA", canvas.get_width_height(), pixels).convert("RGB")

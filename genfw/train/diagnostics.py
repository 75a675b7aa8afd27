"""Watches what the latents of a learned hierarchy do (`genfw.train.activity`): numbers go to the
log, a table and pictures to the run folder, and a level that carries nothing gets a warning."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from PIL import Image as PIL
from torch import Tensor
from torch.utils.data import DataLoader

from genfw.check import at_least
from genfw.noise import Noise, mix
from genfw.train.activity import Findings, Sums, look, spread
from genfw.train.data.images import Batch
from genfw.train.files import replace_text
from genfw.train.latents import Latents, latents_of
from genfw.train.loggers import show
from genfw.train.module import LatentModule
from genfw.train.occasions import Every, fitting, over_ranks, skipped
from genfw.train.pictures import interpolation, save, traversal
from genfw.train.signals import heard
from genfw.types import Image, Labels


class Diagnostics(L.Callback):
    """Logs, for learned hierarchies, `kl_<t>`, `active_units_<t>` and `informative_units_<t>` of
    every level, z_1 next to the data, in nats per image, and draws pictures. They are of some
    `images`; `rate`, what all levels cost, and `distortion`, minus the reconstruction, are of all:
    the terms of the NLL that is reported. They are absent where its estimator has none: an
    importance-weighted number is no sum of a rate and a distortion, and `genfw.evaluate
    run=<folder> estimator=bound` gives those of the bound, as `levels` + `prior` and
    `reconstruction`. Does nothing for other models, diffusion models among them.

    `kl_<t>` is the term of the bound in which z_t stands. In a chain only that of z_T is a
    divergence; the others, and those of their units, may be negative, see `genfw.model.bound`.
    Under a prior that is no Normal z_T has `active_units_<T>` alone: what its units cost is not
    known one by one (nan in the table), and all together they cost `prior`, a term of the NLL.

    `units.csv`, `interpolation.png` and `traversal_<t>.png` in the run folder are of the last
    weights that were drawn: in the end, those that were tested. The table has a line for every
    unit, its level t, number within z_t (of (C, H, W), W running fastest), KL_u and A_u.

    Args:
        bins: K of the data.
        images: how many are looked at, anywhere in the split (`spread`): data come sorted by class.
        draws: k, of all latents, for each of them: at least 2.
        patience: validations after which a level that has no active unit, or costs less than 0.1
            nat, is called collapsed, in one warning.
        every: validations between pictures; 0: only at the end.
        columns: images in a row of a picture.
        units: of a level, the most active ones, in a traversal.

    Raises:
        ValueError: fewer than two images or draws, or than three columns.
    """

    def __init__(
        self,
        bins: int,
        images: int = 256,
        draws: int = 4,
        patience: int = 5,
        every: int = 5,
        columns: int = 9,
        units: int = 8,
    ):
        self.bins = bins
        self.images, self.draws = at_least(2, "images", images), at_least(2, "draws", draws)
        self.patience, self.turns = at_least(1, "patience", patience), Every(every)
        self.columns, self.units = at_least(3, "columns", columns), at_least(1, "units", units)
        self.alarmed: set[int] = set()
        self.sums: Sums | None = None
        self.pair: tuple[Image, Labels] | None = None
        self.chosen: Tensor | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin()

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._look(trainer, pl_module, batch, "val")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._look(trainer, pl_module, batch, "test")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = self._report(trainer, pl_module, "val")
        if found is None:
            return
        due = self.turns.due(trainer)
        late = fitting(trainer) and self.turns.validations >= self.patience
        if late and trainer.is_global_zero:
            self._alarm(found)
        if due:
            self._draw(trainer, pl_module, "val", found)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = self._report(trainer, pl_module, "test")
        if found is not None:
            self._draw(trainer, pl_module, "test", found)

    def _begin(self) -> None:
        self.sums, self.pair, self.chosen = None, None, None

    def _look(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, split: str
    ) -> None:
        assert isinstance(module, LatentModule)
        if trainer.sanity_checking or latents_of(module.evaluated) is None:
            return
        world = trainer.world_size
        if self.chosen is None:
            count = _images(trainer, split, len(batch.index)) // world
            self.chosen = spread(max(1, count), -(-self.images // world)).to(batch.index.device)
        # Rank r has images r, r + world, ...: each looks at the same rows of its own.
        rows = torch.isin(batch.index // world, self.chosen)
        if not rows.any():
            return
        x, y, index = batch.image[rows], batch.label[rows], batch.index[rows]
        first = (x[:1], y[:1]) if self.pair is None else (self.pair[0][:1], self.pair[1][:1])
        self.pair = torch.cat([first[0], x[-1:]]), torch.cat([first[1], y[-1:]])
        noise = Noise(mix(module.seed, "diagnostics"), index)
        with module.evaluating() as model:
            sums = look(model, x, y, noise, self.draws)
        self.sums = sums if self.sums is None else self.sums + sums

    def _report(self, trainer: L.Trainer, module: L.LightningModule, split: str) -> Findings | None:
        assert isinstance(module, LatentModule)
        latents = latents_of(module.evaluated)
        if trainer.sanity_checking or latents is None:
            return None
        sums = of_all_ranks(self.sums, latents, module.device)
        if sums is None:
            return None
        found = sums.findings()
        for name, levels in (
            ("kl", found.kl),
            ("active_units", found.active()),
            ("informative_units", found.informative()),
        ):
            for t, units in enumerate(levels, 1):
                if name == "active_units" or not found.kl[t - 1].isnan().all():
                    module.log(f"{split}/{name}_{t}", float(units.sum()))
        whole = module.nll.compute()  # the terms of the number itself, of all images
        if "levels" in whole:
            module.log(f"{split}/rate", (whole["levels"] + whole["prior"]).float())
            module.log(f"{split}/distortion", -whole["reconstruction"].float())
        return found

    def _alarm(self, found: Findings) -> None:
        for t in found.collapsed():
            if t not in self.alarmed:
                self.alarmed.add(t)
                kl, active = float(found.kl[t - 1].sum()), int(found.active()[t - 1].sum())
                warnings.warn(
                    f"level {t} of {len(found.kl)} has collapsed: z_{t} costs "
                    f"{kl:.3f} nats and {active} of its units are active; "
                    "objective=warmup or objective=free_bits may help",
                    stacklevel=2,
                )

    def _draw(
        self, trainer: L.Trainer, module: L.LightningModule, split: str, found: Findings
    ) -> None:
        pictures: dict[str, PIL.Image] = {}
        assert isinstance(module, LatentModule)
        with heard(trainer), skipped("pictures of latents"):  # further ranks wait
            if trainer.is_global_zero and self.pair is not None:
                pictures = self._pictures(module, *self.pair, found)
        if trainer.is_global_zero:
            write(found.table(), Path(trainer.default_root_dir) / "units.csv")
        for name, picture in pictures.items():
            path = save(picture, Path(trainer.default_root_dir) / f"{name}.png")
            show(trainer, f"{split}/{name}", path)

    def _pictures(
        self, module: LatentModule, x: Image, y: Labels, found: Findings
    ) -> dict[str, PIL.Image]:
        with module.evaluating() as model:
            latents = latents_of(model)
            assert latents is not None
            pictures = {"interpolation": interpolation(latents, x, y, self.bins, self.columns)}
            for t in range(1, latents.levels + 1):
                units = found.most_active(t, self.units)
                scale = found.activity[t - 1].clamp_min(0).sqrt()
                pictures[f"traversal_{t}"] = traversal(
                    latents, x[:1], y[:1], t, units, scale, self.bins, self.columns
                )
        return pictures

    def state_dict(self) -> dict[str, Any]:
        return {**self.turns.state_dict(), "alarmed": sorted(self.alarmed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.turns.load_state_dict(state_dict)
        self.alarmed = set(state_dict["alarmed"])


def of_all_ranks(seen: Sums | None, latents: Latents, device: torch.device) -> Sums | None:
    """The sums of all ranks together, of which some may have seen nothing; None if all have. All
    must call it."""
    mine = [0] * latents.levels if seen is None else [each.shape[1] for each in seen.units]
    (sizes,) = over_ranks([torch.tensor(mine, device=device)], dist.ReduceOp.MAX)
    seen = seen or Sums.nothing(sizes.tolist(), device)
    count, *units = over_ranks([seen.count, *seen.units])
    return Sums(count, units) if count > 0 else None


def _images(trainer: L.Trainer, split: str, batch: int) -> int:
    """How many images, over all ranks, this evaluation sees in batches of `batch`."""
    if split == "val":
        loader, batches = trainer.val_dataloaders, trainer.num_val_batches
    else:
        loader, batches = trainer.test_dataloaders, trainer.num_test_batches
    assert isinstance(loader, DataLoader)
    return min(len(loader.dataset), int(batches[0]) * batch * trainer.world_size)  # pyright: ignore


def write(table: str, path: Path) -> None:
    """Of a run: a full disk costs the table, not the run."""
    try:
        replace_text(path, table)
    except OSError as error:
        print(f"{path}: {error.strerror}; no table", file=sys.stderr)

r"""What the latents of a learned hierarchy do: what each level costs, and each of its units, how
many of them follow the data, and pictures of what they mean.

A unit u of z_t is active (Burda et al.) where its posterior mean moves with the data,

.. math:: A_u = \mathrm{Var}_x \, E_{q(z_t | x)}[u] > 0.01.

Where z_t depends on other latents the inner expectation is a mean over k draws, whose own variance,
Var[mean] = E_x Var_q[m | x] / k with m the mean of z_t given the draws, is subtracted.

q and p are products over units, so what a level costs is a sum over units:

.. math:: KL_u = E_x E_q \log \frac{q(u | \cdot)}{p(u | \cdot)}, \quad
    \text{kl}_t = \sum_{u \in z_t} KL_u.

A unit is informative where it is active and costs more than 0.1 nat. At the top KL_u is the mutual
information of u and what q reads (x, or z_{T-1} in a chain) plus KL(q(u) || p(u)) (Hoffman,
Johnson), and so an upper bound on what u tells of x. A unit may cost and not move, where all its
posteriors are alike and not the prior, or move and cost nothing, where they are too wide: hence
both.

References:
    ELBO surgery, Hoffman, Johnson, 2016,
        http://approximateinference.org/accepted/HoffmanJohnson2016.pdf;
    Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, 2015,
        https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image as PIL
from torch import Tensor
from torch.utils.data import DataLoader

from genfw.check import at_least
from genfw.model import LatentModel
from genfw.noise import Noise, mix
from genfw.train.callbacks import show
from genfw.train.data.images import Batch
from genfw.train.errors import Stopped, one_line
from genfw.train.files import replace_text
from genfw.train.latents import Latents, Means, latents_of
from genfw.train.module import LatentModule
from genfw.train.pictures import grid, pixels, save
from genfw.train.signals import heard
from genfw.types import Image, Labels

ACTIVE = 0.01
"""A_u above which a unit is active (Burda et al., 2015)."""

COLLAPSED = 0.1
"""Nats per image that a level must cost, and a unit to be informative: less carries nothing."""


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
        self.patience, self.every = at_least(1, "patience", patience), at_least(0, "every", every)
        self.columns, self.units = at_least(3, "columns", columns), at_least(1, "units", units)
        self.validations = 0
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
        if found is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self.validations += 1
        if self.validations >= self.patience and trainer.is_global_zero:
            self._alarm(found)
        if self.every and self.validations % self.every == 0:
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
        if self.sums is None:
            return None
        assert isinstance(module, LatentModule)
        found = self.sums.over_ranks().findings()
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
        with heard(trainer):  # further ranks wait
            try:
                if trainer.is_global_zero and self.pair is not None:
                    pictures = self._pictures(module, *self.pair, found)
            except Stopped:
                raise
            except Exception as error:
                print(f"pictures of latents skipped: {one_line(error)}", flush=True)
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
        return {"validations": self.validations, "alarmed": sorted(self.alarmed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations, self.alarmed = state_dict["validations"], set(state_dict["alarmed"])


@dataclass(frozen=True)
class Findings:
    """Means over images.

    Attributes:
        kl: KL_u of every unit, (units,) nats for each level, z_1's first.
        activity: A_u of every unit, (units,) for each level; estimates, which may be negative.
    """

    kl: list[Tensor]
    activity: list[Tensor]

    def active(self) -> list[Tensor]:
        """Whether a unit follows the data, (units,) for each level."""
        return [each > ACTIVE for each in self.activity]

    def informative(self) -> list[Tensor]:
        """Whether it also costs enough to tell something, (units,) for each level."""
        pairs = zip(self.active(), self.kl, strict=True)
        return [on & (kl > COLLAPSED) for on, kl in pairs]

    def collapsed(self) -> list[int]:
        """The levels t that carry nothing. A term far below 0 (in a chain) is no collapse."""
        pairs = enumerate(zip(self.kl, self.active(), strict=True), 1)
        return [t for t, (kl, on) in pairs if abs(kl.sum()) < COLLAPSED or not on.any()]

    def table(self) -> str:
        """All units, as CSV."""
        lines = ["level,unit,kl,activity"]
        for t, level in enumerate(zip(self.kl, self.activity, strict=True), 1):
            units = enumerate(torch.stack(level, 1).tolist())
            lines += [f"{t},{u},{kl:.6g},{activity:.6g}" for u, (kl, activity) in units]
        return "\n".join(lines) + "\n"

    def most_active(self, t: int, n: int) -> Tensor:
        """The n units of z_t that move most, or all of them."""
        activity = self.activity[t - 1]
        return activity.topk(min(n, len(activity))).indices


@dataclass(frozen=True)
class Sums:
    """Sums over images, float64, from which findings follow; sums of batches and ranks add up.

    Attributes:
        count: of images.
        units: (4, units) for each level: what it costs, nats, and of m, the mean over draws of a
            posterior mean: m, m squared, and the variance of m that is due to the draws.
    """

    count: Tensor
    units: list[Tensor]

    def __add__(self, other: Sums) -> Sums:
        units = [a + b for a, b in zip(self.units, other.units, strict=True)]
        return Sums(self.count + other.count, units)

    def over_ranks(self) -> Sums:
        """The sums of all ranks together."""
        everything = [self.count.clone(), *(each.clone() for each in self.units)]
        if dist.is_available() and dist.is_initialized():
            for each in everything:
                dist.all_reduce(each)
        return Sums(everything[0], everything[1:])

    def findings(self) -> Findings:
        """The means over all images."""
        n = self.count
        kl, activity = [], []
        for cost, total, squares, own in self.units:
            spread = (squares - total.square() / n) / (n - 1).clamp_min(1)
            kl.append((cost / n).cpu())
            activity.append((spread - own / n).cpu())
        return Findings(kl, activity)


def spread(count: int, n: int) -> Tensor:
    """n of the rows 0..count - 1 (or all), ascending: in no order that data could have, and the
    same in every run, so that runs look at the same images."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:n].sort().values


def _images(trainer: L.Trainer, split: str, batch: int) -> int:
    """How many images, over all ranks, this evaluation sees in batches of `batch`."""
    if split == "val":
        loader, batches = trainer.val_dataloaders, trainer.num_val_batches
    else:
        loader, batches = trainer.test_dataloaders, trainer.num_test_batches
    assert isinstance(loader, DataLoader)
    return min(len(loader.dataset), int(batches[0]) * batch * trainer.world_size)  # pyright: ignore


def look(model: LatentModel, x: Image, y: Labels | None, noise: Noise, draws: int) -> Sums:
    """The sums over one batch, with `draws` draws of every latent for each image.

    Raises:
        TypeError: the model's latents are not learned.
    """
    latents = latents_of(model)
    if latents is None:
        raise TypeError(f"{type(model).__name__} has no learned latents to look at")
    costs, means = [], []
    for j in range(draws):
        drawn = noise.fold(j)
        costs.append([cost.double() for cost in latents.costs(x, y, noise=drawn)])
        posteriors = latents.posteriors(x, y, noise=drawn)
        means.append([q.mean.flatten(1).double() for q, _ in posteriors])
    units = []
    for cost, level in zip(zip(*costs, strict=True), zip(*means, strict=True), strict=True):
        kl, m = torch.stack(cost).mean(0), torch.stack(level)  # (b, units), (draws, b, units)
        mean, own = m.mean(0), m.var(0) / draws
        units.append(torch.stack([kl.sum(0), mean.sum(0), mean.square().sum(0), own.sum(0)]))
    return Sums(torch.tensor(float(len(x)), dtype=torch.float64, device=x.device), units)


def write(table: str, path: Path) -> None:
    """Of a run: a full disk costs the table, not the run."""
    try:
        replace_text(path, table)
    except OSError as error:
        print(f"{path}: {error.strerror}; no table", file=sys.stderr)


def interpolation(
    latents: Latents, x: Image, y: Labels | None, bins: int, columns: int = 9
) -> PIL.Image:
    """Between the two images x: they at both ends of every row, and between them E[x | z] on the
    straight line between their latents. In row t, z_t .. z_T are on the line, and what is below
    z_t is the mean of its prior, so that rows tell what a level and those above hold."""
    means = [z for _, z in latents.posteriors(x, y, noise=Means())]
    w = torch.linspace(0, 1, columns - 2, device=x.device)
    labels = None if y is None else y[(w > 0.5).long()]
    rows = []
    for t in range(latents.levels):
        lines = [torch.lerp(z[:1], z[1:2], _column(w, z)) for z in means[t:]]
        between = pixels(latents.expected(lines, labels), bins)
        rows.append(torch.cat([pixels(x[:1], bins), between, pixels(x[1:2], bins)]))
    return grid(torch.cat(rows), columns)


def traversal(
    latents: Latents,
    x: Image,
    y: Labels | None,
    t: int,
    units: Sequence[int] | Tensor,
    scale: Tensor,
    bins: int,
    columns: int = 9,
) -> PIL.Image:
    """What single units of z_t mean: a row for each of `units`, in which it goes from -3 to 3
    `scale`s (units,) away from where the image x (1, ...) has it. All else at z_t and above stays
    with x, what is below z_t is the mean of its prior."""
    above = [z for _, z in latents.posteriors(x, y, noise=Means())][t - 1 :]
    steps = torch.linspace(-3, 3, columns, device=x.device)
    labels = None if y is None else y.expand(columns)
    rows = []
    for unit in units:
        z, *rest = (z.repeat(columns, *(1,) * (z.ndim - 1)) for z in above)
        flat = z.flatten(1)
        flat[:, int(unit)] += steps.to(z) * float(scale[int(unit)])
        rows.append(pixels(latents.expected([flat.view_as(z), *rest], labels), bins))
    return grid(torch.cat(rows), columns)


def _column(w: Tensor, like: Tensor) -> Tensor:
    return w.to(like).reshape(-1, *(1,) * (like.ndim - 1))

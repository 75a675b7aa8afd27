"""The table that ends a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
from rich.table import Table

from genfw.diffusion.denoising import Denoises
from genfw.elbo import bits_per_dim
from genfw.train.certificate import kind
from genfw.train.errors import not_finite
from genfw.train.keeper import Keeper
from genfw.train.module import LatentModule


def table(results: Mapping[str, Any], module: LatentModule, of: int | None = None) -> Table:
    """The end of a run, for the eye.

    Args:
        results: of the test, as in results.json.
        module: what was tested, by which estimator, on images of how many dimensions.
        of: how many images the test set has.
    """
    test = {
        key.removeprefix("test/"): value
        for key, value in results.items()
        if key.startswith("test/")
    }
    sheet = Table("test set", "")
    name = "NLL given labels" if "given" in test else "NLL"
    if wrong := not_finite(results):
        sheet.add_row(name, f"{test['nll']:.2f} nats: {wrong}")
    else:
        error = test["nll_stderr"]
        how = "standard error" if math.isfinite(error) else "one draw, no standard error"
        sheet.add_row(name, f"{_give_or_take(test['nll'], error, 2)} nats ({how})")
        if "bpd" in test:
            bits = float(bits_per_dim(torch.tensor(error), module.dims))
            sheet.add_row("", f"{_give_or_take(test['bpd'], bits, 4)} bits/dim")
    sheet.add_row("kind", kind(module))
    if "levels" in test:
        sheet.add_row("  reconstruction", f"{-test['reconstruction']:.2f} nats")
        if test["levels"]:
            levels = "levels (denoising)" if isinstance(module.model, Denoises) else "levels"
            sheet.add_row(f"  {levels}", f"{test['levels']:.2f} nats")
        sheet.add_row("  prior", f"{test['prior']:.2f} nats")
    for key, value in test.items():
        if f"{key}_samples" in test:
            what = f"{test[f'{key}_samples']:.0f} samples, {test[f'{key}_reference']}"
            sheet.add_row(key, f"{value:.2f} ({what})")
    for name in module.estimator.diagnostics:
        if name in test:
            sheet.add_row(name, f"{test[name]:.4g} (mean over images)")
    images = f"{test['count']:.0f}" + f" of {of}" * (of is not None and test["count"] < of)
    if not wrong and test["count"] > 1:
        images += f", NLL spread over them {test['nll_std']:.1f} nats"
    sheet.add_row("images", images)
    return sheet


def _give_or_take(value: float, error: float, digits: int) -> str:
    """A number, and its standard error where it has one."""
    more = f" ± {error:.{digits}f}" if math.isfinite(error) else ""
    return f"{value:.{digits}f}{more}"


def so_far(trainer: L.Trainer, keeper: Keeper) -> Table:
    """The end of a run that was interrupted."""
    sheet = Table("so far", "")
    sheet.add_row("step", f"{trainer.global_step}")
    known = trainer.callback_metrics
    for key, name in (("train/objective", "objective"), ("val/nll", "validation NLL")):
        if key in known:
            sheet.add_row(name, f"{float(known[key]):.2f} nats")
    if math.isfinite(keeper.best):
        sheet.add_row("best validation NLL", f"{keeper.best:.2f} nats")
    return sheet

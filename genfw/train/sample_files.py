"""Sets of samples as files: pictures, arrays, a GIF of the way from noise; and what made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from genfw.model import LatentModel
from genfw.models.vdm import VDM
from genfw.noise import Noise
from genfw.train.files import replaced
from genfw.train.frechet import to_bytes
from genfw.train.loggers import git_commit
from genfw.train.pictures import animate, grid, to_png, way
from genfw.types import Image


def about(
    folder: Path,
    config: DictConfig,
    options: DictConfig,
    model: LatentModel,
    chosen: list[int] | None,
) -> dict[str, str]:
    """What made the images."""
    facts = {
        "run": str(folder.absolute()),
        "checkpoint": options.checkpoint,
        "seed": str(options.seed),
        "label": "none" if chosen is None else ",".join(_named(each, model) for each in chosen),
        "git": git_commit() or "unknown",
    }
    if isinstance(model, VDM):
        facts["sampler"] = f"{model.sampler.called()}({model.sampler.extra_repr()})"
        grid = model.sampler.grid
        facts["grid"] = f"{grid.called()}({grid.extra_repr()})".removesuffix("()")
        facts["guidance"] = model.guided().title or "none"
        guidance = config.get("guidance") or {}
        for by in ("classifier", "weaker"):
            if by in guidance:
                facts[by] = str(Path(guidance[by]).absolute())
    if (temperature := options.get("temperature")) is not None:
        facts["temperature"] = str(temperature)
    return facts


def _named(label: int, model: LatentModel) -> str:
    """As the person knows it: the number of classes stands for no label."""
    return "none" if label == model.classes else str(label)


def write(
    images: Image,
    given: list[int] | None,
    facts: dict[str, str],
    kind: str,
    out: Path,
    bins: int,
    columns: int,
) -> None:
    """In this format; `out` without an ending gets one."""
    pixels = to_bytes(images, bins)
    if kind == "npz":
        out = out if out.suffix == ".npz" else Path(f"{out}.npz")
        out.parent.mkdir(parents=True, exist_ok=True)
        unknown = facts["label"] == "none"
        given = [-1] * len(images) if given is None or unknown else given
        arrays: dict[str, Any] = {"images": images.numpy(), "labels": np.array(given), **facts}
        with replaced(out) as beside, beside.open("wb") as file:
            np.savez(file, **arrays)
    elif kind == "png":
        for i, one in enumerate(pixels):
            of = dict(facts)
            if given is not None and facts["label"] != "none":
                of["label"] = str(given[i])
            picture = grid(one[None], 1, smallest=1, gap=0)  # its own pixels and no others
            to_png(picture, out / f"{i:05d}.png", of)
    else:
        out = out if out.suffix == ".png" else Path(f"{out}.png")
        to_png(grid(pixels, columns), out, facts)
    print(f"{len(images)} samples: {out}")


def film(
    model: LatentModel,
    seed: int,
    given: list[int] | None,
    n: int,
    out: Path,
    bins: int,
    columns: int,
    facts: dict[str, str],
) -> None:
    """The first n samples on their way from noise, as a GIF beside the images."""
    assert isinstance(model, VDM)
    index = torch.arange(n, device=model.device)
    y = None if given is None else torch.tensor(given[:n], device=model.device)
    gif = out.with_name(f"{out.name.removesuffix('.png').removesuffix('.npz')}.gif")
    frames = way(model, Noise(seed, index), y, bins, min(columns, n))
    print(f"the way to {n} of them: {animate(frames, gif, facts)}")


def columns_of(n: int, classes: int) -> int:
    """Of a nearly square grid in which every column holds one class."""
    return min(n, classes * max(1, round(n**0.5 / classes)))

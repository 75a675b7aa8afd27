"""Images to look at: grids of samples, the way from noise to one, what latents stand for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image as PIL
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from genfw.amplitudes import broadcast
from genfw.diffusion.sampler import Step
from genfw.model import LatentModel
from genfw.models.vdm import VDM
from genfw.noise import Noise
from genfw.train.files import replaced
from genfw.train.frechet import to_bytes
from genfw.train.latents import Latents, Means
from genfw.types import Data, Image, Labels

GAP = 1
"""Pixels between the images of a grid, before enlarging."""


def data_to_bytes(x: Data) -> Tensor:
    """Normalized data, clipped to [-1, 1], as bytes."""
    return ((x.double().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def pixels(x: Tensor, bins: int) -> Tensor:
    """Expected values, 0..bins - 1, as bytes: those of binary images are shades of grey."""
    return (x.double() * 255 / (bins - 1)).round().clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int, smallest: int = 32, gap: int = GAP) -> PIL.Image:
    """A picture of `images`, row by row.

    Args:
        images: (n, C, H, W) uint8 with C = 1 or 3 (other numbers of channels: the first is shown);
            (n, D) is a row of D pixels.
        columns: images per row.
        smallest: images smaller than this are enlarged by a whole factor.
        gap: grey pixels between images and around them.
    """
    images = images.cpu()
    if images.ndim == 2:
        images = images[:, None, None]
    if images.shape[1] != 3:
        images = images[:, :1]
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    tall, wide = height + gap, width + gap
    sheet = torch.full((channels, rows * tall + gap, columns * wide + gap), 127, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * tall + gap, i % columns * wide + gap
        sheet[:, top : top + height, left : left + width] = image
    zoom = max(1, -(-smallest // max(height, width)))
    sheet = sheet.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    picture = sheet.permute(1, 2, 0).numpy()
    return PIL.fromarray(picture if channels == 3 else picture[:, :, 0])


@torch.no_grad()
def draw_samples(
    model: LatentModel,
    indices: Sequence[int],
    seed: int,
    chunk: int = 128,
    labels: Sequence[int] | None = None,
    sample: Callable[..., Image] | None = None,
) -> Image:
    """Samples number `indices` of this seed: the same images whatever the chunks and ranks.

    Args:
        labels: of these samples; None: see `in_turn`.
        sample: `model.sample`, or the same at another temperature.
    """
    device, parts = model.device, []
    sample = sample or model.sample
    for start in range(0, len(indices), chunk):
        index = torch.tensor(indices[start : start + chunk], device=device)
        y = in_turn(model, index)
        if labels is not None:
            y = torch.tensor(labels[start : start + chunk], device=device)
        parts.append(sample(len(index), y, noise=Noise(seed, index)).cpu())
    return torch.cat(parts)


def in_turn(model: LatentModel, index: Tensor) -> Tensor | None:
    """The labels of a conditional model's samples where nobody asks for any: class i modulo their
    number for sample i, so that classes are balanced. None where there are no classes."""
    return None if model.classes is None else index % model.classes


def steered(model: LatentModel) -> str:
    """What guides samples, as the end of a name; nothing where nothing does.

    Example:
        >>> slug("classifier_free(scale=1.5, interval=[-3, 4])")
        '_classifier_free_scale_1.5_interval_-3_4'
    """
    return slug(model.guided().title) if isinstance(model, VDM) else ""


def slug(title: str) -> str:
    """For names of files and metrics."""
    words = re.sub(r"[^\w.+-]+", "_", title).strip("_")
    return f"_{words}" if words else ""


@torch.no_grad()
def denoising_strip(model: VDM, n: int, seed: int, bins: int, levels: int = 8) -> PIL.Image:
    """Samples 0..n-1 on their way: from t = 1 on the left to the finished image in the last column.

    Two rows per sample, at `levels` times: the latent z_t, and x_hat, what the model makes of it.
    """
    index = torch.arange(n, device=model.device)
    way, x = trajectory(model, Noise(seed, index), in_turn(model, index))
    chosen = [way[round(i * (len(way) - 1) / (levels - 1))] for i in range(levels)]
    final = to_bytes(x, bins)
    latents = torch.stack([data_to_bytes(step.z) for step in chosen] + [final], 1)
    guesses = torch.stack([data_to_bytes(step.prediction.x) for step in chosen] + [final], 1)
    return grid(torch.stack([latents, guesses], 1).flatten(0, 2), levels + 1)


def trajectory(model: VDM, noise: Noise, y: Tensor | None = None) -> tuple[list[Step], Image]:
    """Every step of `model.sample(n, y, noise=noise)`, from t = 1 on, and the images it ends in."""
    z_1 = model.start(len(noise.index), noise)
    steps = list(model.path(z_1, y, noise=noise))
    one = torch.ones((), dtype=torch.float64, device=z_1.device)
    start = Step(one, z_1, model.guided()(z_1, one, y))
    return [start, *steps], model.finish(steps[-1].z, y, noise)


@torch.no_grad()
def way(
    model: VDM, noise: Noise, y: Tensor | None, bins: int, columns: int, most: int = 60
) -> list[PIL.Image]:
    """The samples `model.sample(n, y, noise=noise)` from z at t = 1 to the images, each a grid.

    At most `most` steps are shown, evenly chosen; the last picture is that of the images.
    """
    z = model.start(len(noise.index), noise)
    shown = {round(i * model.sampler.steps / most) for i in range(1, most + 1)}
    frames = [grid(data_to_bytes(z), columns)]
    for i, step in enumerate(model.path(z, y, noise=noise), start=1):
        z = step.z
        if i in shown:
            frames.append(grid(data_to_bytes(z), columns))
    x = model.finish(z, y, noise)
    return [*frames, grid(to_bytes(x, bins), columns)]


def animate(frames: Sequence[PIL.Image], path: Path, facts: Mapping[str, str]) -> Path:
    """Writes a GIF of three seconds that holds its last frame for two more, again and again;
    `facts` are its comment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = frames
    with replaced(path) as beside:
        first.save(
            beside,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=[max(20, 3000 // len(frames))] * len(others) + [2000],
            loop=0,
            comment="\n".join(f"{name}: {value}" for name, value in facts.items()).encode(),
        )
    return path


@torch.no_grad()
def reconstructions(
    latents: Latents, x: Image, noise: Noise, bins: int, y: Tensor | None = None
) -> PIL.Image:
    """Images in the first row, and below them E[x | z], a row for every level, z_1's first: in that
    of z_t, the latents z_t .. z_T are what each image was encoded to, and those below z_t are the
    means of their priors."""
    z = [each for _, each in latents.posteriors(x, y, noise=noise)]
    levels = [pixels(latents.expected(z[t:], y), bins) for t in range(latents.levels)]
    return grid(torch.cat([pixels(x, bins), *levels]), columns=len(x))


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
        lines = [torch.lerp(z[:1], z[1:2], broadcast(w, z)) for z in means[t:]]
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


def to_png(picture: PIL.Image, path: Path, facts: Mapping[str, str] | None = None) -> None:
    """Writes beside, then replaces: a reader never sees half a picture. `facts` become text chunks.

    Raises:
        OSError: it could not be written.
    """
    chunks = PngInfo()
    for name, value in (facts or {}).items():
        chunks.add_text(name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as beside:
        picture.save(beside, format="PNG", pnginfo=chunks)


def save(picture: PIL.Image, path: Path) -> Path:
    """Of a run: a full disk costs the picture, not the run."""
    try:
        to_png(picture, path)
    except OSError as error:
        print(f"{path}: {error.strerror}; no picture", file=sys.stderr)
    return path

"""python -m genfw.sample run=<folder> n=64: images from a finished run.

    label=7 | label=0,1,2 | label=all    of these classes, in turn; a conditional model: all
    label=none                           of a conditional model, as one of all classes together
    sampler=ddim sampler.steps=50        another way from noise to images
    guidance=classifier_free guidance.scale=3
    temperature=0.8                      of model=hvae: of every prior; [1,0.9,0.8]: of z_1's, ...
    format=grid | png | npz              one picture; a folder of them; integers and labels
    trajectory=true                      and a GIF: the first 64 on their way from noise
    device=cpu | cuda:1                  where; else a GPU where there is one
    --config-dir=<folder>                with YAMLs of your own to choose from

Sample number i of a seed and label is always the same image, however many are asked for. What made
them stands in the PNG's text chunks, or beside the arrays; guidance, and the run that guides, in
the name of the file too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from genfw.train.errors import ConfigError, GenfwError
from genfw.train.files import replaced
from genfw.train.nodes import option
from genfw.train.rules.guidance import weaker_hears_no_label
from genfw.train.runs import all_but, checkpoint, command, guide, other, output, read, unguided

if TYPE_CHECKING:
    import torch

    from genfw.model import LatentModel
    from genfw.types import Image

USAGE = """python -m genfw.sample run=<folder> [n=64] [label=7] [seed=0] [sampler=...]
  [guidance=...] [temperature=1] [format=grid|png|npz] [trajectory=true] [checkpoint=best|last]
  [out=<path>] [device=cpu]
Example: python -m genfw.sample run=outputs/2026-11-23_10-15-42_k3f9ab n=100 seed=1"""

DEFAULTS = {
    "n": 64,
    "seed": 0,
    "checkpoint": "best",
    "out": None,
    "chunk": 128,
    "label": None,
    "format": "grid",
    "trajectory": False,
    "temperature": None,
    "device": None,
}

CHANGES = ("sampler", "grid", "guidance", "trusted")
"""Of a run's configuration, what its samples depend on and may be chosen anew."""

ANIMATED = 64
"""Samples in a GIF, at most."""

ENDINGS = {"grid": ".png", "png": "", "npz": ".npz"}
"""Of what is written; a format that is a folder of files has none."""


def sample(arguments: Sequence[str]) -> None:
    folder, config, options = read(arguments, DEFAULTS, USAGE, keeps=all_but(CHANGES))
    for key in ("n", "chunk"):
        if options[key] < 1:
            raise ConfigError(f"{key}={options[key]}: expected at least 1")
    if options.format not in ENDINGS:
        raise ConfigError(f"format={options.format}: expected grid, png or npz")
    _out_fits(options)
    if options.trajectory and "sampler" not in config:
        raise ConfigError(
            f"trajectory=true: {config.model._target_} goes no way from noise to a sample; "
            "diffusion models do"
        )
    chosen = labels(options.label, config)
    if options.temperature is not None and config.model._target_ != "genfw.HVAE":
        raise ConfigError(
            f"temperature={options.temperature}: {config.model._target_} has none; genfw.HVAE does"
        )
    if options.label == "none" and option(config, "guidance") == "classifier_free":
        unguided(config)  # it goes nowhere
    weights = checkpoint(folder, options.checkpoint)
    _out_is_there(options, folder)

    from genfw.noise import mix
    from genfw.train.parts import restore
    from genfw.train.pictures import draw_samples, slug, steered
    from genfw.train.process import prepare
    from genfw.train.progress import watched

    prepare()
    module, _ = restore(config, weights)
    module.to(_device(options.device))
    given = None if chosen is None else [chosen[i % len(chosen)] for i in range(options.n)]
    with module.evaluating() as model:
        seed = mix(options.seed, "sample")
        warmed = _warmed(model, options.temperature)
        with watched(model, -(-options.n // options.chunk)):
            images = draw_samples(model, range(options.n), seed, options.chunk, given, warmed)
        facts, guided = about(folder, config, options, model, chosen), steered(model)
        anew = [each for each in arguments if each.startswith(("sampler", "grid"))]
        named = "" if options.label is None else slug(f"label_{options.label}")
        named += "" if options.checkpoint == "best" else slug(options.checkpoint)
        if options.temperature is not None:
            facts["temperature"] = str(options.temperature)
            named += slug("temperature_" + str(options.temperature).strip("[]"))
        name = f"samples_{options.n}_seed{options.seed}{named}{slug('_'.join(anew))}{guided}"
        name += slug(_other_run(config))
        columns = (
            max(1, round(options.n**0.5)) if chosen is None else _columns(options.n, len(chosen))
        )
        out = folder / name if options.out is None else Path(str(options.out))
        bins = config.data.bins
        try:
            write(images, given, facts, options.format, out, bins, columns)
            if options.trajectory:
                with watched(model, 1):
                    film(model, seed, given, min(options.n, ANIMATED), out, bins, columns, facts)
        except OSError as error:
            raise GenfwError(
                f"{error.filename or out}: {error.strerror}; give out=<path>"
            ) from error


def _warmed(model: LatentModel, temperature: Any) -> Callable[..., Image]:
    """`model.sample` at a temperature, or at one for each level.

    Raises:
        ConfigError: a negative one, another number of them than levels, or none at all.
    """
    from genfw.models.hvae import HVAE

    if temperature is None or not isinstance(model, HVAE):
        return model.sample
    several = isinstance(temperature, ListConfig)
    try:
        numbers = [float(each) for each in (temperature if several else [temperature])]
        given = model.temperatures(numbers if several else numbers[0])
        return partial(model.sample, temperature=given)
    except (TypeError, ValueError):
        raise ConfigError(
            f"temperature={temperature}: expected a number of at least 0, or one for each of "
            f"{model.levels} levels, z_1's first: temperature=[1,0.8,...]"
        ) from None


def _device(name: str | None) -> torch.device:
    """The one asked for; else a GPU, where there is one.

    Raises:
        ConfigError: it is not there.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=str(name)).device
    except (RuntimeError, AssertionError) as error:  # of a torch that was built without it
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}") from error


def _out_is_there(options: DictConfig, folder: Path) -> None:
    """Makes the folder that images go to.

    Raises:
        ConfigError: it cannot be written; or `out` is a folder, and a file is to be written.
    """
    several = options.format == "png" and options.out is not None
    asked = Path(str(options.out)) / "00000.png" if several else options.out
    output(asked, folder / f"samples{ENDINGS[options.format]}")


def _out_fits(options: DictConfig) -> None:
    """Refuses `out=images.npz` for a picture, of which it would make images.npz.png, and a folder
    in which images of an earlier, larger set would stand among these.

    Raises:
        ConfigError: it has the ending of another format, or holds such images.
    """
    held = [] if options.format != "png" or not options.out else Path(options.out).glob("*.png")
    stale = sorted(
        each.name for each in held if each.stem.isdigit() and int(each.stem) >= options.n
    )
    if stale:
        raise ConfigError(
            f"out={options.out}: {stale[0]} to {stale[-1]} are there already, and n={options.n} "
            "would leave them among its own: give another folder, or remove them"
        )
    ending, own = Path(str(options.out)).suffix, ENDINGS[options.format]
    fits = [name for name, each in ENDINGS.items() if each and each == ending != own]
    if fits:
        raise ConfigError(
            f"out={options.out}: format={options.format} writes {own or 'a folder'}; "
            f"for {ending} give format={fits[0]}"
        )


def labels(asked: Any, config: DictConfig) -> list[int] | None:
    """The classes asked for, None where the model has none; "no label" is the number of classes.

    Raises:
        ConfigError: it knows none, and nothing guides it to any; there is no such class; or none
            is asked for where one is needed, by the weaker model that guides too.
    """
    by_classifier = "classifier" in (config.get("guidance") or {})
    classes = config.data.classes if by_classifier else config.model.get("classes")
    if asked == "none":
        if by_classifier:
            raise ConfigError(
                f"label=none: guidance={option(config, 'guidance')} guides to a class: label=7, or "
                "all"
            )
        if classes is not None and not config.get("label_dropout"):
            raise ConfigError(
                "label=none: this model was never without a label (label_dropout=0): train it "
                "with label_dropout=0.1"
            )
        if classes is not None:
            if place := (config.get("guidance") or {}).get("weaker"):
                weaker_hears_no_label(other(place, "guidance.weaker", config)[0], place)
            return [classes]
    if classes is None:
        if asked is not None:
            guide = ", or guide it: guidance=classifier" if "sampler" in config else ""
            raise ConfigError(
                f"label={asked}: this model knows no labels (model.classes=null); train one with "
                f"'model.classes=${{data.classes}}'{guide}"
            )
        return None
    if asked is None or asked == "all":
        return list(range(classes))
    said = [each.strip() for each in str(asked).strip("[] ").split(",")]
    if not all(re.fullmatch(r"[-+]?\d+", each) for each in said):
        raise ConfigError(f"label={asked}: expected a number, 0,1,2, all or none")
    chosen = [int(each) for each in said]
    for each in chosen:
        if not 0 <= each < classes:
            raise ConfigError(
                f"label={asked}: there is no class {each}, labels are 0..{classes - 1}"
            )
    return chosen


def _other_run(config: DictConfig) -> str:
    """The folder of the run that guides, and the checkpoint where one was named; else nothing."""
    place = guide(config)
    if place is None:
        return ""
    file = Path(place).absolute()
    return f"{file.parent.parent.name}_{file.stem}" if file.suffix == ".ckpt" else file.name


def about(
    folder: Path,
    config: DictConfig,
    options: DictConfig,
    model: LatentModel,
    chosen: list[int] | None,
) -> dict[str, str]:
    """What made the images."""
    from genfw.models.vdm import VDM
    from genfw.train.loggers import git_commit

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
    return facts


def _named(label: int, model: LatentModel) -> str:
    """As the person knows it: the number of classes stands for no label."""
    return "none" if label == model.classes else str(label)


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
    import torch

    from genfw.models.vdm import VDM
    from genfw.noise import Noise
    from genfw.train.pictures import animate, way

    assert isinstance(model, VDM)
    index = torch.arange(n, device=model.device)
    y = None if given is None else torch.tensor(given[:n], device=model.device)
    gif = out.with_name(f"{out.name.removesuffix('.png').removesuffix('.npz')}.gif")
    frames = way(model, Noise(seed, index), y, bins, min(columns, n))
    print(f"the way to {n} of them: {animate(frames, gif, facts)}")


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
    import numpy as np

    from genfw.train.frechet import to_bytes
    from genfw.train.pictures import grid, to_png

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


def _columns(n: int, classes: int) -> int:
    """Of a nearly square grid in which every column holds one class."""
    return min(n, classes * max(1, round(n**0.5 / classes)))


if __name__ == "__main__":
    sys.exit(command(sample))

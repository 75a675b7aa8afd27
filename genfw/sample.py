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
    _can_be_asked(options, config)
    _out_fits(options)
    chosen = labels(options.label, config)
    if options.label == "none" and option(config, "guidance") == "classifier_free":
        unguided(config)  # it goes nowhere
    weights = checkpoint(folder, options.checkpoint)
    _out_is_there(options, folder)

    from genfw.noise import mix
    from genfw.train.parts import restore
    from genfw.train.pictures import draw_samples, steered
    from genfw.train.process import prepare
    from genfw.train.progress import watched
    from genfw.train.sample_files import about, columns_of, film, write

    prepare()
    module, _ = restore(config, weights)
    module.to(_device(options.device))
    n, bins, seed = options.n, config.data.bins, mix(options.seed, "sample")
    given = None if chosen is None else [chosen[i % len(chosen)] for i in range(n)]
    columns = max(1, round(n**0.5)) if chosen is None else columns_of(n, len(chosen))
    with module.evaluating() as model:
        warmed = _warmed(model, options.temperature)
        with watched(model, -(-n // options.chunk)):
            images = draw_samples(model, range(n), seed, options.chunk, given, warmed)
        facts = about(folder, config, options, model, chosen) | {"step": str(module.reached)}
        name = _name(arguments, options, config, steered(model))
        out = folder / name if options.out is None else Path(str(options.out))
        try:
            write(images, given, facts, options.format, out, bins, columns)
            if options.trajectory:
                with watched(model, 1):
                    film(model, seed, given, min(n, ANIMATED), out, bins, columns, facts)
        except OSError as error:
            raise GenfwError(
                f"{error.filename or out}: {error.strerror}; give out=<path>"
            ) from error


def _can_be_asked(options: DictConfig, config: DictConfig) -> None:
    """Refuses numbers, formats and ways that there are not, or that this model has not."""
    for key in ("n", "chunk"):
        if options[key] < 1:
            raise ConfigError(f"{key}={options[key]}: expected at least 1")
    if options.format not in ENDINGS:
        raise ConfigError(f"format={options.format}: expected grid, png or npz")
    if options.trajectory and "sampler" not in config:
        raise ConfigError(
            f"trajectory=true: {config.model._target_} goes no way from noise to a sample; "
            "diffusion models do"
        )
    if options.temperature is not None and config.model._target_ != "genfw.HVAE":
        raise ConfigError(
            f"temperature={options.temperature}: {config.model._target_} has none; genfw.HVAE does"
        )


def _name(arguments: Sequence[str], options: DictConfig, config: DictConfig, guided: str) -> str:
    """Of a set in the run folder: another for whatever makes other images."""
    from genfw.train.pictures import slug

    warmth = str(options.temperature).strip("[]")
    said = [
        "" if options.label is None else f"label_{options.label}",
        "" if options.checkpoint == "best" else options.checkpoint,
        "" if options.temperature is None else f"temperature_{warmth}",
        "_".join(each for each in arguments if each.startswith(("sampler", "grid"))),
    ]
    named = "".join(map(slug, said))
    return f"samples_{options.n}_seed{options.seed}{named}{guided}{slug(_other_run(config))}"


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


if __name__ == "__main__":
    sys.exit(command(sample))

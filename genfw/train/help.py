"""`python -m genfw --help`: the groups and their options, read from the conf folders."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

TEXT = """\
genfw trains and compares variational autoencoders and variational diffusion models:
one bound, in nats and bits per dimension, with its standard error.

  python -m genfw [group=option ...] [key=value ...] [--multirun]

Groups and their options (* is the default). A group is conf/<group>/; group.key=value sets a key.
{groups}

Examples
  python -m genfw                                              vdm, eps, cosine, on 8x8 digits
  python -m genfw model=vae trainer.max_steps=1000             another model, a shorter run
  python -m genfw model=vdm param=v schedule=linear seed=1     other parts
  python -m genfw data=mnist data.path=/data/mnist logger=csv  local files, no W&B
  python -m genfw --multirun param=eps,x0,score,v seed=0,1     a sweep: eight processes

Of a finished run: python -m genfw.sample, .evaluate and .export run=<folder>; of one that was
interrupted: python -m genfw resume=<folder>; a classifier that guides: python -m genfw.classifier.
Also: --cfg job prints the configuration and stops; -sc install=bash completes in the shell.
Output: outputs/<time>_<random>/ with results.json, metrics.csv, samples.png, checkpoints/ and the
configuration; a sweep's jobs in multirun/<time>_<random>/<number>/; elsewhere: hydra.run.dir=...
"""


def text(folders: Sequence[Path], plugins: Sequence[str] = ()) -> str:
    """The help page, for genfw's own conf folder and those of plug-ins."""
    chosen = defaults(folders[0] / "config.yaml")
    lines = []
    for group in ["model", *(g for g in chosen if g != "model")]:
        lines.append(_line(group, options(group, folders), chosen.get(group)))
        if group == "model":
            for model in options("model", folders):
                parts = next(
                    defaults(folder / "model" / f"{model}.yaml")
                    for folder in folders
                    if (folder / "model" / f"{model}.yaml").is_file()
                )
                if parts:
                    lines.append(f"    with model={model}:")
                for key, option in parts.items():
                    of = options(key.split("@")[0], folders)
                    lines.append(_line(key, of, option, indent="      "))
    if plugins:
        lines.append(f"  Plug-ins, whose names join their groups: {', '.join(plugins)}")
    return TEXT.format(groups="\n".join(lines))


def options(group: str, folders: Sequence[Path]) -> list[str]:
    """The names of the YAML files of a group."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def defaults(file: Path) -> dict[str, str | None]:
    """The choices in a file's defaults list: {group or group@package: option}."""
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    found = {}
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):
            for key, option in entry.items():
                found[key.removeprefix("optional ").removeprefix("/")] = option
    return found


def _line(group: str, names: Sequence[str], default: str | None, indent: str = "  ") -> str:
    starred = "  ".join(f"*{name}" if name == default else name for name in names)
    first = f"{indent}{group:<{20 - len(indent)}}"
    return textwrap.fill(starred, 120, initial_indent=first, subsequent_indent=" " * 20)

"""What was wrong with a command line that Hydra could not compose."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genfw.train.config import nearest, unknown_key
from genfw.train.errors import ConfigError
from genfw.train.help import defaults, options
from genfw.train.nodes import keys
from genfw.train.session import choices_of, composed_once, folders, group_names, option_names

PLUGINS = {
    "hydra/launcher=joblib": "'genfw[joblib]'",
    "hydra/launcher=submitit_slurm": "'genfw[slurm]'",
    "hydra/launcher=submitit_local": "'genfw[slurm]'",
    "hydra/launcher=ray": "hydra-ray-launcher",
    "hydra/sweeper=optuna": "'genfw[optuna]'",
}
"""Hydra's launchers and sweepers, and what brings them; said where one is not there."""


OF_NODES = ("callbacks", "logger", "metrics")
"""Groups that hold any number of nodes, under names of their own."""


def explain(error: Exception, overrides: Sequence[Override], name: str = "config") -> ConfigError:
    """What was wrong with a command line that Hydra could not compose."""
    groups = group_names()
    if name == "classifier":
        own = [key for key in defaults(folders()[0] / "classifier.yaml") if key in groups]
        for key in (each.key_or_group for each in overrides if not each.is_add()):
            if key in groups and key not in own:
                return ConfigError(f"{key}: a classifier has none. Its groups: {', '.join(own)}")
    chosen = [each for each in overrides if each.key_or_group in groups and _has_option(each)]
    try:
        parts = [each for each in chosen if each.key_or_group in ("model", "experiment")]
        choices = choices_of(composed_once([each.input_line for each in parts], name))
        parts += [each for each in chosen if each not in parts and _key(each) in choices]
        base = composed_once([each.input_line for each in parts], name)
    except (HydraException, OmegaConfBaseException):
        return ConfigError(_short(error))
    known = [key for key in keys(base) if not key.startswith("hydra")]
    for override in overrides:
        key, text = override.key_or_group, override.input_line
        if override.is_hydra_override():
            if missing := PLUGINS.get(f"{key}={override.value()}"):
                return ConfigError(f"{text}: its plug-in is not installed: pip install {missing}")
            continue
        if override.is_sweep_override():
            return ConfigError(f"{text}: several values; add --multirun to try each of them")
        if key in groups:
            if not _has_option(override):
                return _no_option(override, groups)
            if _key(override) not in choices and not override.is_add():
                return _not_of_model(_key(override), choices)
        elif key.removesuffix("._target_") not in known and not override.is_add():
            group = key.partition(".")[0]
            if group in groups and group not in base:  # sampler.steps of a VAE
                return _not_of_model(group, choices)
            if group in OF_NODES and key.endswith("._target_"):
                return ConfigError(f"{key}: there is no such key. To add a node: '+{text}'")
            near = nearest(key, groups) if "." not in key else None
            if near is None:
                return unknown_key(key, known)
            return ConfigError(
                f"{text}: there is no group or key {key}. Did you mean {near}?\n"
                f"Groups: {', '.join(groups)}"
            )
        elif override.is_delete() and OmegaConf.select(base, key) is None:
            return ConfigError(f"{text}: {key} is null already: leave this out")
    return ConfigError(_short(error))


def _no_option(override: Override, groups: Sequence[str]) -> ConfigError:
    group, key = override.key_or_group, _key(override)
    value = "null" if override.value() is None else str(override.value())
    lines = [f"{key}={value}: {group} has no option {value}."]
    match = nearest(value, option_names(group))
    homes = [other for other in groups if value in option_names(other)]
    if match:
        lines.append(f"Did you mean {key}={match}?")
    elif homes:
        lines.append(f"Did you mean {homes[0]}={value}?")
    lines += wrap(f"Options: {', '.join(option_names(group))}", width=120, subsequent_indent="  ")
    return ConfigError("\n".join(lines))


def _not_of_model(key: str, choices: dict[str, str]) -> ConfigError:
    places = folders()
    model = choices.get("model")
    others = [
        option
        for option in options("model", places)
        for folder in places
        if (folder / "model" / f"{option}.yaml").is_file()
        and key in defaults(folder / "model" / f"{option}.yaml")
    ]
    shared = defaults(places[0] / "config.yaml")
    own = [f"{group}={option}" for group, option in choices.items() if group not in shared]
    lines = [f"{key} does not belong to model={model}, which has {', '.join(own)}."]
    if others:
        lines.append(f"It belongs to {', '.join(f'model={other}' for other in others)}")
    return ConfigError("\n".join(lines))


def _has_option(override: Override) -> bool:
    if override.is_sweep_override():
        return False
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    known = option_names(override.key_or_group)
    return override.is_delete() or all(str(each) in known for each in chosen)


def _key(override: Override) -> str:
    """As it stands on the command line: `net`, or `net@encoder`."""
    return override.key_or_group + (f"@{override.package}" if override.package else "")


def _short(error: Exception) -> str:
    """Hydra's own words, without its advice to add keys and its search path."""
    said = "\n".join([str(error), str(error.__cause__ or "")]).split("Config search path:")[0]
    noise = ("To append", "full_key", "reference_type", "object_type")
    lines = [
        line for line in said.splitlines() if line.strip() and not line.strip().startswith(noise)
    ]
    return "\n".join(lines[:6]) or repr(error)

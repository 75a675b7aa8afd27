"""How the checks read a composed configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import genfw
from genfw.train.schema import RESERVED, ConfFiles


def conf_folder() -> Path:
    """Where genfw's own conf/ lies: beside the package in a checkout, inside it once installed."""
    package = Path(genfw.__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def target_of(config: DictConfig, key: str) -> str | None:
    return OmegaConf.select(config, f"{key}._target_")


def option(config: DictConfig, group: str) -> str:
    """The name by which it is chosen, `edm` of genfw.EdmWeighted; the class itself where none of
    genfw's own files names it."""
    target = str(target_of(config, group))
    files = ConfFiles([conf_folder() / group]).files.get(target)
    return files[0].stem if files else target


def select(node: Any, key: str) -> Any:
    """What a reference says here; None where it says nothing, or leaves it to be given."""
    if not isinstance(node, DictConfig) or key not in node:
        return None
    try:
        return node[key]
    except OmegaConfBaseException:
        return None


def keys(config: Any, path: str = "") -> list[str]:
    """All keys below a node, dotted."""
    found = []
    if isinstance(config, DictConfig):
        for key in map(str, config):
            if key not in RESERVED:
                found.append(joined(path, key))
                if not OmegaConf.is_interpolation(config, key) and not OmegaConf.is_missing(
                    config, key
                ):
                    found += keys(config[key], joined(path, key))
    return found


def is_missing(config: DictConfig, key: str) -> bool:
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return OmegaConf.is_missing(node, leaf)


def joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def elements(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is in a list, and in the lists in it."""
    for i, each in enumerate(value if isinstance(value, ListConfig) else ()):
        yield f"{path}[{i}]", each
        yield from elements(f"{path}[{i}]", each)


def numbers(path: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """A number itself; of a list those in it."""
    if isinstance(value, ListConfig):
        for i, each in enumerate(value):
            yield from numbers(f"{path}[{i}]", each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def shown(value: Any) -> str:
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value)
    return (
        {True: "true", False: "false"}[value]
        if isinstance(value, bool)
        else ("null" if value is None else repr(value))
    )

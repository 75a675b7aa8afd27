"""Hydra, looking into folders: genfw's own conf/, those of plug-ins, and those that are typed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import QuotedString
from omegaconf import DictConfig

from genfw.train import resolvers
from genfw.train.errors import ConfigError
from genfw.train.jobs import quoted
from genfw.train.nodes import conf_folder
from genfw.train.overrides import parse


@contextmanager
def session(folder: Path | None = None, overrides: Sequence[str] = ()) -> Iterator[Hydra]:
    """Hydra, looking into a conf folder (genfw's own by default), those of plug-ins, and those that
    `hydra.searchpath` names on a command line.

    Raises:
        ConfigError: one of them is not there.
    """
    resolvers.register()
    folder = conf_folder() if folder is None else folder
    if not folder.is_dir():
        raise ConfigError(f"--config-path: there is no folder {folder}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder.absolute()), job_name="genfw", version_base="1.3"):
            hydra = cast(Hydra, GlobalHydra.instance().hydra)
            path = hydra.config_loader.get_search_path()
            for each in searched(overrides):
                path.prepend("command-line", f"file://{each}", SearchPathQuery(provider="schema"))
            hydra.config_loader = ConfigLoaderImpl(path)
            yield hydra
    finally:
        GlobalHydra.instance().clear()


def searched(overrides: Sequence[str]) -> list[Path]:
    """The folders that `hydra.searchpath=[folder, file://folder, pkg://package.conf]` names. Hydra
    itself would look into them while it composes, and nobody else would know of them.

    Raises:
        ConfigError: one of them is not there.
    """
    found = []
    for override in parse([each for each in overrides if "hydra.searchpath" in each]):
        named = override.value()
        if not isinstance(named, list):
            raise ConfigError(
                f"{override.input_line}: expected a list of folders, hydra.searchpath=[<folder>]"
            )
        for each in named:
            text = each.text if isinstance(each, QuotedString) else str(each)
            place = _package(text) if text.startswith("pkg://") else text.removeprefix("file://")
            if not Path(place).is_dir():
                raise ConfigError(f"hydra.searchpath: there is no folder {place}")
            found.append(Path(place).absolute())
    return found


def searching(arguments: Sequence[str]) -> list[str]:
    """A command line whose `--config-dir <folder>` is `hydra.searchpath=[<folder>]`, its meaning.

    Raises:
        ConfigError: there is no such folder.
    """
    words, said = iter(arguments), []
    for word in words:
        flag, given, folder = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = folder if given else next(words, "")
            if not folder or not Path(folder).is_dir():
                raise ConfigError(f"--config-dir: there is no folder {folder}")
            word = f"hydra.searchpath=[{quoted(Path(folder).absolute())}]"
        said.append(word)
    return said


def _package(text: str) -> str:
    """The folder of `pkg://package.conf`; itself, where there is no such package."""
    try:
        spec = importlib.util.find_spec(text.removeprefix("pkg://").replace("/", "."))
    except ModuleNotFoundError:
        return text
    return next(iter((spec and spec.submodule_search_locations) or ()), text)


def folders() -> list[Path]:
    """The conf folders of this session: its own, those of plug-ins, those of `hydra.searchpath`."""
    places = GlobalHydra.instance().config_loader().get_search_path().get_path()
    paths = [place.path.removeprefix("file://") for place in places]
    return [Path(path) for path in paths if "://" not in path]


def group_names() -> list[str]:
    """All groups but Hydra's own."""
    found = GlobalHydra.instance().config_loader().get_group_options("", ObjectType.GROUP)
    return sorted(group for group in found if group != "hydra")


def option_names(group: str) -> list[str]:
    """The options of a group."""
    return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


def choices_of(config: DictConfig) -> dict[str, str]:
    """{group: option} of a composed configuration, Hydra's own groups left out."""
    return {
        str(group): str(option)
        for group, option in config.hydra.runtime.choices.items()
        if option is not None and not str(group).startswith("hydra/")
    }


def composed(overrides: Sequence[str | None], name: str) -> DictConfig:
    """As Hydra composes it, its own part under `hydra`."""
    return hydra_compose(name, [each for each in overrides if each], return_hydra_config=True)


def composed_once(overrides: Sequence[str | None], name: str) -> DictConfig:
    """The same, once for as long as no conf file changes: what others are held against."""
    files = sorted(file for folder in folders() for file in folder.rglob("*.yaml"))
    state = tuple((file, file.stat().st_mtime_ns) for file in files)
    return _known_by_files(tuple(overrides), name, state)


@functools.lru_cache
def _known_by_files(
    overrides: tuple[str | None, ...], name: str, files: tuple[tuple[Path, int], ...]
) -> DictConfig:
    return composed(overrides, name)

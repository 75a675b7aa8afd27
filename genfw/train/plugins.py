"""Plug-ins: classes from other packages, on genfw's command line.

A package announces a module, and needs nothing else of genfw:

    [project.entry-points."genfw.plugins"]
    mine = "my_package.flows"

Importing that module registers its classes. That happens only when it must: for a name that no YAML
knows. A registered name without a YAML of its own gets the defaults of its signature; a `conf/`
folder inside the package joins the search path, and needs no import at all.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from genfw.train.errors import ConfigError
from genfw.train.schema import parameters

GROUP = "genfw.plugins"

FACTS = {
    "bins": "${data.bins}",
    "shape": "${data.shape}",
    "log_snr_max": "${log_snr_max:${data.bins}}",
    "log_snr_min": -10.0,
}
"""What an argument without a default of its own is given, by name."""


def installed() -> list[EntryPoint]:
    """The announced modules, not imported."""
    return sorted(set(entry_points(group=GROUP)), key=lambda each: each.name)


def packages() -> list[str]:
    """The packages they are in."""
    return list(dict.fromkeys(each.module.split(".")[0] for each in installed()))


def conf_folders() -> list[Path]:
    """The `conf/` folders of plug-ins; finding them imports nothing."""
    folders = []
    for package in packages():
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            if (Path(place) / "conf").is_dir():
                folders.append(Path(place) / "conf")
    return folders


class ConfFolders(SearchPathPlugin):
    """Tells Hydra where to look, after genfw's own conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in conf_folders():
            search_path.append("genfw-plugin", f"file://{folder}")


Plugins.instance().register(ConfFolders)


@functools.cache
def load() -> None:
    """Imports every plug-in and makes its registered names options of their groups.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    from genfw.registry import Registered
    from genfw.train.nodes import conf_folder

    for each in installed():
        try:
            each.load()
        except Exception as error:
            raise ConfigError(
                f"plug-in {each.name} ({each.value}) cannot be imported: "
                f"{type(error).__name__}: {error}\nRepair or uninstall it"
            ) from error
    folders = [conf_folder(), *conf_folders()]
    for group, interface in Registered.groups.items():
        for name, cls in interface.registry.items():
            if not any((folder / group / f"{name}.yaml").is_file() for folder in folders):
                ConfigStore.instance().store(
                    group=group, name=name, node=defaults(cls), provider="genfw"
                )


def defaults(cls: type) -> dict[str, Any]:
    """What a conf file of this class would say; `???` for what must be given."""
    node: dict[str, Any] = {"_target_": f"{cls.__module__}.{cls.__qualname__}"}
    for name, parameter in parameters(cls).items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            node[name] = FACTS.get(name, "???")
        elif isinstance(parameter.default, (type(None), bool, int, float, str)):
            node[name] = parameter.default
        elif isinstance(parameter.default, (list, tuple)):
            node[name] = list(parameter.default)
    return node

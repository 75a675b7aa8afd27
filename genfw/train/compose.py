"""From a command line to a checked configuration, and from a wrong one to a short answer.

Hydra composes; this page says what was wrong in the words of the person who typed it: which name,
which names there are, and which of them was probably meant.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from genfw.train import plugins, resolvers
from genfw.train.config import check, nearest, trusted_by, unknown_key, vouched_for
from genfw.train.errors import ConfigError
from genfw.train.help import defaults, options
from genfw.train.jobs import quoted
from genfw.train.nodes import conf_folder, keys, select
from genfw.train.rules import samples_have_labels, times_are_looked_at


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


def compose(overrides: Sequence[str], name: str = "config") -> DictConfig:
    """The checked configuration of one job, Hydra's own part under `hydra`. Within a `session`.

    Raises:
        ConfigError: it is wrong, and how.
    """
    config = unchecked(overrides, name)
    complete(config, config.hydra)
    chosen = [f"{k}={v}" for k, v in _choices(config).items() if k != "experiment"]
    named = typed(parse(overrides))
    check_hydra(config.hydra, trusted_by(config, named))
    vouched = [*(config.trusted or []), *named]
    config.trusted = list(dict.fromkeys(vouched))  # interpolations build too
    check(_job(config), _job(_known(chosen, name)), folders())
    times_are_looked_at(config)
    samples_have_labels(config)
    return config


HYDRAS_OWN = re.compile(
    r"hydra_plugins\.genfw\.Local"
    r"|hydra\._internal\.core_plugins\.basic_\w+\.Basic(Launcher|Sweeper)"
    r"|hydra_plugins\.hydra_\w+(\.\w+)*\.\w+(Launcher|Sweeper)"
    r"|hydra\.experimental\.callbacks\.\w+Callback"
    r"|optuna\.samplers\.\w+Sampler"
    r"|(logging|logging\.handlers|colorlog)\.\w*(Handler|Formatter|Filter)"
)
"""What Hydra's own part of a configuration names: launchers, sweepers, and how they log."""


def complete(config: DictConfig, hydra: Any) -> None:
    """What Hydra cannot say of a configuration that it has composed.

    Args:
        config: which is changed.
        hydra: its own part.
    """
    as_many_levels(config)
    none_of_what_is_off(config, hydra)


def none_of_what_is_off(config: DictConfig, hydra: Any) -> None:
    """Under `metrics=none` and `callbacks=none` what an experiment says of those that are then not
    there is of no matter; what is typed of them stays, to be refused."""
    asked = [each.key_or_group for each in parse(hydra.overrides.task)]
    for group in ("callbacks", "metrics"):
        if hydra.runtime.choices.get(group) == "none":
            for name, node in list(config[group].items()):
                named = any(each.startswith(f"{group}.{name}") for each in asked)
                if isinstance(node, DictConfig) and "_target_" not in node and not named:
                    with open_dict(config):
                        del config[group][name]


def as_many_levels(config: DictConfig) -> None:
    """More sizes in model.latents than networks: the last network of either list is copied for each
    of them, reading the sizes one place further on. Where it names no sizes, nothing is done."""
    model = config.get("model")
    latents = select(model, "latents")
    for name in ("encoders", "decoders"):
        networks = select(model, name)
        if isinstance(networks, ListConfig) and networks and isinstance(latents, ListConfig):
            for t in range(len(networks), len(latents)):
                last = networks._get_node(t - 1)
                text = OmegaConf.to_yaml(last) if isinstance(last, DictConfig) else ""
                if f"${{model.latents[{t - 1}]}}" in text:
                    networks.append(OmegaConf.create(_SIZE.sub(_next_size, text)))


_SIZE = re.compile(r"\$\{model\.latents\[(\d+)\]\}")


def _next_size(found: re.Match[str]) -> str:
    return f"${{model.latents[{int(found[1]) + 1}]}}"


def check_hydra(node: Any, trusted: Sequence[str], path: str = "hydra") -> None:
    """Refuses Hydra's own part of a configuration where it would import or call something foreign.

    Hydra builds its launcher, sweeper and callbacks itself, and `logging` what `()` and `class`
    name.

    Raises:
        ConfigError: one of them is not of Hydra, its plug-ins, or named in `trusted`.
    """
    if isinstance(node, ListConfig):
        for i, each in enumerate(node._iter_ex(resolve=False)):
            check_hydra(each, trusted, f"{path}[{i}]")
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for key, value in node.items_ex(resolve=False):
        at = f"{path}.{key}"
        if key in ("_target_", "()", "class"):
            target = str(node[key])
            if not HYDRAS_OWN.fullmatch(target) and not vouched_for(target, trusted):
                raise ConfigError(
                    f"{at}={target} is not among what Hydra's own part of a config may import: its "
                    f"launchers, sweepers, callbacks and loggers.\nIf you trust it, name it: "
                    f"'trusted=[{target}]'"
                )
        check_hydra(value, trusted, at)


def unchecked(overrides: Sequence[str], name: str = "config") -> DictConfig:
    """What the command line composes to, whether or not it can run.

    Raises:
        ConfigError: it does not compose.
    """
    parsed = parse(overrides)
    try:
        try:
            config = _compose(overrides, name)
        except MissingConfigException:  # a name that no YAML knows: perhaps a plug-in does
            plugins.load()
            config = _compose(overrides, name)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error, parsed, name) from error
    return config


def typed(overrides: Sequence[Override]) -> list[str]:
    """Every `_target_` that stands on this command line: its author trusts it."""
    found = []

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                visit(each, str(name))
        elif isinstance(value, list):
            for each in value:
                visit(each, "")
        elif key == "_target_":
            found.append(value.text if isinstance(value, QuotedString) else str(value))

    for override in overrides:
        name = override.key_or_group.rpartition(".")[2]
        values = override.sweep_iterator() if override.is_discrete_sweep() else [override.value()]
        for value in values:
            visit(value, name)
    return list(dict.fromkeys(found))


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides of a command line.

    Raises:
        ConfigError: one of them is not `key=value`.
    """
    hydra = GlobalHydra.instance()
    parser = OverridesParser.create(hydra.config_loader() if hydra.is_initialized() else None)
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(
                f"{text}: not understood ({reason}).\n"
                "Write key=value or group=option; quote a value with special characters twice: "
                """'key="a=b"'"""
            ) from error
    return parsed


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The command lines of a sweep, one per job: every combination of the listed values.

    Values that only a sweeper can choose (intervals) are left out.
    """
    axes = []
    for override in parse(overrides):
        if override.is_discrete_sweep():
            key = override.get_key_element()
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override():
            axes.append([str(override.input_line)])
    return [list(job) for job in itertools.product(*axes)]


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
    groups = _groups()
    if name == "classifier":
        own = [key for key in defaults(folders()[0] / "classifier.yaml") if key in groups]
        for key in (each.key_or_group for each in overrides if not each.is_add()):
            if key in groups and key not in own:
                return ConfigError(f"{key}: a classifier has none. Its groups: {', '.join(own)}")
    chosen = [each for each in overrides if each.key_or_group in groups and _has_option(each)]
    try:
        parts = [each for each in chosen if each.key_or_group in ("model", "experiment")]
        choices = _choices(_known([each.input_line for each in parts], name))
        parts += [each for each in chosen if each not in parts and _key(each) in choices]
        base = _known([each.input_line for each in parts], name)
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


def _compose(overrides: Sequence[str | None], name: str) -> DictConfig:
    return hydra_compose(name, [each for each in overrides if each], return_hydra_config=True)


def _known(overrides: Sequence[str | None], name: str) -> DictConfig:
    """The same, once for as long as no conf file changes: what others are held against."""
    files = sorted(file for folder in folders() for file in folder.rglob("*.yaml"))
    state = tuple((file, file.stat().st_mtime_ns) for file in files)
    return _known_by_files(tuple(overrides), name, state)


@functools.lru_cache
def _known_by_files(
    overrides: tuple[str | None, ...], name: str, files: tuple[tuple[Path, int], ...]
) -> DictConfig:
    return _compose(overrides, name)


def _job(config: DictConfig) -> DictConfig:
    """Without Hydra's own part."""
    config = copy.copy(config)
    with open_dict(config):
        del config["hydra"]
    return config


def folders() -> list[Path]:
    """The conf folders of this session: its own, those of plug-ins, those of `hydra.searchpath`."""
    places = GlobalHydra.instance().config_loader().get_search_path().get_path()
    paths = [place.path.removeprefix("file://") for place in places]
    return [Path(path) for path in paths if "://" not in path]


def _choices(config: DictConfig) -> dict[str, str]:
    """{group: option} of a composed configuration, Hydra's own groups left out."""
    return {
        str(group): str(option)
        for group, option in config.hydra.runtime.choices.items()
        if option is not None and not str(group).startswith("hydra/")
    }


def _groups() -> list[str]:
    found = GlobalHydra.instance().config_loader().get_group_options("", ObjectType.GROUP)
    return sorted(group for group in found if group != "hydra")


def _options(group: str) -> list[str]:
    return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


def _has_option(override: Override) -> bool:
    if override.is_sweep_override():
        return False
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    known = _options(override.key_or_group)
    return override.is_delete() or all(str(each) in known for each in chosen)


def _key(override: Override) -> str:
    """As it stands on the command line: `net`, or `net@encoder`."""
    return override.key_or_group + (f"@{override.package}" if override.package else "")


def _no_option(override: Override, groups: Sequence[str]) -> ConfigError:
    group, key = override.key_or_group, _key(override)
    value = "null" if override.value() is None else str(override.value())
    lines = [f"{key}={value}: {group} has no option {value}."]
    match = nearest(value, _options(group))
    homes = [other for other in groups if value in _options(other)]
    if match:
        lines.append(f"Did you mean {key}={match}?")
    elif homes:
        lines.append(f"Did you mean {homes[0]}={value}?")
    lines += wrap(f"Options: {', '.join(_options(group))}", width=120, subsequent_indent="  ")
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


def _short(error: Exception) -> str:
    """Hydra's own words, without its advice to add keys and its search path."""
    said = "\n".join([str(error), str(error.__cause__ or "")]).split("Config search path:")[0]
    noise = ("To append", "full_key", "reference_type", "object_type")
    lines = [
        line for line in said.splitlines() if line.strip() and not line.strip().startswith(noise)
    ]
    return "\n".join(lines[:6]) or repr(error)

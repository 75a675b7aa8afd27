"""A composed configuration is checked before anything it names is imported, and then built.

Every node with a `_target_` is held against what its class takes (`genfw.train.schema`): unknown,
missing and mistyped keys are errors, wherever they come from. All other nodes are held against the
same choice of groups composed without further settings. What may be imported at all is a short
list: genfw's own classes, torch.optim, Lightning's callbacks and loggers, installed plug-ins, and
what the person named in `trusted` or typed as a `_target_` of this very run.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genfw.registry import NameTaken
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.nodes import (
    conf_folder,
    elements,
    is_missing,
    joined,
    keys,
    numbers,
    select,
    shown,
)
from genfw.train.rules import RULES
from genfw.train.rules.networks import latents_are_levels, networks_fit_their_place
from genfw.train.schema import (
    RESERVED,
    Argument,
    ConfFiles,
    fits,
    from_signature,
    type_of,
)

PREFIXES = (
    "genfw.",
    "torch.optim.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
)
NAMES = ("lightning.pytorch.Trainer", "lightning.pytorch.trainer.trainer.Trainer")


def check(
    config: DictConfig,
    reference: DictConfig,
    conf_folders: Sequence[Path] | None = None,
) -> None:
    """Refuses a configuration that cannot run.

    Args:
        config: as composed.
        reference: the same choices of groups, composed without other settings: its keys and types
            are the known ones.
        conf_folders: genfw's own conf/ and those of plug-ins.

    Raises:
        ConfigError: the first thing that is wrong, with what was expected.
    """
    try:
        missing = [key for key in keys(config) if is_missing(config, key)]
        if missing:
            said = " ".join(f"{key}=..." for key in missing)
            raise ConfigError(f"{', '.join(missing)} must be given: add {said} to the command")
        checker = _Checker(ConfFiles(conf_folders or [conf_folder()]), trusted_by(config))
        checker.node(config, reference, "")
        for at, value, argument in checker.copies:  # a wrong value is named where it was given
            _fit(at, value, argument)
        for rule in RULES:
            rule(config)
    except OmegaConfBaseException as error:
        networks_fit_their_place(config)  # out of place, they read what is not there
        latents_are_levels(config)
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}") from error


class _Checker:
    def __init__(self, files: ConfFiles, trusted: Sequence[str]):
        self.files, self.trusted = files, trusted
        self.copies: list[tuple[str, Any, Argument]] = []

    def value(self, at: str, value: Any, argument: Argument, like: Any, copied: bool) -> None:
        """One value, and all below it; copies of other places wait."""
        if copied:
            self.copies.append((at, value, argument))
        else:
            _fit(at, value, argument)
            self.node(value, like, at)

    def node(self, node: Any, like: Any, path: str) -> None:
        if isinstance(node, ListConfig):
            for i in range(len(node)):
                if not OmegaConf.is_interpolation(node, i):
                    self.node(node[i], None, f"{path}[{i}]")
        elif isinstance(node, DictConfig):
            if "_target_" in node:
                self.call(node, like, path)
            else:
                self.settings(node, like, path)

    def settings(self, node: DictConfig, like: Any, path: str) -> None:
        """A node that no class reads: a dictionary of settings, or of nodes."""
        known = like if isinstance(like, DictConfig) else None
        names = list(map(str, known or ()))
        for key in names:
            if key not in node and not _is_call(select(known, key)):
                raise ConfigError(f"{joined(path, key)} is missing: do not delete it")
        for key, at, value, copied in _items(node, path):
            if known is not None and key not in names and not _is_call(value):
                raise unknown_key(at, keys(known, path))
            before = select(known, key)
            switched_off = value is None and isinstance(before, DictConfig)
            types = None if before is None or switched_off else type_of(before)
            self.value(at, value, Argument(types), before, copied)

    def call(self, node: DictConfig, like: Any, path: str) -> None:
        """A node that names a class: the keys are the class's arguments."""
        target, at = node["_target_"], joined(path, "_target_")
        if not isinstance(target, str) or not allowed(target, self.trusted):
            raise ConfigError(
                f"{at}={target} is not among what a config may import: genfw's classes, "
                "torch.optim, Lightning's callbacks and loggers, plug-ins.\n"
                f"If you trust it, name it: 'trusted=[{target}]'"
            )
        given = [str(key) for key in node if key not in RESERVED]
        arguments = self.arguments(target, at, given)
        for key in given:
            if key not in arguments and (node[key] is not None or target.startswith(PREFIXES)):
                raise _not_taken(key, target, arguments, like, path)
        for key, argument in arguments.items():
            if argument.required and key not in node and not node.get("_partial_"):
                raise ConfigError(f"{joined(path, key)} must be given: {target} needs it")
        _fit(joined(path, "_partial_"), node.get("_partial_", False), Argument(frozenset({"bool"})))
        for key, where, value, copied in _items(node, path):
            argument, before = arguments.get(key, Argument()), select(like, key)
            if argument.types is None and isinstance(before, DictConfig):
                argument = Argument(frozenset({"dict"}))
            self.value(where, value, argument, before, copied)

    def arguments(self, target: str, at: str, given: Sequence[str]) -> Mapping[str, Argument]:
        """What the class takes; whatever is given, where it takes anything (**kwargs)."""
        schema = self.files.schema(target)
        if schema is None or not (schema.complete or schema.arguments.keys() >= set(given)):
            try:
                schema = from_signature(locate(target, self.trusted))
            except ConfigError as error:
                raise ConfigError(f"{at}: {error}") from error
        if schema.complete:
            return schema.arguments
        return {**dict.fromkeys(given, Argument()), **schema.arguments}


def _not_taken(
    key: str, target: str, arguments: Iterable[str], like: Any, path: str
) -> ConfigError:
    at = joined(path, key)
    if isinstance(like, DictConfig) and key in like and like.get("_target_") != target:
        left_out = f"~{at}" if target.startswith(PREFIXES) else f"{at}=null"
        return ConfigError(
            f"{at} belongs to {like.get('_target_')}; {target} takes {_listed(arguments)}.\n"
            f"Add '{left_out}' to leave it out"
        )
    return unknown_key(at, [joined(path, each) for each in arguments], f"{target} takes")


def _items(node: DictConfig, path: str) -> Iterator[tuple[str, str, Any, bool]]:
    """(key, path, value, whether the value is a copy of another place in the config)."""
    for key in map(str, node):
        if key not in RESERVED:
            yield key, joined(path, key), node[key], OmegaConf.is_interpolation(node, key)


def _is_call(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value


def _fit(path: str, value: Any, argument: Argument) -> None:
    if _is_call(value):
        return
    if not fits(value, argument.types):
        raise ConfigError(f"{path}: expected {argument.expected()}, got {shown(value)}")
    if argument.choices and value not in argument.choices:
        match = nearest(str(value), argument.choices)
        hint = f" Did you mean {match}?" if match else ""
        expected = ", ".join(argument.choices)
        raise ConfigError(f"{path}: expected one of {expected}, got {shown(value)}.{hint}")
    for at, each in elements(path, value) if argument.elements else ():
        if not fits(each, argument.elements):
            expected = Argument(argument.elements).expected()
            raise ConfigError(f"{at}: expected {expected}, got {shown(each)}")
    for at, number in numbers(path, value):
        if argument.range is not None and number not in argument.range:
            types = argument.elements or argument.types or frozenset()
            kind = "a number" if "float" in types else "an integer"
            raise ConfigError(f"{at}={number}: expected {kind} {argument.range}")
        if math.isnan(number):
            raise ConfigError(f"{at}=nan: expected a number")


# ---- names ---------------------------------------------------------------------------------------


def unknown_key(key: str, known: Iterable[str], taken: str | None = None) -> ConfigError:
    """The error for a key that nothing reads, with the nearest one that something does."""
    known = list(known)
    parent = key.rpartition(".")[0]
    siblings = [each for each in known if each.rpartition(".")[0] == parent]
    lines = [f"{key}: there is no such key."]
    match = nearest(key, known)
    if match:
        lines.append(f"Did you mean {match}?")
    if siblings:
        names = [each.rpartition(".")[2] for each in siblings]
        lines.append(f"{taken or (parent + ' has' if parent else 'Keys:')} {_listed(names)}")
    elif taken:
        lines.append(f"{taken} no arguments")
    return ConfigError("\n".join(lines))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name most like it: of its siblings, then by the last part, then as a whole."""
    known = list(known)
    parent, _, leaf = word.rpartition(".")
    by_leaf: dict[str, str] = {}
    siblings: dict[str, str] = {}
    for each in known:
        above, _, name = each.rpartition(".")
        by_leaf.setdefault(name, each)
        if above == parent:
            siblings[name] = each
    for names, cutoff in ((siblings, 0.6), (by_leaf, 0.9)):
        close = difflib.get_close_matches(leaf, names, 1, cutoff)
        if close:
            return names[close[0]]
    close = [] if siblings and parent else difflib.get_close_matches(word, known, 1, 0.6)
    return close[0] if close else None


def _listed(names: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(names), 240, placeholder=" ...") or "no arguments"


# ---- what may be imported ------------------------------------------------------------------------


def trusted_by(config: DictConfig, more: Iterable[str] = ()) -> list[str]:
    """The packages, modules and classes that a person or an installed plug-in vouches for."""
    from genfw.train.plugins import packages

    named = config.get("trusted") or []
    if not isinstance(named, ListConfig | list):
        raise ConfigError(f"trusted: expected list, got {shown(named)}: write 'trusted=[{named}]'")
    return [*packages(), *more, *map(str, named)]


def allowed(target: str, trusted: Sequence[str] = ()) -> bool:
    """Whether a config may import this name."""
    if not all(part.isidentifier() for part in target.split(".")) or "." not in target:
        return False
    return target in NAMES or target.startswith(PREFIXES) or vouched_for(target, trusted)


def vouched_for(target: str, trusted: Sequence[str]) -> bool:
    """Whether it, or a module or package that it is in, is named."""
    return any(target == name or target.startswith(f"{name}.") for name in trusted)


def locate(target: str, trusted: Sequence[str] = ()) -> Callable[..., Any]:
    """Imports what a `_target_` names.

    Under genfw, torch.optim and Lightning it must be a class that is written there, so that no
    other module can be reached through them (`genfw.train.config.importlib.import_module`), or a
    function that genfw's own conf/ names.

    Raises:
        ConfigError: it may not be imported, or is not there.
    """
    if not allowed(target, trusted):
        raise ConfigError(
            f"{target} is not among what a config may import: if you trust it, name it: "
            f"'trusted=[{target}]'"
        )
    found = _imported(target)
    if vouched_for(target, trusted):
        return found
    home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', '')}"
    is_own = isinstance(found, type) or target in ConfFiles([conf_folder()]).files
    if not (is_own and allowed(home)):
        raise ConfigError(
            f"{target} is not a class of {target.split('.')[0]}: it cannot be built from a config"
        )
    return found


def _imported(target: str) -> Any:
    parts = target.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:depth])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(f"{error.name}.")):
                continue
            raise
        except NameTaken as error:
            raise ConfigError(f"{target}: {error}") from error
        for name in parts[depth:]:
            try:
                found = getattr(found, name)
            except AttributeError:
                close = nearest(name, dir(found))
                hint = f" Did you mean {close}?" if close else ""
                raise ConfigError(f"{target}: {module} has no {name}.{hint}") from None
        if not callable(found):
            raise ConfigError(f"{target} is not a class")
        return found
    raise ConfigError(
        f"{target}: there is no module {parts[0]}, here or installed (looked in {Path.cwd()} too)"
    )


def build(node: Any, **arguments: Any) -> Any:
    """The object that a node names; a dictionary or a list of nodes becomes one of objects.

    `_partial_: true` gives a function that waits for the other arguments. Interpolations copy
    configurations, not objects: a node interpolated in two places is built twice.

    Args:
        node: a config node, or a plain value, which is returned.
        arguments: further arguments for the node itself, objects as they are; they go before the
            node's own.

    Raises:
        ConfigError: a target that may not be imported, or a value that a constructor refuses (its
            ValueError).
    """
    if not isinstance(node, (DictConfig, ListConfig)):
        return node
    root = node._get_root()
    trusted = trusted_by(root if isinstance(root, DictConfig) else OmegaConf.create({}))
    return _build(
        OmegaConf.to_container(node, resolve=True), node._get_full_key(None), trusted, arguments
    )


def _build(value: Any, path: str, trusted: Sequence[str], more: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_build(each, f"{path}[{i}]", trusted, {}) for i, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    built = {
        key: _build(each, joined(path, str(key)), trusted, {})
        for key, each in value.items()
        if key not in RESERVED
    }
    if "_target_" not in value:
        return built
    made = locate(value["_target_"], trusted)
    given = {**_spared(value["_target_"], made, built), **more}
    named = f"{path} ({value['_target_']})"
    call = functools.partial(_call, named, made, **given)
    return call if value.get("_partial_") else call()


def _spared(target: str, made: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Without nulls that somebody else's class does not take: of the class that it stands for,
    `model._target_=mine.VAE`, whose keys others may interpolate."""
    if target.startswith(PREFIXES) or None not in given.values():
        return given
    takes = from_signature(made)
    kept = takes.arguments if takes.complete else given
    return {key: value for key, value in given.items() if value is not None or key in kept}


def _call(named: str, made: Callable[..., Any], /, *args: Any, **given: Any) -> Any:
    """`made`, whose complaints name the node."""
    try:
        return made(*args, **given)
    except Exception as error:
        if isinstance(error, GenfwError) or not _complains(error):
            raise
        raise ConfigError(f"{named}: {' '.join(str(error).split())}") from error


def _complains(error: Exception) -> bool:
    """Whether an exception of a constructor is about what it was given (Lightning has its own, and
    its Trainer answers with a TypeError to what it cannot read)."""
    names = ("MisconfigurationException", "TypeError")
    return isinstance(error, ValueError) or type(error).__name__ in names

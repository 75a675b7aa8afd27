"""Command lines that take a finished run, `run=<folder> key=value ...`."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genfw.train.compose import unchecked
from genfw.train.config import check, unknown_key
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.files import probe
from genfw.train.nodes import keys
from genfw.train.session import searching, session
from genfw.train.slurm import tell
from genfw.train.terminal import detach

CHOSEN_ANEW = ("estimator", "sampler", "guidance", "grid")
"""Groups that a finished run does not depend on; those of diffusion models after the first."""


PLAIN = re.compile(r"[-+]?(0|[1-9]\d*|[^_:]*\.[^_:]*)")
"""A number as it is written here."""


def command(act: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Runs `act` on a command line; returns the exit code, as `python -m genfw` does. Of --help it
    says what its module's docstring says. Without `arguments` it is the process's own."""
    if arguments is None:
        detach()
        arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print((sys.modules[act.__module__].__doc__ or "").strip())
        return 0
    try:
        act(searching(arguments))
    except GenfwError as error:
        return tell(error, lines=40)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def read(
    arguments: Sequence[str],
    defaults: Mapping[str, Any],
    usage: str,
    word: str = "run",
    keeps: Callable[[str], str | None] = lambda key: None,
) -> tuple[Path, DictConfig, DictConfig]:
    """A run folder, its configuration with the changes asked for, and the command's own options.

    Args:
        arguments: `key=value`, the folder among them, and `hydra.searchpath=[<folder>]`, where
            options of groups may be too.
        defaults: the command's options. Every other key must be one of the run's config.yaml, or a
            group that may be chosen anew, `estimator=importance_weighted`.
        usage: said where the folder is missing.
        word: what names the folder.
        keeps: of a key of config.yaml, why it may not be given here; None: it may.

    Raises:
        ConfigError: an argument that is not understood or has no value, a folder that is no run's,
            a key that is unknown or kept.
    """
    search = [each for each in arguments if each.startswith("hydra.searchpath=")]
    given = _pairs([each for each in arguments if each not in search], usage, word)
    folder = Path(given.pop(word))
    config = load(folder, word)
    if "model" not in config and word == "run":
        raise ConfigError(f"run={folder}: expected the run of a model, and this is a classifier's")
    reference = copy.deepcopy(config)
    options, there = OmegaConf.create(dict(defaults)), keys(config)
    for key, value in given.items():
        theirs = key in there or key.partition(".")[0] in CHOSEN_ANEW or "._" in key
        if theirs and key not in defaults and (why := keeps(key)):
            raise ConfigError(f"{key}={value}: {why}")
    for group in CHOSEN_ANEW:
        if group in given:
            name = given.pop(group)
            more = [f"{key}={value}" for key, value in given.items() if key.startswith(f"{group}.")]
            option = _option(config, group, name, more, search)
            config[group] = reference[group] = option
    _follow(config)
    known = [*defaults, *(key for key in keys(config) if not keeps(key))]
    for key, value in given.items():
        if key not in defaults:
            _may_change(config, key, value, known)
        target = options if key in defaults else config
        try:
            new = _typed(value)
            OmegaConf.update(target, key, new)
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from error
        if key in defaults and defaults[key] is not None and type(new) is not type(defaults[key]):
            kind = type(defaults[key]).__name__
            raise ConfigError(f"{key}={value}: expected {kind}, got {type(new).__name__} {value}")
    check(config, reference)
    return folder, config, options


def _pairs(arguments: Sequence[str], usage: str, word: str) -> dict[str, str]:
    """Keys and values, `word` among them; of a key given twice the last.

    Raises:
        ConfigError: an argument that is none, a key without a value, or no `word`.
    """
    pairs = [each.partition("=") for each in arguments]
    wrong = [name + sign + value for name, sign, value in pairs if not sign]
    given = {name: value for name, _, value in pairs}
    if wrong or word not in given:
        raise ConfigError(f"{wrong[0]}: not understood.\n{usage}" if wrong else usage)
    if not given[word]:
        raise ConfigError(f"{word}=: expected a run's folder.\n{usage}")
    for key, value in given.items():
        if not value.strip():
            raise ConfigError(f"{key}=: expected a value, got none: give one, or leave it out")
    return given


def _typed(text: str) -> Any:
    """A value from the command line, which is YAML, but for the numbers that only YAML 1.1 knows:
    3:5 (185), 010 (8), 0x1F (31), 1_0 (10).

    Raises:
        ValueError: one of those, or no YAML at all.
    """
    try:
        for number in _numbers(yaml.compose(f"value: {text}", Loader=yaml.SafeLoader)):
            if not PLAIN.fullmatch(number):
                raise ValueError(
                    f"expected a number in decimal digits, like 10, got {number}; as text it needs "
                    "quotes of its own"
                )
        return OmegaConf.create(f"value: {text}").value
    except yaml.YAMLError:
        raise ValueError("not understood; text with brackets or colons needs quotes") from None


def _numbers(node: yaml.Node | None) -> Iterator[str]:
    """All that YAML takes for a number, as it was written."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            yield node.value
    elif isinstance(node, yaml.MappingNode | yaml.SequenceNode):
        for each in node.value:
            for one in each if isinstance(each, tuple) else (each,):
                yield from _numbers(one)


def all_but(groups: Sequence[str]) -> Callable[[str], str | None]:
    """For `read`, where what a command gives depends on these parts of config.yaml alone."""
    return lambda key: (
        None if key.partition(".")[0] in groups else f"changes nothing here; {', '.join(groups)} do"
    )


def _may_change(config: DictConfig, key: str, value: str, known: Sequence[str]) -> None:
    """Whether a command that reads a run may set `key`, one of `known` or a group chosen anew.

    Raises:
        ConfigError: the run's configuration has no such key, or it is a group.
    """
    group, dot, rest = key.partition(".")
    if group in CHOSEN_ANEW[1:] and group not in config:
        raise ConfigError(
            f"{key}={value}: {group} is of diffusion models, and this run is of "
            f"{config.model._target_}"
        )
    if key not in known:
        node = config.get(group) if dot and group in CHOSEN_ANEW else None
        if isinstance(node, DictConfig) and all(str(each).startswith("_") for each in node):
            raise ConfigError(
                f"{key}={value}: the run's {group} has no {rest}; choose one that has: "
                f"{group}=<name> {key}={value}"
            )
        raise unknown_key(key, known)
    if isinstance(config.get(key), DictConfig):
        raise ConfigError(
            f"{key}={value}: a finished run keeps its {key}. "
            f"Groups that may be chosen anew: {', '.join(CHOSEN_ANEW)}"
        )


def checkpoint(folder: Path, name: str, given: str = "") -> Path:
    """The file of a checkpoint of a run, `best`, `last` or `previous`.

    Args:
        given: how it was asked for, for messages; empty: checkpoint=name.

    Raises:
        ConfigError: there is none of this name.
    """
    file = folder / "checkpoints" / f"{name}.ckpt"
    if not file.is_file():
        there = ", ".join(sorted(each.stem for each in file.parent.glob("*.ckpt")))
        raise ConfigError(
            f"{given or f'checkpoint={name}'}: there is no checkpoint {file}; "
            f"{f'there are: {there}' if there else 'the run has saved none'}"
        )
    return file


def output(asked: Any, own: Path) -> Path:
    """The file that a command writes, `out=` or its own; found out before anything is computed.
    The folder that it names is made.

    Raises:
        ConfigError: it is a folder, or nothing can be written there.
    """
    file = own if asked is None else Path(str(asked))
    if asked is not None and (str(asked).endswith("/") or file.is_dir()):
        raise ConfigError(
            f"out={asked}: expected a file, and that is a folder: {quote(f'out={file / own.name}')}"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        probe(file.parent)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give out=<path>") from error
    return file


GUIDES = ("classifier", "weaker")
"""Under `guidance`, other runs."""


def guide(config: DictConfig) -> str | None:
    """The other run that this one's samples are drawn with, if any: a folder or a checkpoint."""
    node = config.get("guidance") or {}
    return next((node[key] for key in GUIDES if key in node), None)


def unguided(config: DictConfig) -> None:
    """For what draws no samples: that which guides them may be gone."""
    if "guidance" in config:
        config.guidance = {"_target_": "genfw.Unguided", "_partial_": True}


def told_from_anywhere(config: DictConfig) -> None:
    """The other run by its whole path: this one may be opened from another folder."""
    node = config.get("guidance") or {}
    for key in GUIDES:
        if (place := node.get(key)) is not None:
            node[key] = str(Path(place).absolute())


def other(place: str, key: str, config: DictConfig) -> tuple[DictConfig, Path]:
    """The configuration of another run that this one's samples are drawn with, and its weights.

    Args:
        place: its folder, or one of its checkpoints; the best one where none is named.
        key: what `place` was given as, for messages.
        config: of this run: what it trusts is trusted there too.

    Raises:
        ConfigError: there is no such run, or it has no such checkpoint.
    """
    file = Path(place)
    folder, name = (file.parent.parent, file.stem) if file.suffix == ".ckpt" else (file, "best")
    if not folder.is_dir():
        raise ConfigError(
            f"{key}={place}: there is no {folder / 'config.yaml'}; where it has moved, give "
            f"{key}=<its folder>"
        )
    theirs = load(folder, key)
    theirs.trusted = config.get("trusted") or []
    return theirs, checkpoint(folder, name, f"{key}={place}")


def load(folder: Path, key: str = "run") -> DictConfig:
    """The configuration of a run folder. Nothing is imported.

    Raises:
        ConfigError: it is no run's.
    """
    file = folder / "config.yaml"
    within = {".ckpt": folder.parent.parent, ".yaml": folder.parent}.get(folder.suffix)
    if not file.is_file() and within is not None:
        which = f" checkpoint={folder.stem}" if key == "run" and folder.suffix == ".ckpt" else ""
        raise ConfigError(
            f"{key}={folder}: expected the run's folder, {quote(f'{key}={within}')}{which}"
        )
    if not file.is_file():
        raise ConfigError(f"{key}={folder}: there is no {file}; a run folder has one")
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    config.trusted = []  # a folder may come from anywhere: it does not vouch for itself
    return config


def _option(
    config: DictConfig, group: str, name: str, more: Sequence[str], search: Sequence[str]
) -> DictConfig:
    """What conf/<group>/<name>.yaml says, also a plug-in's or one of the folders that `search`
    names, with `more` settings of the group."""
    if group != "estimator" and "sampler" not in config:
        raise ConfigError(
            f"{group}={name}: of diffusion models, and this run is of {config.model._target_}"
        )
    model = "vae" if group == "estimator" else "vdm"  # which any option of these groups can read
    free = ["model.classes=${data.classes}"] if group == "guidance" else []
    with session(overrides=search):
        composed = unchecked([f"model={model}", *free, f"{group}={name}", *more])  # `read` checks
    return OmegaConf.create({group: OmegaConf.to_container(composed[group], resolve=True)})[group]


def _follow(config: DictConfig) -> None:
    """In config.yaml interpolations are resolved; where a group's choice was copied, it is the
    choice again."""
    for holder in ("model", "sampler"):
        for group in CHOSEN_ANEW:
            if group in config and holder != group and group in config.get(holder, {}):
                config[holder][group] = f"${{{group}}}"

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
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import genfw
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.resolvers import binarized_bins, out_channels, outputs
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
DISCRETE = ("genfw.CategoricalParameterization", "genfw.LogisticMixtureParameterization")
FLOAT32_TINY = 2.0**-126
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "32", "bf16", "16", "64", "None")
NAMES = ("lightning.pytorch.Trainer", "lightning.pytorch.trainer.trainer.Trainer")


def conf_folder() -> Path:
    """Where genfw's own conf/ lies: beside the package in a checkout, inside it once installed."""
    package = Path(genfw.__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


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
        missing = [key for key in keys(config) if _is_missing(config, key)]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} must be given: add {missing[0]}=... to the command"
            )
        checker = _Checker(ConfFiles(conf_folders or [conf_folder()]), trusted_by(config))
        checker.node(config, reference, "")
        for at, value, argument in checker.copies:  # a wrong value is named where it was given
            _fit(at, value, argument)
        for rule in RULES:
            rule(config)
    except OmegaConfBaseException as error:
        _networks_fit_their_place(config)  # out of place, they read what is not there
        _latents_are_levels(config)
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
            if key not in node and not _is_call(_select(known, key)):
                raise ConfigError(f"{_join(path, key)} is missing: do not delete it")
        for key, at, value, copied in _items(node, path):
            if known is not None and key not in names and not _is_call(value):
                raise unknown_key(at, keys(known, path))
            before = _select(known, key)
            switched_off = value is None and isinstance(before, DictConfig)
            types = None if before is None or switched_off else type_of(before)
            self.value(at, value, Argument(types), before, copied)

    def call(self, node: DictConfig, like: Any, path: str) -> None:
        """A node that names a class: the keys are the class's arguments."""
        target, at = node["_target_"], _join(path, "_target_")
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
                raise ConfigError(f"{_join(path, key)} must be given: {target} needs it")
        _fit(_join(path, "_partial_"), node.get("_partial_", False), Argument(frozenset({"bool"})))
        for key, where, value, copied in _items(node, path):
            argument, before = arguments.get(key, Argument()), _select(like, key)
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
    at = _join(path, key)
    if isinstance(like, DictConfig) and key in like and like.get("_target_") != target:
        left_out = f"~{at}" if target.startswith(PREFIXES) else f"{at}=null"
        return ConfigError(
            f"{at} belongs to {like.get('_target_')}; {target} takes {_listed(arguments)}.\n"
            f"Add '{left_out}' to leave it out"
        )
    return unknown_key(at, [_join(path, each) for each in arguments], f"{target} takes")


def _select(node: Any, key: str) -> Any:
    """What a reference says here; None where it says nothing, or leaves it to be given."""
    if not isinstance(node, DictConfig) or key not in node:
        return None
    try:
        return node[key]
    except OmegaConfBaseException:
        return None


def _items(node: DictConfig, path: str) -> Iterator[tuple[str, str, Any, bool]]:
    """(key, path, value, whether the value is a copy of another place in the config)."""
    for key in map(str, node):
        if key not in RESERVED:
            yield key, _join(path, key), node[key], OmegaConf.is_interpolation(node, key)


def _is_call(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value


def _fit(path: str, value: Any, argument: Argument) -> None:
    if _is_call(value):
        return
    if not fits(value, argument.types):
        raise ConfigError(f"{path}: expected {argument.expected()}, got {_shown(value)}")
    if argument.choices and value not in argument.choices:
        match = nearest(str(value), argument.choices)
        hint = f" Did you mean {match}?" if match else ""
        expected = ", ".join(argument.choices)
        raise ConfigError(f"{path}: expected one of {expected}, got {_shown(value)}.{hint}")
    for at, each in _elements(path, value) if argument.elements else ():
        if not fits(each, argument.elements):
            expected = Argument(argument.elements).expected()
            raise ConfigError(f"{at}: expected {expected}, got {_shown(each)}")
    for at, number in _numbers(path, value):
        if argument.range is not None and number not in argument.range:
            types = argument.elements or argument.types or frozenset()
            kind = "a number" if "float" in types else "an integer"
            raise ConfigError(f"{at}={number}: expected {kind} {argument.range}")
        if math.isnan(number):
            raise ConfigError(f"{at}=nan: expected a number")


def _elements(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is in a list, and in the lists in it."""
    for i, each in enumerate(value if isinstance(value, ListConfig) else ()):
        yield f"{path}[{i}]", each
        yield from _elements(f"{path}[{i}]", each)


def _numbers(path: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """A number itself; of a list those in it."""
    if isinstance(value, ListConfig):
        for i, each in enumerate(value):
            yield from _numbers(f"{path}[{i}]", each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def _shown(value: Any) -> str:
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value)
    return (
        {True: "true", False: "false"}[value]
        if isinstance(value, bool)
        else ("null" if value is None else repr(value))
    )


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


def keys(config: Any, path: str = "") -> list[str]:
    """All keys below a node, dotted."""
    found = []
    if isinstance(config, DictConfig):
        for key in map(str, config):
            if key not in RESERVED:
                found.append(_join(path, key))
                if not OmegaConf.is_interpolation(config, key) and not OmegaConf.is_missing(
                    config, key
                ):
                    found += keys(config[key], _join(path, key))
    return found


def _is_missing(config: DictConfig, key: str) -> bool:
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return OmegaConf.is_missing(node, leaf)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _listed(names: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(names), 240, placeholder=" ...") or "no arguments"


# ---- what may be imported ------------------------------------------------------------------------


def trusted_by(config: DictConfig, more: Iterable[str] = ()) -> list[str]:
    """The packages, modules and classes that a person or an installed plug-in vouches for."""
    from genfw.train.plugins import packages

    named = config.get("trusted") or []
    if not isinstance(named, ListConfig | list):
        raise ConfigError(f"trusted: expected list, got {_shown(named)}: write 'trusted=[{named}]'")
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
        key: _build(each, _join(path, str(key)), trusted, {})
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


# ---- combinations that cannot be right -----------------------------------------------------------


def _bins_are_the_datas(config: DictConfig) -> None:
    if _target(config, "data") != "genfw.train.data.ImageData":
        return
    bins, raw, binarize = (config.data.get(key) for key in ("bins", "raw_bins", "binarize"))
    if isinstance(raw, int) and isinstance(binarize, str):
        known = binarized_bins(binarize, raw)
        if bins != known:
            raise ConfigError(
                f"data.bins={bins}, but with data.raw_bins={raw} and data.binarize={binarize} the "
                f"data have {known} values: leave data.bins alone"
            )


def _bins_agree(config: DictConfig) -> None:
    bins = OmegaConf.select(config, "data.bins")
    for place in ("likelihood", "param"):
        told = OmegaConf.select(config, f"{place}.bins")
        if told is not None and bins is not None and told != bins:
            raise ConfigError(
                f"{place}.bins={told}, but the data have {bins} values (data.bins): "
                f"leave {place}.bins alone"
            )


def _bernoulli_is_binary(config: DictConfig) -> None:
    bins = OmegaConf.select(config, "data.bins")
    if _target(config, "likelihood") == "genfw.BernoulliLikelihood" and bins not in (None, 2):
        raise ConfigError(
            f"likelihood=bernoulli has 2 values, but the data have {bins}: "
            "use likelihood=categorical, or binarize the data: data.binarize=dynamic"
        )


def _data_are_integers(config: DictConfig) -> None:
    bins, model = OmegaConf.select(config, "data.bins"), _target(config, "model")
    if bins is not None and _target(config, "likelihood") == "genfw.GaussianLikelihood":
        masses = "bins or discretized_gaussian" if model == "genfw.VDM" else "discretized_gaussian"
        raise ConfigError(
            f"likelihood=gaussian is a density of real numbers, and the data are {bins} integers: "
            f"use likelihood={masses}"
        )


def _likelihood_reads_model(config: DictConfig) -> None:
    model, likelihood = _target(config, "model"), _target(config, "likelihood")
    from_network = (("bins",), "categorical, bernoulli, logistic_mixture or the like")
    logistic = ("discretized_logistic", "logistic_mixture")
    unreadable, others = {
        "genfw.VAE": from_network,
        "genfw.MHVAE": from_network,
        "genfw.HVAE": from_network,
        "genfw.VDM": (("bernoulli", *logistic), "bins or discretized_gaussian"),
    }.get(str(model), ((), ""))
    for name in unreadable:
        if likelihood == f"genfw.{name.title().replace('_', '')}Likelihood":
            raise ConfigError(
                f"likelihood={name} cannot read what {model} decodes: use likelihood={others}"
            )


def _decoder_is_the_networks(config: DictConfig) -> None:
    model, param = _target(config, "model"), str(_target(config, "param"))
    if model != "genfw.VDM" or _target(config, "likelihood") != "genfw.CategoricalLikelihood":
        return
    if param.startswith("genfw.") and param not in DISCRETE:
        raise ConfigError(
            f"likelihood=categorical reads the masses that the network itself states, and {param} "
            "says where x lies, not how likely each value is: use param=categorical or "
            "logistic_mixture, or likelihood=bins or discretized_gaussian"
        )


def _signal_at_the_end(config: DictConfig) -> None:
    least, most = (OmegaConf.select(config, f"schedule.log_snr_{each}") for each in ("min", "max"))
    ends = [end for end in (least, most) if isinstance(end, int | float)]
    if not all(map(math.isfinite, ends)):
        raise ConfigError(
            f"schedule: log_snr_max={most}, log_snr_min={least}: end points must be finite; "
            "at -10 nothing is left of the data that could be seen"
        )
    if len(ends) == 2 and most <= least:
        raise ConfigError(
            f"schedule: log_snr_max={most}, log_snr_min={least}: log SNR falls from log_snr_max to "
            "log_snr_min, so the first must be the larger"
        )
    if ends and max(ends) > -math.log(FLOAT32_TINY):
        raise ConfigError(
            f"schedule.log_snr_max={most}: the noise at t = 0 is zero in float32, and there nobody "
            "can say what eps is, eps_hat = (z - alpha x) / sigma; leave schedule.log_snr_max alone"
        )
    param = _target(config, "param")
    if param in ("genfw.Eps", "genfw.Score") and ends and min(ends) < math.log(FLOAT32_TINY):
        raise ConfigError(
            f"schedule.log_snr_min={least}: the SNR at t = 1 is zero in float32, and there {param} "
            "cannot say what x is, x_hat = (z - sigma eps) / alpha; use param=v or x0, or "
            "log_snr_min=-10"
        )


def _schedule_falls(config: DictConfig) -> None:
    node = config.get("schedule") or {}
    for key, value in node.items():
        for at, number in _numbers(f"schedule.{key}", value):
            if not math.isfinite(number):
                raise ConfigError(f"{at}={number}: expected a finite number")
    pairs = {"genfw.Sigmoid": ("start", "end"), "genfw.Linear": ("beta_min", "beta_max")}
    names = pairs.get(str(_target(config, "schedule")), ())
    ends = [node[name] for name in names if name in node]
    if len(ends) == 2 and ends[0] >= ends[1]:
        said = ", ".join(f"schedule.{name}={end}" for name, end in zip(names, ends, strict=True))
        raise ConfigError(f"{said}: the first must be the smaller, or log SNR would not fall")


def _shapes_are_the_datas(config: DictConfig) -> None:
    shape = OmegaConf.select(config, "data.shape")
    for key in ("model.shape", "net.shape"):
        told = OmegaConf.select(config, key)
        if isinstance(told, ListConfig) and isinstance(shape, ListConfig) and told != shape:
            raise ConfigError(
                f"{key}={list(told)}, but the data have the shape {list(shape)} (data.shape): "
                f"leave {key} alone"
            )
    param, told = config.get("param"), OmegaConf.select(config, "net.out_channels")
    if isinstance(param, DictConfig) and isinstance(told, int) and isinstance(shape, ListConfig):
        read = out_channels(param, shape[0])
        if str(_target(config, "param")).startswith("genfw.") and told != read:
            raise ConfigError(
                f"net.out_channels={told}, but param={_option(config, 'param')} reads {read}: "
                "leave net.out_channels alone"
            )


def _networks_fit_their_place(config: DictConfig) -> None:
    for place, ending in (("net", ""), ("encoder", "_encoder"), ("decoder", "_decoder")):
        target = _target(config, place) or ""
        kind = re.search(r"(Encoder|Decoder)?$", target)
        if target.startswith("genfw.nets.") and kind and kind[0].lower() != ending.lstrip("_"):
            key = place if place == "net" else f"net@{place}"
            raise ConfigError(
                f"{key} cannot be {target.removeprefix('genfw.nets.')}: use {key}=conv{ending}, "
                f"mlp{ending} or the like"
            )


def as_many_levels(config: DictConfig) -> None:
    """More sizes in model.latents than networks: the last network of either list is copied for each
    of them, reading the sizes one place further on. Where it names no sizes, nothing is done."""
    model = config.get("model")
    latents = _select(model, "latents")
    for name in ("encoders", "decoders"):
        networks = _select(model, name)
        if isinstance(networks, ListConfig) and networks and isinstance(latents, ListConfig):
            for t in range(len(networks), len(latents)):
                last = networks._get_node(t - 1)
                text = OmegaConf.to_yaml(last) if isinstance(last, DictConfig) else ""
                if f"${{model.latents[{t - 1}]}}" in text:
                    networks.append(OmegaConf.create(_SIZE.sub(_next_size, text)))


_SIZE = re.compile(r"\$\{model\.latents\[(\d+)\]\}")


def _next_size(found: re.Match[str]) -> str:
    return f"${{model.latents[{int(found[1]) + 1}]}}"


def _latents_are_levels(config: DictConfig) -> None:
    model = config.get("model")
    encoders, decoders, latents = (_select(model, k) for k in ("encoders", "decoders", "latents"))
    if not isinstance(encoders, ListConfig) or not isinstance(decoders, ListConfig):
        return
    levels = len(encoders)
    if not isinstance(latents, ListConfig) or not len(latents) == levels == len(decoders):
        raise ConfigError(
            f"model.latents={_shown(latents)}: expected a size for each of {levels} levels, z_1 "
            "first, like model.latents=[16,8], and as many networks in model.encoders and in "
            f"model.decoders; these are {levels} and {len(decoders)}; one level is model=vae"
        )


def _networks_fit_their_neighbours(config: DictConfig) -> None:
    for place, key, expected, why in _neighbours(config):
        node = OmegaConf.select(config, place)
        own = isinstance(node, DictConfig) and str(node.get("_target_")).startswith("genfw.nets.")
        if own and key in node and _sizes(node[key]) != _sizes(expected):
            raise ConfigError(
                f"{place}.{key}={_shown(node[key])}, but {why}: leave {place}.{key} alone"
            )


def _neighbours(config: DictConfig) -> Iterator[tuple[str, str, Any, str]]:
    """What every network must read and give: where it stands, the argument, its value, why."""
    target, shape = _target(config, "model"), OmegaConf.select(config, "data.shape")
    if target not in ("genfw.VAE", "genfw.MHVAE", "genfw.HVAE"):
        return
    reads = outputs(config.model.likelihood)
    data = f"the data have the shape {_shown(shape)} (data.shape)"
    decoded = f"the likelihood reads {reads} numbers per channel of the data"
    if target == "genfw.HVAE":
        yield "model.ladder", "shape", shape, data
        yield "model.ladder", "outputs", reads, decoded
        return
    alone = target == "genfw.VAE"
    below, numbers = shape, reads
    for t, z in enumerate([config.model.latents] if alone else config.model.latents):
        size = f"z_{t + 1} has the size {_shown(z)} (model.latents)"
        for name in ("encoder", "decoder"):
            holder, at = (config.model, name) if alone else (config.model[f"{name}s"], t)
            group = t == 0 and OmegaConf.is_interpolation(holder, at)  # ${encoder}
            place = name if group else str(holder._get_full_key(at))
            yield place, "latents", z, size
            yield place, "shape", below, data
        yield place, "outputs", numbers, decoded
        below, numbers, data = z, 2, size
        decoded = f"z_{t + 1} is given a mean and a log standard deviation, 2 numbers"


def _sizes(value: Any) -> list[Any]:
    return list(value) if isinstance(value, ListConfig) else [value]


def _learned_schedule_follows_the_bound(config: DictConfig) -> None:
    objective = _option(config, "objective")
    if _target(config, "schedule") == "genfw.Learned" and objective != "elbo":
        raise ConfigError(
            "schedule=learned follows the bound and its variance, and under "
            f"objective={objective} its gradient means nothing: use objective=elbo, or a fixed "
            "schedule"
        )


def _objective_reads_model(config: DictConfig) -> None:
    objective, model = _option(config, "objective"), _option(config, "model")
    endless = OmegaConf.select(config, "model.steps") is None
    weighted = "weighs whole chains of latents, and in continuous time they are infinite"
    upward = "follows a chain of latents from x up, and this one is drawn from the top down"
    apart = str(OmegaConf.select(config, "objective.per")).endswith("dimension")
    several = len(OmegaConf.select(config, "model.encoders") or []) > 1
    for objectives, models, reason in (
        (
            "simple min_snr p2 sigmoid edm",
            "vae mhvae hvae",
            "weighs noise levels, and there are none: use objective=elbo",
        ),
        ("l2 free_bits", "vdm", "is for learned latents, and these are noise: use objective=elbo"),
        ("stl", "hvae", f"{upward}: use objective=elbo"),
        (
            "dreg",
            "hvae",
            f"{upward}: use objective=iwae, the same bound, plainly differentiated",
        ),
        (
            "l2",
            "hvae",
            f"{upward}: use objective=elbo likelihood=discretized_gaussian",
        ),
        (
            "free_bits",
            "mhvae" if apart and several else "",
            "per dimension needs divergences in closed form, and below the top of a chain a level "
            "costs a log ratio at one draw: use objective.per=batch_level",
        ),
        (
            "iwae miwae ciwae stl dreg",
            "vdm" if endless else "",
            f"{weighted}: use objective=elbo, or model.steps=100",
        ),
    ):
        if objective in objectives.split() and model in models.split():
            raise ConfigError(f"objective={objective}, model={model}: {objective} {reason}")


def _estimator_reads_model(config: DictConfig) -> None:
    estimator, model = _target(config, "estimator"), _target(config, "model")
    steps = OmegaConf.select(config, "model.steps")
    if estimator == "genfw.ImportanceWeighted" and model == "genfw.VDM" and steps is None:
        raise ConfigError(
            "estimator=importance_weighted weighs a chain of finitely many latents, and "
            "model.steps=null is continuous time: set model.steps=1000, or use estimator=bound"
        )
    levels = len(OmegaConf.select(config, "model.encoders") or [None])
    one_level = model == "genfw.VAE" or (model == "genfw.MHVAE" and levels == 1)
    if estimator == "genfw.Annealed" and str(model).startswith("genfw.") and not one_level:
        raise ConfigError(
            f"estimator=annealed moves one latent, and {model} has more: use "
            "estimator=importance_weighted"
        )
    if estimator == "genfw.ProbabilityFlow" and model in (
        "genfw.VAE",
        "genfw.MHVAE",
        "genfw.HVAE",
    ):
        raise ConfigError(
            "estimator=ode follows the probability flow of a diffusion model, and "
            f"model={_option(config, 'model')} has none: use estimator=bound or importance_weighted"
        )


def _weights_need_an_exact_density(config: DictConfig) -> None:
    if _target(config, "estimator") != "genfw.ProbabilityFlow":
        return
    k, most = (OmegaConf.select(config, f"estimator.{each}") for each in ("k", "exact_dims"))
    dims = math.prod(OmegaConf.select(config, "data.shape") or [])
    if isinstance(k, int) and isinstance(most, int) and k > 1 and dims > most:
        raise ConfigError(
            f"estimator.k={k}: the mean of weights is a bound only where log p_ode is exact, and "
            f"D={dims} is above estimator.exact_dims={most}: use estimator.k=1"
        )


def _option(config: DictConfig, group: str) -> str:
    """The name by which it is chosen, `edm` of genfw.EdmWeighted; the class itself where none of
    genfw's own files names it."""
    target = str(_target(config, group))
    files = ConfFiles([conf_folder() / group]).files.get(target)
    return files[0].stem if files else target


def _target(config: DictConfig, key: str) -> str | None:
    return OmegaConf.select(config, f"{key}._target_")


def _weights_are_float32(config: DictConfig) -> None:
    precision = str(OmegaConf.select(config, "trainer.precision"))
    if precision.endswith("16-true") or precision.startswith("transformer-engine"):
        raise ConfigError(
            f"trainer.precision={precision}: weights and their average must be float32 or better, "
            "as reported numbers are: use trainer.precision=bf16-mixed"
        )
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision}: expected one of {', '.join(PRECISIONS)}")


def _run_can_be(config: DictConfig) -> None:
    for key in ("trainer.val_check_interval", "trainer.devices"):
        value = OmegaConf.select(config, key)
        share = key == "trainer.val_check_interval" and isinstance(value, float) and 0 < value <= 1
        all_of_them = key == "trainer.devices" and value == -1
        wrong = isinstance(value, float) or (isinstance(value, int) and value < 1)
        if wrong and not (share or all_of_them):
            raise ConfigError(f"{key}={value}: expected an integer of at least 1")
    for key in ("trainer.limit_train_batches", "trainer.limit_test_batches"):
        if OmegaConf.select(config, key) == 0:
            raise ConfigError(f"{key}=0: expected at least one batch, or null for all of them")
    seed = OmegaConf.select(config, "seed")
    if isinstance(seed, int) and seed < 0:
        raise ConfigError(f"seed={seed}: expected an integer of at least 0")
    steps, epochs = (
        OmegaConf.select(config, f"trainer.max_{each}") for each in ("steps", "epochs")
    )
    if steps == 0:
        raise ConfigError(
            "trainer.max_steps=0: expected at least 1; without a step nothing is tested"
        )
    if isinstance(steps, int) and steps < 0 and (epochs is None or epochs < 0):
        raise ConfigError(
            f"trainer.max_steps={steps}: this run has no end; give trainer.max_steps or "
            "trainer.max_epochs"
        )
    strategy = str(OmegaConf.select(config, "trainer.strategy"))
    if strategy != "fsdp2" and strategy.startswith(("fsdp", "deepspeed", "model_parallel")):
        raise ConfigError(
            f"trainer.strategy={strategy}: averages, evaluation and checkpoints do not know "
            "weights in these parts: use trainer=fsdp (trainer.strategy=fsdp2), or trainer=ddp"
        )
    if OmegaConf.select(config, "trainer.enable_checkpointing") is False:
        raise ConfigError(
            "trainer.enable_checkpointing=false: the best weights are what is tested; leave it true"
        )


BY_ELEMENT = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
]
"""Those of torch.optim that move every weight by its own past alone, and so weights in parts."""


def _weights_can_be_divided(config: DictConfig) -> None:
    if OmegaConf.select(config, "trainer.strategy") != "fsdp2":
        return
    precision = str(OmegaConf.select(config, "trainer.precision"))
    if precision in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer=fsdp, trainer.precision={precision}: ranks would scale the loss each on its "
            "own: use trainer.precision=bf16-mixed"
        )
    module, _, name = str(_target(config, "optimizer")).rpartition(".")
    if module == "torch.optim" and name not in BY_ELEMENT:
        raise ConfigError(
            f"trainer=fsdp: torch.optim.{name} looks at a weight as a whole, and every rank has a "
            f"part of it: use one of {', '.join(BY_ELEMENT)}, or trainer=ddp"
        )
    if OmegaConf.select(config, "classifier") is not None:
        raise ConfigError("trainer=fsdp divides the weights of a model of data: use trainer=ddp")


def _labels_agree(config: DictConfig) -> None:
    known = OmegaConf.select(config, "data.classes")
    classes = OmegaConf.select(config, "model.classes")
    if isinstance(classes, int) and isinstance(known, int) and classes != known:
        raise ConfigError(
            f"model.classes={classes}, but the data have {known} classes (data.classes): "
            f"set model.classes={known}, or null for a model without labels"
        )
    lists = {
        name: OmegaConf.select(config, f"model.{name}") or [] for name in ("encoders", "decoders")
    }
    several = [f"model.{name}[{i}]" for name, nodes in lists.items() for i in range(len(nodes))]
    within = [f"model.{name}" for name in ("denoiser.network", "encoder", "decoder", "ladder")]
    for place in ("net", "encoder", "decoder", *within, *several):  # in a run's config.yaml copies
        node = OmegaConf.select(config, place)
        if isinstance(node, DictConfig) and "classes" in node and node.classes != classes:
            raise ConfigError(
                f"{place}.classes={_shown(node.classes)}, but the model has "
                f"model.classes={_shown(classes)}: set model.classes, and leave {place}.classes "
                "alone"
            )
    dropout = OmegaConf.select(config, "label_dropout")
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        raise ConfigError(f"label_dropout={dropout}: expected a share of labels in [0, 1)")


def _guidance_reads_model(config: DictConfig) -> None:
    target = str(_target(config, "guidance"))
    name = re.sub("(?<=[a-z])(?=[A-Z])", "_", target.removeprefix("genfw.")).lower()
    name = name.removesuffix("_guidance")
    classes = OmegaConf.select(config, "model.classes")
    dropout = OmegaConf.select(config, "label_dropout")
    if target == "genfw.ClassifierFree" and classes is None:
        raise ConfigError(
            f"guidance={name} needs a conditional model, and this one has no labels "
            "(model.classes=null): train one with model.classes=${data.classes}, or use "
            "guidance=classifier"
        )
    without = (
        "genfw.ClassifierFree",
        "genfw.ClassifierGuidance",
        "genfw.DenoisedClassifierGuidance",
    )
    if target in without and classes is not None and not dropout:
        raise ConfigError(
            f"guidance={name} asks the model without a label, and this one never saw that "
            "(label_dropout=0): train it with label_dropout=0.1"
        )


def times_are_looked_at(config: DictConfig) -> None:
    """Refuses a choice of times that training would ignore; a finished run may be read in steps.

    Raises:
        ConfigError: `times` says where, and T steps are drawn evenly.
    """
    steps, times = OmegaConf.select(config, "model.steps"), _option(config, "times")
    if steps is not None and times in ("log_snr", "importance"):
        raise ConfigError(
            f"times={times}, model.steps={steps}: {times} chooses among times, and of {steps} "
            "steps each is drawn as often: use times=uniform, or model.steps=null"
        )


def samples_have_labels(config: DictConfig) -> None:
    """Refuses guidance to labels that nobody gives: those of pictures and distances while a model
    trains are the model's own. `genfw.sample` takes any.

    Raises:
        ConfigError: a classifier would guide a model without classes.
    """
    target = str(_target(config, "guidance"))
    if target.endswith("ClassifierGuidance") and config.model.classes is None:
        raise ConfigError(
            "guidance by a classifier needs labels, and samples of this model have none while it "
            "trains (model.classes=null): leave guidance to python -m genfw.sample run=<folder>"
        )


def data_are_there(config: DictConfig) -> None:
    """Refuses a `data.path` that is no folder; for runs that will read it.

    Raises:
        ConfigError: there is no such folder.
    """
    path = OmegaConf.select(config, "data.path")
    if isinstance(path, str) and not Path(path).expanduser().is_dir():
        raise ConfigError(f"data.path={path}: no such folder")


RULES: tuple[Callable[[DictConfig], None], ...] = (
    _run_can_be,
    _weights_can_be_divided,
    _labels_agree,
    _guidance_reads_model,
    _weights_are_float32,
    _bins_are_the_datas,
    _bins_agree,
    _bernoulli_is_binary,
    _data_are_integers,
    _likelihood_reads_model,
    _decoder_is_the_networks,
    _signal_at_the_end,
    _schedule_falls,
    _shapes_are_the_datas,
    _networks_fit_their_place,
    _latents_are_levels,
    _networks_fit_their_neighbours,
    _learned_schedule_follows_the_bound,
    _objective_reads_model,
    _estimator_reads_model,
    _weights_need_an_exact_density,
)

"""From a command line to a checked configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from genfw.train import plugins
from genfw.train.config import check, trusted_by, vouched_for
from genfw.train.errors import ConfigError
from genfw.train.explain import explain
from genfw.train.nodes import select
from genfw.train.overrides import parse, typed
from genfw.train.rules.guidance import samples_have_labels
from genfw.train.rules.model import times_are_looked_at
from genfw.train.session import choices_of, composed, composed_once, folders


def compose(overrides: Sequence[str], name: str = "config") -> DictConfig:
    """The checked configuration of one job, Hydra's own part under `hydra`. Within a `session`.

    Raises:
        ConfigError: it is wrong, and how.
    """
    config = unchecked(overrides, name)
    complete(config, config.hydra)
    chosen = [f"{k}={v}" for k, v in choices_of(config).items() if k != "experiment"]
    named = typed(parse(overrides))
    check_hydra(config.hydra, trusted_by(config, named))
    vouched = [*(config.trusted or []), *named]
    config.trusted = list(dict.fromkeys(vouched))  # interpolations build too
    check(_job(config), _job(composed_once(chosen, name)), folders())
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
    typed: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    asked = [each.key_or_group for each in parse(typed)]
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
            config = composed(overrides, name)
        except MissingConfigException:  # a name that no YAML knows: perhaps a plug-in does
            plugins.load()
            config = composed(overrides, name)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error, parsed, name) from error
    return config


def _job(config: DictConfig) -> DictConfig:
    """Without Hydra's own part."""
    config = copy.copy(config)
    with open_dict(config):
        del config["hydra"]
    return config

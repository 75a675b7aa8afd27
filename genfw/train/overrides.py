"""A command line as Hydra reads it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from genfw.train.errors import ConfigError


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

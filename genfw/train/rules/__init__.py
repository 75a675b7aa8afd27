"""The combinations that cannot be right, each refused with what would be.

A rule takes a composed configuration, whose keys and types are known to be right, and raises a
`ConfigError` or does nothing. `RULES` hold for every configuration; what a page leaves out of its
own is called by the commands that it concerns.
"""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from genfw.train.rules import data, guidance, model, networks, run, schedule

RULES: tuple[Callable[[DictConfig], None], ...] = (
    *run.RULES,
    *data.RULES,
    *guidance.RULES,
    *model.RULES,
    *schedule.RULES,
    *networks.RULES,
)

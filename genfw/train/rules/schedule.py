"""Numbers with which log SNR falls, and float32 can follow."""

from __future__ import annotations

import math

from omegaconf import DictConfig, OmegaConf

from genfw.train.errors import ConfigError
from genfw.train.nodes import numbers, target_of

FLOAT32_TINY = 2.0**-126


def signal_at_the_end(config: DictConfig) -> None:
    """Refuses end points that are not finite, do not fall, or lose signal or noise in float32."""
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
    param = target_of(config, "param")
    if param in ("genfw.Eps", "genfw.Score") and ends and min(ends) < math.log(FLOAT32_TINY):
        raise ConfigError(
            f"schedule.log_snr_min={least}: the SNR at t = 1 is zero in float32, and there {param} "
            "cannot say what x is, x_hat = (z - sigma eps) / alpha; use param=v or x0, or "
            "log_snr_min=-10"
        )


def schedule_falls(config: DictConfig) -> None:
    """Refuses numbers of a schedule that are not finite, or with which log SNR would not fall."""
    node = config.get("schedule") or {}
    for key, value in node.items():
        for at, number in numbers(f"schedule.{key}", value):
            if not math.isfinite(number):
                raise ConfigError(f"{at}={number}: expected a finite number")
    pairs = {"genfw.Sigmoid": ("start", "end"), "genfw.Linear": ("beta_min", "beta_max")}
    names = pairs.get(str(target_of(config, "schedule")), ())
    ends = [node[name] for name in names if name in node]
    if len(ends) == 2 and ends[0] >= ends[1]:
        said = ", ".join(f"schedule.{name}={end}" for name, end in zip(names, ends, strict=True))
        raise ConfigError(f"{said}: the first must be the smaller, or log SNR would not fall")


RULES = (
    signal_at_the_end,
    schedule_falls,
)

"""What conf files compute: `${log_snr_max:${data.bins}}`."""

from __future__ import annotations

import math

from omegaconf import OmegaConf


def log_snr_max(bins: int) -> float:
    """2 log(3.02 K), as `genfw.schedule.log_snr_max_for`, without importing torch."""
    return 2 * math.log(3.02 * bins)


def register() -> None:
    """Makes the resolvers known to OmegaConf; again and again is fine."""
    OmegaConf.register_new_resolver("log_snr_max", log_snr_max, replace=True)

"""Run folders, and the jobs of a sweep: each a fresh process.

A job in the sweep's own process would inherit its environment, its loggers and its random state,
and Lightning's multi-process strategies would start the whole sweep again on every further rank.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from genfw.train.errors import ConfigError, GenfwError

log = logging.getLogger(__name__)

RANK_VARIABLES = (
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


OF_THE_SWEEP = (
    *("hydra.mode", "hydra.run.", "hydra.sweep.", "hydra.sweeper.", "hydra.launcher."),
    *("hydra/sweeper", "hydra/launcher"),
)


def start_name() -> str:
    """`2026-11-23_10-15-42_k3f9ab`: when a run started, and 30 random bits."""
    random = base64.b32encode(secrets.token_bytes(4)).decode()[:6].lower()
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{random}"


OmegaConf.register_new_resolver("start", start_name, use_cache=True, replace=True)


def own_folder(config: DictConfig, key: str) -> Path:
    """Makes the folder that `key` names, for this run alone; without `${start:}` it may exist."""
    parent, _, leaf = key.rpartition(".")
    named = OmegaConf.to_container(OmegaConf.select(config, parent), resolve=False)
    assert isinstance(named, dict)
    while True:
        folder = Path(str(OmegaConf.select(config, key)))
        try:
            folder.mkdir(parents=True, exist_ok="${start:}" not in str(named[leaf]))
            further_rank = any(name in os.environ for name in ("LOCAL_RANK", "RANK"))
            if (folder / "config.yaml").exists() and not further_rank:
                raise ConfigError(
                    f"{key}: {folder} holds a run already; name another, or none for a new one"
                )
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise GenfwError(f"{key}: {folder} is a file") from None
            OmegaConf.clear_cache(config)
        except OSError as error:
            raise GenfwError(f"{key}: cannot make the folder {folder}: {error.strerror}") from error


def quoted(path: Path) -> str:
    """A path as the value of a Hydra override."""
    return QuotedString(text=str(path), quote=Quote.single).with_quotes()


def run_apart(config: DictConfig, flags: Sequence[str] = ()) -> float | None:
    """One job of a sweep, in its own process; what `config.optimized` names in its results.

    Args:
        flags: command line flags that all jobs share.

    Raises:
        GenfwError: it failed; the other jobs go on.
    """
    own = HydraConfig.get()
    folder = Path(own.runtime.output_dir)
    hydra = [each for each in own.overrides.hydra if not each.lstrip("+~").startswith(OF_THE_SWEEP)]
    overrides = [*own.overrides.task, *hydra, f"hydra.run.dir={quoted(folder)}"]
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    process = subprocess.Popen([sys.executable, "-m", "genfw", *flags, *overrides], env=environment)
    try:
        code = process.wait()
    finally:
        process.wait()  # Ctrl-C reaches the job too: let it finish
    if code:
        raise GenfwError(
            f"job {own.job.num} ({' '.join(own.overrides.task)}) failed with exit code {code}"
        )
    results = folder / "results.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    return found.get(config.optimized)

"""A few steps, and a test, of every model x parameterization x schedule, in one process.

    python benchmarks/smoke.py

Each is composed, checked and run as `python -m genfw` does it. A combination may be refused, with a
reason; anything else that does not train ends this with exit code 1.
"""

import contextlib
import io
import itertools
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path

from omegaconf import open_dict

from genfw.train.compose import compose
from genfw.train.errors import ConfigError
from genfw.train.help import options
from genfw.train.job import run
from genfw.train.nodes import conf_folder
from genfw.train.session import session

SHORT = (
    *("trainer.max_steps=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"),
    *("trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "data.batch_size=8"),
    *("data.eval_batch_size=16", "estimator.strata=1", "validation_estimator.strata=1"),
    *("logger=none", "metrics=none", "callbacks=none"),
)
SMALL = ("net.width=8", "net.blocks=1")


def combinations() -> list[tuple[str, ...]]:
    """The command lines."""
    names = {group: options(group, [conf_folder()]) for group in ("model", "param", "schedule")}
    found: list[tuple[str, ...]] = [(f"model={m}",) for m in names["model"] if m != "vdm"]
    for param, schedule in itertools.product(names["param"], names["schedule"]):
        found.append(("model=vdm", f"param={param}", f"schedule={schedule}"))
    return found


def attempt(words: tuple[str, ...]) -> str:
    """What became of it: `ok`, `refused: ...` or `FAILED: ...`."""
    small = SMALL if "model=vdm" in words else ()
    try:
        with session():
            config = compose([*words, *small, *SHORT])
    except ConfigError as error:
        return f"refused: {str(error).splitlines()[0]}"
    with open_dict(config):
        config.pop("hydra")
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            results = run(config, Path(folder))
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    bpd = results["test/bpd"]
    return f"ok, {bpd:.2f} bits/dim" if math.isfinite(bpd) else f"FAILED: bits/dim {bpd}"


def main() -> int:
    warnings.simplefilter("ignore")
    started, failed = time.monotonic(), 0
    for words in combinations():
        answer = attempt(words)
        failed += answer.startswith("FAILED")
        print(f"{' '.join(words):<52} {answer}", flush=True)
    print(f"{failed} failed; {time.monotonic() - started:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

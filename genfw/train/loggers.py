"""Where numbers and pictures go: always a CSV in the run folder, and Weights & Biases beside it.

W&B is a guest here. It is online when there are credentials and a network, offline otherwise; this
is found out within `PATIENCE` seconds and without a question, and nothing that goes wrong with it
stops a run. Offline files are written in blocks, and a killed run loses its last one: `metrics.csv`
is the ledger, complete up to the last row.
"""

from __future__ import annotations

import csv
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from genfw.train.errors import one_line
from genfw.train.files import replace_text, replaced

PATIENCE = 1.5
"""Seconds to wait for an answer from the network."""

LAST_PATIENCE = 4.0
"""Seconds to upload what is left of a run that a signal ended."""

UPLOAD_PATIENCE = 300.0
"""Seconds to upload what is left of any other run: a network that takes and never answers would
hold the process for days."""

ONLINE_PATIENCE = 20.0
"""Seconds that a W&B server which did answer may take to open a run."""


NAME = 128
"""Characters of a W&B run's name that are kept."""


class CSV(Logger):
    """`metrics.csv` in the run folder: one row per call, flushed at once.

    `step` first, then names as they appear. A name that appears late adds a column: the file is
    then rewritten beside itself and replaced in one motion. Rows of a file that is already there
    are kept, or `cut`. On a full disk rows wait in memory.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns, self.rows = ["step"], 0
        self._waiting: list[dict[str, Any]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.reader(file)
                self.columns = next(reader, self.columns)
                self.rows = sum(1 for _ in reader)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The composed configuration is a file of its own in the run folder."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        self._waiting.append({"step": step, **plain(metrics)})
        try:
            self._write(self._waiting)
        except OSError as error:
            if len(self._waiting) == 1:
                print(f"{self.path}: {error.strerror}; its rows wait for room", file=sys.stderr)
        else:
            self._waiting = []

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """All of these rows, or none."""
        names = dict.fromkeys(name for row in rows for name in row)
        new = [name for name in names if name not in self.columns]
        if new or not self.path.exists():
            self._rewrite([*self.columns, *new])
        whole = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerows(rows)
        except OSError:
            os.truncate(self.path, whole)
            raise
        self.rows += len(rows)

    @rank_zero_only
    def cut(self, rows: int) -> None:
        """Keeps the first so many rows: those after a checkpoint are about to come again."""
        if self.rows > rows:
            self.rows = rows
            self._rewrite(self.columns)

    def _rewrite(self, columns: list[str]) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = list(itertools.islice(csv.DictReader(file), self.rows))
        with replaced(self.path) as beside, beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        self.columns = columns


class Wandb(Logger):
    """A W&B run that starts in seconds or not at all, and never fails.

    The run is opened by the first call, `log_hyperparams` with the composed configuration. Its id
    is then in `wandb_id.txt` in the run folder, and a folder that has one goes on with that run.
    What W&B refuses later is said once, and the run goes on without it.

    Args:
        folder: the run folder; W&B writes to `<folder>/wandb`.
        project, entity, name, group, tags: as in `wandb.init`; name: default, WANDB_NAME (a
            sweep's jobs have one), else the run folder's.
        mode: auto, online, offline or disabled. auto: the environment's WANDB_MODE where it is set;
            else online when credentials and network are there; else offline.

    Raises:
        ValueError: another mode.
    """

    MODES = ("auto", "online", "offline", "disabled")

    left = False
    """Whether a run of this process was left before all of it was uploaded: at the end of the
    process W&B would wait for the rest."""

    def __init__(
        self,
        folder: str | Path,
        project: str = "genfw",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: str = "auto",
    ):
        super().__init__()
        if mode not in self.MODES:
            raise ValueError(f"logger.wandb.mode={mode!r}: expected one of {', '.join(self.MODES)}")
        self.folder = Path(folder)
        self.identity = {
            "project": project,
            "entity": entity,
            "name": name or os.environ.get("WANDB_NAME") or self.folder.name,
            "group": group,
            "tags": tags,
        }
        self.known = self.folder / "wandb_id.txt"
        self.same: dict[str, Any] = {}
        if self.known.exists():
            self.same = {"id": self.known.read_text().strip(), "resume": "allow"}
        self.reason = ""
        self.run: Any = None
        self._last = ""
        # asked while the caller goes on building data and model
        self._choice = ThreadPoolExecutor(1).submit(choose_mode, mode)

    def evaluates(self, name: str) -> None:
        """What is to be opened is a run of its own, for an evaluation of this name: in the trained
        one a second summary would take the place of the first. Its group is that of the trained
        one, or the id of that; the same evaluation again goes on with the same run."""
        trained = self.same.get("id")
        self.identity["name"] = f"{self.identity['name']}, {name}"[:NAME]
        self.identity["group"] = self.identity["group"] or trained
        self.identity["job_type"] = "evaluate"
        self.same = {**self.same, "id": f"{trained}-{crc32(name.encode()):08x}"} if trained else {}

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str | None:
        return None if self.run is None else self.run.id

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Opens the run with this configuration."""
        config = vars(params) if isinstance(params, Namespace) else params
        if self.run is None:
            self._quietly(lambda: self._start(config))
        else:
            self._quietly(lambda: self.run.config.update(config, allow_val_change=True))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        if self.run is not None:
            row = {"trainer/global_step": step, **plain(metrics)}
            self._quietly(lambda: self.run.log(row))

    @rank_zero_only
    def log_picture(self, key: str, path: Path, step: int) -> None:
        """A PNG file."""
        if self.run is not None:
            import wandb

            self._quietly(
                lambda: self.run.log({key: wandb.Image(str(path)), "trainer/global_step": step})
            )

    @rank_zero_only
    def summarize(self, results: Mapping[str, Any]) -> None:
        """Final numbers, to the run's summary."""
        if self.run is not None:
            self._quietly(lambda: self.run.summary.update(dict(results)))

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Closes the run; later calls do nothing. It waits `UPLOAD_PATIENCE` seconds for the
        upload, and `LAST_PATIENCE` where a signal ended it (an exit code beyond 1): the rest stays
        in its folder."""
        if self.run is not None:
            run, self.run = self.run, None
            self._last = self._where(run)
            close = threading.Thread(
                target=lambda: self._quietly(lambda: run.finish(exit_code=exit_code)), daemon=True
            )
            close.start()
            close.join(LAST_PATIENCE if exit_code > 1 else UPLOAD_PATIENCE)
            if close.is_alive():
                Wandb.left = True
                self._last += f"; not all of it arrived: {_sync(run)}"

    @property
    def where(self) -> str:
        """One line: how to see the run. Nothing where none was asked for, as on further ranks."""
        if self.run is not None:
            return self._where(self.run)
        return self._last or (self.reason and f"W&B: no run ({self.reason})")

    def _where(self, run: Any) -> str:
        if run.disabled:
            return f"W&B: disabled ({self.reason})"
        if run.offline:
            return f"W&B: offline ({self.reason}); to upload: {_sync(run)}"
        return f"W&B: {run.url}"

    def _start(self, config: Mapping[str, Any]) -> None:
        import wandb

        mode, self.reason = self._choice.result()
        settings = {
            "silent": True,
            "console": "off",
            "init_timeout": ONLINE_PATIENCE,
            "disable_git": True,
        }
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self.run = wandb.init(
                    **self.identity,
                    **self.same,
                    dir=str(self.folder),
                    config=dict(config),
                    mode=attempt,  # pyright: ignore[reportArgumentType]
                    settings=wandb.Settings(**settings),
                )
                break
            except Exception as error:
                if attempt == "offline":
                    raise
                self.reason = f"no run could be opened online: {one_line(error)}"
        self.run.define_metric("trainer/global_step", hidden=True)
        self.run.define_metric("*", step_metric="trainer/global_step")
        if "job_type" not in self.identity:
            replace_text(self.known, self.run.id + "\n")

    def _quietly(self, act: Callable[[], Any]) -> None:
        """W&B's troubles are not the run's."""
        try:
            act()
        except Exception as error:
            self.run, self.reason = None, one_line(error)
            print(f"W&B: gave up, the run goes on ({self.reason})", file=sys.stderr)


def _sync(run: Any) -> str:
    """What uploads it, to be copied into a shell."""
    return shlex.join(("wandb", "sync", str(run.settings.sync_dir)))


def choose_mode(mode: str = "auto") -> tuple[str, str]:
    """(mode, reason) for `wandb.init`; at most about `PATIENCE` seconds, and never a prompt."""
    if mode != "auto":
        asked, by = mode, f"logger.wandb.mode={mode}"
    else:
        asked, by = os.environ.get("WANDB_MODE"), f"WANDB_MODE={os.environ.get('WANDB_MODE')}"
    if asked and asked != "online":  # online is a wish: without credentials W&B would ask for them
        return {"dryrun": "offline"}.get(asked, asked), by
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        return "offline", "no credentials: `wandb login` to have them"
    host = wandb.setup().settings.base_url
    if not answers(host):
        return "offline", f"no answer from {host}"
    return "online", ""


def answers(host: str, patience: float = PATIENCE) -> bool:
    """Whether a W&B server answers within so many seconds, name resolution and proxies included.

    Any JSON from its GraphQL door will do; the HTML of a captive portal or of a proxy will not.
    """
    heard = threading.Event()

    def ask() -> None:
        try:
            question = urllib.request.Request(
                f"{host.rstrip('/')}/graphql",
                data=b'{"query": "{ __typename }"}',
                headers={"Content-Type": "application/json", "User-Agent": "genfw"},
            )
            with urllib.request.urlopen(question, timeout=patience) as reply:
                kind = reply.headers.get_content_type()
        except urllib.error.HTTPError as refusal:  # 401 is an answer
            kind = refusal.headers.get_content_type()
        except (OSError, ValueError):
            return
        if kind == "application/json":
            heard.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience)
    return heard.is_set()


@cache
def git_commit() -> str | None:
    """The commit of genfw's own checkout, with `+` where it has changes; None outside of one. As it
    was when this was first asked, by `prepare`: of the code that runs, not of what came later."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words: str) -> str:
        here = Path(__file__).parent
        run = subprocess.run([git, *words], cwd=here, capture_output=True, text=True, timeout=5)
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        commit = ask("rev-parse", "HEAD")
        return commit + "+" * bool(ask("status", "--porcelain", "-uno")) if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Python numbers."""
    return {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}


def show(trainer: L.Trainer, key: str, path: Path) -> None:
    """A picture to W&B, where there is one."""
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            logger.log_picture(key, path, trainer.global_step)

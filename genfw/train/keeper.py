"""When a run is saved, and what it takes to go on from there exactly.

A save belongs to the end of an optimizer step, before the validation that may be due: an
interrupted validation has nothing to save, and a run that goes on begins it again. It is written a
moment later, when the step's numbers are in the ledger, but with the counters of Lightning's loops
as they were at the step's end, a moment that Lightning knows how to go on from. (Of a checkpoint
written after it, it would leave out the validation.)

Random numbers, times and the order of images are functions of seed and step and need no saving.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from genfw.check import at_least_one
from genfw.train.batches import limit
from genfw.train.checkpoint import AtomicIO, read, same
from genfw.train.errors import ConfigError, Stopped, resume_line
from genfw.train.files import probe
from genfw.train.loggers import CSV
from genfw.train.occasions import fitting
from genfw.train.signals import Signals, stop


class Keeper(Checkpoint):
    """Writes last.ckpt, previous.ckpt and best.ckpt, and takes a run up again.

    Saved are the steps at which a validation is due, the last one, and the one after which a signal
    asked to stop.

    Args:
        folder: for the files; made if need be.
        files: writes them; the Trainer's plug-in too.
        signals: asked after each step.
        begin: the file that this run goes on from; None: it is a new one.
        every: steps between further saves; None: none.
        failures: so many saves that fail in a row (a full disk) stop the run. The last good files
            stay.

    Raises:
        ValueError: every or failures below 1.
    """

    def __init__(
        self,
        folder: Path,
        files: AtomicIO,
        signals: Signals,
        begin: Path | None = None,
        every: int | None = None,
        failures: int = 3,
    ):
        self.folder, self.files, self.signals, self.begin = folder, files, signals, begin
        self.every = None if every is None else at_least_one("every", every)
        self.failures = at_least_one("failures", failures)
        self.best = math.inf
        """The best validation NLL so far, nats."""
        self.step, self.saved, self.failed = 0, 0, 0
        self.validated = -1
        self._trains = False
        self.validation_due = False
        self._loops: dict[str, Any] | None = None
        self._exit_code = 0

    def check(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Whether this run can go on from `begin`; nothing is written.

        Raises:
            ConfigError: its steps took another number of images, or its epochs would; or its
                weights are not these.
        """
        if self.begin is None:
            return
        checkpoint = read(self.begin)
        kept = checkpoint["genfw"]
        then = kept["world"], kept["accumulate"]
        now = trainer.world_size, trainer.accumulate_grad_batches
        if math.prod(then) != math.prod(now):
            raise ConfigError(
                f"a step of this run takes {then[0]} ranks x {then[1]} micro-batches, and here are "
                f"{now[0]} x {now[1]}: give trainer.devices and trainer.accumulate_grad_batches "
                "the same product"
            )
        key, most = limit(trainer, "train")
        if then != now and (isinstance(most, int) or most != 1.0):
            raise ConfigError(
                f"{key}={most} counts micro-batches of a rank, so that "
                f"{now[0]} x {now[1]} would see other epochs than {then[0]} ranks x {then[1]} "
                "micro-batches did: go on with those"
            )
        theirs, mine = _shapes(checkpoint["state_dict"]), _shapes(module.state_dict())
        for name in [*mine, *theirs]:
            if theirs.get(name) != mine.get(name):
                raise ConfigError(
                    f"{self.begin} holds weights of another model than config.yaml: {name} is "
                    f"{theirs.get(name, 'not there')} in the one and "
                    f"{mine.get(name, 'not there')} in the other; put back the config.yaml that it "
                    "was trained with"
                )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds out early whether files can be written, and removes what a killed run left; one
        that was killed before its first save begins anew."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.tmp"):
                left.unlink()
            if self.begin is not None and self.begin.name == "previous.ckpt":
                self._put_aside(self.begin)
            probe(self.folder)
            if self.begin is None:
                for ledger in _ledgers(trainer):
                    ledger.cut(0)
        except OSError as error:
            raise ConfigError(
                f"checkpoints cannot be written to {self.folder}: {error.strerror}"
            ) from error

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trains = True
        _go_on(trainer, self.validation_due)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that was killed after its last step has nothing to train; its last validation may
        be due, and what Lightning counts after a step and at the end."""
        if not self._trains and self.begin is not None:
            fit: Any = trainer.fit_loop
            if self.validation_due:
                pl_module.to(trainer.strategy.root_device)  # Lightning has taken it to the CPU
                _validate(trainer)
            fit.epoch_loop._batches_that_stepped += 1
            fit.epoch_progress.increment_processed()
            fit.epoch_progress.increment_completed()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.step:
            return  # within an accumulation window
        self.step = trainer.global_step
        self._exit_code = self.signals.agreed()
        loop: Any = trainer.fit_loop.epoch_loop
        self.validation_due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        ends = loop._is_training_done or trainer.should_stop
        every = self.every is not None and self.step % self.every == 0
        wanted = self._exit_code or self.validation_due or ends or every
        self._loops = copy.deepcopy(trainer.fit_loop.state_dict()) if wanted else None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if fitting(trainer):
            self._save(trainer)
            self.signals.idle = self.saved == self.step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)
        if self.saved != trainer.global_step:
            raise Stopped(
                f"the weights of step {trainer.global_step} could not be saved in {self.folder}; "
                f"those of step {self.saved} are: make room, then "
                f"{resume_line(trainer.default_root_dir)}"
            )
        self.signals.idle = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.signals.idle = not fitting(trainer)
            self.validation_due, self.validated = False, trainer.global_step
            self.consider(trainer, trainer.callback_metrics.get("val/nll"))

    def look_at_the_last(
        self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule
    ) -> None:
        """After training: steps since the last validation count too."""
        if self.validated != trainer.global_step:
            trainer.validate(module, data, verbose=False)

    def consider(self, trainer: L.Trainer, nll: torch.Tensor | None) -> None:
        """Keeps the weights last saved as the best ones, if this is their NLL and it is less."""
        known = nll is not None and self.saved == trainer.global_step
        value = trainer.strategy.broadcast(float(nll) if known and nll is not None else math.nan)
        if not value < self.best:  # the first rank's number, lest ranks part ways
            return
        failed = None
        if trainer.is_global_zero:
            try:
                same(self.folder / "last.ckpt", self.folder / "best.ckpt")
            except OSError as error:
                failed = str(error)
                print(f"the best weights could not be kept ({failed}); training goes on")
        if trainer.strategy.broadcast(failed) is None:
            self.best = value

    def _put_aside(self, good: Path) -> None:
        """A last.ckpt that is damaged must not become previous.ckpt."""
        last = self.folder / "last.ckpt"
        if last.exists():
            last.replace(last.with_name("last.ckpt.damaged"))
        same(good, last)

    @property
    def path(self) -> Path:
        """The best weights; the last ones where nothing was validated."""
        return self.folder / ("best.ckpt" if math.isfinite(self.best) else "last.ckpt")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["loops"]["fit_loop"] = self._loops
        checkpoint["genfw"] = {
            "best": self.best,
            "validation_due": self.validation_due,
            "world": trainer.world_size,
            "accumulate": trainer.accumulate_grad_batches,
            "rows": {type(each).__name__: each.rows for each in _ledgers(trainer)},
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        kept = checkpoint["genfw"]
        self.best, self.validation_due = kept["best"], kept["validation_due"]
        self.step = self.saved = checkpoint["global_step"]
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counters in (batches["total"], batches["current"]):
            for key, count in counters.items():
                counters[key] = count * trainer.accumulate_grad_batches // kept["accumulate"]
        for each in _ledgers(trainer):
            each.cut(kept["rows"].get(type(each).__name__, 0))

    def _save(self, trainer: L.Trainer) -> None:
        """Writes what `on_train_batch_end` asked for, and stops if it was asked to."""
        if self._loops is None:
            return
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._loops = None
        reason = trainer.strategy.broadcast(self.files.failed and str(self.files.failed))
        if reason is None:
            self.saved, self.failed = self.step, 0
        else:
            self.failed += 1
            self._complain(trainer, reason)
        stop(self._exit_code, trainer)

    def _complain(self, trainer: L.Trainer, reason: str) -> None:
        said = f"step {self.step} could not be saved ({reason}); step {self.saved} is kept"
        if self.failed >= self.failures:
            raise Stopped(
                f"{said}; {self.failed} in a row (checkpoint.failures={self.failures}): make room, "
                f"then {resume_line(trainer.default_root_dir)}"
            )
        if trainer.is_global_zero:
            print(f"{said}; training goes on", flush=True)


def _go_on(trainer: L.Trainer, validation_due: bool) -> None:
    """What Lightning leaves out where it goes on: the validation after the saved step, and where
    that step was the last of its epoch, to count the next one as begun."""
    fit: Any = trainer.fit_loop
    progress = fit.epoch_progress
    between = fit.restarted_mid_epoch and progress.current.ready == progress.current.completed
    if validation_due:
        progress.current.completed -= between  # its numbers are still of the epoch before
        _validate(trainer)
        progress.current.completed += between
    if between:
        progress.increment_ready()
        progress.increment_started()


def _validate(trainer: L.Trainer) -> None:
    """As Lightning's loop does after a step."""
    loop: Any = trainer.fit_loop.epoch_loop
    connector: Any = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of what is trained; averages have the shapes of what they average."""
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("average.")
    }


def _ledgers(trainer: L.Trainer) -> list[CSV]:
    return [each for each in trainer.loggers if isinstance(each, CSV)]

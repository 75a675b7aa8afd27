"""Whoever gets the signal, whenever: the step is finished and saved, and all ranks end alike."""

import itertools
import os
import random
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import ranks
import tiny
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from ranks import MODELS, SMALL, Fault

from genfw.train import callbacks, signals
from genfw.train.checkpoint import AtomicIO, read
from genfw.train.errors import Stopped
from genfw.train.frechet import FrechetDistance
from genfw.train.job import fit
from genfw.train.keeper import Keeper
from genfw.train.process import prepare
from genfw.train.run_folder import noted
from genfw.train.signals import EXIT_CODES, Interruption, Signals

COMMAND = (*SMALL, *MODELS["vae"], "trainer.max_steps=14")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("train", 4, signal.SIGTERM, ranks=(0, 1)),
        Fault("any", 0, signal.SIGUSR1, ranks=(1,), after=random.uniform(0, 0.5)),
        Fault("validation", 3, signal.SIGTERM, ranks=(1,)),
    ],
    ids=["in a step", "at any moment", "in a validation"],
)
def test_two_ranks(tmp_path, fault):
    place = f"hydra.run.dir={tmp_path}/${{start:}}"  # which both ranks must name alike
    ended = ranks.run(*COMMAND, "trainer.max_steps=100000", place, world=2, fault=fault)
    assert ended.codes == [143, 143], f"{fault}\n{ended.said}"
    assert ended.seconds < 10, fault
    (folder,) = (each.parent for each in tmp_path.glob("*/config.yaml"))
    step = read(folder / "checkpoints" / "last.ckpt")["global_step"]
    # the step is finished; a validation is not
    assert step == {"train": 5, "validation": 3}.get(fault.moment, step)
    assert ended.said.count(f"interrupted at step {step}; to go on: python -m genfw resume=") == 1
    assert not (folder / "results.json").exists()


def test_a_loss_that_is_no_number_ends_all_ranks(tmp_path):
    """On rank 1, which rank 0 says and ends too; what is saved is from before."""
    fault = Fault("nan", 4, ranks=(1,))
    ended = ranks.run(*COMMAND, f"hydra.run.dir={tmp_path}/run", world=2, fault=fault)
    assert ended.codes == [1, 1], ended.said
    assert ended.said.count("rank 1, step 4: the loss is nan for training images") == 1
    last = read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 3
    assert all(torch.isfinite(each).all() for each in last["state_dict"].values())


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_all(tmp_path, rank):
    """Nobody waits for a rank that is gone, and it is told which one it was."""
    fault = Fault("error", 4, ranks=(rank,))
    ended = ranks.run(*COMMAND, f"hydra.run.dir={tmp_path}/run", world=2, fault=fault)
    assert ended.codes == [1, 1], ended.said
    assert f"rank {rank}: Traceback" in ended.said and "RuntimeError: out of luck" in ended.said
    assert ended.seconds < 30
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_lightnings_own_launcher_ends_all_with_1(monkeypatch):
    """Not with 137, as if the first rank had been killed."""
    prepare()
    processes = [Mock(returncode=1), Mock(returncode=None)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "_exit", Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            _ChildProcessObserver(os.getpid(), processes)._run()
        os._exit.assert_called_once_with(1)
    assert processes[1].kill.called


def test_the_first_rank_that_fails_says_why(tmp_path):
    """The others lose it, and say so later."""
    first, further = noted(tmp_path), noted(tmp_path)
    for rank in (first, further):
        rank.__enter__()
    for rank, error in ((first, ValueError("out of luck")), (further, RuntimeError("lost a peer"))):
        assert not rank.__exit__(type(error), error, None)
    assert (tmp_path / "error.txt").read_text() == "ValueError: out of luck\n"


def test_a_full_disk_does_not_hide_what_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=OSError(28, "no space")))
    with pytest.raises(ValueError, match="out of luck"), noted(tmp_path):
        raise ValueError("out of luck")


class Measured:
    """A rank of two that draws ten samples in chunks of two, and what came of it."""

    def __init__(self, monkeypatch, draw, others=True, received=0):
        self.drawn, self.distance = [], Mock(spec=FrechetDistance, key="fd")
        heard = Signals()
        heard.received = received
        trainer = Mock(spec=L.Trainer, global_rank=0, world_size=2, callbacks=[heard])
        trainer.global_step, trainer.default_root_dir, trainer.testing = 5, "here", False
        trainer.strategy.reduce_boolean_decision = lambda mine, all: mine and others
        frechet = callbacks.Frechet("auto", (1, 8, 8), 17, chunk=2)
        frechet.distance, frechet.referred = self.distance, True
        monkeypatch.setattr(callbacks, "draw_samples", lambda _, part, *more: draw(self, part))
        self.frechet, self.measure = (
            frechet,
            lambda: frechet._measure(trainer, tiny.module(), "val", 10),
        )


def test_a_distance_that_one_rank_cannot_measure_none_does(monkeypatch, capsys):
    """It is not waited for, neither where it failed nor elsewhere."""

    def fails(rank, part):
        rank.drawn.append(list(part))
        raise RuntimeError("out of memory")

    here = Measured(monkeypatch, fails)
    here.measure()
    assert (
        here.drawn == [[0, 2]] and "skipped: RuntimeError: out of memory" in capsys.readouterr().out
    )
    there = Measured(monkeypatch, lambda rank, part: rank.drawn.append(list(part)), others=False)
    there.measure()
    assert there.drawn == [[0, 2], [4, 6], [8]]
    assert "skipped: GenfwError: another rank failed" in capsys.readouterr().out
    for each in (here, there):
        assert each.frechet.distance is None and not each.distance.compute.called


def test_ranks_obey_while_they_draw_samples(monkeypatch):
    """At the next call of a network, about once a second."""
    finished = []

    def draw(rank, part):
        rank.drawn.append(list(part))
        torch.nn.Identity()(torch.zeros(1))
        finished.append(part)

    rank = Measured(monkeypatch, draw, received=143)
    monkeypatch.setattr(signals, "PAUSE", 0.0)
    with pytest.raises(Stopped, match="interrupted at step 5"):
        rank.measure()
    assert rank.drawn == [[0, 2]] and not finished
    torch.nn.Identity()(torch.zeros(1))  # nobody asks any more


def test_who_has_nothing_to_draw_waits_and_hears(monkeypatch):
    """Until no rank is busy; a signal to any of them ends all."""
    trainer = Mock(spec=L.Trainer, global_step=5, default_root_dir="here")
    for others, ends in (([(0, 1), (0, 1), (0, 0)], False), ([(0, 1), (143, 1)], True)):
        rank, answers = Signals(), iter(others)
        monkeypatch.setattr(rank, "_most", lambda code, busy=0, answers=answers: next(answers))
        with pytest.raises(Stopped) if ends else nullcontext(), rank.heard(trainer):
            pass
        assert not list(answers)


class At(L.Callback):
    """Raises signals at a moment of training."""

    def __init__(self, hook, step, *numbers):
        self.hook, self.step, self.numbers = hook, step, numbers

    def strike(self, hook, trainer):
        if hook == self.hook and trainer.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)

    def on_train_batch_start(self, trainer, *_):
        self.strike("step", trainer)

    def on_validation_batch_start(self, trainer, *_):
        self.strike("validation", trainer)


def trained(folder, *callbacks, steps=6):
    files = AtomicIO()
    with Signals() as signals:
        keeper = Keeper(folder, files, signals)
        settings = {"val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer = tiny.trainer(
            folder,
            steps,
            callbacks=[signals, *callbacks, keeper],
            plugins=[files],
            enable_checkpointing=True,
            **settings,
        )
        fit(trainer, tiny.module(), tiny.Images(), keeper)


@pytest.mark.parametrize(
    ("number", "hook"), list(itertools.product(EXIT_CODES, ("step", "validation")))
)
def test_one_rank(tmp_path, number, hook):
    before = {each: signal.getsignal(each) for each in EXIT_CODES}
    with pytest.raises(Stopped, match=f"resume={tmp_path}") as stopped:
        trained(tmp_path, At(hook, 4, number))
    assert stopped.value.exit_code == EXIT_CODES[number] == (130 if number == 2 else 143)
    saved = read(tmp_path / "last.ckpt")
    assert saved["global_step"] == (5 if hook == "step" else 4)
    assert saved["genfw"]["validation_due"] is (hook == "validation")
    assert {each: signal.getsignal(each) for each in EXIT_CODES} == before


def test_a_signal_at_the_last_step(tmp_path):
    with pytest.raises(Stopped):
        trained(tmp_path, At("step", 5, signal.SIGTERM))
    assert read(tmp_path / "last.ckpt")["global_step"] == 6


def test_a_signal_before_the_first_step(tmp_path):
    class Early(L.Callback):
        def setup(self, *_, **__):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="interrupted at step 0") as stopped:
        trained(tmp_path, Early())
    assert stopped.value.exit_code == 143 and not (tmp_path / "last.ckpt").exists()


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, At("step", 3, signal.SIGINT, signal.SIGINT))
    assert read(tmp_path / "last.ckpt")["global_step"] == 2


def test_what_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trained(tmp_path, At("step", 3, signal.SIGINT), steps=4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert read(tmp_path / "last.ckpt")["global_step"] == 4


def test_who_has_nothing_to_save_does_not_wait(monkeypatch):
    with Signals() as signals:
        with pytest.raises(Interruption):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == 143
        os.kill(os.getpid(), signal.SIGTERM)  # while the first one is being obeyed
    monkeypatch.setenv("WORLD_SIZE", "2")  # the other rank would wait
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == 143
    monkeypatch.delenv("WORLD_SIZE")
    with Signals() as signals:
        signals.idle = False
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == 143


def pictures_of_the_first_rank(folder):
    """Take a minute; the other rank, which waits for them, gets the signal."""
    from genfw.train.callbacks import Pictures

    draw = Pictures.draw

    def slow(*_):
        for _ in range(600):
            torch.nn.Identity()(time.sleep(0.1))

    def drawn(self, *arguments):
        if os.environ["RANK"] == "1":
            threading.Timer(0.2, strike_and_sleep(folder, 0)).start()
        return draw(self, *arguments)

    Pictures._draw, Pictures.draw = slow, drawn


@pytest.mark.parametrize("every", [1, 0], ids=["in a validation", "of the test"])
def test_ranks_that_wait_for_pictures_do_not_wait_with_a_signal(tmp_path, every):
    given = [each for each in COMMAND if each != "~callbacks.pictures"]
    given += [f"callbacks.pictures.every={every}", f"hydra.run.dir={tmp_path}/run"]
    ended = ranks.run(*given, "trainer.max_steps=3", world=2, prepare=pictures_of_the_first_rank)
    assert ended.codes == [143, 143], ended.said
    assert ended.seconds < 10 and "to go on: python -m genfw resume=" in ended.said
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3


def slow_data(folder):
    from genfw.train.data.digits import Digits

    Digits.read = strike_and_sleep(folder)


def slow_samples(folder):
    from genfw.train import callbacks

    callbacks.draw_samples = strike_and_sleep(folder)


def strike_and_sleep(folder, seconds=60):
    """What takes a minute, and a signal in the midst."""

    def slow(*_, **__):
        (folder.parent / f"{folder.name}.mark").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)

    return slow


@pytest.mark.parametrize(
    ("prepare", "every", "saved"),
    [(slow_data, 0, None), (slow_samples, 1, 3), (slow_samples, 0, 14)],
    ids=["while data are read", "in pictures of a validation", "in pictures of the test"],
)
def test_a_run_of_one_process_does_not_wait(tmp_path, prepare, every, saved):
    place = f"{tmp_path}/run"
    command = [each for each in COMMAND if each != "~callbacks.pictures"]
    command.append(f"callbacks.pictures.every={every}")
    ended = ranks.run(*command, f"hydra.run.dir={place}", prepare=prepare)
    assert ended.codes == [143], ended.said
    assert ended.seconds < 30 and f"to go on: python -m genfw resume={place}" in ended.said
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert (read(last)["global_step"] if last.exists() else None) == saved
    assert ranks.run(f"resume={place}").codes == [0]

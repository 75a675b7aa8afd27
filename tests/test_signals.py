"""Whoever gets the signal, whenever: the step is finished and saved, and all ranks end alike."""

import itertools
import os
import signal
import time

import lightning.pytorch as L
import pytest
import ranks
import tiny
import torch
from ranks import MODELS, SMALL, Fault

from genfw.train.checkpoint import AtomicIO, read
from genfw.train.errors import Stopped
from genfw.train.job import fit
from genfw.train.keeper import Keeper
from genfw.train.signals import EXIT_CODES, Interruption, Signals

COMMAND = (*SMALL, *MODELS["vae"], "trainer.max_steps=14")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("train", 4, signal.SIGTERM, ranks=(0, 1)),
        Fault("train", 4, signal.SIGUSR1, ranks=(1,)),
        Fault("validation", 3, signal.SIGTERM, ranks=(1,)),
    ],
)
def test_two_ranks(tmp_path, fault):
    place = f"hydra.run.dir={tmp_path}/${{start:}}"  # which both ranks must name alike
    ended = ranks.run(*COMMAND, place, world=2, fault=fault)
    assert ended.codes == [143, 143], ended.said
    (folder,) = (each.parent for each in tmp_path.glob("*/config.yaml"))
    step = 5 if fault.moment == "train" else 3  # the step is finished; a validation is not
    assert read(folder / "checkpoints" / "last.ckpt")["global_step"] == step
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


def slow_data(folder):
    from genfw.train.data.digits import Digits

    Digits.read = strike_and_sleep(folder)


def slow_samples(folder):
    from genfw.train import callbacks

    callbacks.draw_samples = strike_and_sleep(folder)


def strike_and_sleep(folder):
    """What takes a minute, and a signal in the midst."""

    def slow(*_, **__):
        (folder.parent / f"{folder.name}.mark").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

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

"""A command that a message shows can be pasted into a shell, whatever its folder is called."""

import shlex
import signal
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import tiny

from genfw.__main__ import _trains
from genfw.train.checkpoint import AtomicIO
from genfw.train.errors import GenfwError
from genfw.train.job import obedient
from genfw.train.keeper import Keeper
from genfw.train.loggers import Wandb
from genfw.train.runs import load
from genfw.train.signals import Signals, stop
from genfw.train.sweep import keep

FOLDER = "out puts/it's $HOME/a=1;x"
TRAINER = tiny.trainer(FOLDER)
KEEPER = Keeper(Path(FOLDER), AtomicIO(), Signals(), failures=1)
KEEPER.saved, KEEPER.failed = -1, 1


def interrupted():
    with obedient(Path(FOLDER)):
        signal.raise_signal(signal.SIGTERM)


def offline():
    run = Namespace(disabled=False, offline=True, settings=Namespace(sync_dir=FOLDER))
    raise GenfwError(Wandb._where(Namespace(reason=""), run))


def named_by_a_checkpoint():
    load(Path(FOLDER) / "checkpoints" / "best.ckpt")


def pasted(said, begin):
    """The words that a shell would read from there on."""
    return shlex.split(said[said.index(begin) :])


@pytest.mark.parametrize(
    ("message", "begin", "word"),
    [
        (lambda: KEEPER.on_train_end(TRAINER, tiny.module()), "python", f"resume={FOLDER}"),
        (lambda: KEEPER._complain(TRAINER, "full"), "python", f"resume={FOLDER}"),
        (interrupted, "python", f"resume={FOLDER}"),
        (lambda: stop(143, TRAINER), "python", f"resume={FOLDER}"),
        (lambda: _trains([f"run={FOLDER}"]), "python -m genfw.sample", f"run={FOLDER};"),
        (lambda: _trains([f"run={FOLDER}"]), "python -m genfw ", f"resume={FOLDER}"),
        (offline, "wandb sync", FOLDER),
        (named_by_a_checkpoint, "'run=", f"run={FOLDER}"),
    ],
)
def test_what_is_shown_can_be_pasted(message, begin, word):
    with pytest.raises(GenfwError) as said:
        message()
    assert word in pasted(str(said.value), begin)


def test_so_can_the_line_of_a_sweep(tmp_path):
    (sweep := tmp_path / FOLDER).mkdir(parents=True)
    keep(sweep, ["seed=0,1"], 2)
    with pytest.raises(GenfwError, match="holds a sweep already") as said:
        keep(sweep, ["seed=0,1"], 2)
    assert pasted(str(said.value), "python -m genfw ")[3:] == [f"sweep={sweep}"]

"""Runs on any number of ranks, killed or signalled at a chosen moment, at the price of a fork.

A server process imports everything once; each rank is forked from it, with the environment that
torchrun would give it, and calls `genfw.__main__.main`.
"""

import contextlib
import csv
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

SMALL = (
    *("data.batch_size=80", "data.eval_batch_size=40", "trainer.accelerator=cpu", "logger=csv"),
    *("trainer.val_check_interval=3", "trainer.log_every_n_steps=1", "estimator.strata=1"),
    *("validation_estimator.strata=1", "trainer.limit_test_batches=1", "metrics=none"),
    *("callbacks.progress.every=1", "~callbacks.pictures", "~callbacks.diagnostics"),
)
MODELS = {
    "vae": (
        "model=vae",
        "net@encoder=mlp_encoder",
        "net@decoder=mlp_decoder",
        "encoder.hidden=[8]",
    ),
    "mhvae": (
        *("model=mhvae", "model.latents=[4,2]", "objective=warmup", "objective.steps=20"),
        *("net@encoder=mlp_encoder", "net@decoder=mlp_decoder", "encoder.hidden=[8]"),
    ),
    "vdm": (
        *("model=vdm", "net=mlp", "net.width=8", "net.blocks=1", "sampler.steps=2"),
        *("times=importance", "schedule=learned", "~callbacks.bits"),
    ),
}
"""With a state of their own: a warm-up, learned noise, the history of importance-sampled times."""

context = mp.get_context("forkserver")
context.set_forkserver_preload(["genfw.__main__", "genfw.train.job", "sklearn.datasets", "ranks"])


@dataclass
class Fault:
    """What happens where: a signal to a rank itself, at a global step.

    Attributes:
        moment: train (in the step after), validation (in its second batch), write (half way); nan:
            no signal, the weights are no numbers in the step after; error: an exception there; any:
            a signal from outside, wherever the ranks may be.
        ranks: those it happens to.
        after: seconds from the end of the first rank's first step, of `any`.
    """

    moment: str
    step: int
    number: int = signal.SIGKILL
    ranks: tuple[int, ...] = (0, 1)
    after: float = 0.0


@dataclass
class Ended:
    """How a run ended: an exit code per rank (negative: by a signal), what was said, how long from
    the fault to the end of the last rank."""

    codes: list[int]
    said: str
    seconds: float


def torchrun(rank, world, port):
    """What torchrun tells a process of one node."""
    return {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }


def run(
    *arguments,
    world=1,
    strategy="ddp",
    fault=None,
    environment=None,
    timeout=240.0,
    prepare=None,
    module="genfw",
) -> Ended:
    """`python -m <module> <arguments>` on `world` ranks; each first calls `prepare` (folder)."""
    if world > 1 and not any(each.startswith("resume=") for each in arguments):
        arguments = (*arguments, f"trainer.strategy={strategy}", f"trainer.devices={world}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = _folder(arguments)
    place.mkdir(parents=True, exist_ok=True)
    logs = [place.parent / f"{place.name}.{rank}.log" for rank in range(world)]
    mark = place.parent / f"{place.name}.mark"
    mark.unlink(missing_ok=True)
    up = mark.with_suffix(".up")
    up.unlink(missing_ok=True)
    ranks = []
    for rank in range(world):
        given = {**(environment or {}), **(torchrun(rank, world, port) if world > 1 else {})}
        target = (arguments, given, fault, rank, str(logs[rank]), str(mark), prepare, module)
        ranks.append(context.Process(target=_rank, args=target))
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    if fault is not None and fault.moment == "any":
        while not up.exists() and any(each.is_alive() for each in ranks):
            time.sleep(0.01)
        time.sleep(fault.after)
        mark.write_text(str(time.time()))
        for rank in fault.ranks:
            os.kill(ranks[rank].pid, fault.number)
    for process in ranks:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.exitcode and process.exitcode == -signal.SIGKILL:
            deadline = min(deadline, time.monotonic() + 1)  # as a node that is gone
    hung = [process.is_alive() for process in ranks]
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    seconds = time.time() - float(mark.read_text()) if mark.exists() else 0.0
    said = "".join(log.read_text() for log in logs)
    killed = fault is not None and fault.number == signal.SIGKILL
    assert killed or not any(hung), f"ranks hang: {hung}\n{said}"
    return Ended([process.exitcode or 0 for process in ranks], said, seconds)


MEASURED = ("train/images_per_second", "train/wait_share", "memory/")
"""Columns that say how fast and where a run ran."""


def state(folder):
    """All that a checkpoint says of the run, and the ledger."""
    last = torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        rows = [
            {k: v for k, v in row.items() if v and not k.startswith(MEASURED)}
            for row in csv.DictReader(file)
        ]
    del last["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]  # counts evaluations again
    return {**last, "rows": rows}


def differences(one, two, path=""):
    """Where two states differ, bit for bit."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [path]
    if isinstance(one, dict) and isinstance(two, dict):
        found = [f"{path}/{key}" for key in one.keys() ^ two.keys()]
        both = [key for key in one if key in two]
        return found + [d for key in both for d in differences(one[key], two[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and len(one) == len(two):
        pairs = zip(one, two, strict=True)
        return [d for i, pair in enumerate(pairs) for d in differences(*pair, f"{path}/{i}")]
    return [] if one == two else [f"{path}: {one} | {two}"]


def started_with(variable):
    """The processes that were started with this in their environment."""
    found = []
    for each in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if variable.encode() in each.read_bytes().split(b"\0"):
                found.append(each.parent.name)
    return found


def wait(until, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.01)


def _folder(arguments):
    return Path(next(a.partition("=")[2] for a in arguments if a.startswith(PLACES)))


PLACES = ("hydra.run.dir=", "resume=")


def _rank(arguments, environment, fault, rank, log, mark, prepare, module):
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update({key: str(value) for key, value in environment.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = ["genfw", *arguments]
    from genfw.__main__ import main
    from genfw.classifier import classify
    from genfw.train.runs import command

    if fault is not None and rank in fault.ranks:
        _inject(fault, Path(mark))
    if prepare is not None:
        prepare(_folder(arguments))
    code = main(list(arguments)) if module == "genfw" else command(classify, list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _inject(fault, mark):
    from genfw.train import checkpoint
    from genfw.train.module import LatentModule

    def strike(step):
        if step == fault.step:
            fault.step = -1
            mark.write_text(str(time.time()))
            signal.raise_signal(fault.number)

    def before(name, when=lambda batch_idx: True):
        method = getattr(LatentModule, name)

        def wrapped(self, batch, batch_idx):
            if when(batch_idx) and self.trainer.state.fn == "fit":
                strike(self.trainer.global_step)
            return method(self, batch, batch_idx)

        setattr(LatentModule, name, wrapped)

    def poison(module):
        for p in module.model.parameters():
            p.data.fill_(torch.nan)

    if fault.moment in ("nan", "error"):
        step = LatentModule.training_step

        def poisoned(self, batch, batch_idx):
            if self.trainer.global_step == fault.step:
                if fault.moment == "error":
                    mark.write_text(str(time.time()))
                    raise RuntimeError("out of luck")
                poison(self)
            return step(self, batch, batch_idx)

        LatentModule.training_step = poisoned
    elif fault.moment == "any":
        mark = mark.with_suffix(".up")
        before("training_step", lambda batch_idx: batch_idx == 1 and mark.touch())
    elif fault.moment == "train":
        before("training_step")
    elif fault.moment == "validation":
        before("validation_step", lambda batch_idx: batch_idx == 1)
    else:
        save = torch.save

        def half(held, file):
            if held["global_step"] == fault.step:
                file.write(b"half of a file")
                file.flush()
                strike(fault.step)
            save(held, file)

        checkpoint.torch.save = half

"""A run that is killed goes on as if nothing had been: bit for bit, to the last row of its ledger.

`make test` kills one run of each model on one rank and on two; `make faults` (`faults.py`) each
model ten times at each moment.
"""

import itertools
import json
import shutil
import signal
import subprocess
import sys

import pytest
import ranks
import torch
from omegaconf import OmegaConf
from ranks import MODELS, SMALL, Fault, differences, state

from genfw import evaluate
from genfw.__main__ import main
from genfw.train import runs, slurm
from genfw.train.checkpoint import read
from genfw.train.resume import MAY_CHANGE

STEPS = 14  # epochs end after 6 and 12, validations come every 3
MOMENTS = {  # what a killed run goes on from: in mid-epoch, between two epochs, a save earlier
    ("vae", 1): Fault("train", 11),
    ("vae", 2): Fault("validation", 12),  # after its last step: see LAST
    ("mhvae", 1): Fault("validation", 6),
    ("mhvae", 2): Fault("write", 12),
    ("vdm", 1): Fault("write", 12),
    ("vdm", 2): Fault("train", 8),
}


LAST = {("vae", 2): 12}
"""Steps of a run whose last validation is the one at its end."""
WORKERS = {("vae", 1)}
"""Where the run that is killed has its batches made by two processes, and the whole one has not."""


def command(model, world):
    """A step takes 160 of the 1000 images, however many ranks there are."""
    accumulate = f"trainer.accumulate_grad_batches={2 // world}"
    return (*SMALL, *MODELS[model], f"trainer.max_steps={STEPS}", accumulate)


@pytest.mark.parametrize(("model", "world"), list(itertools.product(MODELS, (1, 2))))
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, model, world):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = LAST.get((model, world), STEPS)
    all_of_it = (*command(model, world), f"trainer.max_steps={steps}")
    ended = ranks.run(*all_of_it, f"hydra.run.dir={whole}", world=world)
    assert ended.codes == [0] * world, ended.said
    fault = MOMENTS[model, world]
    given = (*all_of_it, f"hydra.run.dir={killed}")
    given += ("data.num_workers=2",) * ((model, world) in WORKERS)
    ended = ranks.run(*given, world=world, fault=fault, environment={"OF": killed})
    assert ended.codes[0] == -signal.SIGKILL, ended.said
    ranks.wait(lambda: not ranks.started_with(f"OF={killed}"))  # its workers are gone as well
    assert not (killed / "results.json").exists()
    assert read(killed / "checkpoints" / "last.ckpt")["global_step"] <= fault.step
    ended = ranks.run(f"resume={killed}", world=world)
    assert ended.codes == [0] * world, ended.said
    assert not differences(state(whole), state(killed))
    best = [read(each / "checkpoints" / "best.ckpt")["state_dict"] for each in (whole, killed)]
    assert not differences(*best)
    mine, theirs = (json.loads((each / "results.json").read_text()) for each in (whole, killed))
    assert mine["test/nll"] == theirs["test/nll"] and mine["val/nll"] == theirs["val/nll"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    ended = ranks.run(*command("vae", 1), f"hydra.run.dir={folder}")
    assert ended.codes == [0], ended.said
    return folder


def test_a_run_killed_before_its_first_save_begins_anew(finished, tmp_path):
    given = (*command("vae", 1), f"hydra.run.dir={tmp_path}/run")
    ended = ranks.run(*given, fault=Fault("write", 3))
    assert ended.codes == [-signal.SIGKILL], ended.said
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    ended = ranks.run(f"resume={tmp_path}/run")
    assert ended.codes == [0], ended.said
    assert not differences(state(finished), state(tmp_path / "run"))


def test_a_finished_run_says_so_and_goes_on_with_more_steps(finished, capsys):
    before = (finished / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert main([f"resume={finished}"]) == 0
    assert f"is finished, at step {STEPS}" in capsys.readouterr().out
    assert (finished / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    raised = ranks.run(f"resume={finished}", "trainer.max_steps=16")
    assert raised.codes == [0], raised.said
    assert read(finished / "checkpoints" / "last.ckpt")["global_step"] == 16
    assert OmegaConf.load(finished / "config.yaml").trainer.max_steps == 16
    steps = [int(row["step"]) for row in state(finished)["rows"] if "train/objective" in row]
    assert steps == list(range(16))


def test_a_run_that_ended_without_a_number_says_so(finished, tmp_path, capsys):
    """Each time, also to the table of a sweep that goes on with it."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    results = json.loads((folder / "results.json").read_text())
    results |= {"test/nll": None, "test/nonfinite": 3.0}
    (folder / "results.json").write_text(json.dumps(results))
    assert main([f"resume={folder}"]) == 1
    said = capsys.readouterr().err
    assert f"the NLL of 3 of {results['test/count']:.0f} test images is not finite; " in said
    assert (
        f"python -m genfw.evaluate run={folder} checkpoint=last" in said and said.count("\n") == 1
    )
    assert (folder / "error.txt").read_text() == said


def contents(folder):
    return {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def other_model(folder):
    config = OmegaConf.load(folder / "config.yaml")
    config.model.encoder.hidden = [9]
    OmegaConf.save(config, folder / "config.yaml")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("trainer.accumulate_grad_batches=3", "give trainer.devices and trainer.accumulate"),
        ("data.num_workers=-1", "num_workers"),
        (other_model, r"holds weights of another model than config.yaml: model.encoder"),
    ],
)
def test_who_is_refused_finds_the_folder_as_it_was(finished, tmp_path, capsys, wrong, said):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    changes = [] if callable(wrong) else [wrong]
    if callable(wrong):
        wrong(folder)
    before = contents(folder)
    assert main([f"resume={folder}", "trainer.max_steps=32", *changes]) == 2
    heard = capsys.readouterr().err
    assert said in heard and heard.count("\n") == 1, heard
    assert contents(folder) == before


@pytest.mark.parametrize("limit", [("max_steps", "global_step"), ("max_epochs", "epoch")])
def test_a_run_does_not_end_before_where_it_is(finished, tmp_path, capsys, limit):
    key, reached = limit
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "results.json").unlink()
    before, there = contents(folder), read(folder / "checkpoints" / "last.ckpt")[reached]
    assert main([f"resume={folder}", f"trainer.{key}={there - 1}"]) == 2
    heard = capsys.readouterr().err
    assert f"trainer.{key}={there - 1}: this run has reached {there} already" in heard
    assert contents(folder) == before


def test_a_run_is_in_one_process_at_a_time(finished, tmp_path, capsys):
    """Whoever has it, and until that one has ended, however it ended."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    holds = "import sys; from pathlib import Path; from genfw.train.run_folder import locked\n"
    holds += "with locked(Path(sys.argv[1])): print('up', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", holds, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"up\n"
    before = contents(folder)
    for command in ([f"resume={folder}"], [f"resume={folder}", "trainer.max_steps=16"]):
        assert main(command) == 2
        heard = capsys.readouterr().err
        assert f"running already, in process {other.pid} on " in heard and heard.count("\n") == 1
    assert contents(folder) == before
    other.kill()
    other.wait()
    assert main([f"resume={folder}"]) == 0


def test_two_ranks_go_on_where_one_was(tmp_path):
    """The counters of micro-batches are those of one rank with two, and become those of two."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    given = (*command("vae", 1), "trainer.max_steps=8")
    for folder, fault in ((whole, None), (moved, Fault("train", 3, signal.SIGTERM))):
        ended = ranks.run(*given, f"hydra.run.dir={folder}", fault=fault)
        assert ended.codes == [143 if fault else 0], ended.said
    here = (f"resume={moved}", "trainer.devices=2", "trainer.strategy=ddp")
    wrong = ranks.run(*here, world=2)
    assert wrong.codes == [2, 2] and "the same product" in wrong.said
    ended = ranks.run(*here, "trainer.accumulate_grad_batches=1", world=2)
    assert ended.codes == [0, 0], ended.said
    mine, theirs = (state(each)["state_dict"] for each in (whole, moved))
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-6), name


def test_a_limit_counts_batches_of_a_rank_and_keeps_them(tmp_path):
    run = tmp_path / "run"
    given = (*command("vae", 1), "trainer.limit_train_batches=4", f"hydra.run.dir={run}")
    ended = ranks.run(*given, fault=Fault("train", 3, signal.SIGTERM))
    assert ended.codes == [143], ended.said
    here = (f"resume={run}", "trainer.devices=2", "trainer.strategy=ddp")
    wrong = ranks.run(*here, "trainer.accumulate_grad_batches=1", world=2)
    assert wrong.codes == [2, 2]
    assert "limit_train_batches=4 counts micro-batches of a rank" in wrong.said


def test_weights_in_float64_are_never_rounded(tmp_path):
    """In a run that goes on, and in one that is read again."""
    wide = (*command("vae", 1), "trainer.precision=64-true", "trainer.max_steps=4")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    for folder, fault in ((whole, None), (moved, Fault("train", 3, signal.SIGTERM))):
        ended = ranks.run(*wide, f"hydra.run.dir={folder}", fault=fault)
        assert ended.codes == [143 if fault else 0], ended.said
    assert main([f"resume={moved}"]) == 0
    weights = state(whole)["state_dict"]
    assert {each.dtype for name, each in weights.items() if name.startswith("model.")} == {
        torch.float64
    }
    assert not differences(state(whole), state(moved))
    assert runs.command(evaluate.evaluate, (f"run={moved}", "verify=true")) == 0


def test_a_run_of_epochs_says_that_it_is_finished(tmp_path, capsys):
    given = (*SMALL, *MODELS["vae"], "trainer.max_steps=-1", f"hydra.run.dir={tmp_path}/run")
    assert main([*given, "trainer.max_epochs=1"]) == 0
    results = tmp_path / "run" / "results.json"
    before = results.stat().st_mtime_ns
    capsys.readouterr()
    assert main([f"resume={tmp_path}/run"]) == 0
    assert "give a larger trainer.max_epochs to go on" in capsys.readouterr().out
    assert results.stat().st_mtime_ns == before
    assert main([f"resume={tmp_path}/run", "trainer.max_epochs=2"]) == 0
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 24


@pytest.mark.parametrize(
    "wrong",
    ["model=vdm", "seed=1", "data.batch_size=3", "optimizer.lr=1", "model.encoder.hidden=[3]"],
)
def test_what_would_change_the_run_is_refused(finished, capsys, wrong):
    assert main([f"resume={finished}", wrong]) == 2
    said = capsys.readouterr().err
    assert wrong.split("=")[0] in said and "trainer.max" in said


def test_what_a_run_does_not_know_is_no_change_of_it(finished, capsys):
    assert main([f"resume={finished}", "trainer.max_step=9"]) == 2
    assert "Did you mean trainer.max_steps?" in capsys.readouterr().err


def test_no_folder_and_no_whole_checkpoint(finished, tmp_path, capsys):
    assert main(["resume=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("<html>")
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    assert main([f"resume={tmp_path}"]) == 1
    assert "cut short" in capsys.readouterr().err


def test_a_folder_does_not_vouch_for_itself(finished, tmp_path, capsys):
    config = OmegaConf.load(finished / "config.yaml")
    config.callbacks.mine = {"_target_": "strange.Callback"}
    config.trusted = ["strange"]
    OmegaConf.save(config, tmp_path / "config.yaml")
    assert main([f"resume={tmp_path}"]) == 2
    assert "strange.Callback is not among what a config may import" in capsys.readouterr().err
    assert main([f"resume={tmp_path}", "trusted=[strange]"]) == 2
    assert "there is no module strange" in capsys.readouterr().err


def test_slurm_finds_its_folder_again(tmp_path):
    """Warned, stopped with 143, put back into the queue, started by the same command."""
    arguments = (*command("vae", 1), f"hydra.run.dir={tmp_path}/${{start:}}")
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "night"}
    warned = Fault("train", 5, signal.SIGUSR1)
    first = ranks.run(*arguments, environment=job, fault=warned)
    assert first.codes == [143], first.said
    (folder,) = tmp_path.glob("slurm_77_*/")
    assert read(folder / "checkpoints" / "last.ckpt")["global_step"] == 6
    twice = ranks.run(*arguments, environment=job)
    assert twice.codes == [2] and "holds a run already" in twice.said
    again = ranks.run(*arguments, environment={**job, "SLURM_RESTART_COUNT": "1"})
    assert again.codes == [0], again.said
    assert [*tmp_path.glob("slurm_77_*/")] == [folder]
    steps = [int(row["step"]) for row in state(folder)["rows"] if "train/objective" in row]
    assert steps == list(range(STEPS)) and (folder / "results.json").exists()


def test_names_of_slurm_jobs(monkeypatch):
    assert slurm.job() is None and not slurm.restarted()
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setattr(slurm.sys, "argv", ["genfw", "model=vae"])
    name = slurm.job()
    assert name.startswith("slurm_5_") and name == slurm.job()
    monkeypatch.setattr(slurm.sys, "argv", ["genfw", "model=vdm"])
    assert slurm.job() != name
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm.job().startswith("slurm_4_2_")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert slurm.job() is None  # the same command may come twice


def test_what_may_change_is_there(finished):
    from genfw.train.nodes import keys

    known = keys(OmegaConf.load(finished / "config.yaml"))
    for name in MAY_CHANGE:
        within = name.endswith(".") and any(key.startswith(name) for key in known)
        assert name in known or within, name

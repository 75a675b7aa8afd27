"""Runs from the outside: interrupted, on two ranks, copied from a stranger, started twice."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock, call

import lightning.pytorch as L
import pytest
import tiny
import torch
from omegaconf import OmegaConf
from test_job import SMALL, VAE, composed

from genfw import evaluate, sample
from genfw.__main__ import main
from genfw.export import export
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.job import ended, run
from genfw.train.loggers import Wandb
from genfw.train.runs import command, read

ROOT = Path(__file__).parents[1]
BARE = (*VAE, "logger=csv", "metrics=none", "callbacks.pictures.every=0")


def genfw(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "genfw", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        # a background shell has its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def weights(folder):
    file = folder / "checkpoints" / "last.ckpt"
    return torch.load(file, weights_only=True)["state_dict"]


def signalled(process, number):
    """Sends it after the first step that is told, and waits: (exit code, what was said)."""
    killer = threading.Timer(240, process.kill)  # ends the reading below, whatever happens
    killer.start()
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("step"):
                process.send_signal(number)
                break
        said += process.stdout.read()
        return process.wait(30), said
    finally:
        killer.cancel()
        process.kill()


def test_ctrl_c_saves_and_says_so(tmp_path):
    folder = tmp_path / "run"
    process = genfw(*BARE, "trainer.max_steps=100000", f"hydra.run.dir={folder}")
    code, said = signalled(process, signal.SIGINT)
    assert code == 130, said
    assert f"python -m genfw resume={folder}" in said and "objective" in said.split("so far")[1]
    assert "Traceback" not in said
    assert weights(folder)


def test_a_signal_to_rank_0_of_lightnings_own_launcher(tmp_path):
    """Which kills everybody when a further rank ends with an exit code of its own."""
    folder = tmp_path / "run"
    ddp = ("trainer=ddp", "trainer.max_steps=100000", f"hydra.run.dir={folder}")
    code, said = signalled(genfw(*BARE, *ddp), signal.SIGTERM)
    assert code == 143, said
    assert said.count("interrupted at step") == 1 and "Traceback" not in said
    assert weights(folder)


def test_two_ranks_and_two_micro_batches_are_one_run(tmp_path):
    """The same images, times and noise: chunk = micro-batch x world size + rank. Were the rank left
    out of the key, both ranks would draw the noise of the first micro-batch."""
    small = (*BARE, "trainer.max_steps=3", "trainer.val_check_interval=3", "data.batch_size=8")
    one, two = tmp_path / "one", tmp_path / "two"
    jobs = [
        genfw(*small, "trainer.accumulate_grad_batches=2", f"hydra.run.dir={one}"),
        genfw(*small, "trainer=ddp", "trainer.devices=2", f"hydra.run.dir={two}"),
    ]
    for job in jobs:
        said, _ = job.communicate(timeout=200)
        assert job.returncode == 0, said
    mine, theirs = weights(one), weights(two)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-6), name


def test_a_copied_folder_does_not_vouch_for_itself(tmp_path, capsys):
    OmegaConf.save(
        {
            "seed": 0,
            "trusted": ["os"],
            "model": {"_target_": "os.system", "command": "touch PWNED"},
        },
        tmp_path / "config.yaml",
    )
    assert command(sample.sample, [f"run={tmp_path}", "n=1"]) == 2
    assert "trusted" in capsys.readouterr().err
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    ("word", "file", "more"),
    [
        ("run", "checkpoints/best.ckpt", " checkpoint=best"),
        ("resume", "checkpoints/best.ckpt", ""),
        ("run", "config.yaml", ""),
        ("resume", "config.yaml", ""),
    ],
)
def test_a_file_of_a_run_in_place_of_it_names_the_run(word, file, more):
    with pytest.raises(ConfigError, match=f"expected the run's folder, {word}=outputs/a{more}$"):
        read([f"{word}=outputs/a/{file}"], {}, "", word=word)


@pytest.mark.parametrize("word", ["run", "resume"])
def test_no_folder_is_not_the_one_that_one_is_in(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    OmegaConf.save({"model": {}}, "config.yaml")
    with pytest.raises(ConfigError, match=f"{word}=: expected a run's folder"):
        read([f"{word}="], {}, "", word=word)


def test_a_model_without_a_sampler_has_no_settings_of_one(tmp_path):
    OmegaConf.save({"model": {"_target_": "genfw.VAE"}, "seed": 0}, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"=3: sampler is of diffusion models.*genfw.VAE"):
        read([f"run={tmp_path}", "sampler.steps=3"], {}, "")


def test_values_are_checked_for_finished_runs_too(tmp_path):
    OmegaConf.save(composed(*BARE), tmp_path / "config.yaml", resolve=True)
    for wrong, said in (("estimator.strata=abc", "strata"), ("n=abc", "n=abc: expected int")):
        with pytest.raises(ConfigError, match=said):
            read([f"run={tmp_path}", wrong], {"n": 64}, "")


@pytest.fixture
def any_run(tmp_path):
    OmegaConf.save(composed(*BARE), tmp_path / "config.yaml", resolve=True)
    return f"run={tmp_path}"


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        *(("n", each, each) for each in ("1_0", "010", "0x1F", "0b11", "1:30", "-1_0")),
        *(("label", each, each) for each in ("3:5", "1_0", "1:30.5", "1_000.5")),
        *(("label", each, "1_0") for each in ("[0,1_0]", "[0,[1_0]]", "{a: 1_0}")),
    ],
)
def test_a_number_is_not_read_as_another(key, value, wrong, any_run):
    """YAML 1.1 knows numbers to the bases 60, 16, 8 and 2, and digits in groups."""
    with pytest.raises(ConfigError) as refused:
        read([any_run, f"{key}={value}"], {"n": 64, "label": None}, "")
    assert f"{key}={value}: expected a number in decimal digits" in str(refused.value)
    assert f"got {wrong}; " in str(refused.value)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        *(("10", 10), ("-3", -3), ("+5", 5), ("0", 0), ("1e-3", 1e-3), ("2.0", 2.0)),
        *(("12:75", "12:75"), ("'1_0'", "1_0"), ("0,1,2", "0,1,2"), ("a_1:3", "a_1:3")),
        *(("[0,1.5,b_0]", [0, 1.5, "b_0"]), ("null", None), ("true", True)),
    ],
)
def test_plain_numbers_and_text_are_what_they_look_like(given, value, any_run):
    found = read([any_run, f"label={given}"], {"label": None}, "")[2].label
    assert found == value and isinstance(found, str) == isinstance(value, str)


@pytest.mark.parametrize("act", [sample.sample, evaluate.evaluate, export])
def test_an_argument_without_a_value_is_refused_in_one_line(act, any_run, capsys):
    """It would be the default in silence: all classes, any device."""
    others = ("verify", "simulated", "estimator", "model.latents", "sampler", "trusted")
    for key in (*sample.DEFAULTS, *others):
        for nothing in ("", " "):
            assert command(act, [any_run, f"{key}={nothing}"]) == 2
            said = f"{key}=: expected a value, got none: give one, or leave it out\n"
            assert capsys.readouterr().err == said


def test_what_is_no_yaml_is_said_in_one_line(any_run):
    for wrong in ("[1", "a: b", "{"):
        with pytest.raises(ConfigError, match=r"^label=.*: [^\n]*$"):
            read([any_run, f"label={wrong}"], {"label": None}, "")


def test_a_folder_holds_one_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert main([*BARE, f"hydra.run.dir={tmp_path}"]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that there is no GPU")
def test_what_is_found_wrong_late_is_one_line_too(tmp_path, capfd):
    assert main([*BARE, "trainer=gpu", "trainer.accelerator=gpu", f"hydra.run.dir={tmp_path}"]) == 2
    said = capfd.readouterr().err
    assert "trainer (lightning.pytorch.Trainer)" in said and "gpu" in said
    assert "Error executing job" not in said and "Traceback" not in said


def test_the_steps_after_the_last_validation_count(tmp_path, monkeypatch, capsys):
    """And a disk that is full when they have been tested costs no number: it has been said, and
    `resume=` tests again."""
    monkeypatch.setattr("genfw.train.files.write_json", tiny.full)
    config = composed(*BARE, "trainer.max_steps=5", "trainer.val_check_interval=3")
    with pytest.raises(GenfwError, match=r"No space left on device; then test again: .* resume="):
        run(config, tmp_path)
    assert "bits/dim" in capsys.readouterr().out
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 5  # in its first steps a model only gets better


def test_numbers_that_one_place_cannot_take_are_in_the_other(tmp_path, monkeypatch):
    """W&B's end leaves them to the disk, and a full disk to W&B."""
    wandb, results, certificate = Mock(spec=Wandb), {"test/nll": 1.5}, {"data": {"count": 7}}
    trainer = Mock(spec=L.Trainer, is_global_zero=True, loggers=[wandb])
    wandb.summarize.side_effect = KeyboardInterrupt, None
    with pytest.raises(KeyboardInterrupt):
        ended(trainer, tmp_path, results, certificate=certificate)
    kept = {file.stem: json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert kept == {"results": results, "certificate": certificate}
    monkeypatch.setattr("genfw.train.files.write_json", tiny.full)
    with pytest.raises(GenfwError, match="No space left on device; then test again"):
        ended(trainer, tmp_path, results, certificate=certificate)
    wandb.summarize.assert_has_calls([call({**results, "certificate": certificate})] * 2)


def test_a_picture_that_fails_stops_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr("genfw.train.callbacks.grid", fail)
    run(composed(*BARE), tmp_path)
    assert "pictures skipped: RuntimeError: no ink" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists()


def test_eight_bit_images_train(tmp_path):
    """Bytes with 256 values, which a uint8 cannot be compared with."""
    from PIL import Image as PIL

    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(40):
            pixels = torch.randint(256, (8, 8), dtype=torch.uint8)
            pixels[0, 0], pixels[0, 1] = 0, 255
            PIL.fromarray(pixels.numpy()).save(tmp_path / "images" / label / f"{i}.png")
    overrides = ("data=folder", f"data.path={tmp_path / 'images'}", "data.shape=[1,8,8]")
    config = composed(
        *(*overrides, "data.classes=2", "data.batch_size=8", "logger=none", "metrics=none"),
        *("model=vdm", "net=mlp", "net.width=16", "net.blocks=1", "sampler.steps=4", *SMALL),
    )
    (tmp_path / "run").mkdir()
    assert run(config, tmp_path / "run")["test/count"] > 0

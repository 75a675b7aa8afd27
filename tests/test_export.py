"""What is exported is what was reported, and it can be built again from its file alone."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from test_job import VDM, composed

from genfw import Noise
from genfw.export import export, load
from genfw.sample import DEFAULTS, sample
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.job import run
from genfw.train.parts import restore
from genfw.train.runs import command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    few = [each for each in VDM if not each.startswith("callbacks")]
    run(composed(*few, "logger=none", "metrics=none", "~callbacks.pictures"), folder)
    assert command(export, [f"run={folder}"]) == 0
    return folder


def test_the_same_bound(folder):
    config = OmegaConf.load(folder / "config.yaml")
    module, _ = restore(config, folder / "checkpoints" / "best.ckpt")
    model = load(folder / "model.safetensors")
    assert not model.training and module.average is not None
    x = torch.randint(17, (5, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    noise = Noise(3, torch.arange(5))
    with module.evaluating() as reported:
        expected = reported.elbo(x, noise=noise).total
    assert torch.equal(model.elbo(x, noise=noise).total, expected)
    assert not torch.equal(module.model.eval().elbo(x, noise=noise).total, expected)


def test_the_file_says_what_it_is(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as held:
        told = held.metadata()
    assert json.loads(told["model"])["_target_"] == "genfw.VDM"
    assert json.loads(told["data"]) == {"name": "digits", "shape": [1, 8, 8], "bins": 17}


def changed(folder, tmp_path, **metadata):
    with safe_open(folder / "model.safetensors", framework="pt") as held:
        told = {**held.metadata(), **metadata}
        weights = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    save_file(weights, tmp_path / "other.safetensors", told)
    return tmp_path / "other.safetensors"


def test_a_file_does_not_vouch_for_itself(folder, tmp_path):
    model = json.dumps({"_target_": "os.mkdir", "path": str(tmp_path / "PWNED")})
    with pytest.raises(ConfigError, match="not among what a config may import"):
        load(changed(folder, tmp_path, model=model))
    assert not (tmp_path / "PWNED").exists()


def test_weights_of_another_model_and_other_files(folder, tmp_path):
    with safe_open(folder / "model.safetensors", framework="pt") as held:
        model = json.loads(held.metadata()["model"])
    model["denoiser"]["network"]["width"] = 8
    with pytest.raises(GenfwError, match="size mismatch"):
        load(changed(folder, tmp_path, model=json.dumps(model)))
    save_file({"w": torch.zeros(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(GenfwError, match="not written by genfw"):
        load(tmp_path / "bare.safetensors")
    (tmp_path / "no.safetensors").write_text("<html>")
    with pytest.raises(GenfwError, match="cannot be read"):
        load(tmp_path / "no.safetensors")


def test_the_folder_of_a_file_is_made(folder, tmp_path):
    assert command(export, [f"run={folder}", f"out={tmp_path}/new/7/x.safetensors"]) == 0
    assert load(tmp_path / "new" / "7" / "x.safetensors")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "is a folder: out={}/model.safetensors"),
        ("/new/", "is a folder: out={}/new/model.safetensors"),
        ("/file/x.safetensors", "{}/file/x.safetensors: File exists; give out="),
        ("/file/7/x.safetensors", "{}/file/7/x.safetensors: Not a directory; give out="),
    ],
)
def test_what_cannot_be_written_is_found_first(folder, tmp_path, monkeypatch, capsys, out, said):
    (tmp_path / "file").touch()
    monkeypatch.setattr("genfw.train.parts.restore", None)
    assert command(export, [f"run={folder}", f"out={tmp_path}{out}"]) == 2
    heard = capsys.readouterr().err
    assert said.format(tmp_path) in heard and heard.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_file_that_was_there(folder, tmp_path, monkeypatch, capsys):
    def full(weights, file, metadata):
        file.write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    (tmp_path / "x").write_text("before")
    assert command(export, [f"run={folder}", f"out={tmp_path}/x"]) == 1
    heard = capsys.readouterr().err
    assert f"{tmp_path}/x cannot be written: I/O error: No space" in heard
    assert heard.count("\n") == 1
    assert [each.read_text() for each in tmp_path.iterdir()] == ["before"]


def listed(act, folder, capsys):
    """The keys that a command says there are."""
    assert command(act, [f"run={folder}", "nn=3"]) == 2
    return capsys.readouterr().err.split("Keys: ")[1].strip().split(", ")


def test_the_keys_that_are_listed_can_be_given(folder, capsys):
    ours, models = ["checkpoint", "out"], ["model", "sampler", "grid", "guidance", "trusted"]
    assert sorted(listed(export, folder, capsys)) == sorted([*ours, *models])
    samples = listed(sample, folder, capsys)
    assert sorted(samples) == sorted([*DEFAULTS, "sampler", "grid", "guidance", "trusted"])
    assert command(export, [f"run={folder}", "net.width=3"]) == 2
    assert "net.width=3: changes nothing here" in capsys.readouterr().err

"""One small run from configuration to folder, and everything that is found there."""

import csv
import json
import math
import shutil
from pathlib import Path

import lightning.pytorch as L
import pytest
import ranks
import tiny
import torch
from omegaconf import OmegaConf, open_dict
from PIL import Image as PIL
from test_diagnostics import chain, hvae, module
from test_loggers import read_wandb
from torch.utils.data import DataLoader, TensorDataset

from genfw import Bound, ImportanceWeighted, evaluate, sample
from genfw.train import certificate, checkpoint
from genfw.train.compose import compose
from genfw.train.config import build
from genfw.train.data import Digits
from genfw.train.errors import ConfigError, GenfwError, Stopped
from genfw.train.frechet import FrechetDistance
from genfw.train.job import run
from genfw.train.parts import assemble, restore, validation_interval
from genfw.train.run_table import table
from genfw.train.runs import command
from genfw.train.session import session

SMALL = (
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "estimator.strata=1",
    "callbacks.pictures.every=1",
    "callbacks.pictures.samples=9",
    "callbacks.progress.every=3",
)
FID = ("metrics.fid.samples=40", "metrics.fid.validation_samples=36", "metrics.fid.every=1")
VDM = ("model=vdm", "net=mlp", "net.width=16", "net.blocks=1", "sampler.steps=8", *SMALL)
VAE = ("model=vae", "net@encoder=mlp_encoder", "net@decoder=mlp_decoder", *SMALL)


def composed(*overrides):
    with session():
        config = compose(overrides)
    with open_dict(config):
        config.pop("hydra")
    return config


def rows(sheet):
    return dict(zip(*(list(column.cells) for column in sheet.columns), strict=True))


NUMBERS = {"nll": 80.0, "nll_stderr": 0.2, "nll_std": 9.0, "bpd": 1.8, "count": 447}


def of_dims(lightning, dims):
    """A module that has been tested on images of so many dimensions."""
    lightning.dims = dims
    return lightning


def test_a_perfect_model_has_bits_too():
    """0 nats are 0 bits, and the error is one of dimensions, not of the mean."""
    said = {f"test/{key}": value for key, value in {**NUMBERS, "nll": 0.0, "bpd": 0.0}.items()}
    shown = rows(table(said, of_dims(tiny.module(), 10)))
    assert shown["NLL"] == "0.00 ± 0.20 nats (standard error)"
    assert shown[""] == "0.0000 ± 0.0289 bits/dim"


def test_the_table_says_what_kind_of_number_and_whether_to_believe_it():
    lightning = of_dims(module(chain()), 64)
    lightning.estimator = ImportanceWeighted(k=500)
    said = {**NUMBERS, "ess": 31.72, "khat": 0.854, "khat_over_0.7": 0.25}
    shown = rows(table({f"test/{key}": value for key, value in said.items()}, lightning))
    assert shown["kind"] == "upper bound on -log p(x)"
    assert shown["ess"] == "31.72 (mean over images)"
    assert shown["khat"] == "0.854 (mean over images)"
    assert shown["khat_over_0.7"] == "0.25 (mean over images)"
    less = {key: value for key, value in said.items() if not key.startswith("khat")}
    assert "khat" not in rows(table({f"test/{k}": v for k, v in less.items()}, lightning))


def test_a_table_without_a_number_says_so():
    said = {f"test/{key}": math.nan for key in NUMBERS} | {"test/count": 447, "test/nonfinite": 3}
    shown = rows(table(said, tiny.module()))
    assert shown["NLL"] == "nan nats: the NLL of 3 of 447 test images is not finite"
    assert "" not in shown and shown["images"] == "447", "no bits, and no spread"
    one_draw = {f"test/{key}": value for key, value in NUMBERS.items()}
    one_draw["test/nll_stderr"] = math.nan
    shown = rows(table(one_draw, of_dims(tiny.module(), 64)))
    assert shown["NLL"] == "80.00 nats (one draw, no standard error)"
    assert shown["images"] == "447, NLL spread over them 9.0 nats"
    for of, images in ((447, "447"), (1000, "447 of 1000")):
        again = rows(table(one_draw, of_dims(tiny.module(), 64), of))
        assert again["images"] == f"{images}, NLL spread over them 9.0 nats"
    assert rows(table({**one_draw, "test/count": 1}, of_dims(tiny.module(), 64)))["images"] == "1"


def test_a_run_without_a_number_is_no_success(tmp_path, capsys):
    """It has its files, with null for what is no number."""
    few = [f"trainer.{each}" for each in ("max_steps=2", "limit_test_batches=1", "accelerator=cpu")]
    bare = ("logger=none", "metrics=none", "callbacks=none", "data.eval_batch_size=16")
    with pytest.raises(Stopped, match="the NLL of 16 of 16 test images is not finite") as stopped:
        run(composed(*VAE[:3], *few, *bare, "optimizer.lr=1e30"), tmp_path)
    assert stopped.value.exit_code == 1 and stopped.value.on_all_ranks
    shown = capsys.readouterr()
    assert "nan nats: the NLL of 16 of 16" in shown.out
    assert "Epoch" not in shown.out + shown.err, "callbacks=none has no progress bar either"
    results, certificate = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("results", "certificate")
    )
    assert results["test/nll"] is results["test/bpd"] is certificate["result"]["nll"] is None
    assert results["test/nonfinite"] == 16
    assert (
        command(evaluate.evaluate, [f"run={tmp_path}", "checkpoint=last", "estimator.strata=1"])
        == 1
    )
    assert "the NLL of 16 of 16" in capsys.readouterr().err
    assert "bound(sets=2, strata=1) of last" in (tmp_path / "evaluation.json").read_text()


def test_levels_are_denoising_where_they_are():
    said = {**NUMBERS, "reconstruction": -70.0, "levels": 8.0, "prior": 2.0}
    results = {f"test/{key}": value for key, value in said.items()}
    assert rows(table(results, of_dims(tiny.module(), 64)))["  levels (denoising)"] == "8.00 nats"
    for made in (chain, hvae):
        shown = rows(table(results, of_dims(module(made()), 64)))
        assert shown["  levels"] == "8.00 nats" and "  levels (denoising)" not in shown


@pytest.fixture(scope="module")
def vdm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(composed(*VDM, *FID), folder)


def test_results_are_flat_complete_and_written(vdm):
    folder, results = vdm
    assert json.loads((folder / "results.json").read_text()) == results
    terms = ("nll", "bpd", "nll_stderr", "nll_std", "reconstruction", "levels", "prior", "count")
    for key in (*(f"test/{term}" for term in terms), "test/fd_digits", "val/nll", "seconds"):
        assert math.isfinite(results[key]), key
    assert results["test/count"] == 447
    assert results["test/fd_digits_samples"] == 40
    assert results["test/fd_digits_reference"].startswith("1000 images of train")
    assert results["parameters"] > 1000
    assert results["versions/torch"] == torch.__version__
    dims = 64 * math.log(2)
    assert results["test/bpd"] == pytest.approx(results["test/nll"] / dims, rel=1e-6)
    split = -results["test/reconstruction"] + results["test/levels"] + results["test/prior"]
    assert results["test/nll"] == pytest.approx(split, rel=1e-5)


def test_configuration_is_resolved_and_kept(vdm):
    folder, _ = vdm
    kept = OmegaConf.load(folder / "config.yaml")
    assert kept.net.width == 16
    assert kept.model.denoiser.network.width == 16
    assert "${" not in (folder / "config.yaml").read_text()


def test_every_number_is_in_the_ledger(vdm):
    folder, results = vdm
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row.get("train/objective")]
    assert [int(row["step"]) for row in trained] == list(range(6))
    validated = [row for row in rows if row["val/nll"]]
    assert len(validated) == 2  # the last step is looked at once
    assert min(float(row["val/nll"]) for row in validated) == pytest.approx(results["val/nll"])
    assert all(float(row["val/fd_digits"]) > 0 for row in validated)
    assert all(float(row["val/fd_digits_samples"]) == 36 for row in validated)
    (tested,) = [row for row in rows if row["test/nll"]]
    assert float(tested["test/nll"]) == pytest.approx(results["test/nll"])


def test_pictures(vdm):
    folder, _ = vdm
    assert PIL.open(folder / "samples.png").size == (3 * 9 * 4 + 4, 3 * 9 * 4 + 4)
    strip = PIL.open(folder / "denoising.png")
    assert strip.size == (9 * 9 * 4 + 4, 12 * 9 * 4 + 4)  # 8 levels and the end; 6 samples, 2 rows
    for kind in ("samples", "denoising"):
        assert [file.name for file in sorted((folder / kind).iterdir())] == [
            "000003.png",
            "000006.png",
        ]


def test_checkpoints_hold_plain_types_raw_and_averaged_weights(vdm):
    folder, _ = vdm
    assert {file.name for file in (folder / "checkpoints").iterdir()} == {
        "best.ckpt",
        "last.ckpt",
        "previous.ckpt",
    }
    for name, steps in (("best", (3, 6)), ("last", (6,))):
        held = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert held["global_step"] in steps
        raw = {k.removeprefix("model.") for k in held["state_dict"] if k.startswith("model.")}
        mean = {k.removeprefix("average.") for k in held["state_dict"] if k.startswith("average.")}
        assert raw == mean != set()
        assert held["callbacks"]["EMA"]["updates"] == held["global_step"]


def test_wandb_holds_configuration_and_numbers(vdm):
    folder, results = vdm
    config, history, summary = read_wandb(folder)
    assert config["net"]["width"] == 16
    assert "git" in config
    logged = [row["val/nll"] for row in history if "val/nll" in row]
    assert min(logged) == pytest.approx(results["val/nll"])
    assert {"val/reconstruction", "val/levels", "val/prior"} <= set().union(*history)
    assert any("test/samples/path" in row for row in history)
    assert any("test/bits/path" in row for row in history)
    for split in ("train", "val", "test"):
        series = {key for row in history for key in row if key.startswith(f"{split}/bpd_at_")}
        assert len(series) == 20, split  # of every interval, and its standard error
    assert summary["test/nll"] == pytest.approx(results["test/nll"])
    logged, held = summary["certificate"], json.loads((folder / "certificate.json").read_text())
    assert logged["data"]["sha256"] == held["data"]["sha256"]
    assert logged["result"]["bpd"] == pytest.approx(held["result"]["bpd"])
    assert list(folder.glob("wandb/offline-run-*/files/media/images/test/samples*.png"))


def best(folder):
    """The weights that a run's own number is of, as an entry names them."""
    held = json.loads((folder / "certificate.json").read_text())
    return f"best at step {held['origin']['step']}"


def test_evaluate_gives_the_same_number(vdm, capsys):
    folder, results = vdm
    of = f"of {best(folder)}"
    assert command(evaluate.evaluate, [f"run={folder}"]) == 0
    again = json.loads((folder / "evaluation.json").read_text())[f"bound(sets=2, strata=1) {of}"]
    for key in ("nll", "nll_stderr", "levels", "count"):
        assert again[f"test/{key}"] == pytest.approx(results[f"test/{key}"], rel=1e-6)
    assert f"{results['test/nll']:.2f}" in capsys.readouterr().out

    assert command(evaluate.evaluate, [f"run={folder}", "estimator.strata=2"]) == 0
    entries = json.loads((folder / "evaluation.json").read_text())
    more = entries[f"bound(sets=2, strata=2) {of}"]
    assert more["test/nll"] != results["test/nll"] and len(entries) == 2
    assert command(evaluate.evaluate, [f"run={folder}", "seed=1"]) == 0  # nor is this the same
    entries = json.loads((folder / "evaluation.json").read_text())
    assert entries[f"bound(sets=2, strata=1) {of}"] == again and len(entries) == 3
    assert entries[f"bound(sets=2, strata=1) {of}, seed=1"]["test/nll"] != results["test/nll"]
    assert more["kind"] == "upper bound on -log p(x)" and more["changed"] == ["estimator.strata=2"]


def test_wandb_has_an_evaluation_where_it_is_asked_to(vdm, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(vdm[0], folder, ignore=shutil.ignore_patterns("evaluation.json"))
    asked = [f"run={folder}", "estimator.strata=3", "wandb=true"]
    assert command(evaluate.evaluate, asked) == 0
    assert "wandb sync" in capsys.readouterr().out
    ((name, entry),) = json.loads((folder / "evaluation.json").read_text()).items()
    assert "wandb" not in name
    config, _, summary = read_wandb(folder, "-*")
    assert config["net"]["width"] == 16 and config["evaluation"] == name and "git" in config
    assert summary["test/nll"] == pytest.approx(entry["test/nll"])
    assert summary["certificate"]["estimator"] == entry["certificate"]["estimator"]
    assert read_wandb(folder)[2]["test/nll"] == pytest.approx(vdm[1]["test/nll"])  # the run's own

    assert command(evaluate.evaluate, [*asked, "verify=true"]) == 2
    assert "wandb=true, verify=true: what is only compared" in capsys.readouterr().err
    assert command(evaluate.evaluate, [*asked[:2], "verify=true"]) == 0  # it names the same entry
    configuration = folder / "config.yaml"
    written = OmegaConf.load(configuration)
    del written.logger["wandb"]
    OmegaConf.save(written, configuration)
    assert command(evaluate.evaluate, asked) == 2
    assert "wandb=true: the run has no W&B logger" in capsys.readouterr().err


def test_a_finished_run_is_evaluated_by_another_estimator(vdm, capsys):
    folder, _ = vdm
    kept = (folder / "results.json").read_bytes()
    chosen = ["estimator=importance_weighted", "estimator.k=25", "estimator.chunk=1000"]
    given = [f"run={folder}", "model.steps=2", *chosen]
    assert command(evaluate.evaluate, given) == 0
    entry = json.loads((folder / "evaluation.json").read_text())[
        f"importance_weighted(k=25) of {best(folder)}, model.steps=2"
    ]
    assert 1 <= entry["test/ess"] <= 25 and 0 <= entry["test/khat_over_0.7"] <= 1
    assert math.isfinite(entry["test/nll"]) and "test/khat" in entry
    assert (folder / "results.json").read_bytes() == kept
    assert "importance_weighted(k=25)" in capsys.readouterr().out
    for wrong, said in (
        (["estimator=importance_wheighted"], "Did you mean estimator=importance_weighted?"),
        (["estimator=importance_weighted", "estimator.strata=3"], "estimator has k, chunk"),
        (["estimator=importance_weighted"], "model.steps=1000"),
        (["estimator=annealed"], "moves one latent"),
        (["simulated=10"], "simulated=10: only estimator=annealed"),
        (["simulated=10", "verify=true"], "simulated=10: only estimator=annealed"),
        (["verify=true", "checkpoint=last"], "bound(sets=2, strata=1) of last at step 6, which"),
        (["verify=true", "seed=9"], f"strata=1) of {best(folder)}, seed=9, which"),
        (["data=mnist"], "keeps its data"),
        (["schedule.log_snr_max=4.0"], "schedule.log_snr_max=4.0: changes nothing here"),
        (["net.width=9"], "estimator, model, data, trainer, seed, trusted do"),
        (["label_dropout=0.5"], "changes nothing here"),
        (["sampler=ddim"], "sampler=ddim: says how samples are drawn"),
        (["sampler=ddim", "grid=karras"], "an NLL is of the bare model"),
        (["estimator=importance_weighted", "model.steps=2", "estimator.k=0"], "at least 1"),
    ):
        assert command(evaluate.evaluate, [f"run={folder}", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_certificate_states_everything_and_holds(vdm, capsys):
    folder, results = vdm
    held = json.loads((folder / "certificate.json").read_text())
    assert held["result"]["nll"] == pytest.approx(results["test/nll"])
    assert sum(held["result"]["terms"].values()) == pytest.approx(held["result"]["bpd"], rel=1e-5)
    assert held["estimator"]["draws"] == 2
    assert held["estimator"]["dtype"] == "float32" and held["estimator"]["tf32"] is False
    assert held["model"]["weights"] == "exponential moving average"
    assert held["model"]["decoder"] == "BinsLikelihood(bins=17)"
    assert held["model"]["log_snr"] == pytest.approx([2 * math.log(3.02 * 17), -10.0])
    assert held["data"]["count"] == held["data"]["of"] == 447 and len(held["data"]["sha256"]) == 64
    assert held["origin"]["checkpoint"] == "best.ckpt" and held["origin"]["step"] in (3, 6)
    assert held["origin"]["versions"] == {
        key.removeprefix("versions/"): each for key, each in results.items() if "versions/" in key
    }
    before = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    assert command(evaluate.evaluate, [f"run={folder}", "verify=true"]) == 0
    assert "certificate holds" in capsys.readouterr().out
    after = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    assert after == before, "and nothing is written"


def test_a_certificate_says_how_images_were_binarized():
    """And its hash is of the images as they were evaluated: of the pixels drawn, and of no
    others."""
    config, said = composed(), []
    for changed in ({}, {"binarize": "dynamic"}, {"evaluation_seed": 1}, {"seed": 1}):
        config.data.update(changed)
        said.append(certificate._data(build(config.data), 447))
    assert [each["transform"] for each in said] == ["none"] + [
        f"binarized once, evaluation_seed={seed}" for seed in (0, 1, 1)
    ]
    assert [each["bins"] for each in said] == [17, 2, 2, 2]
    hashes = [each["sha256"] for each in said]
    assert len(set(hashes)) == 3 and hashes[2] == hashes[3]


def altered(entry):
    """The same certificate with every entry another, and where they stand."""
    if isinstance(entry, dict):
        return {key: altered(each) for key, each in entry.items()}
    if isinstance(entry, list):
        return [altered(each) for each in entry]
    if isinstance(entry, str):
        return entry + "x"
    return not entry if isinstance(entry, bool) else entry + max(1, abs(entry)) / 1000


def entries(tree, path=""):
    for key, value in tree.items():
        yield from entries(value, f"{path}{key}.") if isinstance(value, dict) else [path + key]


def test_no_entry_of_a_certificate_can_be_changed(vdm, capsys):
    """But for the circumstances: device, commit, versions."""
    folder, _ = vdm
    file = folder / "certificate.json"
    kept = file.read_text()
    held = json.loads(kept)
    try:
        file.write_text(json.dumps(altered(held)))
        assert command(evaluate.evaluate, [f"run={folder}", "verify=true"]) == 1
    finally:
        file.write_text(kept)
    said = capsys.readouterr().err.splitlines()
    named = {line.split(":")[0] for line in said if ": claimed" in line}
    free = {each for each in entries(held) if {"device", "git", "versions"} & set(each.split("."))}
    assert len(free) == 8 and named == set(entries(held)) - free


def test_other_weights_and_other_data_are_found_by_their_hash(vdm, capsys, monkeypatch):
    """Though no number moves: one weight by its last bits, in a file whose checksum is right; the
    label of one image."""
    folder, _ = vdm
    file, verify = folder / "checkpoints" / "best.ckpt", [f"run={folder}", "verify=true"]
    kept = file.read_bytes()
    held = checkpoint.read(file)
    name = next(key for key in held["state_dict"] if key.startswith("average."))
    held["state_dict"][name].view(-1)[0] += 1e-6
    try:
        file.unlink()  # others may be links to it
        checkpoint.write(held, file)
        assert command(evaluate.evaluate, verify) == 1
    finally:
        file.write_bytes(kept)
    lines = capsys.readouterr().err.splitlines()
    assert [each.split(":")[0] for each in lines[1:]] == ["model.sha256"]

    read = Digits.read

    def relabelled(self, shape, path=None):
        splits = read(self, shape, path)
        splits.test.labels[400] = (splits.test.labels[400] + 1) % 10
        return splits

    monkeypatch.setattr(Digits, "read", relabelled)
    assert command(evaluate.evaluate, verify) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [each.split(":")[0] for each in lines[1:]] == ["data.sha256"]


def test_a_certificate_holds_for_its_own_protocol_only(vdm, capsys, monkeypatch):
    folder, _ = vdm
    few = ["data.eval_batch_size=300", "trainer.limit_test_batches=1"]
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    for first in (True, False):  # of several ranks one says so
        monkeypatch.setattr(L.Trainer, "is_global_zero", first)
        monkeypatch.setenv("RANK", str(int(not first)))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        assert command(evaluate.evaluate, [f"run={folder}", "verify=true", *few]) == 1
        said = capsys.readouterr().err
        assert ("data.count: claimed 447, found 300" in said) is first
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == before


def test_a_certificate_of_an_ode_says_how_it_was_solved_and_holds(vdm, capsys):
    """One draw: there is no standard error, and that is no disagreement. The run's own number is
    not asked about."""
    folder, _ = vdm
    chosen = ["estimator=ode", "estimator.draws=1", "estimator.steps=4", "estimator.exact_dims=0"]
    few = ["model.steps=10", "data.eval_batch_size=50", "trainer.limit_test_batches=1"]
    given = [f"run={folder}", *chosen, *few]
    assert command(evaluate.evaluate, given) == 0
    table = capsys.readouterr().out
    assert "ode_error" in table and "no standard error" in table
    assert "±" not in table and "nan" not in table
    written = (folder / "evaluation.json").read_bytes()
    entries = json.loads(written, parse_constant=pytest.fail)
    ((name, entry),) = ((name, each) for name, each in entries.items() if name.startswith("ode("))
    held = entry["certificate"]
    assert held["model"]["steps"] == "continuous time"
    assert held["result"]["kind"].endswith("by an ODE in 4 fixed steps")
    assert sum(held["result"]["terms"].values()) == pytest.approx(held["result"]["bpd"], rel=1e-5)
    assert set(held["result"]["terms"]) == {"reconstruction", "levels", "prior"}
    assert held["result"]["diagnostics"]["ode_error"] > 0 and held["result"]["nll_stderr"] is None
    own = {name: (folder / name).read_bytes() for name in ("certificate.json", "results.json")}
    try:
        for each in own:
            (folder / each).unlink()
        assert command(evaluate.evaluate, [*given, "verify=true"]) == 0
        said = capsys.readouterr().out
        assert f"{held['result']['nll']:.4f} nats" in said and f"evaluation.json, {name}" in said
        assert (folder / "evaluation.json").read_bytes() == written
        assert not any((folder / each).exists() for each in own), "and nothing is written"
    finally:
        for each, content in own.items():
            (folder / each).write_bytes(content)


def test_samples_of_a_run_are_its_own(vdm, tmp_path):
    folder, _ = vdm
    out = tmp_path / "nine.png"
    assert command(sample.sample, [f"run={folder}", "n=9", "chunk=2", f"out={out}"]) == 0
    assert PIL.open(out).tobytes() == PIL.open(folder / "samples.png").tobytes()


def test_a_top_down_hierarchy_is_sampled_at_a_temperature(tmp_path, monkeypatch, capsys):
    """One for all levels, or one for each, z_1's first; the name and the picture tell it."""
    config = composed("model=hvae", "model.ladder.width=8")
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
    module, data = assemble(config)
    monkeypatch.setattr("genfw.train.parts.restore", lambda *_: (module, data))
    monkeypatch.setattr("genfw.sample.checkpoint", lambda *_: None)
    asked, draw = [], module.model.sample
    monkeypatch.setattr(
        module.model, "sample", lambda *a, **k: asked.append(k.get("temperature")) or draw(*a, **k)
    )

    def said(*given):
        code = command(sample.sample, [f"run={tmp_path}", "n=1", "device=cpu", *given])
        return code, capsys.readouterr().err

    for given in ([], ["temperature=0.5"], ["temperature=[1,1,0,1,0.5]"]):
        assert said(*given)[0] == 0
    assert asked == [None, [0.5] * 5, [1.0, 1.0, 0.0, 1.0, 0.5]]
    names = {f"samples_1_seed0{each}.png" for each in ("", "_temperature_0.5")}
    assert {*names, "samples_1_seed0_temperature_1_1_0_1_0.5.png"} == {
        each.name for each in tmp_path.glob("*.png")
    }
    picture = PIL.open(tmp_path / "samples_1_seed0_temperature_0.5.png")
    assert picture.text["temperature"] == "0.5"
    for wrong in ("-1", "nan", "[1,1]", "[1,1,1,1,nan]", "warm"):
        code, answer = said(f"temperature={wrong}")
        assert code == 2 and "one for each of 5 levels" in answer
    OmegaConf.save(composed("model=vae"), tmp_path / "config.yaml", resolve=True)
    code, answer = said("temperature=0.5")
    assert code == 2 and "temperature=0.5: genfw.VAE has none" in answer
    code, answer = said("guidance.scale=3")
    assert code == 2 and "guidance.scale=3: guidance is of diffusion models" in answer


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run=<folder>"),
        (["run=nowhere"], "nowhere"),
        (["run={}", "sampler.stepps=3"], "sampler.steps"),
        (["run={}", "checkpoint=worst"], "worst.ckpt; there are: best, last"),
        (["run={}", "n"], "not understood"),
    ],
)
def test_wrong_commands_say_so(vdm, capsys, arguments, said):
    given = [each.format(vdm[0]) for each in arguments]
    assert command(sample.sample, given) == 2
    assert said in capsys.readouterr().err


def test_what_somebody_elses_parameterization_reads_is_asked_of_it():
    """Only when it has been built; before a step is taken."""
    given = ("param._target_=test_laws.Sharp", "+param.bins=17", "trusted=[test_laws.Sharp]")
    config = composed(*given, "net=mlp", "net.width=8")
    with pytest.raises(ConfigError, match=r"net.out_channels=1, but test_laws.Sharp reads 17"):
        assemble(config)
    config.model.denoiser.network.out_channels = config.net.out_channels = 17
    assemble(config)


class Picky(Bound):
    """An estimator that serves no model."""

    def check(self, model):
        raise TypeError(f"{type(model).__name__} is not\nmine: use estimator=bound")


@pytest.mark.parametrize("of", ["estimator", "validation_estimator"])
def test_a_model_that_cannot_be_measured_so_is_not_trained(of, tmp_path, monkeypatch):
    monkeypatch.setattr("genfw.train.job.fit", lambda *_: pytest.fail("was trained"))
    given = (f"{of}._target_=test_job.Picky", "trusted=[test_job.Picky]")
    with pytest.raises(ConfigError, match="VDM is not mine: use estimator=bound"):
        run(composed(*VDM, *given), tmp_path)


def test_nor_evaluated(vdm, monkeypatch, capsys):
    monkeypatch.setattr(Bound, "check", Picky.check)
    monkeypatch.setattr(Bound, "forward", lambda *_, **__: pytest.fail("was asked"))
    assert command(evaluate.evaluate, [f"run={vdm[0]}"]) == 2
    assert "VDM is not mine: use estimator=bound" in capsys.readouterr().err


def test_restore_says_which_file_does_not_fit(vdm, tmp_path):
    config = OmegaConf.load(vdm[0] / "config.yaml")
    config.model.denoiser.network.width = 8
    with pytest.raises(GenfwError, match="does not fit"):
        restore(config, vdm[0] / "checkpoints" / "best.ckpt")
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"<html>not found</html>")
    with pytest.raises(GenfwError, match="cannot be read"):
        restore(config, broken)


def test_vae_without_loggers_and_with_a_failing_metric(tmp_path, monkeypatch, capsys):
    """Nothing beside the likelihood can lose a run."""

    def fail(self):
        raise RuntimeError("singular product")

    monkeypatch.setattr(FrechetDistance, "compute", fail)
    results = run(composed(*VAE, *FID, "logger=none", "callbacks.pictures.every=0"), tmp_path)
    assert math.isfinite(results["test/nll"])
    assert not any("fd_digits" in key for key in results)
    out = capsys.readouterr().out
    assert out.count("fd_digits skipped: RuntimeError: singular product") == 1
    assert "step 3/6" in out
    assert {file.name for file in tmp_path.iterdir()} == {
        "certificate.json",
        "checkpoints",
        "config.yaml",
        "reconstructions.png",
        "interpolation.png",
        "traversal_1.png",
        "units.csv",
        "results.json",
        "samples.png",
    }


class RealNumbers(L.LightningDataModule):
    """Somebody's data that are no integers."""

    def __init__(self, shape, **given):
        super().__init__()
        self.x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))

    def _batches(self):
        return DataLoader(TensorDataset(self.x), 4)

    train_dataloader = val_dataloader = test_dataloader = _batches


def test_a_run_of_a_density_has_no_bits_anywhere(tmp_path, capsys):
    given = ("data._target_=test_job.RealNumbers", "data.bins=null", "data.shape=[1,2,2]")
    without = ("metrics=none", "~callbacks.pictures", "~callbacks.diagnostics", "logger=csv")
    trusted = "trusted=[test_job.RealNumbers]"
    results = run(composed(*VAE, *given, *without, "likelihood=gaussian", trusted), tmp_path)
    assert {"val/nll", "test/nll"} <= {*results}
    assert command(evaluate.evaluate, [f"run={tmp_path}", "verify=true", trusted]) == 0
    held = json.loads((tmp_path / "certificate.json").read_text())["result"]
    assert held["bpd"] is held["bpd_stderr"] is None and "density" in held["kind"]
    for written in ("results.json", "metrics.csv"):
        assert "nll" in (told := (tmp_path / written).read_text()) and "bpd" not in told
    said = capsys.readouterr().out
    assert "val nats" in said and "certificate holds" in said and "bits" not in said


def test_equal_seeds_equal_runs(tmp_path):
    """To the last bit: weights, averages, moments, the ledger, every number, the pictures. The
    second run comes after one that has drawn other numbers."""
    few = [each for each in VDM if not each.startswith("callbacks.progress")]
    quick = (
        *(*few, "logger=csv", "metrics=none", "trainer.max_steps=2", "data.binarize=dynamic"),
        *("~callbacks.bits", "~callbacks.diagnostics", "callbacks.pictures.examples=1"),
        *("data.eval_batch_size=50", "trainer.limit_test_batches=1", "sampler.steps=2"),
    )
    found = []
    for seed in (1, 2, 1):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        results = run(composed(*quick, f"seed={seed}"), folder)
        numbers = {k: v for k, v in results.items() if not k.startswith("seconds")}
        pictures = {file.name: file.read_bytes() for file in folder.glob("*.png")}
        assert "samples.png" in pictures
        found.append({**ranks.state(folder), "results": numbers, "pictures": pictures})
    first, other, again = found
    assert not ranks.differences(first, again)
    differ = {path.split("/")[1] for path in ranks.differences(first, other)}
    assert {"state_dict", "optimizer_states", "rows"} <= differ
    assert "/pictures/samples.png" in " ".join(ranks.differences(first, other))


def test_a_run_saves_as_its_configuration_says(tmp_path, monkeypatch):
    def fit(trainer, module, data, keeper):
        assert (keeper.every, keeper.failures) == (7, 2)
        raise Stopped("seen")

    monkeypatch.setattr("genfw.train.job.fit", fit)
    with pytest.raises(Stopped, match="seen"):
        run(composed(*VDM, "checkpoint.every=7", "checkpoint.failures=2"), tmp_path)


def test_a_short_run_validates_once_at_its_end(tmp_path):
    config = composed(*VDM, "trainer.max_steps=2", "trainer.val_check_interval=300")
    assert validation_interval(config.trainer) == 2
    config.trainer.accumulate_grad_batches = 4
    assert validation_interval(config.trainer) == 8
    config.trainer.val_check_interval = 0.5
    assert validation_interval(config.trainer) == 0.5


def test_a_failed_run_ends_its_wandb_run_as_failed(tmp_path, monkeypatch):
    import wandb

    codes = []
    finish = wandb.Run.finish
    monkeypatch.setattr(
        wandb.Run, "finish", lambda self, exit_code=None: (codes.append(exit_code), finish(self))
    )
    config = composed(*VDM, "metrics=none")
    config.trainer.max_steps = -2  # refused by Lightning
    with pytest.raises(Exception, match="max_steps"):
        run(config, tmp_path)
    assert not Path(tmp_path / "results.json").exists()
    config.trainer.max_steps = 1
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config, tmp_path)
    assert codes == [1]

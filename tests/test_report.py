"""A certificate says what was measured; a copy that says something else is found out."""

import copy
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from omegaconf import OmegaConf
from test_job import composed

import genfw
from genfw import evaluate
from genfw.estimators.report import differences, fingerprint, plain
from genfw.train.certificate import certify, versions
from genfw.train.data import ImageData, Source, Split, Splits
from genfw.train.entries import Claim, claim, compare, keep
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.loggers import git_commit
from genfw.train.module import LatentModule
from genfw.train.runs import command

CLAIM = {
    "result": {"nll": 81.3, "bpd": 1.83, "kind": "upper bound", "terms": {"prior": 0.001}},
    "estimator": {"name": "bound", "draws": 64, "seed": 0, "dtype": "float32", "device": "cpu"},
    "model": {"sha256": "ab", "parameters": 10_000_000, "log_snr": [7.9, -10.0]},
    "data": {"name": "digits", "count": 447, "sha256": "cd", "transform": "none"},
    "origin": {"step": 2600, "git": "1234", "versions": {"torch": "2.13.0"}},
}


def changed(path: str, value):
    copied = copy.deepcopy(CLAIM)
    *parts, last = path.split(".")
    place = copied
    for part in parts:
        place = place[part]
    place[last] = value
    return copied


def test_a_certificate_agrees_with_itself():
    assert differences(CLAIM, copy.deepcopy(CLAIM)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("result.nll", 81.31),
        ("result.nll", float("nan")),
        ("result.kind", "unbiased"),
        ("result.terms.prior", 0.002),
        ("estimator.draws", 65),
        ("estimator.dtype", "bfloat16"),
        ("model.sha256", "ac"),
        ("model.parameters", 10_000_001),
        ("model.log_snr", [7.9, -5.0]),
        ("model.log_snr", [7.9]),
        ("data.count", 440),
        ("data.transform", "binarized once, evaluation_seed=0"),
        ("origin.step", 2599),
    ],
)
def test_what_is_said_must_hold(path, value):
    for one, other in ((CLAIM, changed(path, value)), (changed(path, value), CLAIM)):
        (line,) = differences(one, other)
        assert line.startswith(f"{path}: claimed ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("result.nll", 81.3 * (1 + 5e-6)),
        ("model.log_snr", [7.9000001, -10.0]),  # as they were rounded to float32 once
        ("estimator.device", "cuda:0"),
        ("origin.git", None),
        ("origin.versions.torch", "2.14.0"),
    ],
)
def test_circumstances_and_rounding_may_differ(path, value):
    assert differences(CLAIM, changed(path, value)) == []


def test_what_was_not_measured_is_null_and_agrees():
    """nan is no JSON, and differs from itself."""
    found = changed("result.nll_stderr", float("nan"))
    assert differences(json.loads(json.dumps(plain(found), allow_nan=False)), plain(found)) == []
    assert plain({"a": [1.5, float("inf")], "b": {"c": float("nan"), "d": "e"}}) == {
        "a": [1.5, None],
        "b": {"c": None, "d": "e"},
    }
    compare(Claim(plain(found), None, ("", "")), found, {})
    claimed = changed("result.nll_stderr", 0.1)
    assert differences(claimed, plain(found)) == ["result.nll_stderr: claimed 0.1, found None"]


def test_a_missing_entry_is_a_difference():
    without = copy.deepcopy(CLAIM)
    del without["data"]["sha256"]
    assert differences(CLAIM, without) == ["data.sha256: claimed cd, found None"]
    assert differences(without, CLAIM) == ["data.sha256: claimed None, found cd"]


def test_certificates_from_before_skipped_images_were_counted_hold():
    older, found = CLAIM, copy.deepcopy(CLAIM)
    found["data"]["skipped"] = 7
    assert differences(older, found) == []
    assert differences(found, older) == ["data.skipped: claimed 7, found None"]
    fewer = copy.deepcopy(found)
    fewer["data"]["skipped"] = 3
    assert differences(found, fewer) == ["data.skipped: claimed 7, found 3"]


def test_fingerprint_is_of_every_bit():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    assert fingerprint(copy.deepcopy(model).double()) != before
    for name in model.state_dict():
        other = copy.deepcopy(model)
        value = other.state_dict()[name]
        value.view(-1)[-1] = value.view(-1)[-1] + 1
        assert fingerprint(other) != before, name
    square = torch.nn.Module()
    square.w = torch.nn.Parameter(torch.arange(4.0).view(2, 2))
    flat, renamed = torch.nn.Module(), torch.nn.Module()
    flat.w, renamed.v = torch.nn.Parameter(torch.arange(4.0)), square.w
    assert len({fingerprint(each) for each in (square, flat, renamed)}) == 3


@pytest.mark.parametrize("key", ["nll", "nll_stderr", "nll_std", "bpd", "prior", "count"])
def test_results_beside_a_certificate_must_hold_too(key, tmp_path):
    tested = {"test/nll": 81.3, "test/nll_stderr": 0.1, "test/nll_std": 9.0, "test/bpd": 1.83}
    tested |= {"test/reconstruction": -1.0, "test/levels": 80.2, "test/prior": 0.1}
    tested |= {"test/count": 447}
    told = {**tested, "seconds": 1.0}
    (tmp_path / "certificate.json").write_text(json.dumps(CLAIM))
    (tmp_path / "results.json").write_text(json.dumps(told))
    assert "certificate holds" in compare(own(tmp_path), CLAIM, tested)
    (tmp_path / "results.json").write_text(json.dumps({**told, f"test/{key}": 0.09}))
    with pytest.raises(
        GenfwError, match=rf"results.json does not hold:\ntest.*{key}: claimed 0.09"
    ):
        compare(own(tmp_path), CLAIM, tested)


def own(folder):
    """What is verified where nothing else is asked for."""
    return claim(folder, genfw.Bound(), "best", [])


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_what_is_no_certificate_is_said_to_be_none(content, tmp_path):
    (tmp_path / "certificate.json").write_text(content)
    with pytest.raises(GenfwError, match=r"certificate\.json: expected a JSON object"):
        own(tmp_path)


def claims(folder, *entries):
    """Certificates that hold for nobody, of a run and entries, each with its name for a seed."""

    def said(seed):
        return {"estimator": {"name": "bound", "arguments": "sets=2, strata=4", "seed": seed}}

    (folder / "evaluation.json").write_text(
        json.dumps({each: {"certificate": said(each)} for each in entries})
    )
    (folder / "certificate.json").write_text(json.dumps(said("own")))


BOUND = "bound(sets=2, strata=4) of best"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], "own"),  # though there is an entry of the same number
        (["verify=true", "trusted=[mine]", "hydra.searchpath=[mine]"], "own"),
        (["trainer.accelerator=cpu", "data.num_workers=2"], "own"),
        (["checkpoint=best"], BOUND),
        (["estimator.chunk=7"], BOUND),
        (["estimator.chunk=7", "trainer.devices=2"], BOUND),
        (["seed=3"], f"{BOUND}, seed=3"),
        (["trainer.accelerator=cpu", "verify=true", "seed=3"], f"{BOUND}, seed=3"),
        (["data.binarize=none"], f"{BOUND}, data.binarize=none"),
        (["seed=3", "data.binarize=none"], f"{BOUND}, data.binarize=none, seed=3"),
    ],
)
def test_verified_is_the_entry_that_the_arguments_name(given, found, tmp_path):
    """Without where it is computed, if need be; without arguments it is the run's own."""
    others = ("seed=3", "data.binarize=none", "data.binarize=none, seed=3")
    claims(tmp_path, BOUND, *(f"{BOUND}, {each}" for each in others))
    verified = claim(tmp_path, genfw.Bound(2, 4), "best", given)
    assert verified.certificate["estimator"]["seed"] == found


def test_without_such_an_entry_it_is_said_which_there_are(tmp_path):
    """What moves no number, as a chunk, may be asked of the run's own."""
    claims(tmp_path, f"{BOUND}, seed=3")
    verified = claim(tmp_path, genfw.Bound(2, 4), "best", ["estimator.chunk=7"])
    assert verified.certificate["estimator"]["seed"] == "own"
    with pytest.raises(ConfigError) as refused:
        claim(tmp_path, genfw.Bound(2, 4), "best", ["seed=4"])
    said = str(refused.value)
    assert f"has no {BOUND}, seed=4" in said and said.endswith(f"it has: {BOUND}, seed=3")
    for none in ({}, {"certificate": "mine"}, "mine"):
        (tmp_path / "evaluation.json").write_text(json.dumps({f"{BOUND}, seed=3": none}))
        with pytest.raises(GenfwError, match="seed=3 has no certificate"):
            claim(tmp_path, genfw.Bound(2, 4), "best", ["seed=3"])
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "certificate.json").unlink()
    with pytest.raises(ConfigError, match="it has: nothing"):
        claim(tmp_path, genfw.Bound(2, 4), "best", ["seed=4"])


def test_every_entry_of_an_evaluation_must_hold(tmp_path):
    """Its certificate, and what is told beside it."""
    tested = {"test/nll": 81.3, "test/nll_stderr": 0.1, "test/bpd": 1.83, "test/count": 447}
    file = tmp_path / "evaluation.json"

    def verified(certificate, told):
        file.write_text(json.dumps({BOUND: {**told, "certificate": certificate}}))
        verified = claim(tmp_path, genfw.Bound(2, 4), "best", ["checkpoint=best"])
        return compare(verified, CLAIM, tested)

    assert f"{file}, {BOUND}" in verified(CLAIM, tested)
    wrong = re.escape(f"{BOUND} does not hold:\n")
    with pytest.raises(GenfwError, match=wrong + "data.count: claimed 440, found 447"):
        verified(changed("data.count", 440), tested)
    with pytest.raises(GenfwError, match=wrong + "test.nll: claimed 81.2, found 81.3"):
        verified(CLAIM, {**tested, "test/nll": 81.2})


class Known(Source):
    """Seven images to test on."""

    def __init__(self):
        random = np.random.default_rng(0)
        images = random.integers(0, tiny.BINS, (7, *tiny.SHAPE)).astype(np.uint8)
        self.test = Split(images, random.integers(0, 4, 7))

    def read(self, shape, path):
        return Splits(self.test.part(0, 3), self.test.part(3, 5), self.test)


def terms(estimate, bits):
    """What each term of the bound costs, in bits per dimension."""
    if estimate.elbo is None:
        return {}
    bound = estimate.elbo
    nats = -bound.reconstruction.mean(), sum(bound.levels).mean(), bound.prior.mean()
    named = zip(("reconstruction", "levels", "prior"), nats, strict=True)
    return {name: float(value) / bits for name, value in named}


class Mine(genfw.Bound):
    """Without a name."""


@pytest.mark.parametrize(
    ("averaged", "steps", "estimator", "name", "draws"),
    [
        (False, None, genfw.Bound(sets=2, strata=3), "bound", 6),
        (True, 5, genfw.Bound(sets=3, strata=2), "bound", 6),
        (True, 5, genfw.ProbabilityFlow(draws=2, steps=2), "ode", 2),
        (False, 5, genfw.ProbabilityFlow(draws=2, steps=2, k=3), "ode", 6),
        (False, 5, genfw.ImportanceWeighted(k=4), "importance_weighted", 4),
        (False, 5, Mine(sets=2, strata=2), "Mine", 4),
    ],
)
def test_every_entry_is_what_was_measured(averaged, steps, estimator, name, draws, tmp_path):
    """Found anew, in the words of the certificate: value and error in both units, the terms' share
    of the bits, whose weights, of which data, at which ends, in what arithmetic, by which draws."""
    data = ImageData(Known(), tiny.SHAPE, tiny.BINS, 4, name="known")
    trained, model = tiny.vdm().at(steps), tiny.vdm().at(steps)
    module = LatentModule(trained, genfw.Elbo(), torch.optim.SGD, estimator=estimator, seed=3)
    if averaged:
        next(model.parameters()).data += 1.0
        module.average = model
        assert fingerprint(model) != fingerprint(trained)
    module.reached = 12
    (tested,) = tiny.trainer(tmp_path).test(module, data, verbose=False)
    held = certify(module, data, tested, tmp_path / "best.ckpt")
    for perfect in ({}, {"test/nll": 0.0, "test/bpd": 0.0}):  # bits are those of the dimensions
        again = certify(module, tiny.Images(), tested | perfect, tmp_path / "best.ckpt")["result"]
        assert again["bpd_stderr"] == held["result"]["bpd_stderr"]
        assert again["terms"] == held["result"]["terms"]

    x, keys = torch.from_numpy(data.split("test").images), genfw.noise.mix(3, "test")
    found, bits = estimator(model, x, noise=genfw.Noise(keys, torch.arange(7))), 4 * math.log(2)
    nll, error = float(found.nats.mean()), float(found.variance.sum().sqrt() / 7)
    result = held.pop("result")
    assert result.pop("terms") == pytest.approx(terms(found, bits), rel=1e-5)
    diagnosed = {name: float(value.mean()) for name, value in found.diagnostics.items()}
    assert result.pop("diagnostics") == pytest.approx(diagnosed, rel=1e-4)
    assert result.pop("kind") == estimator.kind
    numbers = {"nll": nll, "nll_stderr": error, "bpd": nll / bits, "bpd_stderr": error / bits}
    assert result == pytest.approx(numbers, rel=1e-5)
    assert held == {
        "estimator": {
            "name": name,
            "arguments": estimator.extra_repr(),
            "draws": draws,
            "seed": 3,
            "dtype": "float32",
            "tf32": False,
            "device": "cpu",
        },
        "model": {
            "name": "VDM",
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights": "exponential moving average" if averaged else "raw",
            "sha256": fingerprint(model),
            "decoder": "BinsLikelihood(bins=3)",
            "parameterization": "Eps()",
            "schedule": "Cosine(log_snr: 4 -> -6)",
            "log_snr": [4.0, -6.0],
            "steps": "continuous time" if steps is None or name == "ode" else 5,
        },
        "data": {
            "name": "known",
            "split": "test",
            "count": 7,
            "of": 7,
            "sha256": data.source.test.hash,
            "shape": [1, 2, 2],
            "bins": 3,
            "transform": "none",
        },
        "origin": {
            "checkpoint": "best.ckpt",
            "step": 12,
            "git": git_commit(),
            "versions": {key.removeprefix("versions/"): said for key, said in versions().items()},
        },
    }


@pytest.fixture(scope="module")
def config():
    return composed("model=vae", "estimator=annealed", "trainer.accelerator=cpu")


@pytest.fixture
def run(config, tmp_path, monkeypatch):
    """A folder whose run is the tiny model's, said to be evaluated by annealing."""
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"global_step": 12}, tmp_path / "checkpoints" / "best.ckpt")
    data = ImageData(Known(), tiny.SHAPE, tiny.BINS, 4, name="known")
    module = tiny.module()
    module.on_load_checkpoint({"global_step": 12, "state_dict": {}})
    monkeypatch.setattr("genfw.train.parts.restore", lambda *_: (module, data))
    return tmp_path


def test_a_number_that_cannot_be_saved_is_printed_whole(run, monkeypatch, capsys):
    """One line says so, and the exit code; what was saved before stays."""
    saved = '{"another": {"test/nll": 1.5}}'
    (run / "evaluation.json").write_text(saved)
    monkeypatch.setattr(os, "fsync", tiny.full)
    assert command(evaluate.evaluate, [f"run={run}"]) == 1
    out, err = capsys.readouterr()
    assert "evaluation.json cannot be written: No space left on device; " in err
    assert err.count("\n") == 1 and (run / "evaluation.json").read_text() == saved
    table, brace, rest = out.partition("{\n")
    ((name, entry),) = json.loads(brace + rest).items()
    assert table.startswith(f"{name}\n") and f"{entry['test/nll']:.2f} ± " in table


@pytest.mark.parametrize("left", ["[", "[1]", None])
def test_entries_that_are_no_entries_are_not_written_over(left, tmp_path, capsys):
    file = tmp_path / "evaluation.json"
    file.mkdir() if left is None else file.write_text(left)
    with pytest.raises(GenfwError, match=r"evaluation\.json"):
        keep(tmp_path, "bound", {"test/nll": 1.5})
    assert json.loads(capsys.readouterr().out) == {"bound": {"test/nll": 1.5}}
    assert file.is_dir() if left is None else file.read_text() == left


def test_a_number_outlives_the_interruption_of_its_looseness(run, monkeypatch, capsys):
    def interrupted(*_):
        assert "nats" in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "looseness", interrupted)
    assert command(evaluate.evaluate, [f"run={run}", "simulated=100"]) == 130
    (entry,) = json.loads((run / "evaluation.json").read_text()).values()
    assert math.isfinite(entry["test/nll"]) and "test/looseness" not in entry


def test_a_looseness_names_its_entry_and_is_not_computed_again(run, monkeypatch, capsys):
    given = [f"run={run}", "simulated=100"]
    monkeypatch.setattr(
        evaluate, "looseness", lambda *_: {"test/looseness": 0.5, "test/looseness_stderr": 0.1}
    )
    assert command(evaluate.evaluate, given) == 0
    monkeypatch.setattr(evaluate, "looseness", lambda *_: pytest.fail("computed again"))
    assert command(evaluate.evaluate, [*given, "verify=true"]) == 0
    assert "of best at step 12, simulated=100)" in capsys.readouterr().out


def test_what_the_configuration_says_already_asks_for_the_runs_own_number(run, capsys):
    """And names no entry."""
    assert command(evaluate.evaluate, [f"run={run}"]) == 0
    (entry,) = json.loads((run / "evaluation.json").read_text()).values()
    (run / "evaluation.json").unlink()
    (run / "certificate.json").write_text(json.dumps(entry["certificate"]))
    shutil.copy(run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt")
    again = ("seed=0", "estimator=annealed", "model.latents=16")
    for given in (
        again[:1],
        again[1:2],
        again,
        (*again, "trainer.devices=1"),
        ("seed=1", again[0]),
    ):
        assert command(evaluate.evaluate, [f"run={run}", "verify=true", *given]) == 0
        assert f"computed again ({run / 'certificate.json'})" in capsys.readouterr().out
    few = ["trainer.limit_test_batches=1", "data.eval_batch_size=2"]
    assert command(evaluate.evaluate, [f"run={run}", *few, again[0], "simulated=0"]) == 0
    (name,) = json.loads((run / "evaluation.json").read_text())
    assert "seed" not in name and "simulated" not in name
    assert command(evaluate.evaluate, [f"run={run}", "verify=true", *few, *again]) == 0
    assert f"evaluation.json, {name})" in capsys.readouterr().out
    for given in (["seed=1"], [*again, "seed=1"], ["checkpoint=last"], ["simulated=9"]):
        assert command(evaluate.evaluate, [f"run={run}", "verify=true", *given]) == 2
        assert "evaluation.json has no" in capsys.readouterr().err
    assert command(evaluate.evaluate, [f"run={run}", "seed=1"]) == 0
    assert command(evaluate.evaluate, [f"run={run}", "verify=true", "seed=1", again[1]]) == 0
    assert "of best at step 12, seed=1)" in capsys.readouterr().out


def test_an_entry_is_of_the_weights_that_it_was_computed_from(run, monkeypatch, capsys):
    """Also when the run has gone on since: nothing is written over, and nothing passes for a number
    of what stands there now."""
    files, data = run / "checkpoints", ImageData(Known(), tiny.SHAPE, tiny.BINS, 4, name="known")
    given = [f"run={run}", "seed=1"]
    assert command(evaluate.evaluate, given) == 0
    (first,) = json.loads((run / "evaluation.json").read_text())
    assert first == "bound(sets=2, strata=2) of best at step 12, seed=1"
    shutil.copy(files / "best.ckpt", files / "earlier.ckpt")

    module = tiny.module()
    module.reached = 24
    next(module.model.parameters()).data += 1.0
    monkeypatch.setattr("genfw.train.parts.restore", lambda *_: (module, data))
    capsys.readouterr()
    assert command(evaluate.evaluate, [*given, "verify=true"]) == 2
    assert re.search(f"has no .* of best at step 24, .*it has: {re.escape(first)}$", told(capsys))
    assert command(evaluate.evaluate, given) == 0
    assert [*json.loads((run / "evaluation.json").read_text())] == [
        first,
        first.replace("12", "24"),
    ]
    assert command(evaluate.evaluate, [*given, "verify=true"]) == 0

    (files / "earlier.ckpt").replace(files / "best.ckpt")
    module = tiny.module()
    module.on_load_checkpoint({"global_step": 12, "state_dict": {}})
    monkeypatch.setattr("genfw.train.parts.restore", lambda *_: (module, data))
    capsys.readouterr()
    assert command(evaluate.evaluate, [*given, "verify=true"]) == 0
    assert f"evaluation.json, {first})" in told(capsys)


def test_an_entry_of_before_names_had_steps_is_verified_too(run, capsys):
    given = [f"run={run}", "seed=1"]
    assert command(evaluate.evaluate, given) == 0
    (entry,) = json.loads((run / "evaluation.json").read_text()).values()
    name = "bound(sets=2, strata=2) of best, seed=1"
    (run / "evaluation.json").write_text(json.dumps({name: entry}))
    capsys.readouterr()
    assert command(evaluate.evaluate, [*given, "verify=true"]) == 0
    assert f"evaluation.json, {name})" in told(capsys)


def told(capsys):
    """All that was said, on one line."""
    return " ".join("".join(capsys.readouterr()).split())

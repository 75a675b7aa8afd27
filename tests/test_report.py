"""A certificate says what was measured; a copy that says something else is found out."""

import copy
import json

import pytest
import torch

from genfw.estimators.report import differences, fingerprint, plain
from genfw.evaluate import certificate, compare
from genfw.train.errors import GenfwError

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
    claimed = changed("result.nll_stderr", 0.1)
    assert differences(claimed, plain(found)) == ["result.nll_stderr: claimed 0.1, found None"]


def test_a_missing_entry_is_a_difference():
    without = copy.deepcopy(CLAIM)
    del without["data"]["sha256"]
    assert differences(CLAIM, without) == ["data.sha256: claimed cd, found None"]
    assert differences(without, CLAIM) == ["data.sha256: claimed None, found cd"]


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
def test_results_beside_a_certificate_must_hold_too(key, tmp_path, capsys):
    tested = {"test/nll": 81.3, "test/nll_stderr": 0.1, "test/nll_std": 9.0, "test/bpd": 1.83}
    tested |= {"test/reconstruction": -1.0, "test/levels": 80.2, "test/prior": 0.1}
    tested |= {"test/count": 447}
    told = {**tested, "seconds": 1.0}
    (tmp_path / "results.json").write_text(json.dumps(told))
    compare(CLAIM, CLAIM, tested, tmp_path)
    assert "certificate holds" in capsys.readouterr().out
    (tmp_path / "results.json").write_text(json.dumps({**told, f"test/{key}": 0.09}))
    with pytest.raises(
        GenfwError, match=rf"results.json does not hold:\ntest.*{key}: claimed 0.09"
    ):
        compare(CLAIM, CLAIM, tested, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_what_is_no_certificate_is_said_to_be_none(content, tmp_path):
    (tmp_path / "certificate.json").write_text(content)
    with pytest.raises(GenfwError, match=r"certificate\.json: expected a JSON object"):
        certificate(tmp_path)

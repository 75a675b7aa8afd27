"""Numbers that were written down: what an evaluation's is called, where it is kept, and whether it
holds when it is computed again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from genfw.train.errors import ConfigError, GenfwError
from genfw.train.runs import load

if TYPE_CHECKING:
    from genfw.estimators.estimator import Estimator
    from genfw.estimators.report import Certificate

WHERE = ("data", "trainer")
"""What may be another where a number is only to be computed again."""

OF_NO_MATTER = ("verify", "wandb", "trusted", "hydra")
"""What is said of a number does not change it."""


class Differs(GenfwError):
    """A certificate does not hold."""

    on_all_ranks = True


def named(estimator: Estimator, checkpoint: str, changed: Sequence[str]) -> str:
    """Of an entry: what another measurement would differ in. Of a key given twice the last counts.

    Example:
        >>> from genfw import Bound
        >>> named(Bound(2, 8), "best", ["estimator.strata=8", "seed=3", "model.steps=10", "seed=4"])
        'bound(sets=2, strata=8) of best, model.steps=10, seed=4'
    """
    given = dict(each.split("=", 1) for each in changed)
    said = {"checkpoint", *OF_NO_MATTER}  # the first by the name
    if estimator.extra_repr():  # says how it was asked
        said.add("estimator")
    others = {key: value for key, value in given.items() if key.split(".")[0] not in said}
    parts = [f"{key}={value}" for key, value in sorted(others.items())]
    return ", ".join([f"{estimator.called()}({estimator.extra_repr()}) of {checkpoint}", *parts])


def news(
    arguments: Sequence[str], folder: Path, config: DictConfig, options: Mapping[str, Any]
) -> list[str]:
    """The arguments that say what neither the run's config.yaml nor `options`, those that are
    meant where nothing is said, say already."""
    own = load(folder)

    def said(argument: str) -> bool:
        key, _, value = argument.partition("=")
        if key in options:
            return str(options[key]) == value
        return OmegaConf.select(config, key) == OmegaConf.select(own, key)

    return [each for each in arguments if not each.startswith("run=") and not said(each)]


def keep(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Adds one entry to `<folder>/evaluation.json`, or replaces the one of this name.

    Raises:
        GenfwError: it could not; the entry is printed instead.
    """
    from genfw.estimators.report import plain
    from genfw.train.files import store

    file = folder / "evaluation.json"
    try:
        entries = read_json(file) if file.exists() else {}
        if not all(isinstance(each, dict) for each in entries.values()):
            entries = {}  # of before entries had names
        store(file, plain({**entries, name: entry}), "its new entry stands in the output alone")
    except GenfwError:
        print(json.dumps(plain({name: entry}), indent=2))
        raise


def read_json(file: Path) -> dict[str, Any]:
    """What stands in a file that a run wrote.

    Raises:
        GenfwError: it is not what a run writes, or cannot be read.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError:
        content = None
    except OSError as error:
        raise GenfwError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise GenfwError(f"{file}: expected a JSON object, as a run writes it; it was changed")
    return content


@dataclass(frozen=True)
class Claim:
    """A number that was written down.

    Attributes:
        certificate: of it.
        results: what is `told` of its test, if that is there as well.
        places: where the two stand.
    """

    certificate: Certificate
    results: Certificate | None
    places: tuple[str, str]


def claim(folder: Path, estimator: Estimator, checkpoint: str, changed: Sequence[str]) -> Claim:
    """What is verified: the entry of evaluation.json that these arguments name, or would without
    `WHERE`; the run's own number where they ask for no other.

    Args:
        checkpoint: "best at step 2600"; entries of an older genfw say no step.

    Raises:
        ConfigError: nobody wrote that number down; which there are.
        GenfwError: it has no certificate.
    """
    file = folder / "evaluation.json"
    entries, whatever_step = read_json(file) if file.exists() else {}, checkpoint.split()[0]
    asked = _but_for(OF_NO_MATTER, changed)
    bare = _but_for(WHERE, asked)
    for given, of in product(filter(None, (asked, bare)), (checkpoint, whatever_step)):
        if (name := named(estimator, of, given)) in entries:
            return _entry(entries[name], f"{file}, {name}")
    own = folder / "certificate.json"
    if not bare or (own.is_file() and named(estimator, whatever_step, bare) == _measured(own)):
        return _own(folder)
    raise ConfigError(
        f"verify=true: {file} has no {named(estimator, checkpoint, asked)}, which this command "
        f"writes without verify=true; it has: {'; '.join(entries) or 'nothing'}"
    )


def _but_for(groups: Sequence[str], arguments: Sequence[str]) -> list[str]:
    return [each for each in arguments if each.split("=")[0].split(".")[0] not in groups]


def _entry(entry: Any, place: str) -> Claim:
    held = entry.get("certificate") if isinstance(entry, dict) else None
    if not isinstance(held, dict):
        raise GenfwError(f"verify=true: {place} has no certificate; it was changed")
    return Claim(held, told(entry), (place, place))


def _own(folder: Path) -> Claim:
    file = folder / "certificate.json"
    if not file.is_file():
        raise GenfwError(f"verify=true: there is no {file}; a run writes it when it has tested")
    results = folder / "results.json"
    said = told(read_json(results)) if results.is_file() else None
    return Claim(read_json(file), said, (str(file), str(results)))


def _measured(file: Path) -> str:
    """The number of a run's certificate, as an entry would be `named`."""
    match read_json(file):
        case {"estimator": {"name": name, "arguments": arguments}}:
            return f"{name}({arguments}) of best"
    return ""


def compare(claim: Claim, found: Certificate, tested: Mapping[str, Any]) -> str:
    """A line that says that a claim holds.

    Raises:
        Differs: it does not; a line for each difference.
    """
    from genfw.estimators.report import differences, plain

    said, facts = (claim.certificate, claim.results), (plain(found), told(tested))
    for one, other, place in zip(said, facts, claim.places, strict=True):
        if one is not None and (wrong := differences(one, other)):
            raise Differs("\n".join([f"{place} does not hold:", *wrong]))
    nll, bpd = found["result"]["nll"], found["result"]["bpd"]
    bits = "" if bpd is None else f", {bpd:.5f} bits/dim"
    return f"certificate holds: {nll:.4f} nats{bits}, computed again ({claim.places[0]})"


def told(results: Mapping[str, Any]) -> Certificate:
    """What results say of the test's NLL, measured and counted, as `differences` reads it."""
    from genfw.estimators.report import plain

    measured = ("nll", "nll_stderr", "nll_std", "bpd")
    numbers = {key: plain(results.get(f"test/{key}")) for key in measured}
    terms = {key: results.get(f"test/{key}") for key in ("reconstruction", "levels", "prior")}
    return {"test": {**numbers, "terms": terms, "count": results.get("test/count")}}

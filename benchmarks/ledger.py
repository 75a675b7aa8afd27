"""Measurements of a model's samples, kept line by line, each with its whole setting.

A line of a ledger (JSON) is {"setting": ..., "set": i, what was measured, "git": commit, ...}. The
setting holds whatever the numbers depend on: weights and description of the model, of its guidance
and of what guides, of the sampler and its grid; seed, samples of a set, device; extractor and
reference. A line answers for an equal setting, and for no other. Commit, seconds and the run's name
are kept and not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from genfw import VDM
from genfw.estimators.report import fingerprint
from genfw.registry import Registered
from genfw.train.callbacks import Frechet
from genfw.train.data import Split
from genfw.train.errors import ConfigError, GenfwError
from genfw.train.frechet import FrechetDistance
from genfw.train.loggers import git_commit
from genfw.train.parts import make_callbacks

INHERITED = {*vars(nn.Module())}
"""Attributes that every module has."""


class Ledger:
    """A file of lines.

    Args:
        file: made where there is none.

    Raises:
        GenfwError: a line is not whole.
    """

    def __init__(self, file: Path):
        self.file, self.git = file, git_commit()
        self.lines: list[dict[str, Any]] = []
        for i, line in enumerate(file.read_text().splitlines() if file.is_file() else ()):
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                raise GenfwError(f"{file}: line {i + 1} is not whole: delete it") from None

    def of(self, setting: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """What was measured in this setting and no other, {set: line}."""
        wanted = simple(setting)
        return {line["set"]: line for line in self.lines if line["setting"] == wanted}

    def like(self, setting: Mapping[str, Any], *but: str) -> list[dict[str, Any]]:
        """Lines whose settings differ from this one in `but` alone."""
        wanted = _without(simple(setting), but)
        return [line for line in self.lines if _without(line["setting"], but) == wanted]

    def add(self, setting: Mapping[str, Any], i: int, **measured: Any) -> None:
        """Writes the line of set i, at once."""
        line = simple({"setting": setting, "set": i, **measured, "git": self.git})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)


def setting(
    model: VDM, distance: FrechetDistance, reference: Split, seed: int, samples: int
) -> dict[str, Any]:
    """Whatever the distance of `samples` samples of this seed from `reference` depends on."""
    guided = model.guided()
    own = (model.denoiser, model.schedule)
    guides = {name: identity(one) for name, one in guided.named_children() if one not in own}
    return {
        "model": identity(nn.ModuleList([model.denoiser, model.likelihood])),
        "shape": model.shape,
        "classes": model.classes,
        "guidance": {**description(guided, deep=False), **guides},
        "sampler": description(model.sampler),
        "calls": model.sampler.evaluations,
        "seed": seed,
        "samples": samples,
        "extractor": [distance.key, distance.extractor.fingerprint(), distance.bins],
        "reference": [reference.hash, len(reference)],
        "device": model.device.type,
    }


def description(module: nn.Module, deep: bool = True) -> dict[str, Any]:
    """A module by its name and the plain values it holds, and its modules alike:
    {"is": "ddim", "steps": 10, "eta": 0.0, "grid": {"is": "uniform"}}."""
    held = {key: each for key, each in vars(module).items() if key not in INHERITED}
    name = module.name if isinstance(module, Registered) else type(module).__name__
    return {
        "is": name,
        **{key: each for key, each in held.items() if _is_plain(each)},
        **{key: description(each) for key, each in module.named_children() if deep},
    }


def titled(described: Mapping[str, Any], *but: str) -> str:
    """A description to read, without `but` and what is not set."""
    held = {key: each for key, each in described.items() if each is not None and key not in but}
    name = str(held.pop("is"))
    inside = ", ".join(
        f"{key}={titled(each) if isinstance(each, Mapping) else each}" for key, each in held.items()
    )
    return f"{name} ({inside})" if inside else name


def identity(module: nn.Module) -> str:
    """A hash of description and weights: equal only where it computes the same."""
    facts = json.dumps([description(module), fingerprint(module)])
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def simple(facts: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(facts))


def extracted(config: DictConfig) -> FrechetDistance:
    """The distance that the run itself reports.

    Raises:
        GenfwError: it reports none.
    """
    for one in make_callbacks(config):
        if isinstance(one, Frechet) and one.distance is not None:
            return one.distance
    raise GenfwError("the run measured no Frechet distance: its metrics name no extractor")


def origin(folder: Path, config: DictConfig, model: VDM, checkpoint: str) -> str:
    """Which model was measured: the run's command, network and weights, and their NLL."""
    overrides = folder / ".hydra" / "overrides.yaml"
    given = OmegaConf.load(overrides) if overrides.is_file() else ["(overrides not kept)"]
    network = dict(config.model.denoiser.network)
    name = str(network.pop("_target_")).rpartition(".")[2]
    sizes = ", ".join(f"{key}={each}" for key, each in network.items() if key != "shape")
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    weights = fingerprint(model)
    return (
        f"{folder.name}: `python -m genfw {' '.join(map(str, given))}`; {name}({sizes}), "
        f"{parameters:,} parameters; {checkpoint}.ckpt, sha256 of the weights "
        f"{weights[:16]}; {_nll(folder, weights)}"
    )


def at_least(options: DictConfig, least: int, *keys: str) -> None:
    """
    Raises:
        ConfigError: one of them is less.
    """
    for key in keys:
        if options[key] < least:
            raise ConfigError(f"{key}={options[key]}: expected at least {least}")


def listed(options: DictConfig, key: str, default: Sequence[Any]) -> list[Any]:
    """What was asked for, one or a list, or the default.

    Raises:
        ConfigError: values of another type.
    """
    given = default if options[key] is None else options[key]
    values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    kind = (int, float) if isinstance(default[0], float) else type(default[0])
    if not values or not all(isinstance(each, kind) for each in values):
        raise ConfigError(f"{key}={given}: expected values like {list(default)}")
    return values


def commits(lines: Iterable[Mapping[str, Any]]) -> str:
    """Of genfw, that measured these lines; + where there were changes beside."""
    given = {str(line["git"]) for line in lines}
    return ", ".join(sorted(each[:10] + "+" * each.endswith("+") for each in given))


def mean(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard error (nan for one)."""
    drawn = torch.tensor(list(values), dtype=torch.float64)
    error = drawn.std() / len(drawn) ** 0.5 if len(drawn) > 1 else torch.tensor(float("nan"))
    return float(drawn.mean()), float(error)


def _nll(folder: Path, weights: str) -> str:
    """Of these weights, where the run has tested them."""
    file = folder / "certificate.json"
    if file.is_file():
        certificate = json.loads(file.read_text())
        result, data = certificate["result"], certificate["data"]
        if certificate["model"]["sha256"] == weights:
            return (
                f"NLL {result['nll']:.2f} ± {result['nll_stderr']:.2f} nats "
                f"on {data['count']} test images of {data['name']}"
            )
    return "NLL not known: the run has not tested these weights"


def _without(setting: Mapping[str, Any], but: Iterable[str]) -> dict[str, Any]:
    return {key: each for key, each in setting.items() if key not in but}


def _is_plain(value: Any) -> bool:
    """Numbers, words, and lists of them."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)

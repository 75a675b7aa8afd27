"""Fills in a certificate (`genfw.estimators.report`) for what a trainer has just tested."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

import genfw
from genfw.elbo import bits_per_dim
from genfw.estimators.report import Certificate, fingerprint, plain
from genfw.models.vdm import VDM
from genfw.train.data.module import ImageData
from genfw.train.loggers import git_commit
from genfw.train.module import LatentModule


def certify(
    module: LatentModule,
    data: L.LightningDataModule,
    tested: Mapping[str, Any],
    checkpoint: Path,
) -> Certificate:
    """The certificate of `tested`, what `trainer.test(module, data)` returned.

    Args:
        checkpoint: the file whose weights were tested. It may have been replaced since: their step
            is that of the module, which has read them.
    """
    return {
        "result": _result(module, tested),
        "estimator": _estimator(module),
        "model": _model(module),
        "data": _data(data, int(tested["test/count"])),
        "origin": _origin(checkpoint, module.reached),
    }


def _result(module: LatentModule, tested: Mapping[str, Any]) -> dict[str, Any]:
    nll, stderr = (float(tested[f"test/{key}"]) for key in ("nll", "nll_stderr"))
    bits: dict[str, Any] = {"bpd": None, "bpd_stderr": None, "terms": {}}
    if not module.model.of_density:
        bits = {
            "bpd": float(tested["test/bpd"]),
            "bpd_stderr": plain(float(bits_per_dim(torch.tensor(stderr), module.dims))),
            "terms": _terms(module, tested),
        }
    return {
        "nll": nll,
        "nll_stderr": plain(stderr),
        **bits,
        "kind": kind(module),
        "diagnostics": {
            name: plain(float(tested[f"test/{name}"]))
            for name in module.estimator.diagnostics
            if f"test/{name}" in tested
        },
        **given(module),
    }


def _terms(module: LatentModule, tested: Mapping[str, Any]) -> dict[str, float]:
    """Of the bound, in bits per dimension, where the estimator gave them."""
    return {
        name: float(bits_per_dim(torch.tensor(sign * float(tested[f"test/{name}"])), module.dims))
        for name, sign in (("reconstruction", -1), ("levels", 1), ("prior", 1))
        if f"test/{name}" in tested
    }


def kind(module: LatentModule) -> str:
    """What the number is: the estimator's word, of p(x | y) where the model is told y; and whether
    p is a density, whose numbers compare with no probability of integers."""
    said = module.estimator.kind
    if module.model.of_density:
        said += ", p a density of real numbers"
    return said if module.model.classes is None else said.replace("p(x)", "p(x | y)")


def given(module: LatentModule) -> dict[str, str]:
    """What a conditional model was told: its NLL is one of p(x | y)."""
    classes = module.model.classes
    return {} if classes is None else {"given": f"the label, one of {classes}: -log p(x | y)"}


def _estimator(module: LatentModule) -> dict[str, Any]:
    return {
        "name": module.estimator.called(),
        "arguments": module.estimator.extra_repr(),
        "draws": module.estimator.draws,
        "seed": module.seed,
        **module.arithmetic,
        "device": str(module.device),
    }


def _model(module: LatentModule) -> dict[str, Any]:
    model = module.evaluated
    known: dict[str, Any] = {
        "name": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": "raw" if module.average is None else "exponential moving average",
        "sha256": fingerprint(model),
        "decoder": repr(getattr(model, "likelihood", None)),
    }
    if isinstance(model, VDM):
        known |= {
            "parameterization": repr(getattr(model.denoiser, "parameterization", None)),
            "schedule": f"{type(model.schedule).__name__}({model.schedule.extra_repr()})",
            "log_snr": list(model.schedule.ends),
            "steps": "continuous time"
            if model.steps is None or module.estimator.continuous
            else model.steps,
        }
    return known


def _data(data: L.LightningDataModule, count: int) -> dict[str, Any]:
    if not isinstance(data, ImageData):
        return {"name": type(data).__name__, "split": "test", "count": count}
    split = data.split("test")
    return {
        "name": data.name,
        "split": "test",
        "count": count,
        "of": len(split),
        **({"skipped": split.skipped} if split.skipped else {}),
        "sha256": split.hash,
        "shape": list(data.shape),
        "bins": data.bins,
        "transform": "none"
        if data.binarize == "none"
        else f"binarized once, evaluation_seed={data.evaluation_seed}",
    }


def _origin(checkpoint: Path, step: int | None) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.name,
        "step": step,
        "git": git_commit(),
        "versions": {key.removeprefix("versions/"): value for key, value in versions().items()},
    }


def versions() -> dict[str, str]:
    """What computed these numbers."""
    packages = ("torch", "lightning", "torchmetrics", "numpy")
    return {
        "versions/python": platform.python_version(),
        "versions/genfw": genfw.__version__,
        **{f"versions/{package}": version(package) for package in packages},
    }

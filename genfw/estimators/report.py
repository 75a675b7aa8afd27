"""The certificate of a reported NLL: all that somebody else needs to compute the same number, and
to tell whether theirs is comparable.

A certificate is plain JSON in five parts:

result     nll, nll_stderr (nats per image), bpd, bpd_stderr (bits per dimension), kind (lower or
           upper bound, unbiased, ...), the terms of the bound in bits per dimension, and the
           estimator's diagnostics (what an ODE is believed to be off, effective sample size); of
           a conditional model also `given`: it is an NLL of p(x | y); of a density, which has no
           bits, nats alone
estimator  name, arguments, draws per image, seed, dtype, whether products were shortened (tf32),
           device
model      name, parameters, weights (averaged or raw, sha256), decoder; of a diffusion model also
           parameterization, schedule, log SNR at both ends and steps
data       name, split, count and of how many, how many files were skipped where any were, sha256 of
           images and labels as evaluated, transform
origin     checkpoint, step, git commit, versions

Data set, transform, decoder and end points decide what is measured; two numbers that differ there
are not comparable, whatever their bits per dimension. What was not measured, as the standard error
of a single draw, is null.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

Certificate = dict[str, dict[str, Any]]

MEASURED = ("nll", "nll_stderr", "nll_std", "bpd", "bpd_stderr", "terms", "log_snr")
"""What a computation gives, to rounding; everything else in a certificate is said beforehand."""

CIRCUMSTANCES = ("device", "git", "versions", "diagnostics")
"""What may differ between two computations of one number. Diagnostics, as differences of nearly
equal numbers, do so by more than rounding."""

LATER = ("data.skipped",)
"""What older certificates do not say."""


def fingerprint(model: nn.Module) -> str:
    """sha256 of all weights and buffers: names, types, shapes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = torch.as_tensor(value).detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(claimed: Certificate, found: Certificate, tolerance: float = 1e-5) -> list[str]:
    """What does not agree, a line each; none where the claim holds.

    Measured numbers may differ by `tolerance`, relative (a float32 network sums in another order on
    another machine); device, git commit and versions may differ at all.

    Example:
        >>> claimed = {"result": {"nll": 81.0}, "data": {"name": "digits", "count": 447}}
        >>> found = {"result": {"nll": 81.0001}, "data": {"name": "digits", "count": 440}}
        >>> differences(claimed, found)
        ['data.count: claimed 447, found 440']
    """
    one, other = dict(_flat(claimed)), dict(_flat(found))
    lines = []
    for key in {**one, **other}:
        a, b = one.get(key), other.get(key)
        words = key.split(".")
        if any(word in CIRCUMSTANCES for word in words) or a == b:
            continue
        if key in LATER and key not in one:
            continue
        measured = any(word in MEASURED for word in words)
        if measured and _close(a, b, tolerance):
            continue
        lines.append(f"{key}: claimed {a}, found {b}")
    return lines


def plain(value: Any) -> Any:
    """The same as JSON can hold it: null for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return all(_close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if not (isinstance(a, int | float) and isinstance(b, int | float)):
        return False
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, value

"""Networks in the place they were made for, of the sizes of their neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from genfw.train.errors import ConfigError
from genfw.train.nodes import select, shown, target_of
from genfw.train.resolvers import outputs


def networks_fit_their_place(config: DictConfig) -> None:
    """Refuses an encoder, decoder or denoising network where another of them belongs."""
    for place, ending in (("net", ""), ("encoder", "_encoder"), ("decoder", "_decoder")):
        target = target_of(config, place) or ""
        kind = re.search(r"(Encoder|Decoder)?$", target)
        if target.startswith("genfw.nets.") and kind and kind[0].lower() != ending.lstrip("_"):
            key = place if place == "net" else f"net@{place}"
            raise ConfigError(
                f"{key} cannot be {target.removeprefix('genfw.nets.')}: use {key}=conv{ending}, "
                f"mlp{ending} or the like"
            )


def latents_are_levels(config: DictConfig) -> None:
    """Refuses a chain whose sizes, encoders and decoders are not equally many."""
    model = config.get("model")
    encoders, decoders, latents = (select(model, k) for k in ("encoders", "decoders", "latents"))
    if not isinstance(encoders, ListConfig) or not isinstance(decoders, ListConfig):
        return
    levels = len(encoders)
    if not isinstance(latents, ListConfig) or not len(latents) == levels == len(decoders):
        raise ConfigError(
            f"model.latents={shown(latents)}: expected a size for each of {levels} levels, z_1 "
            "first, like model.latents=[16,8], and as many networks in model.encoders and in "
            f"model.decoders; these are {levels} and {len(decoders)}; one level is model=vae"
        )


def networks_fit_their_neighbours(config: DictConfig) -> None:
    """Refuses a network of other sizes than what it reads from and gives to."""
    for place, key, expected, why in _neighbours(config):
        node = OmegaConf.select(config, place)
        own = isinstance(node, DictConfig) and str(node.get("_target_")).startswith("genfw.nets.")
        if own and key in node and _sizes(node[key]) != _sizes(expected):
            raise ConfigError(
                f"{place}.{key}={shown(node[key])}, but {why}: leave {place}.{key} alone"
            )


def _neighbours(config: DictConfig) -> Iterator[tuple[str, str, Any, str]]:
    """What every network must read and give: where it stands, the argument, its value, why."""
    target, shape = target_of(config, "model"), OmegaConf.select(config, "data.shape")
    if target not in ("genfw.VAE", "genfw.MHVAE", "genfw.HVAE"):
        return
    reads = outputs(config.model.likelihood)
    data = f"the data have the shape {shown(shape)} (data.shape)"
    decoded = f"the likelihood reads {reads} numbers per channel of the data"
    if target == "genfw.HVAE":
        yield "model.ladder", "shape", shape, data
        yield "model.ladder", "outputs", reads, decoded
        return
    alone = target == "genfw.VAE"
    below, numbers = shape, reads
    for t, z in enumerate([config.model.latents] if alone else config.model.latents):
        size = f"z_{t + 1} has the size {shown(z)} (model.latents)"
        for name in ("encoder", "decoder"):
            holder, at = (config.model, name) if alone else (config.model[f"{name}s"], t)
            group = t == 0 and OmegaConf.is_interpolation(holder, at)  # ${encoder}
            place = name if group else str(holder._get_full_key(at))
            yield place, "latents", z, size
            yield place, "shape", below, data
        yield place, "outputs", numbers, decoded
        below, numbers, data = z, 2, size
        decoded = f"z_{t + 1} is given a mean and a log standard deviation, 2 numbers"


def _sizes(value: Any) -> list[Any]:
    return list(value) if isinstance(value, ListConfig) else [value]


RULES = (
    networks_fit_their_place,
    latents_are_levels,
    networks_fit_their_neighbours,
)

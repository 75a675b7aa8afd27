"""What data, and everything that reads them, say alike: values, shapes, labels."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from genfw.train.errors import ConfigError
from genfw.train.nodes import option, shown, target_of
from genfw.train.resolvers import binarized_bins, out_channels


def bins_are_the_datas(config: DictConfig) -> None:
    """Refuses a `data.bins` other than the number that `raw_bins` and `binarize` leave."""
    if target_of(config, "data") != "genfw.train.data.ImageData":
        return
    bins, raw, binarize = (config.data.get(key) for key in ("bins", "raw_bins", "binarize"))
    if isinstance(raw, int) and isinstance(binarize, str):
        known = binarized_bins(binarize, raw)
        if bins != known:
            raise ConfigError(
                f"data.bins={bins}, but with data.raw_bins={raw} and data.binarize={binarize} the "
                f"data have {known} values: leave data.bins alone"
            )


def bins_agree(config: DictConfig) -> None:
    """Refuses a likelihood or parameterization of another number of values than the data have."""
    bins = OmegaConf.select(config, "data.bins")
    for place in ("likelihood", "param"):
        told = OmegaConf.select(config, f"{place}.bins")
        if told is not None and bins is not None and told != bins:
            raise ConfigError(
                f"{place}.bins={told}, but the data have {bins} values (data.bins): "
                f"leave {place}.bins alone"
            )


def bernoulli_is_binary(config: DictConfig) -> None:
    """Refuses likelihood=bernoulli of data with more values than two."""
    bins = OmegaConf.select(config, "data.bins")
    if target_of(config, "likelihood") == "genfw.BernoulliLikelihood" and bins not in (None, 2):
        raise ConfigError(
            f"likelihood=bernoulli has 2 values, but the data have {bins}: "
            "use likelihood=categorical, or binarize the data: data.binarize=dynamic"
        )


def data_are_integers(config: DictConfig) -> None:
    """Refuses likelihood=gaussian, a density of real numbers, of integers."""
    bins, model = OmegaConf.select(config, "data.bins"), target_of(config, "model")
    if bins is not None and target_of(config, "likelihood") == "genfw.GaussianLikelihood":
        masses = "bins or discretized_gaussian" if model == "genfw.VDM" else "discretized_gaussian"
        raise ConfigError(
            f"likelihood=gaussian is a density of real numbers, and the data are {bins} integers: "
            f"use likelihood={masses}"
        )


def shapes_are_the_datas(config: DictConfig) -> None:
    """Refuses shapes other than the data's, and channels that `param` cannot read."""
    shape = OmegaConf.select(config, "data.shape")
    for key in ("model.shape", "net.shape"):
        told = OmegaConf.select(config, key)
        if isinstance(told, ListConfig) and isinstance(shape, ListConfig) and told != shape:
            raise ConfigError(
                f"{key}={list(told)}, but the data have the shape {list(shape)} (data.shape): "
                f"leave {key} alone"
            )
    param, told = config.get("param"), OmegaConf.select(config, "net.out_channels")
    if isinstance(param, DictConfig) and isinstance(told, int) and isinstance(shape, ListConfig):
        read = out_channels(param, shape[0])
        if str(target_of(config, "param")).startswith("genfw.") and told != read:
            raise ConfigError(
                f"net.out_channels={told}, but param={option(config, 'param')} reads {read}: "
                "leave net.out_channels alone"
            )


def labels_agree(config: DictConfig) -> None:
    """Refuses numbers of classes that differ, and a share of hidden labels outside [0, 1)."""
    known = OmegaConf.select(config, "data.classes")
    classes = OmegaConf.select(config, "model.classes")
    if isinstance(classes, int) and isinstance(known, int) and classes != known:
        raise ConfigError(
            f"model.classes={classes}, but the data have {known} classes (data.classes): "
            f"set model.classes={known}, or null for a model without labels"
        )
    lists = {
        name: OmegaConf.select(config, f"model.{name}") or [] for name in ("encoders", "decoders")
    }
    several = [f"model.{name}[{i}]" for name, nodes in lists.items() for i in range(len(nodes))]
    within = [f"model.{name}" for name in ("denoiser.network", "encoder", "decoder", "ladder")]
    for place in ("net", "encoder", "decoder", *within, *several):  # in a run's config.yaml copies
        node = OmegaConf.select(config, place)
        if isinstance(node, DictConfig) and "classes" in node and node.classes != classes:
            raise ConfigError(
                f"{place}.classes={shown(node.classes)}, but the model has "
                f"model.classes={shown(classes)}: set model.classes, and leave {place}.classes "
                "alone"
            )
    dropout = OmegaConf.select(config, "label_dropout")
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        raise ConfigError(f"label_dropout={dropout}: expected a share of labels in [0, 1)")


def data_are_there(config: DictConfig) -> None:
    """Refuses a `data.path` that is no folder; for runs that will read it.

    Raises:
        ConfigError: there is no such folder.
    """
    path = OmegaConf.select(config, "data.path")
    if isinstance(path, str) and not Path(path).expanduser().is_dir():
        raise ConfigError(f"data.path={path}: no such folder")


RULES = (
    bins_are_the_datas,
    bins_agree,
    bernoulli_is_binary,
    data_are_integers,
    shapes_are_the_datas,
    labels_agree,
)

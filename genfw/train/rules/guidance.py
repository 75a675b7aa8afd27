"""Guidance that asks a model for labels, or for none, as it was trained."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from genfw.train.errors import ConfigError
from genfw.train.nodes import option


def guidance_reads_model(config: DictConfig) -> None:
    """Refuses guidance that asks a model for labels, or for none, where it never saw that."""
    guidance = option(config, "guidance")
    classes = OmegaConf.select(config, "model.classes")
    dropout = OmegaConf.select(config, "label_dropout")
    if guidance == "classifier_free" and classes is None:
        raise ConfigError(
            f"guidance={guidance} needs a conditional model, and this one has no labels "
            "(model.classes=null): train one with model.classes=${data.classes}, or use "
            "guidance=classifier"
        )
    without = ("classifier_free", "classifier", "classifier_denoised")
    if guidance in without and classes is not None and not dropout:
        raise ConfigError(
            f"guidance={guidance} asks the model without a label, and this one never saw that "
            "(label_dropout=0): train it with label_dropout=0.1"
        )


def samples_have_labels(config: DictConfig) -> None:
    """Refuses guidance to labels that nobody gives: those of pictures and distances while a model
    trains are the model's own. `genfw.sample` takes any.

    Raises:
        ConfigError: a classifier would guide a model without classes.
    """
    by_classifier = "classifier" in (config.get("guidance") or {})
    if by_classifier and config.model.classes is None:
        raise ConfigError(
            f"guidance={option(config, 'guidance')} needs labels, and samples of this model have "
            "none while it trains (model.classes=null): leave guidance to python -m genfw.sample "
            "run=<folder>"
        )


def weaker_hears_no_label(theirs: DictConfig, place: str) -> None:
    """Refuses a weaker model that has never been without a label, where none is to be given.

    Args:
        theirs: config.yaml of the weaker run.
        place: how it was given.

    Raises:
        ConfigError: it has classes, and was trained with all labels.
    """
    classes = OmegaConf.select(theirs, "model.classes")
    if classes is not None and not theirs.get("label_dropout"):
        raise ConfigError(
            f"guidance.weaker={place}: a model that was never without a label (label_dropout=0), "
            "and here it would be asked without one: give one that was trained with "
            "label_dropout=0.1 or model.classes=null"
        )


RULES = (guidance_reads_model,)

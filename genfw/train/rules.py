"""The combinations that cannot be right, each refused with what would be.

A rule takes a composed configuration, whose keys and types are known to be right, and raises a
`ConfigError` or does nothing. `RULES` hold for every configuration; those below them are called by
the commands they concern.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from genfw.train.errors import ConfigError
from genfw.train.nodes import numbers, option, select, shown, target_of
from genfw.train.resolvers import binarized_bins, out_channels, outputs

DISCRETE = ("genfw.CategoricalParameterization", "genfw.LogisticMixtureParameterization")
FLOAT32_TINY = 2.0**-126
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "32", "bf16", "16", "64", "None")


def _bins_are_the_datas(config: DictConfig) -> None:
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


def _bins_agree(config: DictConfig) -> None:
    """Refuses a likelihood or parameterization of another number of values than the data have."""
    bins = OmegaConf.select(config, "data.bins")
    for place in ("likelihood", "param"):
        told = OmegaConf.select(config, f"{place}.bins")
        if told is not None and bins is not None and told != bins:
            raise ConfigError(
                f"{place}.bins={told}, but the data have {bins} values (data.bins): "
                f"leave {place}.bins alone"
            )


def _bernoulli_is_binary(config: DictConfig) -> None:
    """Refuses likelihood=bernoulli of data with more values than two."""
    bins = OmegaConf.select(config, "data.bins")
    if target_of(config, "likelihood") == "genfw.BernoulliLikelihood" and bins not in (None, 2):
        raise ConfigError(
            f"likelihood=bernoulli has 2 values, but the data have {bins}: "
            "use likelihood=categorical, or binarize the data: data.binarize=dynamic"
        )


def _data_are_integers(config: DictConfig) -> None:
    """Refuses likelihood=gaussian, a density of real numbers, of integers."""
    bins, model = OmegaConf.select(config, "data.bins"), target_of(config, "model")
    if bins is not None and target_of(config, "likelihood") == "genfw.GaussianLikelihood":
        masses = "bins or discretized_gaussian" if model == "genfw.VDM" else "discretized_gaussian"
        raise ConfigError(
            f"likelihood=gaussian is a density of real numbers, and the data are {bins} integers: "
            f"use likelihood={masses}"
        )


def _likelihood_reads_model(config: DictConfig) -> None:
    """Refuses a likelihood that cannot read what the model decodes."""
    model, likelihood = option(config, "model"), option(config, "likelihood")
    from_network = (("bins",), "categorical, bernoulli, logistic_mixture or the like")
    logistic = ("discretized_logistic", "logistic_mixture")
    unreadable, others = {
        "vae": from_network,
        "mhvae": from_network,
        "hvae": from_network,
        "vdm": (("bernoulli", *logistic), "bins or discretized_gaussian"),
    }.get(model, ((), ""))
    if likelihood in unreadable:
        raise ConfigError(
            f"likelihood={likelihood} cannot read what model={model} decodes: use "
            f"likelihood={others}"
        )


def _decoder_is_the_networks(config: DictConfig) -> None:
    """Refuses likelihood=categorical where the network of a diffusion model states no masses."""
    model, param = target_of(config, "model"), str(target_of(config, "param"))
    if model != "genfw.VDM" or target_of(config, "likelihood") != "genfw.CategoricalLikelihood":
        return
    if param.startswith("genfw.") and param not in DISCRETE:
        raise ConfigError(
            f"likelihood=categorical reads the masses that the network itself states, and {param} "
            "says where x lies, not how likely each value is: use param=categorical or "
            "logistic_mixture, or likelihood=bins or discretized_gaussian"
        )


def _signal_at_the_end(config: DictConfig) -> None:
    """Refuses end points that are not finite, do not fall, or lose signal or noise in float32."""
    least, most = (OmegaConf.select(config, f"schedule.log_snr_{each}") for each in ("min", "max"))
    ends = [end for end in (least, most) if isinstance(end, int | float)]
    if not all(map(math.isfinite, ends)):
        raise ConfigError(
            f"schedule: log_snr_max={most}, log_snr_min={least}: end points must be finite; "
            "at -10 nothing is left of the data that could be seen"
        )
    if len(ends) == 2 and most <= least:
        raise ConfigError(
            f"schedule: log_snr_max={most}, log_snr_min={least}: log SNR falls from log_snr_max to "
            "log_snr_min, so the first must be the larger"
        )
    if ends and max(ends) > -math.log(FLOAT32_TINY):
        raise ConfigError(
            f"schedule.log_snr_max={most}: the noise at t = 0 is zero in float32, and there nobody "
            "can say what eps is, eps_hat = (z - alpha x) / sigma; leave schedule.log_snr_max alone"
        )
    param = target_of(config, "param")
    if param in ("genfw.Eps", "genfw.Score") and ends and min(ends) < math.log(FLOAT32_TINY):
        raise ConfigError(
            f"schedule.log_snr_min={least}: the SNR at t = 1 is zero in float32, and there {param} "
            "cannot say what x is, x_hat = (z - sigma eps) / alpha; use param=v or x0, or "
            "log_snr_min=-10"
        )


def _schedule_falls(config: DictConfig) -> None:
    """Refuses numbers of a schedule that are not finite, or with which log SNR would not fall."""
    node = config.get("schedule") or {}
    for key, value in node.items():
        for at, number in numbers(f"schedule.{key}", value):
            if not math.isfinite(number):
                raise ConfigError(f"{at}={number}: expected a finite number")
    pairs = {"genfw.Sigmoid": ("start", "end"), "genfw.Linear": ("beta_min", "beta_max")}
    names = pairs.get(str(target_of(config, "schedule")), ())
    ends = [node[name] for name in names if name in node]
    if len(ends) == 2 and ends[0] >= ends[1]:
        said = ", ".join(f"schedule.{name}={end}" for name, end in zip(names, ends, strict=True))
        raise ConfigError(f"{said}: the first must be the smaller, or log SNR would not fall")


def _shapes_are_the_datas(config: DictConfig) -> None:
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


def _networks_fit_their_neighbours(config: DictConfig) -> None:
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


def _learned_schedule_follows_the_bound(config: DictConfig) -> None:
    """Refuses a learned schedule under an objective of genfw's that is no bound; of others their
    own `bound` decides."""
    objective = option(config, "objective")
    weighted = ["beta", "warmup", "cyclic", "simple", "min_snr", "p2", "sigmoid", "edm"]
    if target_of(config, "schedule") == "genfw.Learned" and objective in weighted:
        raise ConfigError(
            "schedule=learned follows the bound and its variance, and under "
            f"objective={objective} its gradient means nothing: use objective=elbo, or a fixed "
            "schedule"
        )


def _objective_reads_model(config: DictConfig) -> None:
    """Refuses an objective that this model cannot be trained by."""
    objective, model = option(config, "objective"), option(config, "model")
    endless = OmegaConf.select(config, "model.steps") is None
    weighted = "weighs whole chains of latents, and in continuous time they are infinite"
    upward = "follows a chain of latents from x up, and this one is drawn from the top down"
    apart = str(OmegaConf.select(config, "objective.per")).endswith("dimension")
    several = len(OmegaConf.select(config, "model.encoders") or []) > 1
    for objectives, models, reason in (
        (
            "simple min_snr p2 sigmoid edm",
            "vae mhvae hvae",
            "weighs noise levels, and there are none: use objective=elbo",
        ),
        ("l2 free_bits", "vdm", "is for learned latents, and these are noise: use objective=elbo"),
        ("stl", "hvae", f"{upward}: use objective=elbo"),
        (
            "dreg",
            "hvae",
            f"{upward}: use objective=iwae, the same bound, plainly differentiated",
        ),
        (
            "l2",
            "hvae",
            f"{upward}: use objective=elbo likelihood=discretized_gaussian",
        ),
        (
            "free_bits",
            "mhvae" if apart and several else "",
            "per dimension needs divergences in closed form, and below the top of a chain a level "
            "costs a log ratio at one draw: use objective.per=batch_level",
        ),
        (
            "iwae miwae ciwae stl dreg",
            "vdm" if endless else "",
            f"{weighted}: use objective=elbo, or model.steps=100",
        ),
    ):
        if objective in objectives.split() and model in models.split():
            raise ConfigError(f"objective={objective}, model={model}: {objective} {reason}")


def _estimator_reads_model(config: DictConfig) -> None:
    """Refuses an estimator that this model cannot be measured by."""
    estimator, model = target_of(config, "estimator"), target_of(config, "model")
    steps = OmegaConf.select(config, "model.steps")
    if estimator == "genfw.ImportanceWeighted" and model == "genfw.VDM" and steps is None:
        raise ConfigError(
            "estimator=importance_weighted weighs a chain of finitely many latents, and "
            "model.steps=null is continuous time: set model.steps=1000, or use estimator=bound"
        )
    levels = len(OmegaConf.select(config, "model.encoders") or [None])
    one_level = model == "genfw.VAE" or (model == "genfw.MHVAE" and levels == 1)
    if estimator == "genfw.Annealed" and str(model).startswith("genfw.") and not one_level:
        raise ConfigError(
            f"estimator=annealed moves one latent, and {model} has more: use "
            "estimator=importance_weighted"
        )
    if estimator == "genfw.ProbabilityFlow" and model in (
        "genfw.VAE",
        "genfw.MHVAE",
        "genfw.HVAE",
    ):
        raise ConfigError(
            "estimator=ode follows the probability flow of a diffusion model, and "
            f"model={option(config, 'model')} has none: use estimator=bound or importance_weighted"
        )


def _weights_need_an_exact_density(config: DictConfig) -> None:
    """Refuses k > 1 of estimator=ode where its density is only estimated."""
    if target_of(config, "estimator") != "genfw.ProbabilityFlow":
        return
    k, most = (OmegaConf.select(config, f"estimator.{each}") for each in ("k", "exact_dims"))
    dims = math.prod(OmegaConf.select(config, "data.shape") or [])
    if isinstance(k, int) and isinstance(most, int) and k > 1 and dims > most:
        raise ConfigError(
            f"estimator.k={k}: the mean of weights is a bound only where log p_ode is exact, and "
            f"D={dims} is above estimator.exact_dims={most}: use estimator.k=1"
        )


def _weights_are_float32(config: DictConfig) -> None:
    """Refuses weights narrower than float32, and precisions that nobody knows."""
    precision = str(OmegaConf.select(config, "trainer.precision"))
    if precision.endswith("16-true") or precision.startswith("transformer-engine"):
        raise ConfigError(
            f"trainer.precision={precision}: weights and their average must be float32 or better, "
            "as reported numbers are: use trainer.precision=bf16-mixed"
        )
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision}: expected one of {', '.join(PRECISIONS)}")


def _run_can_be(config: DictConfig) -> None:
    """Refuses a run without steps, end, test or checkpoints, and strategies they do not know."""
    for key in ("trainer.val_check_interval", "trainer.devices"):
        value = OmegaConf.select(config, key)
        share = key == "trainer.val_check_interval" and isinstance(value, float) and 0 < value <= 1
        all_of_them = key == "trainer.devices" and value == -1
        wrong = isinstance(value, float) or (isinstance(value, int) and value < 1)
        if wrong and not (share or all_of_them):
            raise ConfigError(f"{key}={value}: expected an integer of at least 1")
    for key in ("trainer.limit_train_batches", "trainer.limit_test_batches"):
        if OmegaConf.select(config, key) == 0:
            raise ConfigError(f"{key}=0: expected at least one batch, or null for all of them")
    seed = OmegaConf.select(config, "seed")
    if isinstance(seed, int) and seed < 0:
        raise ConfigError(f"seed={seed}: expected an integer of at least 0")
    steps, epochs = (
        OmegaConf.select(config, f"trainer.max_{each}") for each in ("steps", "epochs")
    )
    if steps == 0:
        raise ConfigError(
            "trainer.max_steps=0: expected at least 1; without a step nothing is tested"
        )
    if isinstance(steps, int) and steps < 0 and (epochs is None or epochs < 0):
        raise ConfigError(
            f"trainer.max_steps={steps}: this run has no end; give trainer.max_steps or "
            "trainer.max_epochs"
        )
    strategy = str(OmegaConf.select(config, "trainer.strategy"))
    if strategy != "fsdp2" and strategy.startswith(("fsdp", "deepspeed", "model_parallel")):
        raise ConfigError(
            f"trainer.strategy={strategy}: averages, evaluation and checkpoints do not know "
            "weights in these parts: use trainer=fsdp (trainer.strategy=fsdp2), or trainer=ddp"
        )
    if OmegaConf.select(config, "trainer.enable_checkpointing") is False:
        raise ConfigError(
            "trainer.enable_checkpointing=false: the best weights are what is tested; leave it true"
        )


BY_ELEMENT = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
]
"""Those of torch.optim that move every weight by its own past alone, and so weights in parts."""


def _weights_can_be_divided(config: DictConfig) -> None:
    """Refuses trainer=fsdp where precision, optimizer or model need whole weights."""
    if OmegaConf.select(config, "trainer.strategy") != "fsdp2":
        return
    precision = str(OmegaConf.select(config, "trainer.precision"))
    if precision in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer=fsdp, trainer.precision={precision}: ranks would scale the loss each on its "
            "own: use trainer.precision=bf16-mixed"
        )
    module, _, name = str(target_of(config, "optimizer")).rpartition(".")
    if module == "torch.optim" and name not in BY_ELEMENT:
        raise ConfigError(
            f"trainer=fsdp: torch.optim.{name} looks at a weight as a whole, and every rank has a "
            f"part of it: use one of {', '.join(BY_ELEMENT)}, or trainer=ddp"
        )
    if OmegaConf.select(config, "classifier") is not None:
        raise ConfigError("trainer=fsdp divides the weights of a model of data: use trainer=ddp")


def _labels_agree(config: DictConfig) -> None:
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


def _guidance_reads_model(config: DictConfig) -> None:
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


RULES: tuple[Callable[[DictConfig], None], ...] = (
    _run_can_be,
    _weights_can_be_divided,
    _labels_agree,
    _guidance_reads_model,
    _weights_are_float32,
    _bins_are_the_datas,
    _bins_agree,
    _bernoulli_is_binary,
    _data_are_integers,
    _likelihood_reads_model,
    _decoder_is_the_networks,
    _signal_at_the_end,
    _schedule_falls,
    _shapes_are_the_datas,
    networks_fit_their_place,
    latents_are_levels,
    _networks_fit_their_neighbours,
    _learned_schedule_follows_the_bound,
    _objective_reads_model,
    _estimator_reads_model,
    _weights_need_an_exact_density,
)


def times_are_looked_at(config: DictConfig) -> None:
    """Refuses a choice of times that training would ignore; a finished run may be read in steps.

    Raises:
        ConfigError: `times` learns where, and T steps are drawn evenly all the same.
    """
    steps, times = OmegaConf.select(config, "model.steps"), option(config, "times")
    if steps is not None and times == "importance":
        raise ConfigError(
            f"times={times}, model.steps={steps}: of {steps} steps each is drawn as often, "
            f"whatever {times} learned: use times=uniform or log_snr, or model.steps=null"
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


def data_are_there(config: DictConfig) -> None:
    """Refuses a `data.path` that is no folder; for runs that will read it.

    Raises:
        ConfigError: there is no such folder.
    """
    path = OmegaConf.select(config, "data.path")
    if isinstance(path, str) and not Path(path).expanduser().is_dir():
        raise ConfigError(f"data.path={path}: no such folder")

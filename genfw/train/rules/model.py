"""What reads a model: its likelihood, an objective, an estimator, a choice of times."""

from __future__ import annotations

import math

from omegaconf import DictConfig, OmegaConf

from genfw.train.errors import ConfigError
from genfw.train.nodes import option, target_of

DISCRETE = ("genfw.CategoricalParameterization", "genfw.LogisticMixtureParameterization")


def likelihood_reads_model(config: DictConfig) -> None:
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


def decoder_is_the_networks(config: DictConfig) -> None:
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


def learned_schedule_follows_the_bound(config: DictConfig) -> None:
    """Refuses a learned schedule under an objective of genfw's that is no bound; of others their
    own `bound` decides."""
    objective = option(config, "objective")
    ours = str(target_of(config, "objective")).startswith("genfw.")
    warmup = OmegaConf.select(config, "objective.warmup") if ours else None
    weighted = ["beta", "warmup", "cyclic", "simple", "min_snr", "p2", "sigmoid", "edm"]
    if target_of(config, "schedule") == "genfw.Learned" and (objective in weighted or warmup):
        objective = f"{objective} with warmup={warmup}" if warmup else objective
        raise ConfigError(
            "schedule=learned follows the bound and its variance, and under "
            f"objective={objective} its gradient means nothing: use objective=elbo, or a fixed "
            "schedule"
        )


def objective_reads_model(config: DictConfig) -> None:
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


def estimator_reads_model(config: DictConfig) -> None:
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


def weights_need_an_exact_density(config: DictConfig) -> None:
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


RULES = (
    likelihood_reads_model,
    decoder_is_the_networks,
    learned_schedule_follows_the_bound,
    objective_reads_model,
    estimator_reads_model,
    weights_need_an_exact_density,
)

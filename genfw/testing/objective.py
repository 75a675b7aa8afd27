"""Laws of objectives: on small models of every kind that one can train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from genfw.diffusion.times import TimeSampler
from genfw.elbo import ELBO
from genfw.likelihood import GaussianLikelihood
from genfw.model import LatentModel
from genfw.models.vdm import VDM
from genfw.noise import BatchNoise, Draws, Noise
from genfw.objective.denoising import DenoisingObjective, PerLogSNR
from genfw.objective.objective import Objective
from genfw.objective.rate import Beta, Warmup
from genfw.schedule import Cosine, Learned, NoiseSchedule
from genfw.testing.estimator import LOOSE, drawn, images, served
from genfw.testing.model import built
from genfw.testing.oracles import GaussianDenoiser
from genfw.testing.small import hvae, mhvae, vae, vdm
from genfw.testing.times import after_training
from genfw.types import Image, Labels, Nats

Make = Callable[..., Objective]
"""Builds an objective; few draws will do."""

STEP = 10
"""Optimizer steps that an objective is told of."""


def what_it_cannot_train_it_refuses(make: Make, **arguments: Any) -> None:
    """`check` says so in a sentence, a TypeError or a ValueError; what it lets pass is computed."""
    objective = _made(make, arguments)
    for name, model in _models().items():
        refused = _refusal(objective, model)
        if refused is not None:
            sentence = len(refused.split()) > 3 and "\n" not in refused
            assert sentence, f"check of {name} says {refused!r}, which is no sentence"
            continue
        x, y, noise = _batch()
        try:
            objective(model, x, y, noise=noise)
        except Exception as error:
            raise AssertionError(f"check lets {name} pass, and then: {error}") from error


def one_finite_number_per_example(make: Make, **arguments: Any) -> None:
    """(b,), with the draws of training and of evaluation, whose gradients are finite; the same
    where there are none."""
    objective = _made(make, arguments)
    for model in _trained(objective):
        x, y, noise = _batch()
        said = f"of a {type(model).__name__}"
        with torch.random.fork_rng(devices=[]):
            _finite(objective(model, x, y), model, said)
        value = objective(model, x, y, noise=noise)
        _finite(value, model, said)
        with torch.no_grad():
            again = objective(model, x, y, noise=noise)
        _equal(again, value, f"another number {said} where there are no gradients")


def an_example_keeps_its_number(make: Make, **arguments: Any) -> None:
    """With keyed noise: asked again, at another place of its batch and, where the objective is not
    `batchwise`, in another batch."""
    objective = _made(make, arguments)
    for model in _trained(objective):
        x, y, noise = _batch()
        said = f"of a {type(model).__name__}"
        with torch.no_grad():
            whole = objective(model, x, y, noise=noise)
            again = objective(model, x, y, noise=noise)
            _equal(again, whole, f"the same draws give another number {said}")
            order = torch.arange(len(x)).roll(2)
            moved = objective(model, x[order], y[order], noise=Noise(0, order))
            _equal(moved, whole[order], f"an example's number depends on its place, {said}")
            for some in ([3, 1], [2]) if not objective.batchwise else ():
                part = objective(model, x[some], y[some], noise=Noise(0, torch.tensor(some)))
                _equal(part, whole[some], f"an example's number depends on its batch, {said}")


def labels_are_passed_on(make: Make, **arguments: Any) -> None:
    """With another label every example has another number."""
    objective = _made(make, arguments)
    for model in _trained(objective):
        x, y, noise = _batch()
        with torch.no_grad():
            own, other, none = (
                objective(model, x, each, noise=noise) for each in (y, (y + 1) % CLASSES, None)
            )
        said = f"labels do not matter to a {type(model).__name__}"
        assert (own != other).all() and (own != none).any(), said


def the_model_is_left_as_it_was(make: Make, **arguments: Any) -> None:
    """Its weights, buffers and modes, in training and evaluation; it has no gradients before
    `backward`, and reports the bound it did."""
    objective = _made(make, arguments)
    for model in _trained(objective):
        x, y, noise = _batch()
        said = f" of a {type(model).__name__}"
        for training in (True, False):
            before, reported = _state(model.train(training)), _reported(model, x, y, noise)
            value = objective(model, x, y, noise=noise)
            graded = any(p.grad is not None for p in model.parameters())
            assert not graded, f"parameters{said} have gradients before `backward`"
            value.mean().backward()
            model.zero_grad()
            for what, found in _state(model).items():
                same = found.keys() == before[what].keys() and all(
                    torch.equal(found[name], value) for name, value in before[what].items()
                )
                assert same, f"{what}{said} are no more what they were"
            now = _reported(model, x, y, noise)
            assert torch.equal(now, reported), f"the bound{said} is no more what it was"


def what_the_bound_trains_is_trained(make: Make, **arguments: Any) -> None:
    """Every parameter of the model that the bound depends on is on the graph, if only at a slope of
    zero: a floor may take its pull from a parameter, a lost term not."""
    objective = _made(make, arguments)
    for model in _trained(objective):
        x, y, noise = _batch()
        bound = _gradients(-model.elbo(x, y, noise=noise).total, model)
        found = _gradients(objective(model, x, y, noise=noise), model)
        lost = [name for name in bound if name not in found]
        assert not lost, f"of a {type(model).__name__} no gradient reaches {', '.join(lost)}"


def the_gradient_is_that_of_the_value(make: Make, **arguments: Any) -> None:
    """Up the slope of the bound, in each part of the model, the mean rises as differences say at
    the same draws; that of a `surrogate` in the mean over draws, to five standard errors."""
    objective = _made(make, arguments)
    for model in _trained(objective):
        for part, direction in _uphill(model).items():
            found = [_slope(objective, model, direction, 0)]
            if objective.surrogate and not _close(*found[0]):
                found += [_slope(objective, model, direction, i) for i in range(1, GROUPS)]
            slopes, differences = torch.tensor(found, dtype=torch.float64).T
            gap, expected = slopes - differences, float(differences.mean())
            error = float(gap.std() / len(gap) ** 0.5) if len(gap) > 1 else 0.0
            away = float(gap.mean())
            said = f"{away:.3g} ± {error:.2g} from {expected:.3g}, which differences give"
            near = _close(away, 0.0, within=5 * error + 1e-4 * abs(expected))
            assert near, f"the slope in the {part} of a {type(model).__name__} is {said}"


def a_bound_is_one(make: Make, **arguments: Any) -> None:
    """Where the objective says so: on models whose evidence is known, without labels and given
    them, it is above -log p(x) to five standard errors, and where the encoder is right less than
    `LOOSE` nats above."""
    objective = _made(make, arguments)
    for bent in (False, True) if objective.bound else ():
        for model in served(objective, bent):
            for y in (None, images(200)[1]):
                x, exact = drawn(model, 200, y)
                with torch.no_grad():
                    gap = objective(model, x, y, noise=_noise(len(x))) + exact
                mean, error = float(gap.mean()), float(gap.std() / len(gap) ** 0.5) + 1e-3
                said = f"{mean:.4f} ± {error:.4f} nats above -log p(x{'' if y is None else '|y'})"
                said += f" of {type(model).__name__}, which a bound is not"
                assert mean > -5 * error and (bent or mean < LOOSE + 5 * error), said


def it_knows_the_step_it_is_told(make: Make, **arguments: Any) -> None:
    """None before; then `step` is the one told, and its numbers are finite at every one."""
    objective = make(**arguments)
    assert objective.step is None, f"step is {objective.step} before any was told"
    (model, *_), (x, y, noise) = _trained(objective), _batch()
    for step in (0, 1, 10**6):
        objective.advance(step)
        assert objective.step == step, f"step is {objective.step}, told {step}"
        with torch.no_grad():
            value = objective(model, x, y, noise=noise)
        assert value.isfinite().all(), f"not finite at step {step}"


def the_times_drawn_do_not_matter(make: Make, **arguments: Any) -> None:
    """Of diffusion models: the mean is the same whatever density times are drawn from, to five
    standard errors; and whatever the schedule between its end points, of a bound and a weight per
    log SNR."""
    objective = _made(make, arguments)
    first = _ideal(Cosine(*ENDS))
    if _refusal(objective, first) is not None:
        return
    expected, error = _mean(objective, first)
    others = {f"times {name}": _ideal(Cosine(*ENDS), cls()) for name, cls in _times().items()}
    if objective.bound or isinstance(objective, PerLogSNR):
        others |= {f"schedule {name}": _ideal(cls(*ENDS)) for name, cls in _schedules().items()}
    for name, model in others.items():
        mean, its = _mean(objective, model)
        allowed = 5 * (error**2 + its**2) ** 0.5 + 1e-6 * abs(expected)
        said = f"{mean:.4g} ± {its:.2g} for {name}, {expected:.4g} ± {error:.2g} for uniform"
        assert abs(mean - expected) < allowed, f"the mean is {said} times along a cosine"


def weights_are_finite_and_never_negative(make: Make, **arguments: Any) -> None:
    """Of denoising objectives, from clean data to pure noise: one that is negative trains away
    from the data."""
    objective = _made(make, arguments)
    if isinstance(objective, DenoisingObjective):
        log_snr = torch.linspace(-20, 20, 201, dtype=torch.float64)
        weight = objective.weight(log_snr)
        assert weight.shape == log_snr.shape, f"weights are {tuple(weight.shape)} of (201,) levels"
        assert weight.isfinite().all(), "a weight is not finite"
        assert (weight >= 0).all() and (weight > 0).any(), "a weight is negative, or all are zero"


def a_warm_up_is_its_beta(make: Make, **arguments: Any) -> None:
    """Of warm-ups: `beta` at the step told, kept in the one tensor that a recorded step reads and
    in no checkpoint; before it is told it refuses to guess."""
    objective = make(**arguments)
    if not isinstance(objective, Warmup):
        return
    model, (x, y, noise) = built(vae, SHAPE, BINS, {"classes": CLASSES}).double(), _batch()
    try:
        objective(model, x, y, noise=noise)
    except ValueError:
        pass
    else:
        raise AssertionError("a number comes before any step was told")
    read = objective.weight
    for step in (0, 1, 7, 300, 10**6):
        objective.advance(step)
        beta = objective.beta_at(step)
        assert objective.weight is read, "beta moves to another tensor"
        with torch.no_grad():
            found = objective(model, x, y, noise=noise)
            expected = Beta(beta)(model, x, y, noise=noise)
        close = torch.allclose(found, expected, rtol=1e-6)
        assert close, f"at step {step} the rate does not count {beta:g} times"
    assert not objective.state_dict(), "beta is saved, which the step says already"


OBJECTIVE_LAWS = (
    what_it_cannot_train_it_refuses,
    one_finite_number_per_example,
    an_example_keeps_its_number,
    labels_are_passed_on,
    the_model_is_left_as_it_was,
    what_the_bound_trains_is_trained,
    the_gradient_is_that_of_the_value,
    a_bound_is_one,
    it_knows_the_step_it_is_told,
    the_times_drawn_do_not_matter,
    weights_are_finite_and_never_negative,
    a_warm_up_is_its_beta,
)

SHAPE, BINS, CLASSES = (1, 2, 2), 3, 3
ENDS, MANY = (10.0, -4.0), 4000
GROUPS = 10


class Bare(LatentModel):
    """A bound, and nothing else."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def elbo(self, x: Image, y: Labels | None = None, *, noise: Draws | None = None) -> ELBO:
        level = -self.level.exp().expand(len(x))
        return ELBO(level, (), torch.zeros_like(level))

    def sample(self, n: int, y: Labels | None = None, *, noise: Draws | None = None) -> Image:
        return torch.zeros(n, *SHAPE, dtype=torch.int64)


def _made(make: Make, arguments: dict[str, Any]) -> Objective:
    """As it is in the middle of training."""
    objective = make(**arguments).eval()
    objective.advance(STEP)
    return objective


def _models() -> dict[str, LatentModel]:
    """Of every kind, in float64."""
    makes = {"a VAE": vae, "an MHVAE": mhvae, "an HVAE": hvae, "a VDM": vdm}
    told = {"classes": CLASSES}
    models = {name: built(make, SHAPE, BINS, told).double() for name, make in makes.items()}
    diffusion = models["a VDM"]
    assert isinstance(diffusion, VDM)
    learned = vdm(SHAPE, BINS, CLASSES, schedule=Learned(8.0, -6.0, hidden=4)).double()
    return models | {
        "a VDM in steps": diffusion.at(steps=3),
        "a VDM with a learned schedule": learned,
        "a model of a bound alone": Bare().double(),
    }


def _trained(objective: Objective) -> Iterator[LatentModel]:
    """Those that it can train; a learned schedule's gradient is not that of the bound alone."""
    taken = 0
    for name, model in _models().items():
        apart = isinstance(model, Bare) or "learned" in name
        if not apart and _refusal(objective, model) is None:
            taken += 1
            yield model
    assert taken, "trains neither a hierarchy nor a diffusion model"


def _refusal(objective: Objective, model: LatentModel) -> str | None:
    try:
        objective.check(model)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _noise(n: int, first: int = 0) -> Noise:
    return Noise(0, torch.arange(first, first + n))


def _batch(n: int = 6) -> tuple[Image, Labels, Noise]:
    made = torch.Generator().manual_seed(0)
    x = torch.randint(BINS, (n, *SHAPE), generator=made, dtype=torch.uint8)
    return x, torch.arange(n) % CLASSES, _noise(n)


def _finite(value: Tensor, model: LatentModel, said: str) -> None:
    assert value.shape == (6,), f"{tuple(value.shape)} for 6 examples {said}"
    assert value.isfinite().all(), f"not finite {said}"
    assert value.requires_grad, f"the number {said} has no gradient"
    for name, gradient in _gradients(value, model).items():
        assert gradient.isfinite().all(), f"the gradient of {name} {said} is not finite"


def _gradients(value: Tensor, model: LatentModel) -> dict[str, Tensor]:
    """Of the mean, in the parameters that it depends on."""
    learn = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value.mean(), list(learn.values()), allow_unused=True)
    return {name: g for name, g in zip(learn, found, strict=True) if g is not None}


def _state(model: LatentModel) -> dict[str, dict[str, Tensor]]:
    learns = {name: torch.tensor(p.requires_grad) for name, p in model.named_parameters()}
    modes = {name: torch.tensor(each.training) for name, each in model.named_modules()}
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "parameters that learn": learns,
        "modes": modes,
    }


def _reported(model: LatentModel, x: Image, y: Labels, noise: Noise) -> Nats:
    with torch.no_grad():
        return model.elbo(x, y, noise=noise).total


def _uphill(model: LatentModel) -> dict[str, dict[str, Tensor]]:
    """The gradient of the negative bound in each part of the model, of length 1."""
    x, y, noise = _batch()
    parts: dict[str, dict[str, Tensor]] = {}
    for name, gradient in _gradients(-model.elbo(x, y, noise=noise).total, model).items():
        parts.setdefault(name.split(".")[0], {})[name] = gradient
    for part in parts.values():
        length = torch.stack([gradient.norm() for gradient in part.values()]).norm()
        part |= {name: gradient / length for name, gradient in part.items()}
    return parts


def _slope(
    objective: Objective, model: LatentModel, direction: dict[str, Tensor], group: int
) -> tuple[float, float]:
    """Along a direction, of the mean over a group of draws: by its gradient and by differences."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return objective(self.model, x, y, noise=noise).mean()

    n = 200 if objective.surrogate else 6
    (x, y, _), noise, h = _batch(n), _noise(n, n * group), 1e-8
    loss, at = Loss(), {name: p.detach() for name, p in model.named_parameters()}
    ahead = {f"model.{name}": at[name] + h * up for name, up in direction.items()}
    value = loss()
    gradient = _gradients(value[None], model)
    reached = gradient.keys() & direction.keys()
    with torch.no_grad():
        difference = (functional_call(loss, ahead, ()) - value) / h
    slope = sum((float((gradient[n] * direction[n]).sum()) for n in reached), start=0.0)
    return slope, float(difference)


def _close(slope: float, difference: float, within: float = 0.0) -> bool:
    """But for rounding, and what bends within a step."""
    return abs(slope - difference) < within + 1e-4 * abs(difference) + 1e-5


def _ideal(schedule: NoiseSchedule, times: TimeSampler | None = None) -> VDM:
    """The exact denoiser of Gaussian data."""
    denoiser = GaussianDenoiser(schedule, 0.1, 0.5)
    if times is not None:
        times = after_training(times, schedule)
    return VDM(denoiser, GaussianLikelihood(), shape=(2,), times=times)


def _mean(objective: Objective, model: VDM) -> tuple[float, float]:
    """The mean over examples, times stratified, and an upper bound on its standard error."""
    x = 0.1 + 0.5 * images(MANY)[0]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        value = objective(model, x, noise=BatchNoise(MANY))
    return float(value.mean()), float(value.std()) / MANY**0.5


def _times() -> dict[str, type[TimeSampler]]:
    return {name: cls for name, cls in TimeSampler.registry.items() if name != "uniform"}


def _schedules() -> dict[str, type[NoiseSchedule]]:
    """Those that do not learn."""
    return {
        name: cls
        for name, cls in NoiseSchedule.registry.items()
        if not any(True for _ in cls(*ENDS).parameters())
    }


def _equal(found: Tensor, expected: Tensor, otherwise: str) -> None:
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9), otherwise

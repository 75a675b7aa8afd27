"""Laws of models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from genfw.model import LatentModel, MarkovianHierarchy, Weighs, tempers
from genfw.models.vdm import VDM
from genfw.noise import Noise

Make = Callable[..., LatentModel]
"""Builds a model of images of `shape` with `bins` values; the smaller, the better. Sums over all
images are made where there are at most `ENUMERABLE`."""

Bins: TypeAlias = int | None
"""None: of a density, whose data are real numbers."""

ENUMERABLE, DRAWS, MANY, SAMPLES, FEW = 256, 400, 2000, 10_000, 40


def a_density_says_so(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """`of_density`, which has no bits per dimension, where numbers are real (bins=None) and nowhere
    else."""
    model = built(make, shape, bins, arguments).eval()
    with torch.no_grad():
        drawn = model.sample(2, noise=Noise(1, torch.arange(2)))
    assert model.of_density == drawn.is_floating_point(), (
        f"samples are {drawn.dtype}, and of_density={model.of_density}: a density of real numbers "
        "says `of_density = True` and draws real numbers, any other model says nothing and draws "
        "integers"
    )
    assert model.of_density == (bins is None), (
        f"of_density={model.of_density}, and bins={bins}: give the laws the number of values, and "
        "of a density bins=None"
    )


def bound_is_one_number_per_image(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """elbo(x) -> (b,) nats, finite, its total the sum of its terms, its gradients finite."""
    model, x = built(make, shape, bins, arguments), _images(shape, bins)
    elbo = model.elbo(x)
    assert elbo.total.shape == (len(x),), f"total is {tuple(elbo.total.shape)}, not ({len(x)},)"
    assert elbo.total.isfinite().all(), "the bound is not finite"
    rate = elbo.prior + sum(elbo.levels)
    assert torch.allclose(elbo.total, elbo.reconstruction - rate, rtol=1e-5), "terms do not add up"
    elbo.total.sum().backward()
    reached = [p.grad for p in model.parameters() if p.grad is not None]
    assert reached or not any(True for _ in model.parameters()), "no parameter has a gradient"
    assert all(gradient.isfinite().all() for gradient in reached), "a gradient is not finite"


def an_image_keeps_its_number(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """With keyed noise, whatever its batch and its place in it."""
    model, x = built(make, shape, bins, arguments).eval(), _images(shape, bins)
    with torch.no_grad():
        whole = model.elbo(x, noise=Noise(0, torch.arange(len(x)))).total
        some = torch.tensor([3, 1])
        part = model.elbo(x[some], noise=Noise(0, some)).total
    assert torch.allclose(part, whole[some], rtol=1e-4), "an image's bound depends on its batch"


def samples_are_values_of_their_own(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """sample(n) -> (n, *shape), 0..K-1 but of a density; sample i is the same in any batch."""
    model = built(make, shape, bins, arguments).eval()
    with torch.no_grad():
        drawn = model.sample(5, noise=Noise(1, torch.arange(5)))
        alone = model.sample(1, noise=Noise(1, torch.tensor([3])))
    assert drawn.shape == (5, *shape), f"samples are {tuple(drawn.shape)}, not {(5, *shape)}"
    if bins is None:
        assert drawn.isfinite().all(), "samples are not finite"
    else:
        assert drawn.min() >= 0 and drawn.max() < bins, f"samples outside 0..{bins - 1}"
    assert _same(alone, drawn[3:4]).all(), "a sample depends on its batch"


def a_sample_is_of_its_label(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """Of models with `classes`: sample i is drawn given y[i], as beside none but its like; and the
    label matters. Down the chain too, where there is one."""
    model = built(make, shape, bins, arguments).eval()
    if model.classes is None:
        return
    down, ways = chain(model), {"sample": model.sample}
    if isinstance(down, MarkovianHierarchy):
        ways["ancestral_sample"] = down.ancestral_sample
    n = 40
    y, noise = torch.arange(n) % model.classes, Noise(1, torch.arange(n))
    for name, draw in ways.items():
        with torch.no_grad():
            mixed = draw(n, y, noise=noise)
            alike = [draw(n, torch.full_like(y, k), noise=noise) for k in range(model.classes)]
        for k, of_one in enumerate(alike):
            assert _same(mixed, of_one)[y == k].all(), f"{name}: a sample is not of its label"
        moved = any(not _same(each, alike[0]).all() for each in alike[1:])
        assert moved or model.classes == 1, f"{name}: samples are the same whatever the label"


def no_more_than_one_in_all(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """exp(bound), summed over all images there are, is at most 1: a dropped constant, a mean over
    pixels or a forgotten Jacobian is found here."""
    x = _all_images(shape, bins)
    if x is not None:
        model = built(make, shape, bins, arguments).eval()
        rows = Noise(2, torch.arange(len(x))).each(0, DRAWS)
        with torch.no_grad():
            total = model.elbo(x.repeat_interleave(DRAWS, 0), noise=rows).total
        bound = total.double().view(-1, DRAWS)
        p = bound.mean(1).exp()
        error = float((p * bound.std(1) / DRAWS**0.5).square().sum().sqrt())
        mass = float(p.sum())
        assert mass < 1 + 5 * error + 1e-5, f"exp(bound) sums to {mass:.4f} +- {error:.4f} over all"


def weights_average_to_one_in_all(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """Of models with importance weights: E[w] = p(x), so the mean weights of all images sum to
    1."""
    x, model = _all_images(shape, bins), chain(built(make, shape, bins, arguments).eval())
    if x is not None and isinstance(model, Weighs):
        rows = Noise(3, torch.arange(len(x))).each(0, DRAWS)
        with torch.no_grad():
            log_w = model.log_weight(x, noise=rows, k=DRAWS)
        w = log_w.double().exp().view(-1, DRAWS)
        mass, error = float(w.mean(1).sum()), float((w.var(1) / DRAWS).sum().sqrt())
        effective = w.sum(1).square() / w.square().sum(1)
        wrong = mass - 1 > 5 * error + 1e-4
        if float(effective.min()) > FEW:  # else a weight that was not drawn may be missing
            wrong = abs(mass - 1) > 5 * error + 1e-4
        assert not wrong, f"E[w] sums to {mass:.4f} +- {error:.4f} over all"


def bound_is_the_mean_log_weight(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """Of models with importance weights: E log w = E elbo. A rate that is halved or left out is
    found here; what is small in so small a model, as a KL between levels may be, is not."""
    x, model = _images(shape, bins), chain(built(make, shape, bins, arguments).eval())
    if isinstance(model, Weighs):
        draws = [Noise(seed, torch.arange(len(x))).each(0, MANY) for seed in (4, 5)]
        with torch.no_grad():
            log_w = model.log_weight(x, noise=draws[0], k=MANY).double()
            bound = model.elbo(x.repeat_interleave(MANY, 0), noise=draws[1]).total.double()
        both = torch.stack([log_w, bound]).view(2, len(x), MANY)
        (log_w, bound), error = both.mean((1, 2)), float(both.var(2).sum() / MANY) ** 0.5 / len(x)
        wrong = abs(float(log_w - bound)) > 5 * error + 1e-4
        assert not wrong, f"E log w is {log_w:.4f} +- {error:.4f}, the mean bound {bound:.4f}"


def beta_weighs_what_the_latents_cost(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """Of models with importance weights that take a beta: at the same draws log w is a straight
    line in it, of 1 the one asked for without, of 0 in the mean what the bound calls
    reconstruction."""
    x, model = _images(shape, bins), chain(built(make, shape, bins, arguments).eval())
    if not isinstance(model, Weighs) or not tempers(model):
        return
    draws = [Noise(seed, torch.arange(len(x))).each(0, MANY) for seed in (8, 9)]
    with torch.no_grad():
        plain = model.log_weight(x, noise=draws[0], k=MANY)
        none, half, all_ = (
            model.log_weight(x, noise=draws[0], k=MANY, beta=beta) for beta in (0.0, 0.5, 1.0)
        )
        rows = x.repeat_interleave(MANY, 0)
        decoded = model.elbo(rows, noise=draws[1]).reconstruction.double()
    assert torch.equal(all_, plain), "beta=1 is another log w than that asked for without beta"
    straight = torch.allclose(half, (none + plain) / 2, rtol=1e-4, atol=1e-4)
    assert straight, "log w is no straight line in beta"
    both = torch.stack([none.double(), decoded]).view(2, len(x), MANY)
    (found, known), error = both.mean((1, 2)), float(both.var(2).sum() / MANY) ** 0.5 / len(x)
    wrong = abs(float(found - known)) > 5 * error + 1e-4
    said = f"log w is {found:.4f} +- {error:.4f}, the mean reconstruction {known:.4f}"
    assert not wrong, f"with beta=0 the mean {said}"


def samples_come_down_the_chain(make: Make, shape: Any, bins: Bins, **arguments: Any) -> None:
    """Of chains: an image is drawn as often as prior and conditionals say,
    p(x) = E_p(z_1)[p(x | z_1)]."""
    x, model = (
        _all_images(shape, bins),
        chain(built(make, shape, bins, arguments, moved=0.5).eval()),
    )
    if bins is None or x is None or not isinstance(model, MarkovianHierarchy):
        return
    draw = model.ancestral_sample if isinstance(model, VDM) else model.sample  # in T steps
    noise, places = Noise(6, torch.arange(MANY)), bins ** torch.arange(x[0].numel())
    with torch.no_grad():
        z = model.prior(MANY).sample(noise.fold("top"))
        for t in range(model.levels, 1, -1):
            z = model.decode(z, t).sample(noise.fold(f"{t}"))
        decoded = model.decode(z, 1)
        p = torch.stack([decoded.log_prob(each.expand(MANY, *shape)).exp() for each in x]).double()
        drawn = draw(SAMPLES, noise=Noise(7, torch.arange(SAMPLES)))
    found, known = ((each.flatten(1).long() * places).sum(1) for each in (drawn, x))
    share = found.bincount(minlength=len(x))[known].double() / SAMPLES
    variance = (p.mean(1) + 1 / SAMPLES) / SAMPLES + (p.var(1) + 1 / MANY) / MANY
    off = float(((share - p.mean(1)).square() / variance).sum()) - len(x)
    assert off < 5 * (2 * len(x)) ** 0.5, "images are not drawn as often as the model says"


def chain(model: LatentModel) -> LatentModel:
    """The model in finitely many steps."""
    return model.at(steps=3) if isinstance(model, VDM) and model.steps is None else model


def built(
    make: Make, shape: Any, bins: Bins, arguments: dict[str, Any], moved: float = 0.1
) -> LatentModel:
    """As it might be after some training, the same every time: weights are off by about `moved`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(shape=shape, bins=bins, **arguments)
        for p in model.parameters():  # networks begin at zero output, which hides mistakes
            p.data += moved * torch.randn_like(p)
    return model


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Where two draws are one and the same; real numbers but for rounding."""
    return a.isclose(b, rtol=1e-4, atol=1e-5) if a.is_floating_point() else a == b


def _images(shape: Any, bins: Bins) -> Tensor:
    made = torch.Generator().manual_seed(0)
    if bins is None:
        return torch.randn(6, *shape, generator=made)
    return torch.randint(bins, (6, *shape), generator=made, dtype=torch.uint8)


def _all_images(shape: Any, bins: Bins) -> Tensor | None:
    dims = int(torch.tensor(shape).prod())
    if bins is None or bins**dims > ENUMERABLE:
        return None
    every = torch.tensor(list(product(range(bins), repeat=dims)), dtype=torch.uint8)
    return every.view(-1, *shape)


MODEL_LAWS = (
    a_density_says_so,
    bound_is_one_number_per_image,
    an_image_keeps_its_number,
    samples_are_values_of_their_own,
    a_sample_is_of_its_label,
    no_more_than_one_in_all,
    weights_average_to_one_in_all,
    bound_is_the_mean_log_weight,
    beta_weighs_what_the_latents_cost,
    samples_come_down_the_chain,
)

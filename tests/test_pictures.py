"""Pictures show what they say: the very samples, and the way that led to them."""

import resource
from unittest.mock import Mock

import lightning.pytorch as L
import numpy as np
import PIL.Image as PIL
import pytest
import tiny
import torch
from test_diagnostics import Linear, chain, hvae, module

import genfw
from genfw.noise import Noise
from genfw.parameterization import Prediction
from genfw.testing import small
from genfw.testing.model import built
from genfw.train.callbacks import Pictures
from genfw.train.frechet import to_bytes
from genfw.train.latents import Means, latents_of
from genfw.train.pictures import (
    animate,
    data_to_bytes,
    denoising_strip,
    draw_samples,
    grid,
    interpolation,
    reconstructions,
    trajectory,
    traversal,
    way,
)
from genfw.train.sample_files import write


def shown(picture, columns, side=2, zoom=16):
    """The images of a grid, (rows, columns, side, side), out of their enlarged pixels."""
    size = picture.size
    sheet = torch.tensor(list(picture.tobytes())).view(size[1], size[0])[::zoom, ::zoom]
    rows = (sheet.shape[0] - 1) // (side + 1)
    tiles = [
        sheet[1 + r * (side + 1) :][:side, 1 + c * (side + 1) :][:, :side]
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(tiles).view(rows, columns, side, side)


def test_a_trajectory_ends_in_the_sample():
    model, noise = tiny.vdm(), Noise(7, torch.arange(5))
    with torch.no_grad():
        way, x = trajectory(model, noise)
        assert (x == model.sample(5, noise=noise)).all()
    assert [float(step.s) for step in way] == [1, 0.75, 0.5, 0.25, 0]


def test_every_way_is_that_of_the_sample():
    """Of its labels, guided as it is, and with its labels looked at."""
    y, noise = torch.tensor([2, 0, 3, 1]), Noise(7, torch.arange(4))
    model = built(small.vdm, (1, 2, 2), 3, {"classes": 3, "schedule": genfw.Cosine(0.0, -6.0)})
    model.guidance = lambda denoiser: genfw.ClassifierFree(denoiser, 1.5)
    with torch.no_grad():
        z_1 = model.prior(4).sample(noise.fold("prior"))
        z_0 = model.sampler(genfw.ClassifierFree(model.denoiser, 1.5), z_1, y, noise=noise)
        x = model.decode(z_0, 1).sample(noise.fold("z0"))
        steps, end = trajectory(model, noise, y)
        assert torch.equal(model.sample(4, y, noise=noise), x)
    assert torch.equal(steps[0].z, z_1) and torch.equal(steps[-1].z, z_0) and torch.equal(end, x)
    for most, shown_steps in ((60, [0, 1, 2, 3, 4]), (2, [0, 2, 4])):
        frames = way(model, noise, y, 3, columns=2, most=most)
        z = [data_to_bytes(steps[i].z) for i in shown_steps]
        expected = [*(grid(each, 2) for each in z), grid(to_bytes(x, 3), 2)]
        assert [each.tobytes() for each in frames] == [each.tobytes() for each in expected]
    model.denoiser.forward = lambda z, t, y=None: Prediction(z, z, z, z)  # looks at no label
    for ask in (trajectory, lambda *given: way(*given, 3, 2), lambda m, n, y: m.sample(4, y)):
        with pytest.raises(ValueError, match="label"):
            ask(model, noise, torch.full((4,), 4))


def test_a_way_asks_the_denoiser_as_often_as_its_sampler_says():
    model, calls = built(small.vdm, (1, 2, 2), 3, {}), []
    model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    model.sample(4, noise=Noise(7, torch.arange(4)))
    assert len(calls) == model.sampler.evaluations == 4


@pytest.mark.parametrize(("levels", "steps"), [(2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])])
def test_a_strip_goes_from_noise_to_the_sample_in_even_steps(levels, steps):
    """Two rows per sample, z_t above x_hat, both ends among them, and the image itself last."""
    model = tiny.vdm()
    strip = shown(denoising_strip(model, 2, seed=7, bins=3, levels=levels), levels + 1)
    with torch.no_grad():
        way, x = trajectory(model, Noise(7, torch.arange(2)))
    assert strip.shape[:2] == (4, levels + 1)
    for column, i in enumerate(steps):
        latents, guesses = (data_to_bytes(each) for each in (way[i].z, way[i].prediction.x))
        assert torch.equal(strip[0::2, column], latents[:, 0])
        assert torch.equal(strip[1::2, column], guesses[:, 0])
    assert torch.equal(strip[:, -1], to_bytes(x, 3)[:, 0].repeat_interleave(2, 0))


def test_a_sample_is_its_number_and_seed():
    model = tiny.vdm()
    at_once = draw_samples(model, range(7), seed=1)
    assert (draw_samples(model, range(7), seed=1, chunk=3) == at_once).all()
    assert (draw_samples(model, range(1, 7, 2), seed=1) == at_once[1::2]).all()  # rank 1 of 2
    assert (draw_samples(model, range(7), seed=2) != at_once).any()


def test_grid_puts_images_row_by_row():
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 2, 2) * 100
    picture = torch.tensor(list(grid(images, columns=2, smallest=1).tobytes())).reshape(7, 7)
    assert picture[1:3, 1:3].unique() == 0
    assert picture[1:3, 4:6].unique() == 100
    assert picture[4:6, 1:3].unique() == 200
    assert picture[:, 3].unique() == picture[4:6, 4:6].unique() == 127


def test_grid_of_colours_and_of_vectors():
    colours = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    colours[:, 1] = 9
    assert grid(colours, columns=2, smallest=4).getpixel((1, 1)) == (0, 9, 0)
    assert grid(torch.zeros(2, 5, dtype=torch.uint8), columns=1, smallest=5).size == (7, 5)


def test_data_are_bytes_between_their_ends():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    assert data_to_bytes(x).tolist() == [0, 0, 128, 255, 255]


FACTS = {"label": "none", "run": "a"}
FILES = {
    "grid": lambda x, out: write(x, None, FACTS, "grid", out, 3, 2),
    "npz": lambda x, out: write(x, None, FACTS, "npz", out, 3, 2),
    "gif": lambda x, out: animate(
        [grid(to_bytes(x, 3), 2), grid(to_bytes(2 - x, 3), 2)], out, FACTS
    ),
}


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 5, 2)])
def test_images_of_a_folder_are_their_own_pixels(tmp_path, shape):
    """No frame and no enlargement: who measures the files measures the samples."""
    x = torch.randint(256, (3, *shape))
    write(x, None, FACTS, "png", tmp_path, 256, 2)
    for i, one in enumerate(x):
        pixels = np.asarray(PIL.open(tmp_path / f"{i:05d}.png"))
        assert np.array_equal(pixels if len(one) == 3 else pixels[..., None], one.permute(1, 2, 0))


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_samples_is_whole_or_as_it_was(kind, tmp_path):
    """A limit on the size of files stops a write in its midst, as a full disk does."""
    x, out = torch.randint(3, (4, 1, 8, 8)), tmp_path / f"out.{kind}"
    FILES[kind](x, out)
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    assert len(before) == 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(OSError):
            FILES[kind](2 - x, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_reconstructions_of_a_perfect_vae():
    """An encoder that copies and a decoder that is sure: the rows below equal the rows above."""

    class Copy(torch.nn.Module):
        def forward(self, x, y=None):
            x = x.flatten(1)
            return torch.cat([x, torch.full_like(x, -7.0)], 1)

    class Read(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(1000.0))

        def forward(self, z, y=None):
            centres = torch.tensor([-2 / 3, 0.0, 2 / 3])
            distance = (z[:, None] - centres[:, None]).square()
            return (-self.gain * distance).reshape(len(z), 3, 2, 2)

    x = torch.randint(3, (4, 1, 2, 2))
    model = genfw.VAE(Copy(), Read(), genfw.CategoricalLikelihood(3), latents=4)
    noise = Noise(0, torch.arange(4))
    picture = reconstructions(latents_of(model), x, noise, bins=3)
    rows = [picture.crop((0, top, picture.width, top + 32)) for top in (16, 64)]  # 16-fold, 1 gap
    assert rows[0].tobytes() == rows[1].tobytes()
    assert len(set(rows[0].tobytes())) == 4  # three values and the gap


@pytest.mark.parametrize("made", [chain, hvae])
def test_reconstructions_of_every_level(made):
    """Row t: the mean image where z_t .. z_T are drawn for the image above."""
    model, x, noise = made(), torch.randint(3, (3, 1, 2, 2)), Noise(0, torch.arange(3))
    latents = latents_of(model)
    rows = shown(reconstructions(latents, x, noise, bins=3), 3)
    assert rows.shape[:2] == (3, 3)  # of the images, and of two levels
    assert (rows[0] == (x[:, 0] * 127.5).round()).all()
    with torch.no_grad():
        z = [each for _, each in latents.posteriors(x, noise=noise)]
        for t in range(2):
            expected = latents.expected(z[t:])[:, 0] * 127.5
            assert (rows[t + 1] - expected).abs().max() < 1.01
    trainer = Mock(spec=L.Trainer, callbacks=[], is_global_zero=True)
    drawn = Pictures(bins=3, samples=4).draw(trainer, module(model), x)
    assert drawn.keys() == {"samples", "reconstructions"}


@pytest.mark.parametrize("wrong", [{"levels": 1}, {"samples": 0}, {"examples": 0}])
def test_pictures_need_images_and_two_levels(wrong):
    with pytest.raises(ValueError, match="expected an integer of at least"):
        Pictures(256, **wrong)


@pytest.mark.parametrize("made", [chain, hvae])
def test_interpolation_begins_and_ends_where_the_images_are(made):
    model, x = made(), torch.tensor([[0, 1, 2, 2], [2, 1, 0, 0]]).view(2, 1, 2, 2)
    with torch.no_grad():
        latents = latents_of(model)
        rows = shown(interpolation(latents, x, None, bins=3, columns=5), 5)
        means = [z for _, z in latents.posteriors(x, noise=Means())]
        ends = [latents.expected(means[t:]) * 127.5 for t in range(2)]
        middle = latents.expected([(z[:1] + z[1:]) / 2 for z in means]) * 127.5
    assert rows.shape[0] == 2
    for row, end in zip(rows, ends, strict=True):
        assert (row[0] == (x[0, 0] * 127.5).round()).all()
        assert (row[4] == (x[1, 0] * 127.5).round()).all()
        assert (row[1] - end[0, 0]).abs().max() < 1.01
        assert (row[3] - end[1, 0]).abs().max() < 1.01
    assert (rows[0, 2] - middle[0, 0]).abs().max() < 1.01


class Painter(torch.nn.Module):
    """Paints every image in the value that is its label."""

    def forward(self, z, y):
        return (100.0 * torch.nn.functional.one_hot(y, 3))[..., None, None].expand(-1, 3, 2, 2)


def test_interpolation_has_the_label_of_the_nearer_image():
    likelihood = genfw.CategoricalLikelihood(3)
    latents = latents_of(genfw.VAE(Linear(4, 6), Painter(), likelihood, 3, classes=3))
    x, y = torch.ones(2, 1, 2, 2, dtype=torch.int64), torch.tensor([0, 2])
    with torch.no_grad():
        row = shown(interpolation(latents, x, y, bins=3, columns=6), 6)[0]
    assert row.flatten(1).float().mean(1).tolist() == [128, 0, 0, 255, 255, 128]


@pytest.mark.parametrize("made", [chain, hvae])
def test_traversal_moves_one_unit(made):
    model, x = made(), torch.tensor([0, 1, 2, 2]).view(1, 1, 2, 2)
    scale = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        latents = latents_of(model)
        picture = traversal(latents, x, None, 2, [1], scale, bins=3, columns=3)
        _, (_, z) = latents.posteriors(x, noise=Means())
        for column, shift in enumerate((-6.0, 0.0, 6.0)):
            flat = z.flatten(1).clone()
            flat[0, 1] += shift
            expected = latents.expected([flat.view_as(z)])[0, 0] * 127.5
            assert (shown(picture, 3)[0, column] - expected).abs().max() < 1.01

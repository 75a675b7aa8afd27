"""Laws of networks: every registered one obeys them, whatever it is built of."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from genfw.nets import (
    MLP,
    Conv,
    ConvDecoder,
    Decoder,
    DenoisingNetwork,
    Encoder,
    Fourier,
    MLPDecoder,
    Network,
    UNet,
    sinusoidal,
)
from genfw.nets.blocks import Attention
from genfw.nets.unet import Stage

CLASSES, LATENTS, OUTPUTS = 3, 5, 4
SHAPES = [(1, 8, 8), (3, 12, 8)]
NETS = sorted(Network.registry.items())
DENOISERS = [(name, cls) for name, cls in NETS if issubclass(cls, DenoisingNetwork)]

each_net = pytest.mark.parametrize("cls", [pytest.param(cls, id=name) for name, cls in NETS])
each_denoiser = pytest.mark.parametrize(
    "cls", [pytest.param(cls, id=name) for name, cls in DENOISERS]
)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def build(cls: type[Network], shape: tuple[int, ...], **options: Any) -> Network:
    """A network in float64 without zero parameters: what zero layers hide comes to light."""
    torch.manual_seed(0)
    if issubclass(cls, Encoder):
        options |= {"latents": LATENTS}
    elif issubclass(cls, Decoder):
        options |= {"latents": LATENTS, "outputs": OUTPUTS}
    net = cls(shape=shape, **options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net.eval()


def arguments(net: Network, size: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """A batch of what this kind of network is called with, labels left out."""
    generator = torch.Generator().manual_seed(seed)
    shape = net.latents if isinstance(net, Decoder) else net.shape
    data = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    if not isinstance(net, DenoisingNetwork):
        return (data,)
    return data, torch.rand(size, generator=generator, dtype=torch.float64)


def expected_shape(net: Network, size: int) -> tuple[int, ...]:
    if isinstance(net, Encoder):
        return size, 2 * LATENTS
    per_channel = OUTPUTS if isinstance(net, Decoder) else 1
    return size, per_channel * net.shape[0], *net.shape[1:]


@each_net
@each_shape
def test_output_has_the_shape_of_the_contract_and_the_dtype_of_the_network(cls, shape):
    net = build(cls, shape)
    out = net(*arguments(net, 2))
    assert out.shape == expected_shape(net, 2)
    assert out.dtype == torch.float64
    single = [argument.float() for argument in arguments(net, 2)]
    assert net.float()(*single).dtype == torch.float32
    torch.testing.assert_close(net(*single), out.float(), rtol=1e-3, atol=1e-3)


@each_denoiser
def test_schedules_may_give_the_level_in_float64_to_a_network_in_float32(cls):
    net = build(cls, (1, 8, 8), bins=17, fourier=2).float()
    z, level = arguments(net, 2)
    assert net(z.float(), level).dtype == torch.float32


@each_denoiser
@each_shape
def test_a_denoiser_answers_zero_before_training(cls, shape):
    net = cls(shape=shape, out_channels=2 * shape[0], bins=17, fourier=2, classes=CLASSES)
    z = torch.randn(3, *shape)
    out = net(z, torch.rand(3), torch.arange(3))
    assert out.shape == (3, 2 * shape[0], *shape[1:])
    assert not out.any()


@pytest.mark.parametrize(
    ("cls", "options"),
    [pytest.param(cls, {}, id=name) for name, cls in NETS]
    + [pytest.param(Conv, {"attention": True}, id="conv with attention")],
)
def test_the_gradient_reaches_every_parameter(cls, options):
    net = build(cls, (1, 8, 8), classes=CLASSES, **options)
    y = torch.arange(CLASSES + 1)
    torch.sin(7 * net(*arguments(net, len(y)), y)).sum().backward()
    unreached = [
        name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12
    ]
    assert not unreached


@each_net
def test_an_example_does_not_see_its_batch(cls):
    net = build(cls, (1, 8, 8), classes=CLASSES)
    mates, others = arguments(net, 4), arguments(net, 4, seed=2)
    y = torch.tensor([0, 1, 2, 0])
    mixed = [torch.cat([a[:1], b[1:3]]) for a, b in zip(mates, others, strict=True)]
    for training in (False, True):
        net.train(training)
        alone = net(*mates, y)[0]
        torch.testing.assert_close(net(*mixed, y[:3])[0], alone, rtol=1e-10, atol=1e-10)


@each_denoiser
def test_the_level_matters_at_every_scale(cls):
    net = build(cls, (1, 8, 8))
    z, _ = arguments(net, 1)
    levels = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0]).double()
    out = net(z.expand(len(levels), *net.shape), levels).flatten(1)
    distances = torch.cdist(out, out) + torch.eye(len(levels))
    assert distances.min() > 1e-3 * out.norm(dim=1).mean()


@each_net
def test_labels_matter_where_there_are_classes_and_only_there(cls):
    net = build(cls, (1, 8, 8), classes=CLASSES)
    inputs = arguments(net, 2)
    zeros, ones = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    assert not torch.allclose(net(*inputs, zeros), net(*inputs, ones), rtol=1e-3)
    assert not torch.allclose(net(*inputs, zeros), net(*inputs), rtol=1e-3)
    assert torch.equal(net(*inputs), net(*inputs, torch.full((2,), CLASSES)))
    without = build(cls, (1, 8, 8))
    assert torch.equal(without(*inputs, zeros), without(*inputs, ones))
    assert (net.classes, without.classes) == (CLASSES, None)  # which a model asks


@each_net
def test_labels_of_any_integers_and_of_no_others(cls):
    """Bytes, which torch would take for a mask; and -1 is no way to say "no label"."""
    net = build(cls, (1, 8, 8), classes=CLASSES)
    inputs, y = arguments(net, CLASSES + 1), torch.tensor([2, 0, 1, 3])
    assert torch.equal(net(*inputs, y.to(torch.uint8)), net(*inputs, y))
    for wrong in (y - 1, y + 1):
        with pytest.raises(ValueError, match=r"labels: expected 0\.\.2, or 3 for none"):
            net(*inputs, wrong)
    for wrong in (y.float(), y > 1, y[:1]):
        with pytest.raises((TypeError, ValueError)):
            net(*inputs, wrong)


@each_net
def test_dropout_acts_in_training_only(cls):
    net = build(cls, (1, 8, 8), dropout=0.5)
    inputs = arguments(net, 2)
    assert torch.equal(net(*inputs), net(*inputs))
    net.train()
    assert not torch.equal(net(*inputs), net(*inputs))


@each_denoiser
def test_fourier_features_enter_the_network(cls):
    """Of two inputs a whole bin apart, those of one comb are told from those between the teeth."""
    torch.manual_seed(0)
    z = torch.randn(1, 1, 8, 8).double()
    level = torch.ones(1).double()
    plain, combed = build(cls, (1, 8, 8)), build(cls, (1, 8, 8), bins=2**20, fourier=1)
    step = 2.0**-20

    def change(net: Network) -> float:
        return (net(z + step, level) - net(z, level)).abs().max().item()

    assert change(plain) < 1e-4
    assert change(combed) > 1e-3


@pytest.mark.parametrize("period", [1, 2, 4])
def test_fourier_features_have_periods_of_whole_bins_and_fade_as_noise_leaves_them(period):
    """The feature of clean data is the average of the noisy feature. Tolerance: 5 errors."""
    bins, omega = 17, math.pi * 17 / period
    fourier = Fourier(bins, 3, log_snr_min=-10.0, log_snr_max=8.0)
    n, x = 200_000, 0.3
    log_snr = torch.tensor(6.0).double()
    sigma = torch.sigmoid(-log_snr).sqrt()
    generator = torch.Generator().manual_seed(0)
    z = x + sigma * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    at = 1 + 2 * int(math.log2(period))
    averages = torch.stack([torch.sin(omega * z).mean(), torch.cos(omega * z).mean()])
    clean = fourier(torch.full((1, 1), x, dtype=torch.float64), ((log_snr + 10) / 18)[None])[0]
    torch.testing.assert_close(clean[at : at + 2], averages, rtol=0, atol=5 / math.sqrt(n))
    shifted = torch.full((1, 1), x + period * 2 / bins, dtype=torch.float64)
    again = fourier(shifted, ((log_snr + 10) / 18)[None])[0]
    torch.testing.assert_close(again[at : at + 2], clean[at : at + 2])
    assert clean[at : at + 2].abs().max() > 1e-4


@pytest.mark.parametrize("data_std", [0.4, 2.0])
def test_features_of_a_scaled_latent_are_those_of_the_latent(data_std):
    """Edm's input, z / r with r^2 = sigma^2 + alpha^2 s_d^2: the teeth of z, one bin apart."""
    z, level = torch.randn(6, 1, 3), torch.linspace(0, 1, 6)
    log_snr = -10.0 + 18.0 * level
    alpha, sigma = (each.sigmoid().sqrt().view(-1, 1, 1) for each in (log_snr, -log_snr))
    r = (sigma**2 + alpha**2 * data_std**2).sqrt()
    plain, told = (Fourier(17, 3, s, log_snr_max=8.0) for s in (None, data_std))
    expected, found = plain(z, level), told(z / r, level)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, :1], z / r)


def test_fourier_features_of_bytes_are_those_of_vdm():
    z = torch.linspace(-1, 1, 40).double()[:, None]
    fourier = Fourier(256, 2, log_snr_max=200.0)
    features = fourier(z, torch.ones(40).double())
    vdm = [f(2.0**n * math.pi * z) for n in (8, 7) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(features, torch.cat([z, *vdm], dim=1))


def test_fourier_features_vanish_in_pure_noise():
    features = Fourier(17, 3)(torch.randn(5, 1), torch.zeros(5))
    assert features[:, 1:].abs().max() < 1e-3


def test_levels_are_embedded_as_times_of_a_thousand():
    level = torch.tensor([0.0, 0.25, 1.0]).double()
    omega = torch.tensor([10000 ** (-i / 3) for i in range(4)], dtype=torch.float64)
    angle = 1000 * level[:, None] * omega
    torch.testing.assert_close(sinusoidal(level, 8), torch.cat([angle.sin(), angle.cos()], 1))


def test_attention_is_that_of_the_textbook():
    torch.manual_seed(0)
    attention = Attention(8, heads=2).double()
    h = torch.randn(2, 8, 3, 2).double()
    tokens = attention.norm(h).flatten(2).transpose(1, 2)
    weight, bias = attention.qkv.weight[..., 0, 0], attention.qkv.bias
    q, k, v = (tokens @ weight.T + bias).split(8, dim=2)
    heads = []
    for i in (slice(0, 4), slice(4, 8)):
        scores = q[..., i] @ k[..., i].transpose(1, 2) / math.sqrt(4)
        heads.append(scores.softmax(-1) @ v[..., i])
    mixed = torch.cat(heads, 2) @ attention.out.weight[..., 0, 0].T + attention.out.bias
    expected = h + mixed.transpose(1, 2).reshape(h.shape)
    torch.testing.assert_close(attention(h), expected)


@each_denoiser
def test_the_output_can_be_z_itself_at_any_scale(cls):
    """eps is z in pure noise, and no normalization may stand between them."""
    net = cls(shape=(2, 8, 8), out_channels=4)
    torch.nn.init.ones_(net.output.gain.bias)
    z = 1000 * torch.randn(3, 2, 8, 8)
    out = net(z, torch.rand(3)).unflatten(1, (2, 2))
    torch.testing.assert_close(out, z[:, None].expand_as(out))


@pytest.mark.parametrize("size", [8, 28, 32])
def test_the_unet_attends_to_the_coarse_and_halves_evenly(size):
    net = UNet(shape=(1, size, size), width=8, blocks=2, attention=7)
    assert net(torch.randn(2, 1, size, size), torch.rand(2)).shape == (2, 1, size, size)
    attends = sum(isinstance(module, Attention) for module in net.modules())
    assert attends == {8: 11, 28: 6, 32: 1}[size]


def test_the_unet_gives_each_step_down_to_one_step_up():
    net = UNet(shape=(1, 8, 8), width=8, blocks=2)
    down, up = [], []
    for layer in [net.enter, *net.down]:
        layer.register_forward_hook(lambda _, inputs, output: down.append(output))
    for layer in net.up:
        if isinstance(layer, Stage):
            layer.register_forward_hook(lambda _, inputs, output: up.append(inputs[0]))
    net(torch.randn(2, 1, 8, 8), torch.rand(2))
    assert len(up) == len(down)
    for given, kept in zip(up, reversed(down), strict=True):
        assert torch.equal(given[:, -kept.shape[1] :], kept)


@pytest.mark.parametrize("cls", [ConvDecoder, MLPDecoder])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (28, 28)], ids=str)
def test_decoders_fit_odd_sizes(cls, size):
    net = cls(shape=(2, *size), latents=3, outputs=5)
    assert net(torch.randn(2, 3)).shape == (2, 10, *size)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_between_levels_latents_have_any_shape(kind):
    """A level above maps (4, 6, 5) to (2, 3, 3) and back: 2 numbers of each, mean and log std."""
    encoder = Network.registry[f"{kind}_encoder"](shape=(4, 6, 5), latents=(2, 3, 3))
    decoder = Network.registry[f"{kind}_decoder"](shape=(4, 6, 5), latents=(2, 3, 3), outputs=2)
    assert encoder(torch.randn(2, 4, 6, 5)).shape == (2, 4, 3, 3)
    assert decoder(torch.randn(2, 2, 3, 3)).shape == (2, 8, 6, 5)
    with pytest.raises(ValueError, match="Decoder reads 2x3x3 per example, got 5: build it"):
        decoder(torch.randn(2, 5))
    with pytest.raises(ValueError, match="Encoder reads 4x6x5 per example, got 4x6x6: build it"):
        encoder(torch.randn(2, 4, 6, 6))


def test_a_decoder_starts_at_the_bias_it_is_given():
    bias = torch.randn(2, 3, 4)
    decoder = MLPDecoder((2, 3, 4), 5, 1, output_bias=bias.flatten().tolist())
    before = MLPDecoder((2, 3, 4), 5, 1)
    before.load_state_dict(decoder.state_dict())
    torch.nn.init.zeros_(before.layers[-1].bias)
    z = torch.randn(2, 5)
    torch.testing.assert_close(decoder(z), before(z) + bias)
    assert (MLPDecoder(4, 2, 1, output_bias=-1.5).layers[-1].bias == -1.5).all()


def test_networks_print_what_they_map():
    net = Conv((1, 8, 8), out_channels=17, width=8, blocks=1)
    count = sum(p.numel() for p in net.parameters())
    assert repr(net) == f"Conv(z 1x8x8, level -> 17x8x8, {count:,} parameters)"
    assert repr(MLPDecoder((4,), 3, 5, hidden=[])) == "MLPDecoder(z 3 -> 20, 80 parameters)"


def _unet(**options: Any) -> Callable[[], Network]:
    return lambda: UNet(**({"shape": (1, 8, 8), "width": 8} | options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            _unet(shape=(1, 30, 30)),
            "3 resolutions need an image divisible by 4, got 30x30; take fewer, or net=conv",
        ),
        (_unet(shape=(64,)), r"shape: expected positive sizes \(C, H, W\), got \(64,\)"),
        (_unet(fourier=-1), "fourier: expected a number of frequencies >= 0, got -1"),
        (_unet(bins=1), "bins: expected at least 2 values, got 1"),
        (_unet(shape=(3, 8, 8), out_channels=4), "a multiple of the 3 channels"),
        (_unet(heads=3, attention=8), "heads: expected a divisor of 8 channels, got 3"),
        (lambda: Conv((1, 8, 8), width=9), "width .* expected an even number >= 4, got 9"),
        (lambda: Conv((1, 8, 8), classes=0), "classes: expected an integer of at least 1, got 0"),
        (lambda: MLP((0,)), r"shape: expected positive sizes \(D,\) or \(C, \*dims\)"),
        (
            lambda: ConvDecoder((1, 2, 2), 3, 4, channels=(8, 8, 8)),
            "channels: 3 resolutions do not fit",
        ),
        (lambda: MLPDecoder((4,), (3, 0), 4), r"latents: expected positive sizes .*, got \(3, 0\)"),
        (lambda: MLPDecoder((4,), 3, 1, output_bias=[1.0] * 3), "expected 1 number or 4, got 3"),
        (lambda: MLPDecoder((4,), 3, 4, activation="sillu"), "expected one of silu, .*'sillu'"),
    ],
)
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)

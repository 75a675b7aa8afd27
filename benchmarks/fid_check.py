"""FID end to end, without the published weights: `make fid-check`.

A randomly initialised Inception network is saved in torch-fidelity's layout and given as `weights`,
and two sets of random images shaped like CIFAR-10's are compared three ways: by genfw, by
torchmetrics' own FID, and by torch-fidelity. Same network, same images, so the same number; the
reference then comes from the cache, and must not change it. Needs torch-fidelity and a torchvision
that fits torch, which is why it has an environment of its own.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from genfw.train.features import InceptionFeatures
from genfw.train.frechet import FrechetDistance

IMAGES = 48


class Images(TensorDataset):
    """Images alone, as torch-fidelity reads them."""

    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index)[0]


def random_inception(file: Path) -> None:
    """Saves an Inception network with random weights in torch-fidelity's layout."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            """Keeps the initial weights."""

    torch.save({}, file)
    network = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), file)


def random_images(seed: int, smooth: float) -> Tensor:
    """(IMAGES, 3, 32, 32) bytes: coarse colour blotches mixed with noise."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(IMAGES, 3, 4, 4, generator=draw)
    fine = torch.rand(IMAGES, 3, 32, 32, generator=draw)
    image = smooth * nn.functional.interpolate(coarse, 32, mode="bicubic") + (1 - smooth) * fine
    return (255 * image).round().clamp(0, 255).to(torch.uint8)


def by_genfw(real: Tensor, generated: Tensor, weights: Path, cache: Path) -> float:
    distance = FrechetDistance(InceptionFeatures(weights), bins=256, cache=cache)
    distance.reference(real.numpy(), split="train", content_hash="random")
    for batch in generated.split(24):
        distance.update(batch)
    value = distance.compute()
    print(f"genfw           {distance.record}")
    return value


def by_torchmetrics(real: Tensor, generated: Tensor, weights: Path) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=weights, antialias=False)
    for batch in real.split(32):
        metric.update(batch, real=True)
    for batch in generated.split(32):
        metric.update(batch, real=False)
    return metric.compute().item()


def by_torch_fidelity(real: Tensor, generated: Tensor, weights: Path) -> float:
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=Images(generated),
        input2=Images(real),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=32,
        feature_extractor_weights_path=str(weights),
    )
    return found["frechet_inception_distance"]


def main() -> None:
    warnings.filterwarnings("ignore", message=".*worker processes.*")
    logging.basicConfig(format="                %(message)s", level=logging.INFO)
    torch.manual_seed(0)
    real, generated = random_images(1, smooth=0.7), random_images(2, smooth=0.5)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        weights, cache = Path(folder, "inception.pth"), Path(folder, "cache")
        random_inception(weights)

        value = by_genfw(real, generated, weights, cache)
        (statistics,) = cache.iterdir()
        again = by_genfw(real, generated, weights, cache)
        torchmetrics = by_torchmetrics(real, generated, weights)
        fidelity = by_torch_fidelity(real, generated, weights)
        for name, other in {"torchmetrics": torchmetrics, "torch-fidelity": fidelity}.items():
            print(f"{name:15} {other:.6g}, relative difference {value / other - 1:.1e}")

        extractor = InceptionFeatures(weights)
        grey = real[:2, :1]
        repeats = torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
        opened = FrechetDistance.open("auto", (3, 32, 32), 256, weights)
        weights.write_bytes(b"not a checkpoint")
        refused = FrechetDistance.open("auto", (3, 32, 32), 256, weights)

    checks = {
        "equals torchmetrics (1e-5, it returns float32)": abs(value / torchmetrics - 1) < 1e-5,
        "equals torch-fidelity (1e-4)": abs(value / fidelity - 1) < 1e-4,
        "cached reference gives the same": value == again and statistics.name.startswith("fid_"),
        "grey images are repeated to three channels": repeats,
        "auto takes it for colour images": opened is not None and opened.key == "fid_inception",
        "a damaged weights file costs a message, not the run": refused is None,
    }
    for check, passed in checks.items():
        print(f"{'ok    ' if passed else 'FAILED'}  {check}")
    print(f"{time.time() - start:.0f} s")
    raise SystemExit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()

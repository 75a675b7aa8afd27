"""Trains the small classifier behind a Frechet distance.

python -m genfw.train.fit_features digits
python -m genfw.train.fit_features mnist --path <folder of parquet files>     (or from the hub)

Half a minute, and three minutes, of one core. Deterministic: one thread, fixed seed. Training
images are bent by random affine maps, so that the features speak of the digit and not of its
examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from genfw.train.data import Digits, HubImages, Split
from genfw.train.errors import GenfwError
from genfw.train.features import (
    Bytes,
    Classifier,
    ClassifierFeatures,
    DigitsFeatures,
    FeatureExtractor,
    MNISTFeatures,
    to_bytes,
)


class Labelled(NamedTuple):
    """Images as bytes (n, C, H, W) and their classes (n,)."""

    images: Bytes
    labels: Tensor


def digits(path: Path | None = None) -> tuple[Labelled, Labelled]:
    """The 1000 training and the 447 test images of `genfw.train.data.Digits`."""
    splits = Digits().read(DigitsFeatures.shape, path)
    return labelled(splits.train, 17), labelled(splits.test, 17)


def mnist(path: Path | None = None) -> tuple[Labelled, Labelled]:
    """The 50,000 training and the 10,000 test images of conf/data/mnist.yaml."""
    splits = HubImages("ylecun/mnist", validation=10_000).read(MNISTFeatures.shape, path)
    return labelled(splits.train, 256), labelled(splits.test, 256)


def labelled(split: Split, bins: int) -> Labelled:
    """A split whose images are integers 0..bins-1."""
    return Labelled(to_bytes(torch.tensor(split.images), bins), torch.tensor(split.labels))


DATA: dict[str, Callable[[Path | None], tuple[Labelled, Labelled]]] = {
    "digits": digits,
    "mnist": mnist,
}
STEPS = {"digits": 2500, "mnist": 1500}  # 320 epochs of few images, four of many


def fit(train: Labelled, classifier: Classifier, steps: int) -> Classifier:
    """Cross-entropy with smoothed labels, AdamW, one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    classifier.train()
    for _ in range(steps):
        batch = torch.randint(len(train.labels), (128,))
        x = bend(classifier.normalize(train.images[batch]))
        loss = F.cross_entropy(classifier(x), train.labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def bend(x: Tensor, linear: float = 0.1, shift: float = 0.12) -> Tensor:
    """A random affine map of each image; what comes in from outside is background (-1).

    Args:
        x: (b, C, H, W) in (-1, 1).
        linear: standard deviation of the matrix entries about the identity.
        shift: standard deviation of the translation; 2 is the width of the image.
    """
    matrix = torch.eye(2) + linear * torch.randn(len(x), 2, 2)
    maps = torch.cat([matrix, shift * torch.randn(len(x), 2, 1)], dim=2)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def accuracy(classifier: Classifier, data: Labelled) -> float:
    """The share of images that it recognises."""
    with torch.no_grad():
        found = [classifier(classifier.normalize(x)).argmax(1) for x in data.images.split(1000)]
    return (torch.cat(found) == data.labels).double().mean().item()


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("data", choices=sorted(DATA))
    parser.add_argument("--path", type=Path, help="folder of parquet files; default: the hub")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: the file that genfw ships")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    extractor: type[ClassifierFeatures] = FeatureExtractor.registry[args.data]
    try:
        train, test = DATA[args.data](args.path)
    except GenfwError as error:
        parser.error(str(error))
    classifier = fit(train, Classifier(extractor.shape, extractor.dim), STEPS[args.data])
    metadata = {
        "accuracy": f"{accuracy(classifier, test):.4f}",
        "accuracy of": f"{len(test.labels)} test images of {args.data}",
        "trained on": f"{len(train.labels)} training images of {args.data}",
        "made by": f"python -m genfw.train.fit_features {args.data} --seed {args.seed}",
    }
    file = args.output or extractor.file()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), file, metadata)
    print(f"{file}: accuracy {metadata['accuracy']} on {metadata['accuracy of']}")


if __name__ == "__main__":
    main()

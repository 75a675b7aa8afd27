r"""Feature extractors: what a Frechet distance sees of an image.

A distance between sets of images means something only with the name of its features. Each extractor
therefore carries the key its distance is reported under: `fd_<name>` for a small classifier of
ours, and `fid_inception` for the network of the published FIDs. Nothing else is called FID.

Every extractor takes bytes (b, C, H, W), 0..255, and does its own resizing and scaling.

References:
    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium,
    Heusel et al., 2017, https://arxiv.org/abs/1706.08500 (FID).

    High-fidelity performance metrics for generative models in PyTorch, Obukhov et al., 2020,
    https://github.com/toshas/torch-fidelity (the Inception network, its resizing, its weights).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import ClassVar
from urllib.request import urlopen

import torch
from jaxtyping import Float, Integer, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from genfw.registry import Registered

Bytes = UInt8[Tensor, "b c h w"]
Features = Float[Tensor, "b dim"]


def to_bytes(images: Integer[Tensor, "b c h w"], bins: int) -> Bytes:
    """Integers 0..bins-1 as bytes, round(255 x / (bins - 1)).

    Raises:
        IndexError: a value outside 0..bins-1 (on the CPU).

    Example:
        >>> to_bytes(torch.arange(5).view(1, 1, 1, 5), bins=5).flatten().tolist()
        [0, 64, 128, 191, 255]
    """
    byte = (torch.arange(bins, dtype=torch.float64) * 255 / (bins - 1)).round().to(torch.uint8)
    return byte.to(images.device)[images.long()]


class FeaturesUnavailable(RuntimeError):
    """A package, file or connection that an extractor needs is missing; says what to do."""


class FeatureExtractor(Registered, nn.Module, ABC, group="features"):
    """Maps images to features, (b, C, H, W) bytes -> (b, dim).

    Attributes:
        name: as in `metrics.fid.extractor=<name>`.
        key: what the Frechet distance in these features is called in logs and results.
        dim: number of features; more images than that are needed for a covariance of full rank.
        takes: the images it is for, in words.

    Every constructor takes `weights`, a file, or None for the extractor's own.
    """

    key: ClassVar[str]
    dim: ClassVar[int]
    takes: ClassVar[str]

    @classmethod
    @abstractmethod
    def fits(cls, shape: tuple[int, ...]) -> bool:
        """Whether it can read images of this shape, (C, H, W)."""

    @classmethod
    def refusal(cls, shape: Sequence[int], bins: int | None) -> str | None:
        """Why images of this shape with values 0..bins-1 (None: real-valued) cannot be taken.

        None where they can.
        """
        if bins is None:
            return f"{cls.key} takes images of integers, and these are real-valued"
        if not cls.fits(tuple(shape)):
            return f"{cls.key} takes {cls.takes}, and these are {tuple(shape)}"
        return None

    @classmethod
    def accepts(cls, shape: Sequence[int], bins: int | None) -> bool:
        """Whether `refusal` has nothing to say."""
        return cls.refusal(shape, bins) is None

    @abstractmethod
    def features(self, images: Bytes) -> Features: ...

    def forward(self, images: Bytes) -> Features:
        """Features, computed in float32 outside autocast, returned in float64 to be summed.

        Raises:
            TypeError: images that are not bytes.
            ValueError: images of a shape that the extractor refuses.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"{self.key} takes bytes (uint8, 0..255), not {images.dtype}")
        if reason := self.refusal(images.shape[1:], 256):
            raise ValueError(reason)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.features(images).double()

    @property
    def num_features(self) -> int:
        """`dim`, by the name torchmetrics asks for."""
        return self.dim

    def fingerprint(self) -> str:
        """A hash of name and weights: equal features, equal fingerprint."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=16)
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def choose(name: str, shape: Sequence[int], bins: int | None) -> type[FeatureExtractor]:
    """The extractor of this name; `auto`: the first that takes the images, Inception last.

    Raises:
        ValueError: no such extractor, or one that cannot take the images.

    Example:
        >>> [choose("auto", shape, 256).key for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32))]
        ['fd_digits', 'fd_mnist', 'fid_inception']
    """
    registry = FeatureExtractor.registry
    if name == "auto":
        for cls in sorted(registry.values(), key=lambda cls: cls is InceptionFeatures):
            if cls.accepts(shape, bins):
                return cls
        reasons = "; ".join(filter(None, (cls.refusal(shape, bins) for cls in registry.values())))
        raise ValueError(f"no feature extractor takes these images: {reasons}")
    if name not in registry:
        raise ValueError(f"no feature extractor {name!r}; there are auto, {', '.join(registry)}")
    if reason := registry[name].refusal(shape, bins):
        raise ValueError(reason)
    return registry[name]


class Classifier(nn.Module):
    """A small convolutional classifier of square images; its features are what the head reads.

    Smooth activations: no feature is dead, and the covariance of a few hundred has full rank.

    Args:
        shape: (C, H, W), H = W.
        features: width of the penultimate layer.
        width: channels of the first convolution, half of the others'.
        classes: number of classes.
    """

    def __init__(
        self, shape: Sequence[int], features: int = 32, width: int = 32, classes: int = 10
    ):
        super().__init__()
        channels, side, _ = shape
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.GELU()]
        channels = width
        while side > 4:
            layers += [nn.Conv2d(channels, 2 * width, 3, stride=2, padding=1), nn.GELU()]
            channels, side = 2 * width, (side + 1) // 2
        layers += [nn.Conv2d(channels, 2 * width, 3, padding=1), nn.GELU(), nn.Flatten()]
        layers += [nn.Dropout(0.5), nn.Linear(2 * width * side**2, features), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(features, classes)

    @staticmethod
    def normalize(images: Bytes) -> Float[Tensor, "b c h w"]:
        """Bytes to (-1, 1)."""
        return images.float() / 127.5 - 1

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of normalized images."""
        return self.head(self.body(x))


class ClassifierFeatures(FeatureExtractor, ABC):
    """Features of a `Classifier` that `python -m genfw.train.fit_features` trained.

    Args:
        weights: a safetensors file; None: `weights/<name>.safetensors`.

    Raises:
        FeaturesUnavailable: no such file.
    """

    shape: ClassVar[tuple[int, int, int]]
    dim = 32

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        file = Path(weights) if weights else self.file()
        if not file.is_file():
            raise FeaturesUnavailable(
                f"no weights {file} for {self.key}; "
                f"make them: python -m genfw.train.fit_features {self.name}"
            )
        self.classifier = Classifier(self.shape, self.dim)
        self.classifier.load_state_dict(load_file(file))
        self.eval().requires_grad_(False)

    @classmethod
    def file(cls) -> Path:
        """The weights shipped with genfw. Their metadata states accuracy and origin."""
        return Path(__file__).parent / "weights" / f"{cls.name}.safetensors"

    @classmethod
    def fits(cls, shape: tuple[int, ...]) -> bool:
        return shape == cls.shape

    def features(self, images: Bytes) -> Features:
        return self.classifier.body(self.classifier.normalize(images))

    def logits(self, images: Bytes) -> Float[Tensor, "b classes"]:
        """What the classifier says, before the softmax."""
        return self.classifier(self.classifier.normalize(images))


class DigitsFeatures(ClassifierFeatures, name="digits"):
    """Digits of 8x8 pixels: trained on 1000, 99.3 % of the 447 test images recognised."""

    key = "fd_digits"
    takes = "grey digits (1, 8, 8)"
    shape = (1, 8, 8)


class MNISTFeatures(ClassifierFeatures, name="mnist"):
    """MNIST: trained on 50,000, 99.4 % of the 10,000 test images recognised."""

    key = "fd_mnist"
    takes = "grey digits (1, 28, 28)"
    shape = (1, 28, 28)


class InceptionFeatures(FeatureExtractor, name="inception"):
    """The last pooling layer of the Inception network of the published FIDs.

    Network, weights and resizing (TensorFlow 1's, without antialiasing) are torch-fidelity's. Grey
    images are repeated to three channels.

    Args:
        weights: a file in torch-fidelity's layout; None: its own file, downloaded once (95 MB).

    Raises:
        FeaturesUnavailable: torch-fidelity does not import, or there are no usable weights.
    """

    key = "fid_inception"
    dim = 2048
    takes = "grey or RGB images (C, H, W)"

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        fidelity = _torch_fidelity()
        file = Path(weights) if weights else _download(fidelity.URL_INCEPTION_V3)
        try:
            # torch-fidelity reads with weights_only=False: see first that there is no code in it.
            torch.load(file, weights_only=True, map_location="cpu")
            self.network = fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)
            )
        except Exception as error:
            raise FeaturesUnavailable(
                f"{file} is not torch-fidelity's Inception network ({type(error).__name__}): "
                f"take {fidelity.URL_INCEPTION_V3}"
            ) from error
        self.eval()

    @classmethod
    def fits(cls, shape: tuple[int, ...]) -> bool:
        return len(shape) == 3 and shape[0] in (1, 3)

    def features(self, images: Bytes) -> Features:
        (features,) = self.network(images.expand(-1, 3, -1, -1))
        return features


def _torch_fidelity() -> ModuleType:
    """torch-fidelity's Inception module.

    Importing it fails in many ways (absent, without torchvision, with one built for another torch),
    all alike to us.
    """
    try:
        import_module("torch_fidelity")
        return import_module("torch_fidelity.feature_extractor_inceptionv3")
    except Exception as error:
        raise FeaturesUnavailable(
            "FID needs torch-fidelity and the torchvision that belongs to this torch "
            f"({_first_line(error)}): see `make fid-check` for an environment that has both"
        ) from error


def _download(url: str) -> Path:
    """The file of this address, kept where torch.hub (and torch-fidelity itself) keeps it.

    The name ends with the first digits of the file's SHA-256, which are checked.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as folder:
            partial = Path(folder, file.name)
            with urlopen(url, timeout=10) as response, partial.open("wb") as output:
                shutil.copyfileobj(response, output)
            if not _sha256(partial).startswith(file.stem.rpartition("-")[2]):
                raise OSError("the file that came is damaged")
            os.replace(partial, file)
    except (OSError, HTTPException) as error:
        raise FeaturesUnavailable(
            f"the Inception weights could not be downloaded ({_first_line(error)}): "
            f"fetch {url} and pass metrics.fid.weights=<file>"
        ) from error
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

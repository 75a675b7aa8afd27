"""The UCI handwritten digits, inside scikit-learn: 1797 images, 8x8, 17 grey values, 10 classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from genfw.train.data.images import DataError, Source, Split, Splits


class Digits(Source, name="digits"):
    """First 1000 images train, next 350 validation, last 447 test, in the file's order.

    The split is that of Tomczak's textbook, so that numbers compare with its companion code. Test
    images come from other writers than training images.

    References:
        Optical Recognition of Handwritten Digits, Alpaydin, Kaynak, 1998,
            https://doi.org/10.24432/C50P49;
        Deep Generative Modeling, Tomczak, 2022,
            https://github.com/jmtomczak/intro_dgm

    Example:
        >>> [len(split) for split in Digits().read((1, 8, 8))]
        [1000, 350, 447]
    """

    def read(self, shape: tuple[int, int, int], path: Path | None = None) -> Splits:
        if path is not None:
            raise DataError(
                f"digits comes with scikit-learn and is read from no folder: drop data.path={path}"
            )
        from sklearn.datasets import load_digits  # 1 s

        bunch = load_digits()
        whole = Split(
            bunch.images.astype(np.uint8)[:, None],  # type: ignore[attr-defined]
            bunch.target.astype(np.int64),  # type: ignore[attr-defined]
        )
        return Splits(whole.part(None, 1000), whole.part(1000, 1350), whole.part(1350, None))

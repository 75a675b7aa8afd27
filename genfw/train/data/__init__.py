"""Images as integers: where they come from, what is checked on the way, how they are handed out.

The names are lazy (PEP 562), so that `Batch` can be had without Lightning and a folder without
`datasets`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genfw.train.data.digits import Digits as Digits
    from genfw.train.data.folder import Folder as Folder
    from genfw.train.data.hub import HubImages as HubImages
    from genfw.train.data.images import Batch as Batch
    from genfw.train.data.images import DataError as DataError
    from genfw.train.data.images import Source as Source
    from genfw.train.data.images import Split as Split
    from genfw.train.data.images import Splits as Splits
    from genfw.train.data.module import ImageData as ImageData

_home = {
    "Batch": "images",
    "DataError": "images",
    "Split": "images",
    "Splits": "images",
    "Source": "images",
    "Digits": "digits",
    "HubImages": "hub",
    "Folder": "folder",
    "ImageData": "module",
}


def __getattr__(name: str) -> Any:
    if name not in _home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_home[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_home)

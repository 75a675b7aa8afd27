"""How much memory tensors take, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The bytes of all storages that operators have made, and their largest sum at a time.

    Args:
        but: tensors that are there before and stay; views of them are not counted.

    Example:
        >>> import torch
        >>> with Live() as memory:
        ...     _ = (torch.zeros(256) + 1).sum()
        >>> memory.peak
        2048
    """

    def __init__(self, but: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.others = {each.untyped_storage()._cdata for each in but}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self.others:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        alive = {k: (ref, n) for k, (ref, n) in self.storages.items() if not ref.expired()}
        self.storages, self.peak = alive, max(self.peak, sum(n for _, n in alive.values()))
        return made

"""Counts the memory of tensors that PyTorch makes, and the most that is alive at a time."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class LiveBytes:
    """Bytes of what has been allocated since the counting began, and has not been given back."""

    now: int = 0
    most: int = 0
    _known: set[int] = field(default_factory=set)

    def add(self, tensor: torch.Tensor) -> None:
        """Count the tensor's memory, unless it is counted already."""
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known or not size:
            return
        self._known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


class _Counter(TorchDispatchMode):
    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            if tensor.untyped_storage().data_ptr() not in inputs:
                self._live.add(tensor)
        return found


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors that have memory of their own, without the weights that oneDNN keeps."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]


@contextmanager
def live_bytes() -> Iterator[LiveBytes]:
    """Count what operations inside it allocate. Memory that an operation needs only for itself is not seen."""
    live = LiveBytes()
    with _Counter(live):
        yield live

"""`LazyTensors`: the tensors of a model, each of which is loaded when it is first used."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping

from torch import Tensor


class LazyTensors(MutableMapping[str, Tensor]):
    """Tensors by name. A model is packed layer by layer, and takes the tensors of a layer out of such a mapping.

    So at any time, only one layer is on the device as the checkpoint has it. A model whose weights are kept in fewer bits need
    not fit the device in full.
    """

    def __init__(self, names: Iterable[str], load: Callable[[str], Tensor]) -> None:
        """load: called once at most for each of `names`, when its tensor is read. Looking for a name loads nothing."""
        self._load = load
        self._tensors: dict[str, Tensor | None] = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor is None:
            tensor = self._tensors[name] = self._load(name)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

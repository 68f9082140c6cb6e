"""Dequantises the tensors of a checkpoint, for copies of weights in other formats and for training."""

from collections import defaultdict
from collections.abc import MutableMapping

import torch
from torch import Tensor

from orthrus.kernels.linear import dense


def dequantised(tensors: MutableMapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`tensors`, by their Hugging Face names, with quantised weights dequantised to `dtype`. Other tensors stay as they are.

    All tensors are taken out of `tensors`, layer by layer, so that only one linear layer is in memory twice.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        modules[name.rpartition(".")[0]].append(name)
    found: dict[str, Tensor] = {}
    for module, names in modules.items():
        parameters = {name.removeprefix(f"{module}."): tensors.pop(name) for name in names}
        whole = len(parameters) == 1
        for part, tensor in (parameters if whole else dense(parameters)).items():
            found[f"{module}.{part}"] = tensor if whole else tensor.to(dtype)
    return found

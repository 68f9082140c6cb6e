"""Write a pruned copy of a checkpoint: of each four neighbouring weights of a linear layer, two are zero.

That is the pattern (2:4) that NVIDIA's sparse matrix units multiply. Which two are kept is decided by magnitude, without
calibration data. The copy stores the zeros, so any engine loads it, and none is faster with it unless it looks for them.
Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
"""

from pathlib import Path

import torch
from torch import Tensor

from orthrus.errors import ConfigError
from orthrus.models.checkpoint import load_weights
from orthrus.models.copies import check_folder, make_folder, write_copy
from orthrus.models.families import family_of, load_config

_GROUP, _KEPT = 4, 2


def prune_checkpoint(path: Path, out: Path) -> None:
    """Write the checkpoint in the folder `path` to the folder `out`, with two of four weights of its projections set to zero.

    Embedding, norms, LM head and diffusion view stay as they are. Raises ConfigError if the checkpoint is quantised, and if a
    projection's inputs are no multiple of four.
    """
    config = load_config(path)
    if config.quantization is not None:
        raise ConfigError(
            f"{path} is quantised ({config.quantization.method}): give the checkpoint that it was made from"
        )
    check_folder(path, out)
    # Those of the AR view: the others are called _proj_diff.
    projections = {
        name: shape
        for name, shape in family_of(config).dense_shapes(config).items()
        if name.endswith("_proj.weight")
    }
    if not projections:
        raise ConfigError(f"{path} can't be pruned: it has no weights called *_proj.weight")
    for name, (_, ins) in projections.items():
        if ins % _GROUP:
            raise ConfigError(
                f"{path} can't be pruned 2:4: {name} has {ins} inputs, which {_GROUP} must divide"
            )
    make_folder(out)
    tensors = load_weights(path, config, "cpu", config.dtype)
    for name in projections:
        tensors[name] = keep_two_of_four(tensors[name])
    write_copy(path, out, config, tensors)


def keep_two_of_four(weight: Tensor) -> Tensor:
    """weight [outs, ins] with the two smaller of each four neighbouring inputs set to zero; of equal ones, the later."""
    outs, ins = weight.shape
    groups = weight.reshape(outs, ins // _GROUP, _GROUP)
    order = groups.abs().sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :_KEPT], True)
    return torch.where(kept, groups, torch.zeros_like(groups)).view(outs, ins)

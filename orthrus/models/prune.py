"""Write a pruned copy of a checkpoint: of each four neighbouring weights of a linear layer, two are zero.

This is the pattern (2:4) that NVIDIA's sparse tensor cores multiply. Which two are kept is decided by their magnitude alone
(Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378), or by Wanda's scores on a calibration text
(`orthrus.models.wanda`). The copy stores the zeros, so any engine loads it. Only engines that use the pattern are faster with it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from orthrus.errors import ConfigError
from orthrus.models.checkpoint import load_weights
from orthrus.models.copies import check_folder, make_folder, write_copy
from orthrus.models.families import family_of, load_config
from orthrus.models.wanda import prune_by_inputs

_GROUP, _KEPT = 4, 2


def prune_checkpoint(path: Path, out: Path, calibration: Sequence[Sequence[int]] | None = None) -> None:
    """Write the checkpoint in the folder `path` to the folder `out`, with two of four weights of its projections set to zero.

    calibration: rows of token ids for Wanda, whose forward pass runs in float32 on the CPU. None prunes by magnitude.
    Embedding, norms, LM head and diffusion view stay as they are. Raises ConfigError if the checkpoint is quantised, or if the
    number of a projection's inputs is not a multiple of four.
    """
    config = load_config(path)
    if config.quantization is not None:
        raise ConfigError(
            f"{path} is quantised ({config.quantization.method}): give the checkpoint that it was made from"
        )
    check_folder(path, out)
    # The AR view's: those of the diffusion view are called _proj_diff.
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
    if calibration is None:
        for name in projections:
            tensors[name] = keep_two_of_four(tensors[name])
    else:
        dtype = tensors[next(iter(projections))].dtype
        in_full = {name: tensor.float() for name, tensor in tensors.items()}
        prune_by_inputs(config, in_full, calibration, keep_two_of_four)
        # The weights that are kept have their original bits again, since they were only widened.
        tensors |= {name: in_full[name].to(dtype) for name in projections}
    write_copy(path, out, config, tensors)


def keep_two_of_four(weight: Tensor, inputs: Tensor | None = None) -> Tensor:
    """weight [outs, ins] with two of each four neighbouring inputs set to zero: the smaller ones, and of equal ones the later.

    inputs [ins]: the sizes of the inputs; weights are then compared by their products with these.
    """
    outs, ins = weight.shape
    groups = weight.reshape(outs, ins // _GROUP, _GROUP)
    scores = (weight if inputs is None else weight * inputs).abs().view_as(groups)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :_KEPT], True)
    return torch.where(kept, groups, torch.zeros_like(groups)).view(outs, ins)

"""Write a quantised copy of a checkpoint, in a published format, without calibration data: `orthrus quantize`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from orthrus.errors import ConfigError
from orthrus.kernels.linear.fp8_block import quantise_blocks
from orthrus.kernels.linear.gptq import quantise_gptq
from orthrus.models.checkpoint import load_weights
from orthrus.models.copies import check_folder, make_folder, write_copy
from orthrus.models.families import family_of, load_config
from orthrus.models.quantization import FP8_BLOCK, read_quantization

GROUP_SIZE = 128
"""Inputs that share a scale with "int8"."""
_SETTINGS: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": ["lm_head"],
    },
    "int8": {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": GROUP_SIZE,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
    },
}


def quantise_checkpoint(path: Path, out: Path, format: str) -> None:
    """Write the checkpoint in the folder `path` to the folder `out`, with the weights of its linear layers quantised.

    format: "fp8" is fine-grained FP8, and "int8" the format of GPTQ with 8 bits, rounded to the nearest.
    Embedding, norms, LM head and diffusion view stay as they are, and the tokenizer's files are copied.
    Raises ConfigError if the checkpoint is quantised already, or has a shape that the format can't store.
    """
    config = load_config(path)
    if config.quantization is not None:
        raise ConfigError(
            f"{path} is quantised already ({config.quantization.method}): give the checkpoint that it was made from"
        )
    check_folder(path, out)
    how = read_quantization({"quantization_config": _SETTINGS[format]})
    assert how is not None
    quantised = replace(config, quantization=how)
    try:
        # Before gigabytes are read: whether each weight can be stored so.
        family_of(config).stored_parts(quantised)
    except ConfigError as error:
        raise ConfigError(f"{path} can't be stored as {format}; try --format fp8 ({error})") from error
    make_folder(out)
    tensors = load_weights(path, config, "cpu", config.dtype)
    stored: dict[str, Tensor] = {}
    for name in family_of(config).dense_shapes(config):
        if how.covers(name):
            stored |= _quantised(name, tensors.pop(name), format)
    write_copy(path, out, quantised, tensors | stored)


def _quantised(name: str, weight: Tensor, format: str) -> dict[str, Tensor]:
    """What the weight called `name` is stored as."""
    if format == "fp8":
        numbers, scales = quantise_blocks(weight)
        return {name: numbers, f"{name}_scale_inv": scales}
    start = name.removesuffix("weight")
    return {start + part: tensor for part, tensor in quantise_gptq(weight, 8, GROUP_SIZE).items()}

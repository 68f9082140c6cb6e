"""Write a copy of a checkpoint in few bits, without calibration data: `orthrus quantize`.

"fp8" and "int8" are published formats that round the weights. "lossless12" keeps every bit, so the original can be restored.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from orthrus.errors import ConfigError
from orthrus.kernels.linear.fp8_block import quantise_blocks
from orthrus.kernels.linear.gptq import quantise_gptq
from orthrus.kernels.linear.lossless import NotPacked
from orthrus.kernels.linear.lossless_stored import store
from orthrus.kernels.lossless_sizes import can_pack
from orthrus.models.checkpoint import compute_dtype, open_weights
from orthrus.models.copies import check_folder, make_folder, write_copy
from orthrus.models.dense import dequantised
from orthrus.models.families import family_of, load_config
from orthrus.models.quantization import FP8_BLOCK, LOSSLESS, read_quantization

logger = logging.getLogger(__name__)

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
    LOSSLESS: {"quant_method": LOSSLESS, "version": 1},
}


def quantise_checkpoint(path: Path, out: Path, format: str) -> None:
    """Write the checkpoint in the folder `path` to the folder `out`, with the weights of its linear layers quantised.

    format: "fp8" is fine-grained FP8, and "int8" the format of GPTQ with 8 bits, rounded to the nearest.
    "lossless12" keeps bfloat16 weights in 12 bits, those of the diffusion view too; see `restore_checkpoint`.
    Embedding, norms, LM head and in other formats the diffusion view stay as they are. The tokenizer's files are copied.
    Raises ConfigError if the checkpoint is quantised already, or has a shape that the format can't store.
    """
    config = load_config(path)
    if config.quantization is not None:
        raise ConfigError(
            f"{path} is quantised already ({config.quantization.method}): give the checkpoint that it was made from"
        )
    if format == LOSSLESS and config.dtype != "bfloat16":
        raise ConfigError(f"{LOSSLESS} needs bfloat16 weights, and {path} is saved in {config.dtype}")
    check_folder(path, out)
    how = read_quantization({"quantization_config": _SETTINGS[format]})
    assert how is not None
    shapes = family_of(config).dense_shapes(config)
    if format == LOSSLESS:
        how = replace(
            how, in_full=tuple(_module(n) for n, s in shapes.items() if how.covers(n) and not can_pack(*s))
        )
    try:
        # Checks whether each weight can be stored in this format, before gigabytes are read.
        family_of(config).stored_parts(replace(config, quantization=how))
    except ConfigError as error:
        raise ConfigError(f"{path} can't be stored as {format}; try --format fp8 ({error})") from error
    make_folder(out)
    tensors = open_weights(path, config, "cpu", config.dtype)
    stored: dict[str, Tensor] = {}
    for name in shapes:
        if how.covers(name):
            try:
                stored |= _quantised(name, tensors[name], format)
            except NotPacked as error:
                logger.warning("%s stays in full, since 12 bits can't keep it: %s", name, error)
                how = replace(how, in_full=(*how.in_full, _module(name)))
            else:
                del tensors[name]
    if how.in_full:
        how = replace(how, settings={**how.settings, "modules_to_not_convert": list(how.in_full)})
    write_copy(path, out, replace(config, quantization=how), {**tensors, **stored})


def restore_checkpoint(path: Path, out: Path) -> None:
    """Write the checkpoint in the folder `path`, stored in "lossless12", to the folder `out` in full: the original's tensors.

    Raises ConfigError if it is stored otherwise.
    """
    config = load_config(path)
    if config.quantization is None or not config.quantization.lossless:
        raise ConfigError(f"{path} is not stored in {LOSSLESS}, so there is nothing to restore")
    check_folder(path, out)
    make_folder(out)
    dtype = compute_dtype(config.dtype, config, "cpu")
    tensors = dequantised(open_weights(path, config, "cpu", dtype), dtype)
    write_copy(path, out, replace(config, quantization=None), tensors)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _quantised(name: str, weight: Tensor, format: str) -> dict[str, Tensor]:
    """The tensors that the weight called `name` is stored as. Raises NotPacked if it can't be stored in 12 bits."""
    if format == "fp8":
        numbers, scales = quantise_blocks(weight)
        return {name: numbers, f"{name}_scale_inv": scales}
    parts = store(weight) if format == LOSSLESS else quantise_gptq(weight, 8, GROUP_SIZE)
    return {f"{_module(name)}.{part}": tensor for part, tensor in parts.items()}

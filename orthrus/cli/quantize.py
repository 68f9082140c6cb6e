"""`orthrus quantize`: writes a copy of a checkpoint in few bits, or restores the original from a lossless copy."""

import argparse
from pathlib import Path

from orthrus.cli.options import Commands

FORMATS = ("fp8", "int8", "lossless12")


def add_parser(commands: Commands) -> None:
    """Add `quantize` to the command line."""
    parser = commands.add_parser(
        "quantize", help="write a copy of a checkpoint with linear layers in FP8, in INT8 or in 12 bits"
    )
    parser.add_argument(
        "model",
        help="directory or hub id of a checkpoint that is not quantised, or, with --restore, of one in lossless12",
    )
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="fp8",
        help="fp8: e4m3 with a scale for 128 x 128 weights; int8: GPTQ's format, rounded to the nearest; lossless12: bfloat16 "
        "weights in 12 bits without loss, which only orthrus reads "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--restore", action="store_true", help="restore the original of a checkpoint in lossless12"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the copy."""
    from orthrus.models.hub import resolve
    from orthrus.models.quantise import quantise_checkpoint, restore_checkpoint

    path = resolve(arguments.model)
    if arguments.restore:
        restore_checkpoint(path, arguments.out)
    else:
        quantise_checkpoint(path, arguments.out, arguments.format)

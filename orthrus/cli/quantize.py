"""`orthrus quantize`: a copy of a checkpoint in few bits, in a format that other engines read too."""

import argparse
from pathlib import Path

from orthrus.cli.options import Commands

FORMATS = ("fp8", "int8")


def add_parser(commands: Commands) -> None:
    """Add `quantize` to the command line."""
    parser = commands.add_parser(
        "quantize", help="write a copy of a checkpoint with linear layers in FP8 or INT8"
    )
    parser.add_argument("model", help="a checkpoint that is not quantised: a directory or a hub id")
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="fp8",
        help="fp8: e4m3 with a scale for 128 x 128 weights; int8: GPTQ's format, rounded to the nearest "
        "(default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the copy."""
    from orthrus.models.hub import resolve
    from orthrus.models.quantise import quantise_checkpoint

    quantise_checkpoint(resolve(arguments.model), arguments.out, arguments.format)

"""`orthrus compare`: ways to decode a checkpoint faster, and what each changes in the output."""

import argparse
from pathlib import Path

from orthrus.cli.options import (
    Commands,
    add_json_option,
    add_model_options,
    add_rounds_options,
    positive,
)
from orthrus.cli.output import print_report, progress


def add_parser(commands: Commands) -> None:
    """Add `compare` to the command line."""
    parser = commands.add_parser(
        "compare",
        help="orthrus beside Medusa, n-gram drafts, FP8, INT8 and pruning: speed, and drift from plain decoding",
    )
    add_model_options(parser, positional=True)
    parser.add_argument(
        "--batch", type=positive, nargs="+", help="batch sizes (default: 1 4, and with --shape 1 4 64)"
    )
    add_rounds_options(parser, new_tokens=64, rounds=3)
    parser.add_argument(
        "--text",
        type=Path,
        help="a text that the model was not trained on (default: the source of Starlette)",
    )
    parser.add_argument(
        "--text-tokens", type=positive, default=8192, help="tokens of it to read (default: %(default)s)"
    )
    parser.add_argument(
        "--answers", type=positive, default=200, help="greedy answers to compare (default: %(default)s)"
    )
    parser.add_argument(
        "--answer-tokens", type=positive, default=48, help="tokens of each answer (default: %(default)s)"
    )
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, help="draw the report into this file, such as compare.svg")
    shape = parser.add_argument_group(
        "a model's shape", "speeds alone, with random weights; the options of text and answers are not used"
    )
    shape.add_argument("--shape", help="a size of Qwen3, such as 8B, instead of a model")
    shape.add_argument(
        "--context", type=positive, default=1024, help="tokens of the text (default: %(default)s)"
    )
    shape.add_argument(
        "--tokens-per-cycle",
        type=float,
        default=10.6,
        help="tokens per cycle with Orthrus' replayed drafts (default: %(default)s, published for GSM8K)",
    )
    shape.add_argument(
        "--medusa-tokens-per-cycle",
        type=float,
        default=2.5,
        help="tokens per cycle with Medusa's replayed drafts (default: %(default)s, assumed; `orthrus compare MODEL` measures)",
    )
    shape.add_argument("--medusa-heads", type=positive, default=5, help="(default: %(default)s)")
    shape.add_argument(
        "--shared-projection",
        action="store_true",
        help="Medusa heads share the LM head (default: each has a projection of its own, as in Medusa-1)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the report, and draw it where asked to."""
    from orthrus.measure.plots import check_plot

    check_plot(arguments.plot)
    if arguments.shape is not None:
        _run_shape(arguments)
        return
    from orthrus.measure.compare import CompareOptions, compare
    from orthrus.measure.compare_report import plot

    options = CompareOptions(
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        batches=tuple(arguments.batch or (1, 4)),
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        text=arguments.text,
        text_tokens=arguments.text_tokens,
        answers=arguments.answers,
        answer_tokens=arguments.answer_tokens,
    )
    report = compare(options, progress=progress)
    print_report(report, as_json=arguments.json)
    if arguments.plot is not None:
        plot(report, arguments.plot)


def _run_shape(arguments: argparse.Namespace) -> None:
    """`run` with --shape."""
    from orthrus.measure.compare_shape import ShapeCompareOptions, compare_shape, plot

    options = ShapeCompareOptions(
        shape=arguments.shape,
        device=arguments.device,
        batches=tuple(arguments.batch or (1, 4, 64)),
        context=arguments.context,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        tokens_per_cycle=arguments.tokens_per_cycle,
        medusa_tokens_per_cycle=arguments.medusa_tokens_per_cycle,
        medusa_heads=arguments.medusa_heads,
        own_projections=not arguments.shared_projection,
    )
    report = compare_shape(options, progress=progress)
    print_report(report, as_json=arguments.json)
    if arguments.plot is not None:
        plot(report, arguments.plot)

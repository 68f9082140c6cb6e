"""`orthrus compare`: ways to decode a checkpoint faster, and what each changes in the output."""

import argparse
from pathlib import Path

from orthrus.cli.options import (
    Commands,
    add_batch_option,
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
    add_batch_option(parser, [1, 4])
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the report, and draw it where asked to."""
    from orthrus.measure.compare import CompareOptions, compare
    from orthrus.measure.compare_report import plot
    from orthrus.measure.plots import check_plot

    check_plot(arguments.plot)
    options = CompareOptions(
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        batches=tuple(arguments.batch),
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

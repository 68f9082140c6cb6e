"""`orthrus bench shape`: a published model's shape with random weights."""

import argparse
from pathlib import Path

from orthrus.cli.options import Commands, add_batch_option, add_rounds_options, positive
from orthrus.cli.output import print_report, progress


def add_parser(commands: Commands) -> None:
    """Add `shape` to `orthrus bench`."""
    parser = commands.add_parser(
        "shape", help="a published model's shape with random weights on this GPU, beside Hugging Face"
    )
    parser.add_argument("shape", help="a size of Qwen3, such as 8B")
    add_batch_option(parser, [1, 64])
    parser.add_argument(
        "--context",
        type=positive,
        default=1024,
        help="tokens of the text, half of the new ones included (default: %(default)s)",
    )
    add_rounds_options(parser, new_tokens=256, rounds=3)
    parser.add_argument(
        "--tokens-per-cycle",
        type=float,
        default=10.6,
        help="what replayed drafts bring (default: %(default)s, published for Orthrus-Qwen3-8B on GSM8K)",
    )
    parser.add_argument("--no-hugging-face", action="store_true", help="measure our schedules alone")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    parser.add_argument("--plot", type=Path, help="draw the report into this file, such as bench.svg")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the report, and write and draw it where asked to."""
    from orthrus.measure.shape_bench import ShapeBenchOptions, plot, shape_bench

    options = ShapeBenchOptions(
        shape=arguments.shape,
        batches=tuple(arguments.batch),
        context=arguments.context,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        tokens_per_cycle=arguments.tokens_per_cycle,
        hugging_face=not arguments.no_hugging_face,
    )
    report = shape_bench(options, progress=progress)
    print_report(report, as_json=False)
    if arguments.json is not None:
        arguments.json.write_text(report.to_json())
    if arguments.plot is not None:
        plot(report, arguments.plot)

"""`orthrus bench`: tokens per second of a checkpoint beside Hugging Face's `generate`."""

import argparse

from orthrus.cli import bench_serve, bench_shape
from orthrus.cli.options import (
    Commands,
    add_batch_option,
    add_json_option,
    add_model_options,
    add_rounds_options,
)
from orthrus.cli.output import print_report, progress


def add_parser(commands: Commands) -> None:
    """Add `bench`, `bench shape` and `bench serve` to the command line."""
    parser = commands.add_parser(
        "bench", help="tokens per second beside Hugging Face generate, in one interleaved run"
    )
    add_model_options(parser)
    add_batch_option(parser, [1, 4, 16])
    add_rounds_options(parser, new_tokens=128, rounds=5)
    add_json_option(parser)
    parser.set_defaults(run=run)
    others = parser.add_subparsers(title="instead", metavar="[shape|serve]")
    bench_shape.add_parser(others)
    bench_serve.add_parser(others)


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    from orthrus.measure.bench import BenchOptions, bench

    options = BenchOptions(
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        batches=tuple(arguments.batch),
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
    )
    print_report(bench(options, progress=progress), as_json=arguments.json)

"""`orthrus bench serve`: what Ray Serve costs over the engine alone."""

import argparse
from pathlib import Path

from orthrus.cli.options import ROOT, Commands, add_json_option, add_rounds_options, positive
from orthrus.cli.output import print_report, progress


def add_parser(commands: Commands) -> None:
    """Add `serve` to `orthrus bench`."""
    parser = commands.add_parser(
        "serve", help="what Ray Serve costs: time to first token and throughput beside the engine's own"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs" / "tiny-cpu.yaml",
        help="a Serve config, whose first application is measured with one replica (default: configs/tiny-cpu.yaml)",
    )
    parser.add_argument(
        "--streams", type=positive, default=128, help="requests in flight (default: %(default)s)"
    )
    parser.add_argument(
        "--requests", type=positive, default=2, help="requests of a stream in a round (default: %(default)s)"
    )
    add_rounds_options(parser, new_tokens=64, rounds=5)
    parser.add_argument(
        "--pass-ms",
        type=float,
        help="replace the passes of the model by waits of so many milliseconds, as a CPU waits for its GPU",
    )
    parser.add_argument(
        "--viewers",
        type=int,
        default=0,
        help="also measure what so many open pages cost that show the cluster (default: 0)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    from orthrus.deployments.bench.serve_bench import ServeBenchOptions, serve_bench

    options = ServeBenchOptions(
        config=arguments.config,
        streams=arguments.streams,
        requests=arguments.requests,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        pass_ms=arguments.pass_ms,
        viewers=arguments.viewers,
    )
    print_report(serve_bench(options, progress=progress), as_json=arguments.json)

"""`orthrus serve`: runs a Serve config on this machine."""

import argparse
import threading
from pathlib import Path

from orthrus.cli.options import Commands
from orthrus.cli.output import exit_status


def add_parser(commands: Commands) -> None:
    """Add `serve` to the command line."""
    parser = commands.add_parser("serve", help="serve a config on this machine, Ctrl-C stops")
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, help="a Ray Serve YAML file, such as configs/tiny-cpu.yaml"
    )
    parser.add_argument(
        "--address", help="address of a running Ray cluster to deploy on (default: start one here)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve in a process of its own, under a supervisor that leaves no process of Ray behind."""
    from orthrus.deployments.launch.supervisor import run_supervised

    return run_supervised(lambda: exit_status(lambda: _serve(arguments.config, arguments.address)))


def _serve(config: Path, address: str | None) -> None:
    from orthrus.deployments.launch.progress import Progress

    with Progress() as progress:
        progress.now("Loading Ray")
        from orthrus.deployments.launch.serve import serve_config

        serve_config(config, address=address, tell=progress.now)
    threading.Event().wait()  # Until the supervisor ends this process.

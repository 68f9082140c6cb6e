"""`orthrus config check`: checks whether a Serve config can work, before it is deployed."""

import argparse
import sys
from pathlib import Path

from orthrus.cli.options import ROOT, Commands
from orthrus.errors import ConfigError


def add_parser(commands: Commands) -> None:
    """Add `config` to the command line."""
    parser = commands.add_parser("config", help="check a Serve config before deploying it")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check", help="print what would run where, and whether it fits; exit status 1 if it can't work"
    )
    check.add_argument("config", metavar="FILE", type=Path, help="such as configs/qwen3-8b-h100.yaml")
    check.add_argument(
        "--cluster",
        type=Path,
        default=ROOT / "ray_cluster.yaml",
        help="the cluster launcher file of the cluster that it is for (default: ray_cluster.yaml)",
    )
    check.set_defaults(run=run_check)


def run_check(arguments: argparse.Namespace) -> int:
    """Print what the config would place on which node. Returns 1 if it can't work."""
    from orthrus.cluster.check import check_config

    try:
        for line in check_config(arguments.config, arguments.cluster):
            print(line)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print("ok")
    return 0

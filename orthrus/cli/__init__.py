"""The `orthrus` command. One module a command; `options` and `output` hold what they share.

Slow imports (torch, Ray) are inside the functions that need them, so that `--help` and a mistyped option answer at once. The
command line is above all packages: it alone may import from every one of them.
"""

import argparse
from collections.abc import Sequence

from orthrus import __version__
from orthrus.cli import bench, chat, compare, config, generate, keys, quantize, serve, train, verify
from orthrus.cli.output import exit_status

COMMANDS = (generate, chat, serve, config, keys, verify, bench, compare, quantize, train)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. argv: the arguments, by default those of the process.

    Returns the exit status: 0 done, 1 the command found a problem (verify, config check), 2 wrong input, 130 Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    return exit_status(lambda: arguments.run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Parsed arguments have a function `run(arguments)`, which returns an exit status, or None for 0."""
    parser = argparse.ArgumentParser(
        prog="orthrus", description="Qwen3, several tokens per forward pass, exact."
    )
    parser.add_argument("--version", action="version", version=f"orthrus {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser

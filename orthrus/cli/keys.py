"""`orthrus keys new`: an API key for a served model."""

import argparse

from orthrus.cli.options import Commands, positive, time
from orthrus.cli.output import progress, write


def add_parser(commands: Commands) -> None:
    """Add `keys` to the command line."""
    parser = commands.add_parser("keys", help="API keys for a served model")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    new = actions.add_parser(
        "new",
        help="make a key: prints its entry for the keys file to stdout, and the key, only now, to stderr",
    )
    new.add_argument("name", metavar="NAME", help="whose key it is, in logs and limits")
    new.add_argument(
        "--expires", type=time, help="day or time from which it is refused, UTC unless it has a zone"
    )
    new.add_argument("--requests-per-minute", type=positive, help="default: what the config says")
    new.add_argument("--tokens-per-minute", type=positive, help="default: what the config says")
    new.set_defaults(run=run_new)


def run_new(arguments: argparse.Namespace) -> None:
    """Print the entry to stdout, so that it may be appended to a file, and the key to stderr."""
    from orthrus.deployments.access.keys import new_key

    key, entry = new_key(
        arguments.name,
        expires=arguments.expires,
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_minute=arguments.tokens_per_minute,
    )
    write(entry)
    progress(f"key, shown this once: {key}")

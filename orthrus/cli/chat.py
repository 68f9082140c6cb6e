"""`orthrus chat`: a conversation in the terminal."""

import argparse

from orthrus.cli.options import (
    Commands,
    add_model_options,
    add_sampling_options,
    add_schedule_option,
    load_engine,
    sampling_params,
)
from orthrus.errors import RequestError


def add_parser(commands: Commands) -> None:
    """Add `chat` to the command line."""
    parser = commands.add_parser("chat", help="talk to a model in the terminal")
    add_model_options(parser)
    add_schedule_option(parser)
    parser.add_argument("--system", help="system message")
    add_sampling_options(parser, max_tokens=None)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Converse until the user ends it."""
    params = sampling_params(arguments)
    try:
        (arguments.system or "").encode()  # See `orthrus generate`.
    except UnicodeError as error:
        raise RequestError("the system message is not UTF-8 text", "system") from error
    engine = load_engine(arguments)
    from orthrus.cli.terminal import run_chat

    run_chat(engine, params, system=arguments.system)

"""`orthrus generate`: complete one prompt."""

import argparse
import sys

from orthrus.cli.options import (
    Commands,
    add_model_options,
    add_sampling_options,
    add_schedule_option,
    load_engine,
    sampling_params,
)
from orthrus.cli.output import progress, write
from orthrus.errors import RequestError


def add_parser(commands: Commands) -> None:
    """Add `generate` to the command line."""
    parser = commands.add_parser(
        "generate", help="complete one prompt, streaming to stdout; statistics on stderr"
    )
    add_model_options(parser)
    add_schedule_option(parser)
    parser.add_argument("--prompt", help="the text to continue; without it, stdin")
    add_sampling_options(parser, max_tokens=128)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Stream the completion to stdout."""
    params = sampling_params(arguments)
    try:
        prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
        prompt.encode()  # Bytes that are no UTF-8 may have become lone surrogates, which no tokenizer takes.
    except UnicodeError as error:
        raise RequestError("the prompt is not UTF-8 text", "prompt") from error
    engine = load_engine(arguments)
    from orthrus.cli.terminal import describe, stream_text, tokenizer_of

    answer = stream_text(engine, tokenizer_of(engine).encode(prompt), params, write)
    write("\n")
    progress(describe(answer))

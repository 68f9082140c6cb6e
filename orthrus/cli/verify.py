"""`orthrus verify`: checks that a model's text does not depend on schedule or batch."""

import argparse

from orthrus.cli.options import (
    Commands,
    add_json_option,
    add_model_options,
    add_tensor_parallel_option,
    positive,
)
from orthrus.cli.output import print_report, progress


def add_parser(commands: Commands) -> None:
    """Add `verify` to the command line."""
    parser = commands.add_parser(
        "verify", help="check that the text and logprobs of a model don't depend on schedule or batch"
    )
    add_model_options(parser, positional=True)
    parser.add_argument(
        "--tokens",
        type=positive,
        default=20_000,
        help="tokens to compare, in all checks together (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=192, help="most tokens of one request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-batch", type=positive, default=16, help="most requests in flight (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the prompts, batches and samples (default: %(default)s)"
    )
    parser.add_argument(
        "--no-hf", action="store_true", help="skip the comparison with Hugging Face's forward"
    )
    add_tensor_parallel_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was compared. Returns 1 if something differs."""
    from orthrus.measure.verify import VerifyOptions, verify

    options = VerifyOptions(
        model=arguments.model,
        tokens=arguments.tokens,
        max_tokens=arguments.max_tokens,
        max_batch=arguments.max_batch,
        seed=arguments.seed,
        device=arguments.device,
        dtype=arguments.dtype,
        compare_hf=not arguments.no_hf,
        tensor_parallel=arguments.tensor_parallel,
    )
    report = verify(options, progress=progress)
    print_report(report, as_json=arguments.json)
    return 0 if report.ok else 1

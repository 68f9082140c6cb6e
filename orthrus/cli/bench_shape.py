"""`orthrus bench shape`: a published model's shape with random weights."""

import argparse
from pathlib import Path

from orthrus.cli.options import (
    Commands,
    add_batch_option,
    add_rounds_options,
    add_tensor_parallel_option,
    positive,
)
from orthrus.cli.output import print_report, progress


def add_parser(commands: Commands) -> None:
    """Add `shape` to `orthrus bench`."""
    parser = commands.add_parser(
        "shape", help="a published model's shape with random weights on this GPU, beside Hugging Face"
    )
    parser.add_argument("shape", help="a size of Qwen3, such as 8B")
    add_batch_option(parser, [1, 4, 16, 64, 256])
    parser.add_argument(
        "--context",
        type=positive,
        default=1024,
        help="tokens of the prompt and of half of the answer, together (default: %(default)s)",
    )
    add_rounds_options(parser, new_tokens=256, rounds=3)
    parser.add_argument(
        "--tokens-per-cycle",
        type=float,
        nargs="+",
        default=[10.6, 3.84],
        help="tokens per cycle with replayed drafts; the report has lines for each number (default: 10.6 and 3.84, which are "
        "published for Orthrus on GSM8K and MT-Bench)",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        help="how often drafts are right by depth, from `orthrus train eval --profile`, scaled to --tokens-per-cycle "
        "(default: the same chance at every depth)",
    )
    parser.add_argument(
        "--mixed-batch",
        type=int,
        default=16,
        help="size of a mixed batch: half at the first --tokens-per-cycle, half at 2.0; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=positive,
        nargs="*",
        default=[2048, 8192],
        help="lengths of fresh prompts whose first token is timed (default: 2048 8192)",
    )
    _add_weight_options(parser)
    add_tensor_parallel_option(parser)
    parser.add_argument("--no-hugging-face", action="store_true", help="measure our schedules alone")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    parser.add_argument("--plot", type=Path, help="draw the report into this file, such as bench.svg")
    parser.set_defaults(run=run)


def _add_weight_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the weights, and of what is drafted with them."""
    parser.add_argument(
        "--quantised",
        choices=("fp8", "int8", "int4"),
        help="measure a checkpoint in this format, beside its own AR decoding (default: in bfloat16)",
    )
    parser.add_argument(
        "--weights", choices=("auto", "bf16", "lossless12"), default="auto", help="as the engine's setting"
    )
    drafts = ("auto", "same", "fp8", "fp8+int4", "int4")
    parser.add_argument("--draft-weights", choices=drafts, default="auto", help="as the engine's setting")
    parser.add_argument(
        "--draft-tree",
        type=_tree_rows,
        default=0,
        metavar="ROWS",
        help='as the engine\'s setting: a number of rows, or "auto"; trees need --profile (default: %(default)s)',
    )


def _tree_rows(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run(arguments: argparse.Namespace) -> None:
    """Print the report, and write and draw it where asked to."""
    from orthrus.measure.plots import check_plot
    from orthrus.measure.shape_bench import ShapeBenchOptions, shape_bench
    from orthrus.measure.shape_report import plot

    check_plot(arguments.plot)
    options = ShapeBenchOptions(
        shape=arguments.shape,
        batches=tuple(arguments.batch),
        context=arguments.context,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        tokens_per_cycle=tuple(arguments.tokens_per_cycle),
        profile=arguments.profile,
        mixed_batch=arguments.mixed_batch,
        quantised=arguments.quantised,
        weights=arguments.weights,
        draft_weights=arguments.draft_weights,
        draft_tree=arguments.draft_tree,
        prompts=tuple(arguments.prompts),
        hugging_face=not arguments.no_hugging_face,
        tensor_parallel=arguments.tensor_parallel,
    )
    report = shape_bench(options, progress=progress)
    print_report(report, as_json=False)
    if arguments.json is not None:
        arguments.json.write_text(report.to_json())
    if arguments.plot is not None:
        plot(report, arguments.plot)

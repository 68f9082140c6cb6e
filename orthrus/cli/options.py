"""Options that several commands share, and the types of their values."""

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from orthrus.schedules.registry import schedule_choices

if TYPE_CHECKING:
    from orthrus.engine import Engine
    from orthrus.requests.request import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_MODEL = ROOT / "models" / "orthrus-tiny"
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a command adds its parser: what `ArgumentParser.add_subparsers` returns."""


def add_model_options(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """Add the model, as an option or as an argument, its device and its dtype."""
    name, count = ("model", "?") if positional else ("--model", None)
    parser.add_argument(
        name,
        nargs=count,
        default=str(DEFAULT_MODEL),
        help="directory or hub id (default: models/orthrus-tiny)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="default: the checkpoint's on a GPU, float32 on a CPU"
    )


def add_schedule_option(parser: argparse.ArgumentParser) -> None:
    """Add the schedule."""
    parser.add_argument(
        "--schedule", default="auto", choices=schedule_choices(), help="changes the speed, never the text"
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """Add the options that `sampling_params` reads. max_tokens: its default; None for as many as the context holds."""
    default = "the context limit" if max_tokens is None else max_tokens
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, help=f"most tokens to generate (default: {default})"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens")
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, help="same seed, same text; drawn and printed when not given")
    parser.add_argument("--stop", action="append", default=[], help="stop before this text; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")


def add_rounds_options(parser: argparse.ArgumentParser, *, new_tokens: int, rounds: int) -> None:
    """Add the new tokens and the rounds of a benchmark, with these defaults."""
    parser.add_argument(
        "--new-tokens", type=positive, default=new_tokens, help="per request (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="interleaved rounds (default: %(default)s)"
    )


def add_batch_option(parser: argparse.ArgumentParser, default: list[int]) -> None:
    """Add the batch sizes that a benchmark measures."""
    shown = " ".join(map(str, default))
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=default, help=f"batch sizes (default: {shown})"
    )


def add_tensor_parallel_option(parser: argparse.ArgumentParser) -> None:
    """Add the number of ranks that share the model."""
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        choices=(1, 2, 4, 8),
        default=1,
        metavar="N",
        help="GPUs of this host that share the model, or processes on a CPU: 1, 2, 4 or 8 (default: %(default)s)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option to print a report as JSON."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def time(text: str) -> datetime:
    """A day or a time in ISO 8601."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be like 2027-06-30 or 2027-06-30T12:00:00Z, got {text!r}"
        ) from None


def sampling_params(arguments: argparse.Namespace) -> "SamplingParams":
    """The sampling parameters from the options of `add_sampling_options`. Raises RequestError if a value is out of range."""
    from orthrus.requests.request import SamplingParams

    return SamplingParams(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        ignore_eos=arguments.ignore_eos,
        max_tokens=arguments.max_tokens,
    )


def load_engine(arguments: argparse.Namespace) -> "Engine":
    """Load the engine that the options of `add_model_options` and `add_schedule_option` describe. Progress goes to stderr."""
    from orthrus.cli.output import progress
    from orthrus.loading import tell_stages

    progress(f"loading {arguments.model}")  # torch alone takes seconds to import.
    tell_stages(progress)
    from orthrus.engine import Engine
    from orthrus.engine.config import EngineConfig

    return Engine.from_pretrained(
        EngineConfig(
            model=arguments.model, device=arguments.device, dtype=arguments.dtype, schedule=arguments.schedule
        )
    )

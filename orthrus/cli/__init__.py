"""The `orthrus` command: generate, chat, serve, config, keys, verify, bench, train.

Imports that cost time (torch, Ray) happen inside the command that needs them, so that `--help` and a mistyped option
answer at once. An error the user can act on is a line on stderr for each fault and exit status 2.
"""

import argparse
import sys
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from orthrus import __version__
from orthrus.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from orthrus.engine import Engine
    from orthrus.requests.request import SamplingParams

DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "models" / "orthrus-tiny"
DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny-cpu.yaml"
DEFAULT_CLUSTER = Path(__file__).resolve().parents[2] / "ray_cluster.yaml"
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
SCHEDULES = ("auto", "ar", "orthrus")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 it found a problem (verify, config check), 2 wrong input, 130 Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser(with_training=argv[:1] == ["train"]).parse_args(argv)
    if arguments.run is _serve:
        from deployments.launch.supervisor import run_supervised

        return run_supervised(lambda: _run(arguments))
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.run(arguments) or 0)
    except (ConfigError, RequestError) as error:
        print(f"orthrus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser(*, with_training: bool = False) -> argparse.ArgumentParser:
    """The whole command line. `with_training` imports the options of `train`, and torch with them."""
    parser = argparse.ArgumentParser(
        prog="orthrus", description="Qwen3, several tokens per forward pass, exact."
    )
    parser.add_argument("--version", action="version", version=f"orthrus {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_config(commands)
    _add_keys(commands)
    _add_verify(commands)
    _add_bench(commands)
    if with_training:
        from orthrus.training.stages import add_parser

        add_parser(commands)
    else:
        commands.add_parser("train", help="train diffusion heads for a frozen Qwen3")
    return parser


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "generate", help="complete one prompt, streaming to stdout; statistics on stderr"
    )
    _add_engine_options(parser)
    parser.add_argument("--prompt", help="the text to continue; without it, stdin")
    _add_sampling_options(parser, max_tokens=128)
    parser.set_defaults(run=_generate)


def _add_chat(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("chat", help="talk to a model in the terminal")
    _add_engine_options(parser)
    parser.add_argument("--system", help="system message")
    _add_sampling_options(parser, max_tokens=None)
    parser.set_defaults(run=_chat)


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("serve", help="serve a config on this machine, Ctrl-C stops")
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, help="a Ray Serve YAML file, such as configs/tiny-cpu.yaml"
    )
    parser.add_argument("--address", help="of a running Ray cluster to deploy on; default: start one here")
    parser.set_defaults(run=_serve)


def _add_config(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("config", help="look at a Serve config before deploying it")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check", help="what it would place where, and whether it fits; 1 if it can't work"
    )
    check.add_argument("config", metavar="FILE", type=Path, help="such as configs/qwen3-8b-h100.yaml")
    check.add_argument(
        "--cluster",
        type=Path,
        default=DEFAULT_CLUSTER,
        help="the cluster launcher file to place it on (default: ray_cluster.yaml)",
    )
    check.set_defaults(run=_config_check)


def _add_keys(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("keys", help="API keys for a served model")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    new = actions.add_parser(
        "new", help="make a key: its entry for the keys file on stdout, the key itself on stderr, this once"
    )
    new.add_argument("name", metavar="NAME", help="whose key it is, in logs and limits")
    new.add_argument(
        "--expires", type=_time, help="day or time from which it is refused, UTC unless it has a zone"
    )
    new.add_argument("--requests-per-minute", type=_positive, help="default: what the config says")
    new.add_argument("--tokens-per-minute", type=_positive, help="default: what the config says")
    new.set_defaults(run=_keys_new)


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "verify", help="check that the text and logprobs of a model don't depend on schedule or batch"
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=str(DEFAULT_MODEL),
        help="directory or hub id (default: models/orthrus-tiny)",
    )
    parser.add_argument(
        "--tokens", type=_positive, default=20_000, help="tokens to compare (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=_positive, default=192, help="most tokens of one request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-batch", type=_positive, default=16, help="most requests in flight (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the prompts, batches and samples (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="default: the checkpoint's on a GPU, float32 on a CPU"
    )
    parser.add_argument(
        "--no-hf", action="store_true", help="skip the comparison with Hugging Face's forward"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_verify)


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "bench", help="tokens per second beside Hugging Face generate, in one interleaved run"
    )
    parser.add_argument(
        "--model", default=str(DEFAULT_MODEL), help="directory or hub id (default: models/orthrus-tiny)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="default: the checkpoint's on a GPU, float32 on a CPU"
    )
    parser.add_argument(
        "--batch", type=_positive, nargs="+", default=[1, 4, 16], help="batch sizes (default: 1 4 16)"
    )
    parser.add_argument(
        "--new-tokens", type=_positive, default=128, help="per request (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=5, help="interleaved rounds (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_bench)
    others = parser.add_subparsers(title="instead", metavar="[shape|serve]")
    _add_shape_bench(others)
    _add_serve_bench(others)


def _add_shape_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "shape", help="a published model's shape with random weights on this GPU, beside Hugging Face"
    )
    parser.add_argument("shape", help="a size of Qwen3, such as 8B")
    parser.add_argument(
        "--batch", type=_positive, nargs="+", default=[1, 64], help="batch sizes (default: 1 64)"
    )
    parser.add_argument(
        "--context",
        type=_positive,
        default=1024,
        help="tokens of the text, half of the new ones included (default: %(default)s)",
    )
    parser.add_argument(
        "--new-tokens", type=_positive, default=256, help="per request (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=3, help="interleaved rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens-per-cycle",
        type=float,
        default=10.6,
        help="what replayed drafts bring (default: %(default)s, published for Orthrus-Qwen3-8B on GSM8K)",
    )
    parser.add_argument("--no-hugging-face", action="store_true", help="measure our schedules alone")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    parser.add_argument("--plot", type=Path, help="draw the report into this file, such as bench.svg")
    parser.set_defaults(run=_shape_bench)


def _add_serve_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "serve", help="what Ray Serve costs: time to first token and throughput beside the engine's own"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        help="a Serve config, whose first application is measured with one replica (default: configs/tiny-cpu.yaml)",
    )
    parser.add_argument(
        "--streams", type=_positive, default=128, help="requests in flight (default: %(default)s)"
    )
    parser.add_argument(
        "--requests", type=_positive, default=2, help="of each stream and round (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=_positive, default=64, help="per request, on average (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=5, help="interleaved rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--pass-ms",
        type=float,
        help="in place of the model, wait this long for every pass, as a CPU waits for its GPU",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_serve_bench)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=str(DEFAULT_MODEL), help="directory or hub id (default: models/orthrus-tiny)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="default: the checkpoint's on a GPU, float32 on a CPU"
    )
    parser.add_argument(
        "--schedule", default="auto", choices=SCHEDULES, help="changes the speed, never the text"
    )


def _add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be like 2027-06-30 or 2027-06-30T12:00:00Z, got {text!r}"
        ) from None


def _sampling(arguments: argparse.Namespace) -> "SamplingParams":
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


def _engine(arguments: argparse.Namespace) -> "Engine":
    from orthrus.loading import tell_stages

    print(f"loading {arguments.model}", file=sys.stderr, flush=True)  # torch alone takes seconds to import.
    tell_stages(lambda stage: print(stage, file=sys.stderr, flush=True))
    from orthrus.engine import Engine
    from orthrus.engine.config import EngineConfig

    return Engine.from_pretrained(
        EngineConfig(
            model=arguments.model, device=arguments.device, dtype=arguments.dtype, schedule=arguments.schedule
        )
    )


def _generate(arguments: argparse.Namespace) -> None:
    params = _sampling(arguments)
    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    engine = _engine(arguments)
    from orthrus.cli.terminal import describe, stream_text, tokenizer_of

    answer = stream_text(engine, tokenizer_of(engine).encode(prompt), params, write=_write)
    _write("\n")
    print(describe(answer), file=sys.stderr)


def _chat(arguments: argparse.Namespace) -> None:
    params = _sampling(arguments)
    engine = _engine(arguments)
    from orthrus.cli.terminal import run_chat

    run_chat(engine, params, system=arguments.system)


def _serve(arguments: argparse.Namespace) -> None:
    from deployments.launch.progress import Progress

    with Progress() as progress:
        progress.now("Loading Ray")
        from deployments.launch.serve import serve_config

        serve_config(arguments.config, address=arguments.address, tell=progress.now)
    threading.Event().wait()  # Until the supervisor ends it.


def _config_check(arguments: argparse.Namespace) -> int:
    from cluster.check import check_config

    try:
        for line in check_config(arguments.config, arguments.cluster):
            print(line)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print("ok")
    return 0


def _keys_new(arguments: argparse.Namespace) -> None:
    from deployments.access.keys import new_key

    key, entry = new_key(
        arguments.name,
        expires=arguments.expires,
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_minute=arguments.tokens_per_minute,
    )
    print(entry, end="")
    print(f"key, shown this once: {key}", file=sys.stderr)


def _verify(arguments: argparse.Namespace) -> int:
    from orthrus.measure.verify import VerifyOptions, verify

    report = verify(
        VerifyOptions(
            model=arguments.model,
            tokens=arguments.tokens,
            max_tokens=arguments.max_tokens,
            max_batch=arguments.max_batch,
            seed=arguments.seed,
            device=arguments.device,
            dtype=arguments.dtype,
            compare_hf=not arguments.no_hf,
        ),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report.to_json() if arguments.json else report.to_text())
    return 0 if report.ok else 1


def _bench(arguments: argparse.Namespace) -> None:
    from orthrus.measure.bench import BenchOptions, bench

    report = bench(
        BenchOptions(
            model=arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            batches=tuple(arguments.batch),
            new_tokens=arguments.new_tokens,
            rounds=arguments.rounds,
        ),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report.to_json() if arguments.json else report.to_text())


def _shape_bench(arguments: argparse.Namespace) -> None:
    from orthrus.measure.shape_bench import ShapeBenchOptions, plot, shape_bench

    report = shape_bench(
        ShapeBenchOptions(
            shape=arguments.shape,
            batches=tuple(arguments.batch),
            context=arguments.context,
            new_tokens=arguments.new_tokens,
            rounds=arguments.rounds,
            tokens_per_cycle=arguments.tokens_per_cycle,
            hugging_face=not arguments.no_hugging_face,
        ),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report.to_text())
    if arguments.json is not None:
        arguments.json.write_text(report.to_json())
    if arguments.plot is not None:
        plot(report, arguments.plot)


def _serve_bench(arguments: argparse.Namespace) -> None:
    from deployments.bench.serve_bench import ServeBenchOptions, serve_bench

    report = serve_bench(
        ServeBenchOptions(
            config=arguments.config,
            streams=arguments.streams,
            requests=arguments.requests,
            new_tokens=arguments.new_tokens,
            rounds=arguments.rounds,
            pass_ms=arguments.pass_ms,
        ),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report.to_json() if arguments.json else report.to_text())


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

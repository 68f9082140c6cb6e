"""`orthrus bench serve`: what Ray Serve costs, side by side in one run.

The contestants take turns, and none works while another is measured. Every round measures each of them once. The report has the
median over all rounds of the ratio within a round. So if the machine becomes slower half way, the ratios stay right.

- *Time to first token*, one request at a time: through Serve, against the engine's own (from `submit` to the first chunk)
  plus that of a bare Serve application: an ingress and one deployment that streams constants, through the same proxy.
- *Throughput*, `streams` requests in flight, each stream sending its next request when its last one has ended: through
  Serve, against the engine's own loop fed the same way. Answers are of different lengths, so that they don't all end at once.

The engine, driven directly, and the clients have a process each. Prompts never repeat, so that nothing comes from the prefix
cache. The schedule is `ar`: with a chunk for every token Serve has most to carry.

On a CPU, the model and the code that serves it share the cores. A GPU leaves the cores idle while it computes. `pass_ms` imitates
that: in both contestants, each forward pass becomes a wait of that many milliseconds. All else stays as it is. The report says if
this was done.
"""

import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from orthrus.deployments.app import make_application
from orthrus.deployments.bench.client import first_token_seconds, total_seconds
from orthrus.deployments.config.config_file import load_config
from orthrus.deployments.config.model_check import locate
from orthrus.deployments.launch.environment import free_port, set_environment
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.engine.sizing import choose_device
from orthrus.errors import ConfigError
from orthrus.measure.contest import Progress, Ratio, hardware
from orthrus.measure.prompts import PROMPTS
from orthrus.plan import RowGroup, flatten
from orthrus.requests.request import Request, SamplingParams
from orthrus.runner.sampler import PickRows
from orthrus.schedules.registry import schedule_settings

_BARE_PATH = "/bare"
_BARE_TOKENS = 8
_FIRST_TOKEN_SAMPLES = 20


@dataclass(frozen=True)
class ServeBenchOptions:
    """What to measure."""

    config: Path
    """A Serve config. Its first application is deployed, with one replica."""
    streams: int = 128
    """Requests in flight."""
    requests: int = 2
    """Requests that each stream sends, one after the other."""
    new_tokens: int = 64
    """A request generates between half and one and a half times as many tokens."""
    rounds: int = 5
    pass_ms: float | None = None
    """Milliseconds that each pass waits instead of running the model. None: run the model."""
    viewers: int = 0
    """Open pages that show the cluster, in a third contestant, which measures what they cost. 0 leaves it out."""


@dataclass(frozen=True)
class ServeBenchReport:
    """Milliseconds and tokens per second are medians over rounds; so are the ratios, with the lowest and highest."""

    model: str
    hardware: str
    streams: int
    new_tokens: int
    rounds: int
    pass_ms: float | None
    bare_ms: float
    engine_ms: float
    serve_ms: float
    first_token: Ratio
    """Time to the first token: through Serve, over bare Serve plus the engine's own."""
    engine_tokens_per_second: float
    serve_tokens_per_second: float
    throughput: Ratio
    """Tokens per second: through Serve, over the engine's own."""
    viewers: int
    watched: Ratio | None
    """Tokens per second through Serve: with the viewers' pages open, over without. None without viewers."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        passes = (
            "" if self.pass_ms is None else f", every pass a wait of {self.pass_ms:g} ms in the model's place"
        )
        lines = [
            f"{self.model}, {self.hardware}{passes}: medians of {self.rounds} round{'s' if self.rounds > 1 else ''}",
            "",
            f"time to first token, 1 stream:   {self.serve_ms:8.1f} ms through Serve, {self.bare_ms:.1f} ms bare Serve "
            f"+ {self.engine_ms:.1f} ms engine: {self.first_token}",
            f"throughput, {self.streams} streams:       {self.serve_tokens_per_second:8.0f} tok/s through Serve, "
            f"{self.engine_tokens_per_second:.0f} tok/s engine: {self.throughput}",
        ]
        if self.watched is not None:
            lines.append(f"the same with {self.viewers} pages open, over without: {self.watched}")
        return "\n".join(lines)


# --- the contestants


@dataclass(frozen=True)
class EngineLoader:
    """Makes the engine that both contestants run. pass_ms: None for the model itself."""

    pass_ms: float | None

    def __call__(self, config: EngineConfig) -> Engine:
        engine = Engine.from_pretrained(config)
        if self.pass_ms is not None:
            engine.use_runner(_WaitingRunner(engine, self.pass_ms / 1000))
        return engine


class _WaitingRunner:
    """Imitates a device that runs one pass after the other, while the CPU waits. Tokens depend on their position only."""

    feeds_tokens = True
    picks_ranks = False
    max_logits = 1 << 30
    row_sizes: tuple[int, ...] = ()

    def __init__(self, engine: Engine, seconds: float) -> None:
        self._page_size, self._vocab_size = engine.page_size, engine.model_config.vocab_size
        self._seconds = seconds
        self._free_at = 0.0

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> "_WaitingPass":
        flatten(groups, self._page_size)
        self._free_at = max(self._free_at, time.perf_counter()) + self._seconds
        return _WaitingPass(self.logits(groups), rows, self._free_at)

    def logits(self, groups: Sequence[RowGroup]) -> Tensor:
        return torch.zeros(1, 1).expand(sum(group.num_logits for group in groups), self._vocab_size)


@dataclass(frozen=True)
class _WaitingPass:
    logits: Tensor
    rows: Sequence[PickRows]
    done_at: float
    first_pick: int = 0

    def picks(self) -> list[int]:
        time.sleep(max(0.0, self.done_at - time.perf_counter()))
        vocab_size = self.logits.shape[1]
        return [
            (group.position + row) * 7919 % vocab_size for group in self.rows for row in range(group.count)
        ]


_Asked = tuple[str, int]
"""A prompt, and how many tokens to continue it by."""

_engine: Engine


def _load_engine(load: EngineLoader, config: EngineConfig) -> None:
    """Initialise the process that drives the engine directly."""
    global _engine
    torch.set_num_threads(1)
    _engine = load(config)


def _engine_first_token(prompt: str, new_tokens: int) -> float:
    begin = time.perf_counter()
    _submit("first", prompt, new_tokens)
    while not _engine.step():
        pass
    seconds = time.perf_counter() - begin
    while _engine.has_work:
        _engine.step()
    return seconds


def _engine_total(streams: Sequence[Sequence[_Asked]]) -> float:
    begin = time.perf_counter()
    left = {str(number): list(asked) for number, asked in enumerate(streams)}
    for name, asked in left.items():
        _submit(name, *asked.pop(0))
    while _engine.has_work:
        for chunk in _engine.step():
            if chunk.finish_reason is not None and left[chunk.request_id]:
                _submit(chunk.request_id, *left[chunk.request_id].pop(0))
    return time.perf_counter() - begin


def _submit(name: str, prompt: str, new_tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    _engine.submit(Request(name, _engine.tokenizer.encode(prompt), params))


@serve.deployment(ray_actor_options={"num_cpus": 0})
class _Constants:
    async def stream(self, count: int) -> AsyncIterator[str]:
        for _ in range(count):
            yield "x"


_bare_api = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(_bare_api)
class _BareIngress:
    def __init__(self, constants: DeploymentHandle) -> None:
        self._constants = constants

    @_bare_api.post("/")
    async def stream(self) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            async for text in self._constants.options(stream=True).stream.remote(_BARE_TOKENS):
                yield f'data: {{"choices": [{{"text": "{text}"}}]}}\n\n'
            yield f'data: {{"choices": [], "usage": {{"completion_tokens": {_BARE_TOKENS}}}}}\n\n'
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def _bare_application() -> Application:
    constants: Any = _Constants  # The decorators' types are lost to the type checker.
    ingress: Any = _BareIngress
    return ingress.bind(constants.bind())


# --- the run


def serve_bench(options: ServeBenchOptions, progress: Progress = lambda line: None) -> ServeBenchReport:
    """Measure. `progress` is called with one line per round. Raises ConfigError for a config that can't work."""
    _, apps = load_config(options.config)
    if not apps:
        raise ConfigError(f"{options.config} has no application of orthrus.deployments.app:build to measure")
    args = next(iter(apps.values()))
    engine = locate(args.engine)
    tokens = options.streams * (2 * options.new_tokens + 256)
    engine = engine.model_copy(
        update={
            "schedule": "ar",
            **{name: EngineConfig.model_fields[name].default for name in schedule_settings()},
            "prefix_caching": False,
            "max_num_seqs": options.streams,
            "kv_cache_tokens": max(tokens, engine.kv_cache_tokens or 0, engine.max_model_len or 0),
        }
    )
    load = EngineLoader(options.pass_ms)
    given: dict[str, Any] = {
        "engine": engine.model_dump(),
        "replica": args.replica.model_dump(
            exclude_unset=True, exclude={"autoscaling_config", "max_ongoing_requests"}
        ),
        "ingress": args.ingress.model_dump(exclude_unset=True),
    }
    texts = _prompts()
    spawn = get_context("spawn")
    with (
        _serving(given, load) as port,
        ProcessPoolExecutor(1, spawn, _load_engine, (load, engine)) as direct,
        ProcessPoolExecutor(1, spawn) as clients,
    ):
        contest = _Contest(options, port, engine.served_model_name or engine.model, texts, direct, clients)
        contest.first_tokens(2)
        contest.throughputs(serve_first=False)
        rounds = []
        for number in range(options.rounds):
            first_tokens = contest.first_tokens(_FIRST_TOKEN_SAMPLES)
            rounds.append((first_tokens, contest.throughputs(serve_first=number % 2 == 0)))
            progress(f"round {number + 1} of {options.rounds}")
    firsts, speeds = zip(*rounds, strict=True)
    return ServeBenchReport(
        model=engine.served_model_name or engine.model,
        hardware=hardware(choose_device(engine.device)),
        streams=options.streams,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        pass_ms=options.pass_ms,
        bare_ms=1000 * statistics.median(bare for bare, _, _ in firsts),
        engine_ms=1000 * statistics.median(own for _, own, _ in firsts),
        serve_ms=1000 * statistics.median(through for _, _, through in firsts),
        first_token=Ratio.of([through / (bare + own) for bare, own, through in firsts]),
        engine_tokens_per_second=statistics.median(own for own, _, _ in speeds),
        serve_tokens_per_second=statistics.median(through for _, through, _ in speeds),
        throughput=Ratio.of([through / own for own, through, _ in speeds]),
        viewers=options.viewers,
        watched=Ratio.of([watched / through for _, through, watched in speeds]) if options.viewers else None,
    )


@contextmanager
def _serving(args: dict[str, Any], load: EngineLoader) -> Iterator[int]:
    """Run both applications on a Serve instance that is started here. Gives its port."""
    set_environment()
    port = free_port()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(_bare_application(), name="bare", route_prefix=_BARE_PATH)
        serve.run(make_application(args, load), name="orthrus", route_prefix="/")
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def _prompts() -> Iterator[str]:
    """An endless sequence of prompts, no two of which begin alike."""
    for number in itertools.count():
        yield f"# {number * 7919 % 1_000_003}\n{PROMPTS[number % len(PROMPTS)]}"


@dataclass
class _Contest:
    """One measurement of each contestant at a time."""

    options: ServeBenchOptions
    port: int
    model: str
    texts: Iterator[str]
    direct: ProcessPoolExecutor
    """The process that drives the engine."""
    clients: ProcessPoolExecutor
    """The processes that drive Serve."""

    def first_tokens(self, samples: int) -> tuple[float, float, float]:
        """Median seconds to the first token: bare Serve's, the engine's own, and through Serve."""
        seconds: list[tuple[float, float, float]] = []
        for prompt in itertools.islice(self.texts, samples):
            again = next(self.texts)
            bare = self._client(first_token_seconds, f"{_BARE_PATH}/", self._body(again, _BARE_TOKENS))
            own = self.direct.submit(_engine_first_token, prompt, 4).result()
            through = self._client(first_token_seconds, "/v1/completions", self._body(prompt, 4))
            seconds.append((bare, own, through))
        bare, own, through = (statistics.median(column) for column in zip(*seconds, strict=True))
        return bare, own, through

    def throughputs(self, serve_first: bool) -> tuple[float, float, float]:
        """Tokens per second: the engine's own, through Serve, and through Serve with viewers (without them, 0)."""
        options = self.options
        least, lengths = options.new_tokens // 2, options.new_tokens + 1
        asked = [
            (prompt, max(1, least + number * 37 % lengths))
            for number, prompt in enumerate(itertools.islice(self.texts, options.streams * options.requests))
        ]
        streams = [asked[first :: options.streams] for first in range(options.streams)]
        bodies = [[self._body(*request) for request in requests] for requests in streams]

        def own() -> float:
            return self.direct.submit(_engine_total, streams).result()

        def through() -> float:
            return self._client(total_seconds, "/v1/completions", bodies)

        def watched() -> float:
            return self._client(total_seconds, "/v1/completions", bodies, options.viewers)

        tokens = sum(new_tokens for _, new_tokens in asked)
        turns = [own, through, *([watched] if options.viewers else [])]
        taken = {turn: turn() for turn in (reversed(turns) if serve_first else turns)}
        return tokens / taken[own], tokens / taken[through], tokens / taken.get(watched, float("inf"))

    def _client(self, measure: Callable[..., float], path: str, *asked: Any) -> float:
        return self.clients.submit(measure, "127.0.0.1", self.port, path, *asked).result()

    def _body(self, prompt: str, new_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

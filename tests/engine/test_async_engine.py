"""The engine's thread: streams reach their event loops, a closed one frees its pages, and a failed engine ends all requests."""

import asyncio
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from orthrus.cache.kv_cache import KVCache
from orthrus.deployments.replica.reports import NAME_BYTES, RoutingReport, request_name
from orthrus.engine import Engine
from orthrus.engine.async_engine import AsyncEngine
from orthrus.engine.config import EngineConfig
from orthrus.errors import RequestError
from orthrus.models.checkpoint import load_weights
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import RowGroup
from orthrus.requests.request import Chunk, Request, SamplingParams
from orthrus.runner.eager import EagerRunner
from orthrus.runner.protocol import LaunchedPass
from orthrus.runner.sampler import PickRows
from orthrus.text.grammar_mask import GrammarMasks
from orthrus.text.token_mask import TokenMask


@pytest.fixture(scope="module")
def engine(tiny_orthrus: Path) -> Engine:
    return Engine.from_pretrained(
        EngineConfig(model=str(tiny_orthrus), adaptive_draft=False, kv_cache_tokens=2048, max_num_seqs=16)
    )


@pytest.fixture
def served(engine: Engine) -> Iterator[AsyncEngine]:
    served = AsyncEngine(engine)
    yield served
    served.close()
    assert not engine.has_work
    assert engine.stats.kv_pages_used == 0


async def collect(served: AsyncEngine, request: Request, limit: int = 10**9) -> list[Chunk]:
    """The chunks of a request, which is cancelled after `limit` chunks."""
    chunks: list[Chunk] = []
    task = asyncio.current_task()
    assert task is not None

    def sink(more: list[Chunk]) -> None:
        chunks.extend(more)
        if len(chunks) >= limit:
            task.cancel()

    with suppress(asyncio.CancelledError):
        await served.run(request, sink)
    return chunks


def test_64_streams_with_cancellations_equal_their_texts_alone(served: AsyncEngine, engine: Engine) -> None:
    rng = random.Random(1)
    requests = [
        Request(
            str(i),
            [rng.randrange(120) for _ in range(rng.randint(1, 150))],
            SamplingParams(
                temperature=rng.choice([0.0, 1.0]),
                seed=i,
                max_tokens=rng.randint(1, 40),
                n=rng.choice([1, 1, 2]),
            ),
        )
        for i in range(64)
    ]
    cut = {r.request_id: rng.randint(1, 3) for r in requests if rng.random() < 0.3}

    async def main() -> list[list[Chunk]]:
        return await asyncio.gather(*(collect(served, r, cut.get(r.request_id, 10**9)) for r in requests))

    results = asyncio.run(main())
    served.close()
    for request, chunks in zip(requests, results, strict=True):
        alone = engine.generate([request.prompt], request.params)[0]
        for choice in alone:
            tokens = tuple(t for c in chunks if c.index == choice.index for t in c.token_ids)
            assert tokens == choice.token_ids[: len(tokens)]
            if request.request_id not in cut:
                assert tokens == choice.token_ids
    assert len(cut) > 10


def test_a_cancelled_request_stops_within_a_pass(served: AsyncEngine, engine: Engine) -> None:
    """HTTP and gRPC calls that are cancelled, or reach their deadline, do the same."""
    passes: list[int] = []

    async def main() -> None:
        request = Request("long", [1], SamplingParams(temperature=0.0, ignore_eos=True))
        running = asyncio.create_task(served.run(request, lambda _: passes.append(engine.stats.passes)))
        while len(passes) < 3:
            await asyncio.sleep(0)
        passes.append(engine.stats.passes)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(main())
    # The engine handles messages in order: when this request has been answered, the cancellation has been handled.
    asyncio.run(collect(served, Request("next", [1], SamplingParams(temperature=0.0, max_tokens=1))))
    # One pass may have been in flight, one may have begun meanwhile, and one is the next request's.
    assert engine.stats.passes - passes[-1] <= 3


def test_the_chunks_of_a_pass_reach_their_sink_together(served: AsyncEngine) -> None:
    """Those of 6 requests go to one sink, and those of 2 to another. After their end, nothing comes."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    calls: dict[str, list[list[Chunk]]] = {"a": [], "b": []}
    sinks = {name: calls[name].append for name in calls}

    async def main() -> None:
        names = ["a"] * 6 + ["b"] * 2
        await asyncio.gather(
            *(served.run(Request(f"{i}", [i], params), sinks[n]) for i, n in enumerate(names))
        )

    asyncio.run(main())
    for name, requests in (("a", 6), ("b", 2)):
        assert max(map(len, calls[name])) == requests
        assert sum(len(chunk.token_ids) for call in calls[name] for chunk in call) == 60 * requests
        assert sum(chunk.finish_reason == "length" for call in calls[name] for chunk in call) == requests


def test_a_refused_request_costs_nothing(served: AsyncEngine) -> None:
    async def main() -> list[Chunk]:
        good = asyncio.create_task(
            collect(served, Request("good", [1, 2], SamplingParams(temperature=0.0, max_tokens=9)))
        )
        with pytest.raises(RequestError, match="at least one token"):
            await collect(served, Request("bad", []))
        return await good

    assert asyncio.run(main())[-1].finish_reason in ("length", "stop")


def test_a_call_whose_id_is_taken_ends_no_other_call(tiny_orthrus: Path) -> None:
    """Both were checked before either began. The second one is refused, and its caller leaves before being told so."""
    config = EngineConfig(model=str(tiny_orthrus), kv_cache_tokens=2048, adaptive_draft=False)
    engine = Engine.from_pretrained(config)
    runner = HeldRunner(engine.forward, engine.cache, passes=0)
    engine.use_runner(runner)
    served = AsyncEngine(engine)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)

    async def main() -> list[Chunk]:
        held = asyncio.create_task(collect(served, Request("held", [1], params)))
        assert await asyncio.to_thread(runner.held.wait, 30)
        first = asyncio.create_task(collect(served, Request("same", [1, 2], params)))
        second = asyncio.create_task(served.run(Request("same", [1, 2], params), lambda chunks: None))
        await asyncio.sleep(0)
        second.cancel()
        with suppress(asyncio.CancelledError):
            await second
        runner.go_on.set()
        await held
        return await asyncio.wait_for(first, 10)

    try:
        chunks = asyncio.run(main())
    finally:
        runner.go_on.set()
        served.close()
    assert sum(len(chunk.token_ids) for chunk in chunks) == 8 and chunks[-1].finish_reason == "length"


def test_an_engine_that_fails_tells_all_calls_with_one_id(tiny_orthrus: Path) -> None:
    config = EngineConfig(model=str(tiny_orthrus), kv_cache_tokens=2048, adaptive_draft=False)
    engine = Engine.from_pretrained(config)
    runner = HeldRunner(engine.forward, engine.cache, passes=0, error=RuntimeError("out of order"))
    engine.use_runner(runner)
    served = AsyncEngine(engine)
    told: list[Chunk] = []

    async def main() -> None:
        held = asyncio.create_task(served.run(Request("held", [1]), told.extend))
        assert await asyncio.to_thread(runner.held.wait, 30)
        same = [asyncio.create_task(served.run(Request("same", [1]), told.extend)) for _ in range(2)]
        await asyncio.sleep(0)
        runner.go_on.set()
        await asyncio.wait_for(asyncio.gather(held, *same), 10)

    try:
        asyncio.run(main())
    finally:
        runner.go_on.set()
        served.close()
    assert [chunk.finish_reason for chunk in told] == ["error"] * 3


def test_load_is_reported_at_once_while_a_pass_hangs_and_after_the_end(tiny_orthrus: Path) -> None:
    config = EngineConfig(model=str(tiny_orthrus), kv_cache_tokens=2048, max_num_seqs=1, adaptive_draft=False)
    engine = Engine.from_pretrained(config)
    runner = HeldRunner(engine.forward, engine.cache, passes=2)
    engine.use_runner(runner)
    served = AsyncEngine(engine)
    params = SamplingParams(temperature=0.0, max_tokens=8, n=2)
    prompt = list(range(2 * engine.page_size))

    async def main() -> None:
        running = asyncio.create_task(collect(served, Request("long", prompt, params)))
        assert await asyncio.to_thread(runner.held.wait, 30)
        before = served.stats.oldest_wait
        report = RoutingReport.of(engine)
        assert not runner.go_on.is_set()
        assert report["sequences"] == 2, "one is in the pass, the other one waits for its place"
        assert report["requests"] == request_name("long")
        assert len(report["prefixes"]) == 2 * NAME_BYTES
        await asyncio.sleep(0.05)
        assert served.stats.oldest_wait >= before + 0.05, "it goes on waiting while the pass does"
        runner.go_on.set()
        await running

    try:
        asyncio.run(main())
    finally:
        runner.go_on.set()
        served.close()
    report = RoutingReport.of(engine)
    assert (report["sequences"], report["requests"]) == (0, b"")
    assert len(report["prefixes"]) >= 2 * NAME_BYTES


class HeldRunner(EagerRunner):
    """Waits in a pass until the test releases it."""

    def __init__(
        self, forward: LayerParallelForward, cache: KVCache, passes: int, error: Exception | None = None
    ) -> None:
        """error: what it then fails with."""
        super().__init__(forward, cache)
        self.held, self.go_on = threading.Event(), threading.Event()
        self._left, self._error = passes, error

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        self._left -= 1
        if self._left < 0:
            self.held.set()
            assert self.go_on.wait(60)
            if self._error is not None:
                raise self._error
        return super().launch(groups, rows)


def test_closing_ends_open_streams_with_an_error(engine: Engine) -> None:
    served = AsyncEngine(engine)

    chunks: list[Chunk] = []

    async def main() -> None:
        begun = asyncio.Event()

        def sink(more: list[Chunk]) -> None:
            chunks.extend(more)
            begun.set()

        run = asyncio.create_task(
            served.run(Request("long", [1], SamplingParams(temperature=0.0, ignore_eos=True)), sink)
        )
        await begun.wait()
        await asyncio.to_thread(served.close)
        await run

    asyncio.run(main())
    assert not engine.has_work
    assert chunks[-1].finish_reason == "error" and "closed" in (chunks[-1].error or "")
    with pytest.raises(RuntimeError, match="stopped"):
        asyncio.run(collect(served, Request("late", [1])))


def test_a_failed_engine_names_the_cause_and_ends_its_requests(tiny_orthrus: Path) -> None:
    engine = Engine.from_pretrained(EngineConfig(model=str(tiny_orthrus), kv_cache_tokens=2048))
    engine.use_runner(FailingRunner(engine.forward, engine.cache, passes=3))
    chunks: list[Chunk] = []
    failures: list[tuple[str, bool]] = []
    served = AsyncEngine(engine, lambda error: failures.append((str(error), chunks[-1].engine_failed)))
    asyncio.run(served.run(Request("cut", [1], SamplingParams(ignore_eos=True)), chunks.extend))
    assert chunks[-1].finish_reason == "error" and "out of order" in (chunks[-1].error or "")
    assert any(chunk.token_ids for chunk in chunks)
    served.close()
    assert failures == [("out of order", True)], "its requests had been told before it was"
    with pytest.raises(RuntimeError, match="out of order"):
        asyncio.run(collect(served, Request("late", [1])))


def test_an_engine_that_ends_in_a_panic_of_rust_code_ends_its_requests(tiny_orthrus: Path) -> None:
    """Grammars and tokenizers are Rust code. Its panics reach Python as exceptions that are no Exception."""

    class Panic(BaseException):
        pass

    engine = Engine.from_pretrained(EngineConfig(model=str(tiny_orthrus), kv_cache_tokens=2048))
    engine.use_runner(FailingRunner(engine.forward, engine.cache, passes=3, error=Panic("out of order")))
    failures: list[Exception] = []
    chunks: list[Chunk] = []
    served = AsyncEngine(engine, failures.append)
    run = served.run(Request("cut", [1], SamplingParams(ignore_eos=True)), chunks.extend)
    asyncio.run(asyncio.wait_for(run, 10))
    served.close()
    assert chunks[-1].finish_reason == "error" and "Panic: out of order" in (chunks[-1].error or "")
    assert len(failures) == 1


class FailingRunner(EagerRunner):
    """Fails after some passes."""

    def __init__(
        self, forward: LayerParallelForward, cache: KVCache, passes: int, error: BaseException | None = None
    ) -> None:
        """error: what it fails with."""
        super().__init__(forward, cache)
        self._left, self._error = passes, error or RuntimeError("out of order")

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return super().launch(groups, rows)


def test_grammars_are_compiled_beside_the_engines_thread(ar: Engine) -> None:
    """On the engine's thread, every other stream would wait. This also holds if more grammars are in use than are cached."""
    compiling: list[str] = []
    masks = GrammarMasks(ar.tokenizer, ar.model_config.vocab_size, ar.model_config.eos_token_ids)

    def make(grammar: str) -> TokenMask:
        compiling.append(threading.current_thread().name)
        return masks(grammar)

    weights = load_weights(Path(ar.config.model), ar.model_config, ar.device, "auto")
    served = AsyncEngine(Engine(ar.config, ar.model_config, weights, ar.tokenizer, make))
    try:
        params = SamplingParams(temperature=0.0, grammar='start: "yes" | "no"', n=2)
        chunks = asyncio.run(collect(served, Request("grammar", [5, 6], params)))
    finally:
        served.close()
    assert sum(chunk.finish_reason == "stop" for chunk in chunks) == 2
    assert compiling and "orthrus-engine" not in compiling

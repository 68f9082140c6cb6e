"""The engine's thread: streams reach their loops, a closed stream frees its pages, nobody waits for a dead engine."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthrus.async_engine import AsyncEngine
from orthrus.engine import Engine
from orthrus.engine_config import EngineConfig
from orthrus.errors import RequestError
from orthrus.request import Chunk, Request, SamplingParams


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
    """The chunks of a request; the stream is closed once `limit` chunks have come."""
    chunks = []
    stream = served.generate(request)
    async for chunk in stream:
        chunks.append(chunk)
        if len(chunks) == limit:
            break
    await stream.aclose()
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


def test_a_closed_stream_stops_within_a_pass(served: AsyncEngine, engine: Engine) -> None:
    """What a cancelled or overdue call of either protocol comes down to."""

    async def main() -> int:
        stream = served.generate(Request("long", [1], SamplingParams(temperature=0.0, ignore_eos=True)))
        for _ in range(3):
            await anext(stream)
        before = engine.stats.passes
        await stream.aclose()
        return before

    before = asyncio.run(main())
    # The engine takes a message at a time: once this has been answered, the one before it has been seen to.
    asyncio.run(collect(served, Request("next", [1], SamplingParams(temperature=0.0, max_tokens=1))))
    # One pass may have been under way, one may have begun meanwhile, and one is the next request's.
    assert engine.stats.passes - before <= 3


def test_a_refused_request_costs_nothing(served: AsyncEngine) -> None:
    async def main() -> list[Chunk]:
        good = asyncio.create_task(
            collect(served, Request("good", [1, 2], SamplingParams(temperature=0.0, max_tokens=9)))
        )
        with pytest.raises(RequestError, match="at least one token"):
            await collect(served, Request("bad", []))
        return await good

    assert asyncio.run(main())[-1].finish_reason in ("length", "stop")


def test_closing_ends_open_streams_with_an_error(engine: Engine) -> None:
    served = AsyncEngine(engine)

    async def main() -> list[Chunk]:
        stream = served.generate(Request("long", [1], SamplingParams(temperature=0.0, ignore_eos=True)))
        chunks = [await anext(stream)]
        await asyncio.to_thread(served.close)
        return chunks + [chunk async for chunk in stream]

    chunks = asyncio.run(main())
    assert not engine.has_work
    assert chunks[-1].finish_reason == "error" and "closed" in (chunks[-1].error or "")
    assert not served.healthy
    with pytest.raises(RuntimeError, match="stopped"):
        asyncio.run(collect(served, Request("late", [1])))

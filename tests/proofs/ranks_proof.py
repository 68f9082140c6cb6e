"""Replicas whose model several ranks share, behind Ray Serve: `make test-ranks` runs it, in minutes.

A rank is killed, or stopped, while both replicas answer. Every text must be the one that a single rank gives.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthrus.engine import Engine, EngineConfig
from orthrus.requests.request import SamplingParams
from tests.local_cluster import (
    ROOT,
    STREAM_SECONDS,
    App,
    Replica,
    Stream,
    answers,
    local_cluster,
    processes,
    under_way,
    until,
    wait_for,
)
from tests.serving import plain

PROMPT = "def add(a, b):\n    return a + b\n\n\n"
TOKENS = 120
ERROR_SECONDS = 5
"""How soon after a rank has ended or stopped its requests must get an error."""
TWO_RANKS = {"tensor_parallel_size": 2, "sum_leaves": 2}


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    with local_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def text() -> str:
    return one_rank_text(TOKENS)


def one_rank_text(tokens: int) -> str:
    """What a model on one rank answers to `PROMPT`."""
    path = str(ROOT / "models" / "orthrus-tiny")
    alone = Engine.from_pretrained(
        EngineConfig(model=path, device="cpu", sum_leaves=2, kv_cache_tokens=2048, adaptive_draft=False)
    )
    found = plain(alone, PROMPT, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
    assert alone.stats.committed / alone.stats.cycles > 1.5
    return found


def ranks_of(replica: Replica) -> list[int]:
    """The processes of a replica's other ranks, which are children of its fork server."""
    parents = {pid: int(stat.split()[1]) for pid, stat in _stats().items()}
    servers = {pid for pid, parent in parents.items() if parent == replica.pid}
    return [pid for pid, parent in parents.items() if parent in servers]


def _stats() -> dict[int, str]:
    """What /proc says of each process of the cluster, behind its name: its state, its parent, ..."""
    found = {}
    for pid in processes():
        try:
            found[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        except OSError:
            continue  # It has ended meanwhile.
    return found


@pytest.mark.parametrize(
    ("sign", "said"),
    [
        (signal.SIGKILL, "rank 1 of the model has ended: killed by signal 9"),
        (signal.SIGSTOP, "rank 1 of the model has stopped"),
    ],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_costs_one_replica_and_is_named(
    app: App, text: str, sign: signal.Signals, said: str
) -> None:
    app.deploy(
        engine={**TWO_RANKS, "max_num_seqs": 4, "kv_cache_tokens": 4096},
        replica={
            "num_replicas": 2,
            "autoscaling_config": None,
            "ray_actor_options": {"num_cpus": 0.1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
        },
        ingress={"ray_actor_options": {"num_cpus": 0.1}},
    )
    victim, other = app.running()
    [rank] = ranks_of(victim)
    [its_rank] = ranks_of(other)
    streams = [Stream(PROMPT, TOKENS) for _ in range(8)]

    async def main() -> None:
        asked = asyncio.create_task(answers(app.completions, streams))
        await under_way(streams, 8)
        os.kill(rank, sign)
        lost = time.monotonic()
        await until(lambda: any(stream.error for stream in streams), STREAM_SECONDS, "an error")
        seconds = time.monotonic() - lost
        print(f"{sign.name}: an error after {seconds:.1f} s")
        assert seconds < ERROR_SECONDS
        await asked

    asyncio.run(main())
    failed = [stream for stream in streams if stream.error]
    assert 1 <= len(failed) <= 4
    for stream in failed:
        assert said in stream.error, stream
        assert stream.text and text.startswith(stream.text), "what it had sent is right"
    assert {stream.text for stream in streams if not stream.error} == {text}
    wait_for(lambda: not {victim.pid, rank} & processes().keys(), 10, "nothing of the replica is left")

    def replaced() -> list[Replica]:
        running = app.running()
        return running if len(running) == 2 and victim not in running else []

    after = wait_for(replaced, 90, "a new replica")
    assert other in after and its_rank in processes()
    assert all(len(ranks_of(replica)) == 1 for replica in after)
    again = asyncio.run(answers(app.completions, [Stream(PROMPT, TOKENS) for _ in range(4)]))
    assert [stream.text for stream in again] == [text] * 4

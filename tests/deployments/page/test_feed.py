"""The cluster's feed: one producer for all viewers, none without viewers; and its summary of the metrics."""

import asyncio
import json
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from orthrus.deployments.page.cluster import request_metrics
from orthrus.deployments.page.feed import ClusterFeed


class Asked:
    """A part of the feed that counts how often it is collected."""

    def __init__(self, name: str, fails: bool = False) -> None:
        self.name, self.fails, self.count = name, fails, 0

    async def __call__(self) -> dict[str, Any]:
        self.count += 1
        if self.fails:
            raise OSError("not now")
        return {self.name: self.count}


async def take(feed: ClusterFeed, count: int) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    stream = feed.events()
    async for event in stream:
        told.append(json.loads(event.removeprefix("data: ")))
        if len(told) == count:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return told


def test_viewers_share_one_producer_and_without_viewers_there_is_none() -> None:
    parts = replicas, state, requests = Asked("replicas"), Asked("state"), Asked("requests")

    async def watch() -> None:
        feed = ClusterFeed([(replicas, 1), (state, 2), (requests, 10)], period_s=0.001)
        await asyncio.sleep(0.02)
        assert [part.count for part in parts] == [0, 0, 0]
        many = await asyncio.gather(*(take(feed, 11) for _ in range(5)))
        assert all(len(told) == 11 for told in many)
        asked = [part.count for part in parts]
        # 11, or a few more if a viewer missed an event. Five producers would have made five times as many.
        assert 11 <= asked[0] < 20
        assert asked[1] == -(-asked[0] // 2) and asked[2] == -(-asked[0] // 10)
        await asyncio.sleep(0.02)
        assert [part.count for part in parts] == asked, "the last viewer has gone"

    asyncio.run(watch())


def test_a_later_viewer_gets_all_fields_at_once() -> None:
    async def watch() -> None:
        feed = ClusterFeed(
            [(Asked("replicas"), 1), (Asked("state"), 2), (Asked("requests", fails=True), 10)], period_s=0.001
        )
        first = feed.events()
        for _ in range(2):
            await anext(first)
        [event] = await take(feed, 1)
        assert set(event) == {"at", "replicas", "state"}, "what fails is left out"
        await first.aclose()  # type: ignore[attr-defined]

    asyncio.run(watch())


def test_a_stream_ends() -> None:
    async def watch() -> int:
        feed = ClusterFeed([(Asked("a"), 1)], period_s=0.001)
        return len([event async for event in feed.events(seconds=0.05)])

    assert asyncio.run(watch()) > 0


def test_metrics_of_the_application_are_summed_over_ingresses() -> None:
    def ingress(name: str, app: str = "a") -> str:
        labels = f'application="{app}",model="m",replica="{name}"'
        return (
            "# TYPE ray_orthrus_requests counter\n"
            f'ray_orthrus_requests_total{{{labels},endpoint="completions",outcome="ok"}} 3.0\n'
            f'ray_orthrus_requests_total{{{labels},endpoint="chat.completions",outcome="ok"}} 1.0\n'
            "# TYPE ray_orthrus_time_to_first_token_seconds histogram\n"
            f'ray_orthrus_time_to_first_token_seconds_bucket{{{labels},le="0.5"}} 2.0\n'
            f'ray_orthrus_time_to_first_token_seconds_bucket{{{labels},le="+Inf"}} 4.0\n'
            f"ray_orthrus_time_to_first_token_seconds_count{{{labels}}} 4.0\n"
            f"ray_orthrus_time_to_first_token_seconds_sum{{{labels}}} 4.0\n"
        )

    families = [
        family
        for name, app in (("x", "a"), ("y", "a"), ("z", "other"))
        for family in text_string_to_metric_families(ingress(name, app))
    ]
    assert request_metrics(families, "a") == {
        "outcomes": {"ok": 8},
        "first_token": [[0.5, 4.0], [None, 8.0]],
        "inter_token": [],
        "whole": [],
    }

"""The cluster's Prometheus metrics behind one address.

Ray keeps an agent on every node that exports what the node's processes record, Serve's and ours among it. A Prometheus that finds
Ray's nodes scrapes the agents directly; `scrape` is for one that only knows the service.
"""

import asyncio

import aiohttp
import ray

_PREFIXES = ("ray_orthrus_", "ray_serve_")
_TIMEOUT = aiohttp.ClientTimeout(total=5)


async def scrape() -> str:
    """Serve's and our metrics of all live nodes, in Prometheus' text format. A node that doesn't answer is left out."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        answers = await asyncio.gather(*(_get(session, url) for url in urls), return_exceptions=True)
    return merge([answer for answer in answers if isinstance(answer, str)])


async def _get(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as answer:
        answer.raise_for_status()
        return await answer.text()


def merge(exports: list[str]) -> str:
    """Several exports in one: each of our metric families once, with the samples of all."""
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for export in exports:
        family = ""
        for line in export.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                if family.startswith(_PREFIXES) and line not in headers.setdefault(family, []):
                    headers[family].append(line)
            elif family.startswith(_PREFIXES) and line:
                samples.setdefault(family, []).append(line)
    lines = [line for family in sorted(samples) for line in (*headers[family], *samples[family])]
    return "".join(f"{line}\n" for line in lines)

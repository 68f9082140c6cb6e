"""The page in a real browser, on a running cluster: `make test-page` runs it, in minutes, and makes the screenshots in docs/.

It needs Chromium and Playwright, says so where one is missing, and installs neither. axe-core comes from npm into .cache/.
"""

import asyncio
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orthrus.deployments.access.keys import new_key
from orthrus.engine import Engine
from orthrus.requests.request import SamplingParams
from tests.local_cluster import ROOT, App, Clients, local_cluster, tiny_args, wait_for
from tests.proofs.browser import Tab, axe_source, chromium
from tests.serving import plain

VIEWS = ("playground", "race", "cluster")
PROMPT = "def load_config(path):\n"
NEW_TOKENS = 160
DOCS = ROOT / "docs"
_SMALL = {
    "ray_actor_options": {"num_cpus": 0.1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
    "autoscaling_config": None,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def app(browser: Any) -> Iterator[App]:
    """Two replicas. The browser comes first: a cluster is not started in vain."""
    with local_cluster() as started:
        started.deploy(replica={"num_replicas": 2, **_SMALL}, ingress=_SMALL)
        yield started


@pytest.fixture
def tab(browser: Any, app: App) -> Iterator[Tab]:
    with Tab.opened(browser, app.url) as tab:
        yield tab


def run(tab: Tab, prompt: str = PROMPT, **settings: str) -> None:
    """Run the playground with a prompt, and wait until it is done."""
    tab.page.fill("#prompt", prompt)
    tab.page.evaluate("document.querySelector('.settings').open = true")
    for name, value in settings.items():
        tab.page.fill(f"#{name}", value)
    tab.page.click("#run")
    tab.page.wait_for_selector("#run:enabled")


def test_an_answer_comes_in_blocks_and_again(tab: Tab, ar: Engine) -> None:
    tab.open()
    run(tab)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    expected = plain(ar, PROMPT, params)
    assert tab.text("#answer") == PROMPT + expected
    summary = tab.text("#play-status")
    assert float(tab.text("#n-tpc")) > 1.5, summary
    cycles = int(re.findall(r"in (\d+) cycles", summary)[0])
    assert tab.page.locator("#strips > li").count() == cycles < NEW_TOKENS / 1.5
    assert tab.page.locator("#strips .kept").count() > cycles / 2
    assert tab.page.locator("#answer .cycle").count() == cycles + 1, "and the first token"
    # By keyboard: the fifth token.
    tab.page.focus("#answer")
    for _ in range(5):
        tab.page.keyboard.press("ArrowRight")
    assert re.search(r"probability .* %, log-probability -?\d.*cycle \d+", tab.text("#inspector"))
    assert tab.page.locator("#inspector li").count() >= 5
    tab.page.click("#again")
    tab.wait_for_text("#play-status", f"equal, 0 of {len(expected)} characters differ")
    assert tab.text("#answer") == PROMPT + expected
    tab.page.fill("#prompt", "Another prompt, which the answer is not to.")
    tab.page.click("#replay")
    tab.page.click("#stop")
    tab.page.wait_for_selector("#replay:enabled")
    assert tab.text("#answer") == PROMPT + expected
    tab.page.click("#again")
    tab.wait_for_text("#play-status", f"equal, 0 of {len(expected)} characters differ")


def test_a_seed_is_honoured_and_a_chat_is_streamed(tab: Tab, ar: Engine) -> None:
    tab.open()
    run(tab, temperature="1", seed="7", max_tokens="40")
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=40)
    assert tab.text("#answer") == PROMPT + plain(ar, PROMPT, params)
    tab.page.fill("#seed", "")
    run(tab, temperature="1", max_tokens="12")
    assert re.search(r'"seed":\d+', tab.text("#snippet")), "the program gives the text that is shown"
    tab.page.check("input[name=mode][value=chat]")
    run(tab, "Write a function that adds two numbers.", temperature="0")
    assert "token" in tab.text("#play-status") and tab.text("#answer").strip()


def test_it_stops(tab: Tab) -> None:
    tab.open()
    tab.page.evaluate("document.querySelector('.settings').open = true")
    tab.page.fill("#max_tokens", "1900")
    tab.page.press("#max_tokens", "Enter")
    tab.page.wait_for_selector("#answer .token >> nth=20")
    tab.page.click("#stop")
    said = tab.wait_for_text("#play-status", "Stopped")
    assert re.fullmatch(r"Stopped after [\d,]+ tokens\. [\d.]+ tokens per cycle in [\d,]+ cycles\.", said)
    assert tab.page.locator("#run").is_enabled()


def test_a_reload_keeps_prompts_and_settings(tab: Tab) -> None:
    tab.open()
    tab.page.fill("#prompt", "def mine():")
    tab.page.check("input[name=mode][value=chat]")
    tab.page.fill("#prompt", "Mine")
    tab.page.evaluate("document.querySelector('.settings').open = true")
    tab.page.fill("#max_tokens", "17")
    tab.page.reload()
    tab.page.wait_for_selector("#examples button")
    assert (tab.page.input_value("#prompt"), tab.page.input_value("#max_tokens")) == ("Mine", "17")
    tab.page.check("input[name=mode][value=completion]")
    assert tab.page.input_value("#prompt") == "def mine():"


def test_what_a_text_says_is_never_markup(tab: Tab) -> None:
    tab.open()
    prompt = "text = '<script>document.title = \"owned\"</script><img src=x onerror=alert(1)>'\n" * 3
    run(tab, prompt, max_tokens="48")
    tab.page.click("[data-snippet=python]")
    tab.page.click("[data-snippet=grpc]")
    assert tab.text("#answer").startswith(prompt)
    assert tab.page.locator("main script, main img").count() == 0 and "owned" not in tab.page.title()


def test_a_race_ends_with_equal_texts(tab: Tab) -> None:
    tab.open("race")
    for start in ("sequential", "together"):
        tab.page.check(f"input[name=start][value={start}]")
        tab.page.click("#race-run")
        said = tab.wait_for_text("#verdict:visible", "Equal: 0 of")
        assert float(re.findall(r"with ([\d.]+) tokens per cycle", said)[0]) > 1.5
        assert tab.text("#text-ar") == tab.text("#text-orthrus") != ""
    tab.page.select_option("#race-speed", "1")
    tab.page.click("#race-replay")
    tab.page.wait_for_selector("#race-replay:enabled")
    assert tab.text("#text-ar") == tab.text("#text-orthrus")


def test_a_lost_replica_is_seen_to_leave_and_another_to_come(tab: Tab, app: App) -> None:
    tab.open("cluster")
    rows = tab.page.locator("#replicas tbody tr")
    tab.page.wait_for_selector("#replicas tbody tr >> nth=1")
    victim = app.running()[0]
    mine = rows.filter(has_text=victim.name)
    assert mine.count() == 1
    os.kill(victim.pid, signal.SIGKILL)
    mine.filter(has_text="has left").wait_for()
    tab.page.wait_for_selector("#replicas tbody tr.new")
    wait_for(lambda: len(app.running()) == 2, what="two replicas run again")
    tab.wait_for_text("#cluster-state", "2 replicas run")


def test_scaling_is_seen_with_its_reason(browser: Any, app: App) -> None:
    busy = App("busy", f"{app.url}/busy")
    scaling = {
        **tiny_args()["replica"]["autoscaling_config"],
        "min_replicas": 1,
        "max_replicas": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
        "upscale_delay_s": 1,
    }
    busy.deploy(engine={"max_num_seqs": 4}, replica={**_SMALL, "autoscaling_config": scaling}, ingress=_SMALL)
    seen = threading.Event()

    async def load() -> list[str]:
        clients = Clients(busy.completions, PROMPT, 64)
        clients.start(12)
        await asyncio.to_thread(seen.wait, 180)
        await clients.stop()
        return clients.errors

    # In a thread of its own, because Playwright's loop runs in this one.
    with Tab.opened(browser, busy.url) as tab, ThreadPoolExecutor() as pool:
        tab.open("cluster")
        loaded = pool.submit(asyncio.run, load())
        try:
            tab.wait_for_text("#decisions", "Scaled from 1 to 2")
            tab.wait_for_text("#cluster-state", "2 replicas run")
        finally:
            seen.set()
        [reason] = re.findall(r"Scaled from 1 to 2: (.*)", tab.page.inner_text("#decisions"))
        assert re.match(
            r"rows used [\d.]+%, target \d+%: needs [\d.]+ replicas|requests (have waited|wait) ", reason
        )
        assert loaded.result() == []


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any, app: App, tmp_path: Path) -> None:
    key, entry = new_key("visitor")
    (tmp_path / "keys.yaml").write_text(entry)
    locked = App("locked", f"{app.url}/locked")
    locked.deploy(
        replica={"num_replicas": 1, **_SMALL}, ingress=_SMALL, api={"keys_file": str(tmp_path / "keys.yaml")}
    )
    with Tab.opened(browser, locked.url) as tab:
        tab.page.goto(f"{locked.url}/")
        for given, said in (("sk-wrong", "no API key"), (key, "not known here")):
            tab.wait_for_text("#key-reason", said)
            tab.page.fill("#key", given)
            tab.page.press("#key", "Enter")
        tab.page.wait_for_selector("#examples button")
        run(tab, max_tokens="16")
        assert "16 tokens" in tab.text("#play-status")
        tab.page.goto(f"{locked.url}/#cluster")
        tab.page.wait_for_selector("#replicas tbody tr")
        kept = tab.page.evaluate("[localStorage.length, document.cookie, Object.values(sessionStorage)]")
        assert kept[:2] == [0, ""] and key in kept[2]
        tab.expect_failed_loads()


def test_a_server_that_does_not_answer_is_reported(tab: Tab) -> None:
    tab.open()
    tab.page.context.set_offline(True)
    tab.page.click("#run")
    tab.wait_for_text("#trouble:visible", "The server does not answer")
    tab.wait_for_text("#play-status", "The server does not answer")
    tab.page.context.set_offline(False)
    tab.expect_failed_loads()
    run(tab, max_tokens="8")
    assert tab.page.locator("#trouble").is_hidden() and "8 tokens" in tab.text("#play-status")


@pytest.mark.parametrize("width", [320, 1200])
def test_it_fits_and_is_accessible(browser: Any, app: App, width: int) -> None:
    axe = axe_source()
    for scheme in ("light", "dark"):
        size = {"width": width, "height": 700}
        with Tab.opened(browser, app.url, viewport=size, color_scheme=scheme) as tab:
            tab.open()
            run(tab, max_tokens="40")
            tab.page.evaluate(f"{axe}; undefined")
            for view in VIEWS:
                tab.page.click(f"[data-view={view}]")
                tab.page.wait_for_selector(f"#view-{view}:visible")
                assert tab.page.evaluate("document.documentElement.scrollWidth") <= width, view
                found = tab.page.evaluate(
                    "async () => (await axe.run({resultTypes: ['violations']})).violations"
                    ".map(v => [v.impact, v.id, v.nodes.map(n => n.html + ' ' + n.failureSummary)])"
                )
                assert [fault for fault in found if fault[0] in ("serious", "critical")] == [], (scheme, view)


def test_screenshots(browser: Any, app: App) -> None:
    """What a visitor sees, for docs/."""
    with Tab.opened(browser, app.url) as tab:
        tab.open()
        run(tab, max_tokens="110")
        tab.page.focus("#answer")
        for _ in range(24):
            tab.page.keyboard.press("ArrowRight")
        tab.page.screenshot(path=DOCS / "page-playground.png")
        tab.open("race")
        tab.page.click("#race-run")
        tab.wait_for_text("#verdict:visible", "Equal: 0 of")
        tab.page.screenshot(path=DOCS / "page-race.png", full_page=True)
    with Tab.opened(browser, app.url, color_scheme="dark") as tab:
        tab.open("cluster")
        with Tab.opened(browser, app.url) as busy:
            for _ in range(6):
                busy.open()
                run(busy, max_tokens="300")
        tab.page.wait_for_selector("#replicas tbody tr >> nth=1")
        tab.page.screenshot(path=DOCS / "page-cluster.png")
    for name in ("playground", "race", "cluster"):
        assert (DOCS / f"page-{name}.png").stat().st_size < 200_000, name

"""The page's files: served as they are, from here alone, under a strict policy."""

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from orthrus.deployments.access.gate import Gate
from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.generation.handler import Handler
from orthrus.deployments.generation.served_model import ServedModel
from orthrus.deployments.ingress.api import create_api
from orthrus.deployments.page.feed import ClusterFeed
from orthrus.deployments.page.files import read_files
from orthrus.deployments.page.router import HEADERS
from orthrus.engine.config import EngineConfig
from tests.conftest import ROOT
from tests.deployments.page.test_feed import Asked

FILES = read_files()
HTML = FILES["index.html"].content.decode()
MODEL = ROOT / "models" / "orthrus-tiny"


def api(root_path: str = "", page: bool = True, **settings: Path) -> TestClient:
    """The application without replicas: nothing here generates."""
    config = ApiConfig.model_validate({"page": page, **settings})
    model = ServedModel.load(EngineConfig(model=str(MODEL), device="cpu"))
    handler = Handler(model, None, None, Gate(config, None), config)  # type: ignore[arg-type]
    feed = ClusterFeed([(Asked("replicas"), 1)]) if page else None
    app = create_api(handler, None, None, feed)  # type: ignore[arg-type]
    return TestClient(app, root_path=root_path, follow_redirects=False)


@pytest.fixture(scope="module")
def web() -> TestClient:
    return api()


def test_the_model_says_how_requests_may_be_decoded(web: TestClient) -> None:
    [card] = web.get("/v1/models").json()["data"]
    assert card["schedules"] == ["auto", "orthrus", "ngram", "ar"]


def test_files_are_served_under_the_policy(web: TestClient) -> None:
    for name, file in FILES.items():
        answer = web.get("/" if name == "index.html" else f"/page/{name}")
        assert answer.status_code == 200 and answer.content == file.content
        assert answer.headers["content-type"] == file.media_type
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        again = web.get(str(answer.request.url), headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert web.get("/page/index.html").status_code == web.get("/page/none.js").status_code == 404


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", HTML)
    assert re.findall(r"<script[^>]*>(.*?)</script>", HTML, re.DOTALL) == [""]
    for name, file in FILES.items():
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", file.content.decode()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name


def test_every_file_is_reached_from_the_page() -> None:
    linked = {name.removeprefix("page/") for name in re.findall(r'(?:src|href)="(page/[^"]+)"', HTML)}
    reached = {"index.html"}
    while linked:
        name = linked.pop()
        if name in reached:
            continue
        reached.add(name)
        if name.endswith(".js"):
            linked |= set(re.findall(r'from "\./([^"]+)"', FILES[name].content.decode()))
    assert reached == set(FILES)


def test_ids_that_scripts_and_labels_refer_to_exist() -> None:
    ids = re.findall(r'\bid="([^"]+)"', HTML)
    assert len(ids) == len(set(ids))
    for name, file in FILES.items():
        if name.endswith(".js"):
            assert set(re.findall(r'byId\("([^"]+)"\)', file.content.decode())) <= set(ids), name
    assert set(re.findall(r'(?:for|aria-labelledby)="([^"]+)"', HTML)) <= set(ids)


def test_its_addresses_are_relative_to_a_slash() -> None:
    """So that it works under the route prefix of an application, and behind a proxy that adds one."""
    web = api(root_path="/qwen3-8b")
    assert web.get("/qwen3-8b/").content == FILES["index.html"].content
    answer = web.get("/qwen3-8b")
    assert (answer.status_code, answer.headers["location"]) == (307, "qwen3-8b/")
    assert web.get("/qwen3-8b/page/main.js").status_code == 200


def test_it_can_be_turned_off() -> None:
    web = api(page=False)
    assert [web.get(path).status_code for path in ("/", "/page/main.js", "/page/model")] == [404, 404, 404]
    assert web.get("/health").status_code == 200


def test_the_page_itself_needs_no_key_and_its_data_do(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("[]")
    web = api(keys_file=tmp_path / "keys.yaml")
    assert web.get("/").status_code == web.get("/page/main.js").status_code == 200
    assert web.get("/page/model").status_code == web.get("/page/cluster").status_code == 401


def test_it_learns_what_the_model_can_do(web: TestClient) -> None:
    told = web.get("/page/model").json()
    assert told["is_assistant"] is False, "its chat template offers no tools: it completes code"
    assert told["max_model_len"] == 2048 and told["model"] == str(MODEL)

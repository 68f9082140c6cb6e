"""Handling of methods, paths and other origins, which is the same for all routes, and the API's description of itself."""

import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from starlette.testclient import TestClient

from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.http.cors import with_cors
from orthrus.deployments.http.paths import NormalizePaths, no_route
from orthrus.deployments.ingress.docs import BODIES, docs_page, openapi_document
from orthrus.deployments.ingress.docs import router as docs_router
from orthrus.deployments.operations.router import router as operations_router

PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = FastAPI(title="Orthrus", openapi_url=None, redirect_slashes=False)
    app.include_router(docs_router)
    app.include_router(operations_router)
    app.add_middleware(NormalizePaths)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def refuse(request: HTTPRequest, error: Any) -> Response:
        answer = no_route(request, error.status_code)
        return (
            answer
            if isinstance(answer, Response)
            else JSONResponse(answer.body, answer.status, answer.headers)
        )

    async def echo(request: HTTPRequest) -> Response:
        return Response(await request.body(), headers={"x-request-id": "r"})

    for path in BODIES:
        app.post(path)(echo)
    app.get("/v1/models")(echo)
    app.get("/v1/models/{model:path}")(echo)
    app.delete("/v1/models/{model:path}")(echo)
    return app


@pytest.fixture(scope="module")
def web(app: FastAPI) -> TestClient:
    return TestClient(app, follow_redirects=False)


def test_a_wrong_method_gets_405_and_the_right_ones(web: TestClient) -> None:
    answer = web.get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["message"] == "GET is not served at /v1/chat/completions: use POST"
    answer = web.put("/v1/models/a/b")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, HEAD")
    assert "use DELETE or GET" in answer.json()["error"]["message"]
    options = web.options("/v1/completions")
    assert (options.status_code, options.headers["allow"], options.content) == (204, "POST", b"")
    nowhere = web.post("/v1/nothing")
    assert nowhere.status_code == 404 and set(nowhere.json()["error"]) == {"message", "type", "param", "code"}
    assert "allow" not in nowhere.headers


def test_a_trailing_slash_is_the_same_route_with_its_body(web: TestClient) -> None:
    for path in ("/v1/completions", "/v1/completions/", "/v1/completions//"):
        answer = web.post(path, content=b"the body")
        assert (answer.status_code, answer.content) == (200, b"the body")
    assert web.get("/v1/models/").status_code == 200


def test_head_is_get_without_the_body(web: TestClient) -> None:
    for path in ("/version", "/ping", "/docs", "/openapi.json", "/v1/models/m"):
        head, get = web.head(path), web.get(path)
        assert head.status_code == get.status_code == 200 and head.content == b""
        assert head.headers["content-type" if path != "/v1/models/m" else "x-request-id"]
    assert web.head("/v1/completions").status_code == 405


def test_version_and_ping(web: TestClient) -> None:
    assert web.get("/version").json()["version"]
    assert web.get("/ping").status_code == web.post("/ping").status_code == 200


def test_pages_of_other_origins_may_call_where_they_are_named(app: FastAPI) -> None:
    asks = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    open_to_it = TestClient(with_cors(app, [PAGE]))
    preflight = open_to_it.options("/v1/completions", headers=asks)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == PAGE
    assert preflight.headers["access-control-allow-headers"] == "authorization"
    for status, answer in (
        (200, open_to_it.post("/v1/completions", headers={"Origin": PAGE})),
        (404, open_to_it.post("/nothing", headers={"Origin": PAGE})),
    ):
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert (
        "access-control-allow-origin"
        not in open_to_it.get("/ping", headers={"Origin": "https://x.example"}).headers
    )
    # Off by default.
    closed = TestClient(with_cors(app, ApiConfig().cors_origins))
    assert "access-control-allow-origin" not in closed.options("/v1/completions", headers=asks).headers


def test_origins_are_checked() -> None:
    assert ApiConfig(cors_origins=[PAGE, "http://localhost:3000", "*"]).cors_origins[0] == PAGE
    for wrong in ("chat.example", "https://chat.example/", "https://chat.example/app"):
        with pytest.raises(ValidationError, match="no origin"):
            ApiConfig(cors_origins=[wrong])


def test_the_description_has_every_body(app: FastAPI) -> None:
    document = openapi_document(app)
    schemas = document["components"]["schemas"]
    for path, body in BODIES.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"]["$ref"].rpartition("/")[2] == body.__name__
        assert set(body.model_fields) <= {*schemas[body.__name__]["properties"], *body.model_fields}
        assert "200" in document["paths"][path]["post"]["responses"]
    # All references lead somewhere, and the schemas are ones.
    said = json.dumps(document)
    for reference in set(said.split('"#/components/schemas/')[1:]):
        assert reference.partition('"')[0] in schemas
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    chat = {"$ref": "#/components/schemas/ChatBody", "components": {"schemas": schemas}}
    validator = Draft202012Validator(chat)
    assert validator.is_valid({"model": "m", "messages": [{"role": "user", "content": "hi"}], "top_k": 5})
    assert not validator.is_valid({"model": "m", "messages": [{"role": "king"}]})


def test_the_page_needs_no_script_and_no_other_host(app: FastAPI, web: TestClient) -> None:
    page = docs_page(openapi_document(app), has_page=False)
    assert web.get("/docs").text == page
    assert "Back to the page" not in page
    assert "Back to the page" in docs_page(openapi_document(app), has_page=True)
    assert (
        "<code>n</code>: integer, default 1<" in page
        and "<code>stream</code>: boolean, default false<" in page
    )
    assert "<script" not in page and "http://" not in page and "https://" not in page
    for path in BODIES:
        assert path in page
    for field in ("max_completion_tokens", "bad_words", "structured_outputs"):
        assert field in page

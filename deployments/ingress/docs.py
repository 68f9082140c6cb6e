"""The descriptions of the HTTP API: `/openapi.json`, and `/docs`, a page that needs no script and no other host."""

import json
from html import escape
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.messages.body import CountTokensBody, MessagesBody
from orthrus.deployments.responses.body import ResponsesBody
from orthrus.deployments.tokenizer.body import DetokenizeBody, TokenizeBody

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
    "/v1/responses/input_tokens": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountTokensBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
"""The bodies of POST requests, by path: the endpoints read them themselves, so FastAPI does not know them."""
_TEXT, _COUNT = {"type": "string"}, {"type": "integer"}
_USAGE = {
    "type": "object",
    "properties": dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT),
}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _choices(**properties: dict[str, Any]) -> dict[str, Any]:
    finish = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
    choice = _object(index=_COUNT, finish_reason=finish, **properties)
    return _object(
        id=_TEXT,
        object=_TEXT,
        created=_COUNT,
        model=_TEXT,
        choices={"type": "array", "items": choice},
        usage=_USAGE,
    )


_IDS = {"type": "array", "items": _COUNT}
_MESSAGE = _object(role=_TEXT, content={"type": ["string", "null"]})
ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/completions": _choices(text=_TEXT),
    "/v1/chat/completions": _choices(message=_MESSAGE),
    "/v1/responses": _object(id=_TEXT, object=_TEXT, status=_TEXT, model=_TEXT, output={"type": "array"}),
    "/v1/responses/input_tokens": _object(input_tokens=_COUNT),
    "/v1/messages": _object(id=_TEXT, type=_TEXT, role=_TEXT, content={"type": "array"}, model=_TEXT),
    "/v1/messages/count_tokens": _object(input_tokens=_COUNT),
    "/tokenize": _object(count=_COUNT, max_model_len=_COUNT, tokens=_IDS),
    "/detokenize": _object(prompt=_TEXT),
}
"""JSON Schemas of the answers to these requests, with the main fields only."""
_ERROR = _object(
    error=_object(
        message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]}
    )
)
_STREAMED = {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"}
_STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.6 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "h2{overflow-wrap:anywhere}code{padding:.1em .3em;border-radius:4px}"
    "code{background:color-mix(in srgb,currentColor 12%,transparent)}"
)

router = APIRouter()


@router.get("/openapi.json")
async def openapi_json(request: HTTPRequest) -> dict[str, Any]:
    """This description."""
    return openapi_document(request.app)


@router.get("/docs")
async def docs(request: HTTPRequest) -> HTMLResponse:
    """The routes as a page."""
    has_page = any(getattr(route, "path", None) == "/" for route in request.app.routes)
    return HTMLResponse(docs_page(openapi_document(request.app), has_page))


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description of the app's routes, request bodies and answers."""
    document = get_openapi(title=app.title, version=version("orthrus-serve"), routes=app.routes)
    template = "#/components/schemas/{model}"
    _, shared = models_json_schema([(body, "validation") for body in BODIES.values()], ref_template=template)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= shared.get("$defs", {})
    schemas["Error"] = _ERROR
    error = _json({"$ref": template.format(model="Error")})
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["4XX"] = {"description": "What is wrong, and what to change", **error}
        if path not in BODIES:
            continue
        post = operations["post"]
        post["requestBody"] = {
            "required": True,
            **_json({"$ref": template.format(model=BODIES[path].__name__)}),
        }
        answer = _json(ANSWERS[path])
        if path in _STREAMED:
            answer["content"]["text/event-stream"] = {"schema": _TEXT}
        post["responses"]["200"] = {"description": "The answer", **answer}
    return document


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def docs_page(document: dict[str, Any], has_page: bool) -> str:
    """A page of all routes, and of the fields of their bodies. has_page: whether there is a page to go back to."""
    parts = ['<meta name="viewport" content="width=device-width, initial-scale=1">']
    parts.append(f"<title>{escape(document['info']['title'])}</title><style>{_STYLE}</style>")
    if has_page:
        parts.append('<p><a href="./">Back to the page</a></p>')
    parts.append(f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>")
    parts.append('<p>The same for programs: <a href="openapi.json">openapi.json</a></p>')
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', operation.get('summary', '')))}</p>")
            if path in BODIES and method == "post":
                parts.append(_fields(document["components"]["schemas"][BODIES[path].__name__]))
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{"".join(parts)}</html>'


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        f"<li><code>{escape(name)}</code>{' (required)' if name in required else ''}: {escape(_kind(field))}"
        f"{escape(_limits(field))}</li>"
        for name, field in schema["properties"].items()
    ]
    return f"<ul>{''.join(rows)}</ul>"


def _limits(field: dict[str, Any]) -> str:
    """A field's range and default, where it has them."""
    bounds = {name: value for kind in (field, *field.get("anyOf", ())) for name, value in kind.items()}
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "over",
        "maximum": "at most",
        "exclusiveMaximum": "under",
        "default": "default",
    }
    told = [
        f"{word} {json.dumps(bounds[name])}" for name, word in words.items() if bounds.get(name) is not None
    ]
    return "".join(f", {limit}" for limit in told)


def _kind(field: dict[str, Any]) -> str:
    """A field's type in a word or two."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(
            dict.fromkeys(_kind(kind) for kind in field["anyOf"] if kind.get("type") != "null")
        )
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return str(field.get("type", "any"))

"""Server-sent events."""

import json
from typing import Any

# Compact, as OpenAI's own events are. The encoder is made once: json.dumps would make one at each call that has options.
encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def sse(event: dict[str, Any]) -> str:
    """An event without a name."""
    return f"data: {encode_json(event)}\n\n"


def named_sse(event: dict[str, Any]) -> str:
    """An event whose name is its `type`, as the clients of newer APIs expect."""
    return f"event: {event['type']}\n{sse(event)}"

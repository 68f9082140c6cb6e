"""Open WebUI: its server lists the model and passes chats on, whole and streamed, as its page asks for them."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from common import BASE, MODEL, QUESTION, step

START_SECONDS = 240


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(url: str, token: str = "", body: dict[str, Any] | None = None) -> str:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
        return str(answer.read().decode())


def answers(url: str) -> bool:
    try:
        ask(url)
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


with tempfile.TemporaryDirectory() as folder:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "DATA_DIR": folder,
        "WEBUI_SECRET_KEY": secrets.token_hex(16),
        "OPENAI_API_BASE_URL": BASE,
        "OPENAI_API_KEY": "none",
        "ENABLE_OLLAMA_API": "False",
        "RAG_EMBEDDING_ENGINE": "openai",  # Else it loads an embedding model from a hub.
        "HF_HUB_OFFLINE": "1",
        "OFFLINE_MODE": "True",
        "ANONYMIZED_TELEMETRY": "False",
    }
    log = Path(folder) / "log"
    command = [
        str(Path(sys.executable).parent / "open-webui"),
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=folder)
    try:
        with step("its server starts"):
            deadline = time.monotonic() + START_SECONDS
            while not answers(f"{url}/health"):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        with step("the first user"):
            user = {"name": "a", "email": "a@example.com", "password": secrets.token_hex(8)}
            token = json.loads(ask(f"{url}/api/v1/auths/signup", body=user))["token"]
        with step("models"):
            assert MODEL in [model["id"] for model in json.loads(ask(f"{url}/api/models", token))["data"]]
        asked = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]}
        with step("chat, whole"):
            whole = json.loads(
                ask(
                    f"{url}/api/chat/completions",
                    token,
                    asked | {"stream": False, "max_tokens": 16, "temperature": 0},
                )
            )
            text = whole["choices"][0]["message"]["content"]
        with step("chat, streamed"):
            events = ask(
                f"{url}/api/chat/completions",
                token,
                asked | {"stream": True, "max_tokens": 16, "temperature": 0},
            )
            lines = [
                line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: {")
            ]
            chunks = [json.loads(line) for line in lines]
            pieces = [
                choice["delta"].get("content") or ""
                for chunk in chunks
                for choice in chunk.get("choices", ())
            ]
            assert "".join(pieces) == text, (pieces, text)
    finally:
        server.terminate()
        server.wait(30)

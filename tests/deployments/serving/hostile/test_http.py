"""HTTP itself: headers, lengths and connections that are not as they should be, and clients that are slow or leave."""

import socket
import threading
from contextlib import ExitStack

import pytest

from tests.deployments.serving.hostile.bodies import completion
from tests.serving import http


def exchange(port: int, sent: bytes, seconds: float = 30) -> bytes:
    """Send raw bytes. Returns what comes back until the server closes the connection or has sent a whole answer."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(sent)
            while not _whole(got) and (more := connection.recv(1 << 16)):
                got += more
        except ConnectionError:
            pass
    return got


def _whole(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
    return bool(found and length) and len(body) >= int(length)


def post(path: str = "/v1/completions", body: bytes | None = None, *headers: str) -> bytes:
    content = completion() if body is None else body
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}", *headers]
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
RAW: dict[str, tuple[bytes, bytes]] = {
    "text": (post("/v1/completions", None, "Content-Type: text/plain"), b" 415 "),
    "form": (post("/v1/completions", None, "Content-Type: application/x-www-form-urlencoded"), b" 415 "),
    "no type": (post("/v1/completions", None, "Content-Type:"), b" 415 "),
    "type with a charset": (
        post("/v1/completions", None, "Content-Type: Application/JSON; charset=x"),
        b" 200 ",
    ),
    "compressed": (post("/v1/completions", None, "Content-Encoding: gzip"), b" 415 "),
    "not compressed": (post("/v1/completions", None, "Content-Encoding: identity"), b" 200 "),
    "no body": (HEAD + b"\r\n", b" 400 "),
    "empty path": (post("/v1/nothing"), b" 404 "),
    "path upwards": (post("/v1/../../completions"), b" 404 "),
    "model upwards": (b"GET /v1/models/%2e%2e%2f%00%ff HTTP/1.1\r\nHost: x\r\n\r\n", b" 404 "),
    "wrong method": (b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", b" 405 "),
    "websocket": (
        b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b" 403 ",
    ),
    "two lengths": (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", b" 400 "),
    "smuggled request": (
        HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b" 400 ",
    ),
    "negative length": (HEAD + b"Content-Length: -1\r\n\r\n", b" 400 "),
    "bad chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", b" 400 "),
    "header with a null": (post("/v1/completions", None, "X-Request-Id: a\x00b"), b" 400 "),
    "header of 1 MB": (post("/v1/completions", None, f"X-Long: {'a' * 1_000_000}"), b""),
    "request id with spaces": (post("/v1/completions", None, "X-Request-Id: a INFO b"), b" 400 "),
    "request id not utf-8": (post("/v1/completions", None, "X-Request-Id: \xff"), b" 500 "),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b" 400 "),
    "http/1.0": (post().replace(b"HTTP/1.1", b"HTTP/1.0"), b" 200 "),
}


@pytest.mark.parametrize("case", RAW, ids=str)
def test_http_oddities(ports: tuple[int, int], case: str) -> None:
    sent, status = RAW[case]
    assert status in exchange(ports[0], sent).split(b"\r\n")[0]


def test_a_connection_is_good_for_the_next_request_after_a_refusal(ports: tuple[int, int]) -> None:
    refused = post("/v1/completions", completion(prompt="x" * 1_000_000), "Content-Type: text/plain")
    with socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as connection:
        connection.sendall(refused)
        got = b""
        while not _whole(got):
            got += connection.recv(1 << 16)
        assert b" 415 " in got.split(b"\r\n")[0]
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got = b""
        while more := connection.recv(1 << 16):
            got += more
    assert b" 200 " in got.split(b"\r\n")[0]


def test_a_body_without_end_is_cut_off(ports: tuple[int, int]) -> None:
    """A client that never stops sending gets the error as soon as it has sent too much."""
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        got = b""

        def listen() -> None:
            nonlocal got
            while not _whole(got) and (more := connection.recv(1 << 16)):
                got += more

        listener = threading.Thread(target=listen)
        listener.start()
        sent = 0
        while listener.is_alive():
            assert sent < 1 << 30, "nobody stops it"
            connection.sendall(chunk)
            sent += 0x10000
        listener.join()
    assert b" 413 " in got.split(b"\r\n")[0]


def test_slow_clients_hold_nothing_up_and_are_disconnected(ports: tuple[int, int], url: str) -> None:
    """204 clients send half a header, half a body, or a request whose answer they do not read. The service still answers."""
    half_body = HEAD + b"Content-Length: 1000\r\n\r\n{"
    unread = post(body=completion(max_tokens=400, ignore_eos=True, stream=True, temperature=0))
    with ExitStack() as stack:
        connections = []
        for sent in (HEAD, half_body, unread):
            for _ in range(100 if sent is not unread else 4):
                connection = stack.enter_context(
                    socket.create_connection(("127.0.0.1", ports[0]), timeout=30)
                )
                connection.sendall(sent)
                connections.append(connection)
        assert http(url + "/v1/completions", completion())[0] == 200
        slow = connections[150]
        got = b""
        while not _whole(got):
            got += slow.recv(1 << 16)
        assert b" 408 " in got.split(b"\r\n")[0] and b"did not come within" in got
        assert http(url + "/v1/completions", completion())[0] == 200


def test_clients_that_leave_while_they_send_are_no_errors(ports: tuple[int, int], url: str) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as connection:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
    assert http(url + "/v1/completions", completion())[0] == 200

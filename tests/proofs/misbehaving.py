"""Clients that misbehave: that never read, go away, stop halfway through a request, or cancel."""

import asyncio
import json
import os
import socket
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from tests.local_cluster import (
    MODEL,
    STREAM_SECONDS,
    App,
    Stream,
    answers,
    client_session,
    pids,
    until,
    wait_for,
)


@dataclass(frozen=True)
class MisbehavingClients:
    """Clients of one application."""

    app: App
    prompt: str
    text: str
    """The text of 40 greedy tokens after the prompt."""

    def misbehave(self) -> None:
        """240 clients that read nothing, send half a request or go away, while another one gets its answer."""
        asked = {"model": MODEL, "max_tokens": 400, "ignore_eos": True, "stream": True}
        text_body = json.dumps({**asked, "prompt": self.prompt})
        chat = {"messages": [{"role": "user", "content": self.prompt}], "logprobs": True, "top_logprobs": 20}
        large_body = json.dumps(asked | chat)  # A megabyte for each answer, which fits no socket's buffers.
        slow = [self._connect("chat/completions", large_body) for _ in range(8)]
        half_open = [self._connect("completions", text_body, cut) for cut in (20, 100) for _ in range(100)]
        gone = [self._connect("completions", text_body) for _ in range(32)]
        wait_for(lambda: not self.app.running()[0].free, 20, "work")
        for connection in gone:
            connection.close()
        # The slow clients read nothing. Another client gets its answer meanwhile.
        [stream] = asyncio.run(answers(self.app.completions, [Stream(self.prompt, 40)]))
        assert (stream.text, stream.error) == (self.text, "")
        wait_for(lambda: self.app.running()[0].free, 90, "the answers that nobody reads are finished")
        for connection in (*slow, *half_open):
            connection.close()

    def _connect(self, path: str, body: str, cut: int | None = None) -> socket.socket:
        """A client that sends a request, up to `cut` bytes of it, and never reads."""
        address = urllib.parse.urlsplit(self.app.url)
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((str(address.hostname), address.port))
        connection.sendall((head + body)[:cut].encode())
        return connection

    async def cancel(self, count: int) -> None:
        """`count` clients, 50 at a time, that cancel: half of them before the first event, half after it."""
        async with client_session() as session:

            async def one(number: int) -> None:
                stream = Stream(self.prompt, 1500)
                task = asyncio.create_task(stream.run(session, self.app.completions))
                if number % 2:
                    await until(lambda: stream.events or stream.ended, STREAM_SECONDS, "the answer begins")
                await asyncio.sleep(number % 7 / 100)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            for first in range(0, count, 50):
                await asyncio.gather(*(one(number) for number in range(first, first + 50)))

    def resources(self) -> dict[str, tuple[int, int]]:
        """Resident MiB and open files of the processes that requests pass through."""
        wait_for(lambda: self.app.running()[0].free, 30, "no pages held")
        [replica], [ingress] = self.app.running(), self.app.running("Ingress")
        [proxy] = pids("haproxy")
        return {
            name: usage(pid)
            for name, pid in (("replica", replica.pid), ("ingress", ingress.pid), ("haproxy", proxy))
        }


def usage(pid: int) -> tuple[int, int]:
    """Resident memory in MiB and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20, len(os.listdir(f"/proc/{pid}/fd"))

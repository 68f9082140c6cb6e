"""The format of the data on a link: a greeting, then messages of chunks.

A replica opens a connection to an ingress and greets it with the secret of the ingress and a random name for the link. Then each
message is its length (uint32, little endian) and a pickle: the names of a chunk's fields, and a list with the values of each
chunk, as tuples. During a rolling update the two ends may be of different versions. The names tell the receiver which fields the
sender knows. A field that is not sent has its default, and a field that the receiver does not know is dropped. The receiver
unpickles nothing from a connection that has not sent the secret, and only calls through Ray carry the secret.
"""

import pickle
import secrets
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from operator import attrgetter

from orthrus.requests.request import Chunk

_SECRET_BYTES = 32
_NAME_BYTES = 16
_GREETING_BYTES = _SECRET_BYTES + _NAME_BYTES
_LENGTH = struct.Struct("<I")
# Tuples are smaller and faster to pickle than dataclasses.
_FIELDS = tuple(field.name for field in fields(Chunk))
_values = attrgetter(*_FIELDS)


@dataclass(frozen=True)
class Address:
    """Where an ingress takes chunks."""

    host: str
    port: int
    secret: bytes = field(repr=False)
    """A connection must begin with it."""


def new_secret() -> bytes:
    """A secret for an ingress."""
    return secrets.token_bytes(_SECRET_BYTES)


def new_name() -> bytes:
    """A name for a link."""
    return secrets.token_bytes(_NAME_BYTES)


def encode(chunks: Iterable[Chunk]) -> bytes:
    """One message with all `chunks`."""
    payload = pickle.dumps((_FIELDS, [_values(chunk) for chunk in chunks]), protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(payload)) + payload


class Decoder:
    """Cuts the bytes of one connection, which come in pieces of any length, into its greeting and its messages."""

    def __init__(self) -> None:
        self._received = bytearray()

    def push(self, data: bytes) -> None:
        """Add bytes that have come."""
        self._received += data

    def greeting(self) -> tuple[bytes, bytes] | None:
        """The secret and the name that a connection begins with, None until they have come. Call it before `chunks`."""
        if len(self._received) < _GREETING_BYTES:
            return None
        greeting = bytes(self._received[:_GREETING_BYTES])
        del self._received[:_GREETING_BYTES]
        return greeting[:_SECRET_BYTES], greeting[_SECRET_BYTES:]

    def chunks(self) -> Iterator[Chunk]:
        """The chunks of all messages that are complete. Unpickles: call it only for a connection that knew the secret."""
        received, start = self._received, 0
        while len(received) >= start + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received, start)
            end = start + _LENGTH.size + length
            if len(received) < end:
                break
            names, chunks = pickle.loads(memoryview(received)[start + _LENGTH.size : end])
            for values in chunks:
                yield Chunk(**{k: v for k, v in zip(names, values, strict=True) if k in _FIELDS})
            start = end
        del received[:start]

"""The ports of a Ray cluster that this machine shares with others."""

import socket

import pytest

from orthrus.deployments.launch import environment


def test_a_block_of_ports_has_no_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one whose owner lets others share it, as gRPC's servers do."""
    first = environment.free_block()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("", first + 7))
        taken.listen()
        offers = iter([first, first + 50, first])
        monkeypatch.setattr(
            "orthrus.deployments.launch.environment.random.randrange", lambda *_: next(offers)
        )
        assert environment.free_block() == first + 50
    assert environment.free_block() == first

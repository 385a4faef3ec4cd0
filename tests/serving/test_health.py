"""Health is answered, and a drain ends, whoever watches and however little he listens."""

import socket
import struct
import threading
from contextlib import suppress
from unittest import mock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.health import MOST_WATCHERS, HealthService
from serving.server import Server
from tests.makers import settings
from tests.serving.load import connect
from tests.serving.test_dispatcher import until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
DATA, HEADERS, SETTINGS, PING, ACK, INITIAL_WINDOW_SIZE = 0, 1, 4, 6, 1, 4
END_STREAM, END_HEADERS = 1, 4


def watchers(health: HealthService) -> int:
    return MOST_WATCHERS - health._room._value


def test_a_watcher_that_is_gone_before_he_is_heard_leaves_nothing():
    health = HealthService()
    gone = mock.Mock(is_active=lambda: False, add_callback=lambda _: False)
    for _ in range(MOST_WATCHERS + 1):
        health.Watch(health_pb2.HealthCheckRequest(), gone, mock.Mock())
        until(lambda: watchers(health) == 0)
    assert not health._send_response_callbacks[""]


class Deaf:
    """An HTTP/2 peer that makes a call and has no room for any answer to it."""

    def __init__(self, address: str, method: bytes) -> None:
        host, _, port = address.rpartition(":")
        self._socket, self._sending = socket.create_connection((host, int(port))), threading.Lock()
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
        threading.Thread(target=self._stay_connected, daemon=True).start()
        headers = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", method),
            (b":authority", b"localhost"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
        literal = b"".join(b"\0" + bytes([len(k)]) + k + bytes([len(v)]) + v for k, v in headers)
        self._frame(HEADERS, END_HEADERS, 1, literal)
        self._frame(DATA, END_STREAM, 1, b"\0" + struct.pack(">I", 0))  # an empty message

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream)
        with self._sending:  # a frame of the other thread's between these would end the connection
            self._socket.sendall(head + payload)

    def _stay_connected(self) -> None:
        with suppress(OSError), self._socket.makefile("rb") as stream:
            while head := stream.read(9):
                payload = stream.read(int.from_bytes(head[:3], "big"))
                if head[3] in (SETTINGS, PING) and not head[4] & ACK:
                    self._frame(head[3], ACK, 0, payload if head[3] == PING else b"")

    def close(self) -> None:
        with suppress(OSError):  # the server may have ended it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def check(address: str, timeout_s: float = 10) -> int:
    with connect(address) as channel:
        asked = health_pb2.HealthCheckRequest()
        return health_pb2_grpc.HealthStub(channel).Check(asked, timeout=timeout_s, wait_for_ready=True).status


def test_who_watches_and_takes_nothing_holds_up_neither_checks_nor_the_drain(healthy):
    server = Server(settings(healthy))
    server.load()
    deaf = [Deaf(server.address, b"/grpc.health.v1.Health/Watch") for _ in range(3)]
    try:
        until(lambda: watchers(server.health) == len(deaf))
        assert check(server.address) == SERVING
        stopping = threading.Thread(target=server.stop, daemon=True)
        stopping.start()
        stopping.join(server.config.grace_s + 15)
        assert not stopping.is_alive()
    finally:
        for peer in deaf:
            peer.close()


def test_a_watcher_hears_of_the_drain_beside_one_that_takes_nothing(serve, healthy):
    running = serve(policy=(str(healthy),))
    deaf = Deaf(running.server.address, b"/grpc.health.v1.Health/Watch")
    until(lambda: watchers(running.server.health) == 1)
    with connect(running.server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == SERVING
        stopping = threading.Thread(target=running.server.stop)
        stopping.start()
        assert next(watch).status == NOT_SERVING  # while it drains: what nobody has read yet ends with the call
        deaf.close()
        stopping.join()


def test_there_is_an_end_to_how_many_watch_and_who_leaves_makes_room(serve, healthy):
    running = serve(policy=(str(healthy),))
    with connect(running.server.address) as channel:
        stub, asked = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
        watches = []
        for _ in range(MOST_WATCHERS):
            watches.append(stub.Watch(asked, timeout=60))
            assert next(watches[-1]).status == SERVING  # one by one: all at once, some would wait for their messages
        with pytest.raises(grpc.RpcError) as refused:
            next(stub.Watch(asked, timeout=10))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert check(running.server.address) == SERVING
        for watch in watches:
            watch.cancel()
        until(lambda: not [thread for thread in threading.enumerate() if thread.name == "health"])
        assert next(stub.Watch(asked, timeout=10)).status == SERVING


def test_a_peer_that_has_vanished_is_noticed_between_its_calls(serve, healthy, monkeypatch):
    """A robot's computer that loses power says nothing: its connection would stay for ever."""
    monkeypatch.setattr("serving.listening.KEEPALIVE_MS", 500)
    running = serve(policy=(str(healthy),))
    host, _, port = running.server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=15) as silent:
        silent.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]))
        silent.sendall(bytes([0, 0, 0, SETTINGS, ACK, 0, 0, 0, 0]))
        while silent.recv(4096):  # it asks whether anybody is there, and hangs up
            pass

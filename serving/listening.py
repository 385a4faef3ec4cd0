"""Where a server listens, on loopback unless it is encrypted or somebody insists, and how much it takes."""

import contextlib
import ipaddress
from collections.abc import Sequence
from concurrent.futures import Executor

import grpc

from serving.config import Config
from serving.errors import StartupError
from serving.security import Certificates

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""A 128 x 128 frame takes 64 KiB; this leaves room for views of up to 1000 x 1000, or batches of 60."""
LOOKAHEAD_BYTES = 256 * 1024
"""A message of 64 KiB and a little, as most are, comes without asking for more room in the middle of it."""
MAX_METADATA_BYTES = 16 * 1024
KEEPALIVE_MS = 10_000
"""After so long a silence a peer is asked whether he is there, and who does not answer for as long again is gone: a
message that a thread waits for will not come, and his connection would stay for ever."""
HANDSHAKE_MS = 10_000
"""Whoever connects and does not speak HTTP/2, or TLS, by then is hung up on: gRPC's own 2 minutes hold a descriptor."""
MAX_CONCURRENT_CALLS = 256


def require_address(config: Config) -> None:
    """Raises StartupError where --listen is no address, or one that may not be listened on like this."""
    host, _, port = config.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise StartupError(f"--listen must be HOST:PORT, for example localhost:50051, got {config.listen!r}")
    if not _is_loopback(host) and not config.insecure and not config.tls_cert:
        raise StartupError(
            f"--listen {config.listen} can be reached from other machines, and is not encrypted: give --tls-cert and "
            "--tls-key, listen on localhost, or say --insecure if the network is yours"
        )


def allow_connections() -> None:
    """As many as this process may have: each holds a descriptor, and most systems let it begin with 1024."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def transport(pool: Executor, interceptors: Sequence[grpc.ServerInterceptor]) -> grpc.Server:
    """A server that takes calls of bounded size and number, and notices who has vanished."""
    return grpc.server(
        pool,
        interceptors=interceptors,
        options=[
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", MAX_CONCURRENT_CALLS // 2),  # one connection cannot have them all
            ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_permit_without_calls", 1),  # a robot's computer may lose power between two calls
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),  # of keepalive's own timeout, grpc took no notice: 60 s
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),  # serving.client asks, too
            ("grpc.so_reuseport", 0),  # or two servers could share a port and answer in turns
        ],
        maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
    )


def bind(server: grpc.Server, config: Config) -> str:
    """Bind and return HOST:PORT with the port that was taken. Raises StartupError."""
    require_address(config)
    host, _, port = config.listen.rpartition(":")
    # grpc is content when one of the addresses of "localhost" can be bound; a port that is half taken must not pass.
    address = f"127.0.0.1:{port}" if host == "localhost" else config.listen
    try:
        if config.tls_cert and config.tls_key:
            certificates = Certificates(config.tls_cert, config.tls_key, config.tls_client_ca)
            bound = server.add_secure_port(address, certificates.credentials())
        else:
            bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {config.listen}: is the port in use, or the address not this machine's? "
            "choose another --listen, or port 0 for a free one"
        ) from error
    return f"{host}:{bound}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # another host name: where it leads is not ours to know
        return False

"""Where a server listens: on loopback, unless it is encrypted or somebody insists."""

import ipaddress

import grpc

from serving.config import Config
from serving.errors import StartupError
from serving.security import Certificates


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

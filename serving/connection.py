"""Where a policy server is, how it is trusted, and who asks. Needs grpcio alone."""

from dataclasses import dataclass, field
from pathlib import Path

import grpc


@dataclass(frozen=True)
class Tls:
    """How to trust a server, and to be trusted by it: PEM files.

    Attributes:
        ca: who signed the server's certificate; None: the authorities that the system trusts.
        cert, key: this client's own pair, for a server that asks for one.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        ca, key, cert = (path.read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True)
class Connection:
    """Where a policy server is, and who asks: what every command that calls one takes as flags."""

    server: str = "localhost:50051"
    """HOST:PORT of `python -m serving.server`."""
    token: str = field(default="", repr=False)
    """A bearer token, where the server asks for one. Whoever may list this machine's processes reads it here."""
    token_file: Path | None = None
    """A file that holds it instead, and nothing else."""
    tls_ca: Path | None = None
    """PEM certificates to trust; with it the connection is TLS."""
    tls_cert: Path | None = None
    """This side's own certificate, PEM, for a server that asks for one; the connection is TLS then, too."""
    tls_key: Path | None = None
    """And its key."""

    def __post_init__(self) -> None:
        host, _, port = self.server.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
            lack = "" if ":" in self.server else ", without a port"
            expected = "HOST:PORT, for example localhost:50051, the port from 1 to 65535"
            raise ValueError(f"--server must be {expected}, got {self.server!r}{lack}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        if self.token and self.token_file:
            raise ValueError("either --token or --token-file")
        try:
            if self.token_file and not self.secret:
                raise ValueError(f"--token-file {self.token_file} is empty")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token-file {self.token_file}: {error}") from error

    @property
    def tls(self) -> Tls | None:
        return Tls(self.tls_ca, self.tls_cert, self.tls_key) if self.tls_ca or self.tls_cert else None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries."""
        return bearer(self.secret)

    @property
    def secret(self) -> str:
        """The token, from wherever it comes; empty: none."""
        return self.token_file.read_text(encoding="utf-8").strip() if self.token_file else self.token


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """What a call carries for the server to know who asks."""
    return (("authorization", f"Bearer {token}"),) if token else ()

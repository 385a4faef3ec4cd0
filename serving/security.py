"""Who may connect and who may do what: TLS, client certificates, bearer tokens with roles.

A token is 256 random bits, so its SHA-256 is as hard to turn back as it is to guess: the file holds nothing else, and
the log holds names alone.
"""

import fcntl
import functools
import hashlib
import logging
import os
import re
import secrets
import ssl
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status
from protos.files import write_atomically
from serving.errors import StartupError
from serving.parsing import method_of

log = logging.getLogger(__name__)

ROLES = ("act", "admin")
ADMIN_SERVICE = pb.DESCRIPTOR.services_by_name["PolicyAdmin"].full_name
LINE = re.compile(r"(?P<name>[\w.-]{1,64}) (?P<roles>(act|admin)(,(act|admin))*) (?P<sha256>[0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True)
class Token:
    """Who holds it, and what they may do."""

    name: str
    roles: frozenset[str]
    sha256: str


HandOver = Callable[[str], AbstractContextManager[None]]
"""Gives a token to its owner; the hash is written within."""


def new_token(name: str, roles: Iterable[str], file: Path, hand_over: HandOver = lambda _: nullcontext()) -> str:
    """Make a token, hand it over, add its hash to `file`, and return it: it is nowhere else.

    What could not be handed over has no hash: its name would be taken, and nobody would have the token. A new file is
    readable for its owner alone; one that was there keeps its owner, its mode and its place.

    Raises:
        StartupError: when the name is taken or not one.
        OSError: when the file cannot be read, written, or left to who owns it.
    """
    with _alone_in((file := file.resolve()).parent):
        return _new_token(name, roles, file, hand_over)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Of two at once, one would read the file before the other has written it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _new_token(name: str, roles: Iterable[str], file: Path, hand_over: HandOver) -> str:
    secret = secrets.token_urlsafe(32)
    line = f"{name} {','.join(roles)} {_sha256(secret)}"
    if not LINE.fullmatch(line):
        raise StartupError(
            f"a name has letters, digits, . _ and -, and roles are {' and '.join(ROLES)}; got {line[:-65]}"
        )
    there = file.stat() if file.exists() else None
    known = read_tokens(file) if there else []
    if name in [token.name for token in known]:
        raise StartupError(f"{file} has a token for {name} already; remove its line first")
    header = "# name roles sha256(token); made by python -m serving.tokens"
    before = file.read_text(encoding="utf-8") if there else header
    content = "\n".join([*before.splitlines(), line, ""]).encode()  # an editor may leave no last newline
    with hand_over(secret):
        if there:
            write_atomically(file, content, mode=stat.S_IMODE(there.st_mode), owner=(there.st_uid, there.st_gid))
        else:
            write_atomically(file, content, mode=0o600)
    return secret


def read_tokens(file: Path) -> list[Token]:
    """Raises StartupError naming the line that does not parse, and not what stands there: it may be a secret."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--tokens {file}: {error}") from error
    tokens = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if not match:
            raise StartupError(
                f"--tokens {file}, line {number}: expected NAME ROLES SHA256; make it with serving.tokens"
            )
        tokens.append(Token(match["name"], frozenset(match["roles"].split(",")), match["sha256"]))
    return tokens


class Gate:
    """What a caller may do. Without tokens: act, but not administer."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._tokens: dict[str, Token] | None = None
        self.reload()

    def reload(self) -> None:
        """Read the file again. Raises StartupError, and the tokens before stay good."""
        if self._file:
            self._tokens = {token.sha256: token for token in read_tokens(self._file)}

    def require(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> str:
        """The name of the token's holder, or "" where no tokens are asked for.

        Args:
            method: "/package.Service/Method".

        Raises:
            Rejected: UNAUTHENTICATED or PERMISSION_DENIED.
        """
        service = method.split("/")[1] if method.count("/") == 2 else ""
        role = "admin" if service == ADMIN_SERVICE else "act"
        if self._tokens is None:
            if role == "admin":
                remedy = "start the server with --tokens, and call with a token that has the role admin"
                raise Rejected("authorization", "a server with tokens", "one without", remedy, Status.PERMISSION_DENIED)
            return ""
        sent = [value for key, value in metadata if key == "authorization"]
        if len(sent) != 1 or not isinstance(sent[0], str) or not sent[0].startswith("Bearer "):
            remedy = "send the metadata authorization: Bearer TOKEN"
            raise Rejected("authorization", "one bearer token", "none", remedy, Status.UNAUTHENTICATED)
        # A dictionary of hashes: how long the search takes tells nothing of the secret.
        token = self._tokens.get(_sha256(sent[0].removeprefix("Bearer ")))
        if token is None:
            remedy = "was it removed from the server's file?"
            raise Rejected("authorization", "a token of this server", "another", remedy, Status.UNAUTHENTICATED)
        if role not in token.roles and not (role == "act" and "admin" in token.roles):
            got = f"{token.name} with {', '.join(sorted(token.roles))}"
            raise Rejected("authorization", f"the role {role}", got, "ask for another token", Status.PERMISSION_DENIED)
        return token.name


class Doorman(grpc.ServerInterceptor):
    """Asks the gate about every call but health, before the message is even read."""

    def __init__(self, gate: Gate, refused: Callable[[str, Rejected, grpc.ServicerContext], None]) -> None:
        self._gate, self._refused = gate, refused

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        if not details.method.startswith(f"/{health.SERVICE_NAME}/"):
            try:
                self._gate.require(details.method, details.invocation_metadata)
            except Rejected as rejected:
                handler, method = continuation(details), method_of(details.method)
                return handler and closed(handler, functools.partial(self._refused, method, rejected))
        return continuation(details)


def closed(handler: Any, refuse: Callable[[grpc.ServicerContext], None]) -> Any:
    """A handler that looks the same on the wire and refuses; having a stream of requests, it waits for none."""

    def behave(_requests: Any, context: grpc.ServicerContext) -> None:
        refuse(context)

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(behave)
    return grpc.stream_unary_rpc_method_handler(behave)


class Certificates:
    """The server's key pair and the clients' authority, read again when their files change."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Raises StartupError when the files do not make a pair."""
        self._files = (cert, key, *([client_ca] if client_ca else []))
        self._client_ca, self._lock = client_ca, threading.Lock()
        self._refused = ""
        try:
            self._stamp = self._stamps()  # before what they are of is read: a pair replaced meanwhile is another
            self._config = self._read()
        except (OSError, ssl.SSLError) as error:
            flags = f"--tls-cert {cert} and --tls-key {key}" + (f", --tls-client-ca {client_ca}" if client_ca else "")
            raise StartupError(f"{flags}: {error}") from error

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._config, self._latest, require_client_authentication=self._client_ca is not None
        )

    def _latest(self) -> Any:
        """At every new connection. A half-written or mismatched pair is not taken: the one before stays."""
        with self._lock:
            try:
                stamp = self._stamps()
                if stamp != self._stamp:
                    self._config, self._stamp, self._refused = self._read(), stamp, ""
                    log.info("certificates: read again")
            except (OSError, ssl.SSLError) as error:
                if str(error) != self._refused:  # once, not at each of the connections that somebody opens in vain
                    log.error("certificates: the new files do not fit, the ones before stay: %s", error)
                self._refused = str(error)
            return self._config

    def _read(self) -> Any:
        cert, key = self._files[:2]
        contents = [file.read_bytes() for file in self._files]  # of a missing file, ssl's error has no name
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert, key, password=_no_passphrase)
        if self._client_ca:
            ssl.create_default_context(cafile=self._client_ca)
        authority = contents[2] if self._client_ca else None
        return grpc.ssl_server_certificate_configuration([(contents[1], contents[0])], authority)

    def _stamps(self) -> tuple[float, ...]:
        return tuple(file.stat().st_mtime_ns for file in self._files)


def _no_passphrase() -> str:
    """Instead of asking for it on a terminal, and grpc could not read such a key."""
    raise ssl.SSLError("the key has a passphrase; a server needs one without")


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()

"""Make a bearer token: `python -m serving.tokens arm-1 --role act --file tokens`. It is shown once and kept nowhere."""

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from protos.files import require_absent, whole
from serving.errors import StartupError
from serving.security import new_token


@dataclass(frozen=True)
class NewToken:
    """Add a token's hash to the file that serving.server --tokens reads, and print the token, or write it to --output.

    A server that runs takes it up at SIGHUP. To revoke one, remove its line and send SIGHUP. Exit code 1: there
    is no such token.
    """

    name: tyro.conf.Positional[str]
    """Whose it is: what the server logs and counts by."""
    file: Path
    """Where the hash goes."""
    output: Path | None = None
    """Write the token here instead, for its owner's eyes alone, as --token-file reads it; nothing may be there yet."""
    role: tuple[Literal["act", "admin"], ...] = ("act",)
    """act: ask for motions. admin: load and unload policies, drain the server, and act."""


def main() -> int:
    asked = tyro.cli(NewToken, prog="python -m serving.tokens")
    try:
        if asked.output is None:
            hand_over = _shown
        elif asked.output.resolve() == asked.file.resolve():
            raise StartupError(f"--output must be another file than --file {asked.file}: that one holds hashes alone")
        else:
            require_absent(asked.output)
            hand_over = functools.partial(_written, asked.output)
        new_token(asked.name, asked.role, asked.file, hand_over)
    except (StartupError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


@contextmanager
def _shown(secret: str) -> Iterator[None]:
    if sys.stdout is None:
        raise OSError("there is no stdout to show the token on: give --output")
    print(secret, flush=True)
    yield


@contextmanager
def _written(output: Path, secret: str) -> Iterator[None]:
    with whole(output) as made, os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        print(secret, file=file)
    try:
        yield
    except BaseException:
        output.unlink()
        raise


if __name__ == "__main__":
    sys.exit(main())

"""Make a bearer token: `python -m serving.tokens arm-1 --role act --file tokens`. It is shown once and kept nowhere."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from protos.files import whole
from serving.errors import StartupError
from serving.security import new_token


@dataclass(frozen=True)
class NewToken:
    """Add a token's hash to the file that serving.server --tokens reads, and print the token, or write it to --output.

    A server that runs takes it up at SIGHUP. To revoke one, remove its line and send SIGHUP. Exit code 1: nothing was
    written.
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
            print(new_token(asked.name, asked.role, asked.file))
        else:
            _write(asked, asked.output)
    except (StartupError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _write(asked: NewToken, output: Path) -> None:
    with whole(output) as made, os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        print(new_token(asked.name, asked.role, asked.file), file=file)


if __name__ == "__main__":
    sys.exit(main())

"""Make a bearer token: `python -m serving.tokens arm-1 --role act --file tokens`. It is shown once and kept nowhere."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from serving.errors import StartupError
from serving.security import new_token


@dataclass(frozen=True)
class NewToken:
    """Add a token's hash to the file that serving.server --tokens reads, and print the token.

    A server that runs takes it up at SIGHUP. To revoke one, remove its line and send SIGHUP. Exit code 1: nothing was
    written.
    """

    name: tyro.conf.Positional[str]
    """Whose it is: what the server logs and counts by."""
    file: Path
    """Where the hash goes."""
    role: tuple[Literal["act", "admin"], ...] = ("act",)
    """act: ask for motions. admin: load and unload policies, drain the server, and act."""


def main() -> int:
    asked = tyro.cli(NewToken, prog="python -m serving.tokens")
    try:
        print(new_token(asked.name, asked.role, asked.file))
    except (StartupError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

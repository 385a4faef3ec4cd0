"""What commands and servers that run in this process would leave behind, or take long over."""

import signal
from collections.abc import Iterator

import pytest

from tests.serving.conftest import no_lame_duck  # noqa: F401


@pytest.fixture(autouse=True)
def sigterm_as_before() -> Iterator[None]:
    """A command that a test ran in this process hears it from then on."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)

"""What every test is owed."""

import logging
import os
from collections.abc import Iterator

import hypothesis
import pytest

import serving  # noqa: F401  # chooses gRPC's event loop: before any test imports grpc
from tests.makers import UNHURRIED_MS

SLOW = (hypothesis.HealthCheck.too_slow,)
hypothesis.settings.register_profile("unhurried", deadline=None, suppress_health_check=SLOW)
hypothesis.settings.load_profile("unhurried")
os.environ.setdefault("EQUISERVE_VALID_FOR_MS", f"{UNHURRIED_MS:g}")  # of servers in processes of their own


@pytest.fixture(autouse=True)
def quiet_afterwards() -> Iterator[None]:
    """A command that a test ran in this process set up logging, onto a stream that ends with the test."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)
    root.setLevel(level)

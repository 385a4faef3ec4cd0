"""The policy server, and the client that a robot's controller imports."""

import os
from importlib.metadata import version

if version("grpcio").startswith("1.85."):  # others may not know these switches, and would say so on stderr
    # gRPC's older event loop: fewer threads in a call's way (`python -m tests.benchmarks.serving.event_loops`).
    # Read when grpc is first imported. Who has set this variable keeps what he set.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

"""Regenerate the checked-in stubs from policy.proto: `python -m protos.generate`; `--check` only compares.

The stubs are checked in so that an install needs no compiler. grpcio-tools (extra `dev`) generates them.
"""

import argparse
import importlib.resources
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = Path("protos/equiserve/v1/policy.proto")


def generate(into: Path) -> None:
    """Write policy_pb2.py, policy_pb2.pyi and policy_pb2_grpc.py below `into`, in the layout of the repository."""
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    flags = [f"--{plugin}={into}" for plugin in ("python_out", "pyi_out", "grpc_python_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"-I{well_known}", *flags, str(PROTO)]
    subprocess.run(command, check=True, cwd=ROOT)


def stale() -> list[str]:
    """Names of checked-in stubs that differ from what policy.proto generates now."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = sorted((Path(scratch) / PROTO.parent).iterdir())
        checked_in = ROOT / PROTO.parent
        return [
            f.name
            for f in fresh
            if not (checked_in / f.name).exists() or (checked_in / f.name).read_bytes() != f.read_bytes()
        ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m protos.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where stubs are stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    names = stale()
    if names:
        print(f"stale stubs: {', '.join(names)}; run `python -m protos.generate` and commit the result")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())

"""The checked-in stubs are what policy.proto generates, and the .proto passes its linter."""

import subprocess
import sys
from pathlib import Path

import pytest

from protos import generate
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Status
from protos.generate import ROOT
from protos.spaces import ACTION


def test_stubs_match_the_proto():
    check = subprocess.run(
        [sys.executable, "-m", "protos.generate", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (check.returncode, check.stdout) == (0, "")


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--chek", 2)])
def test_no_stub_is_rewritten_unasked(argument: str, code: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(generate, "generate", None)
    monkeypatch.setattr(sys, "argv", ["generate", argument])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    assert ended.value.code == code
    assert "--check" in "".join(capsys.readouterr())


def test_proto_passes_buf_lint():
    buf = Path(sys.executable).with_name("buf")
    lint = subprocess.run([buf, "lint"], cwd=ROOT / "protos", capture_output=True, text=True, check=False)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_the_wire_has_every_action_component():
    assert set(ACTION.components) == set(pb.Action.DESCRIPTOR.fields_by_name)


def test_every_status_is_a_grpc_status():
    import grpc

    assert all(hasattr(grpc.StatusCode, status.value) for status in Status)

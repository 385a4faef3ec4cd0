"""The image and the compose file: linted, and small and closed as they claim."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
import yaml

from serving.config import Config
from serving.server import Server
from tests.makers import settings, tiny_policy_file

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "deploy" / "server.Dockerfile"
SERVER = yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())["services"]["server"]


def instructions(name):
    """Arguments of every instruction of this name, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).with_name("hadolint")
    lint = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_only_the_serve_extra_is_installed():
    installs = [run for run in instructions("RUN") if "pip install" in run]
    assert [shlex.split(install)[-1] for install in installs] == ["./[serve]"]


def test_only_contract_and_server_are_copied():
    copied = {source for copy in instructions("COPY") if "--from" not in copy for source in copy.split()[:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "protos", "serving"}
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed


def test_the_server_does_not_run_as_root():
    assert instructions("USER") == ["10001"]


def test_the_image_reports_its_health(tmp_path):
    (check,) = instructions("HEALTHCHECK")
    interpreter, option, code = yaml.safe_load(check.split("CMD", 1)[1])
    assert (interpreter, option) == ("python", "-c")
    assert code.count("127.0.0.1:50051") == 1  # as its command listens, see below
    with Server(settings(tiny_policy_file(tmp_path / "policy.onnx"))) as server:
        code = code.replace("127.0.0.1:50051", server.address).replace("timeout=2", "timeout=60")
        for status in (1, 0):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=90)
            assert (done.returncode, done.stderr) == (status, b"")  # it was answered, whatever the answer
            if status:
                server.load()


def test_the_images_command_is_one_that_the_server_accepts():
    (command,) = instructions("CMD")
    config = tyro.cli(Config, args=yaml.safe_load(command))
    assert config.listen == "0.0.0.0:50051"
    assert config.insecure
    assert config.policy == (SERVER["volumes"][0]["target"],)


def test_compose_publishes_to_loopback_alone():
    assert SERVER["ports"] == ["127.0.0.1:50051:50051"]


def test_compose_gives_nothing_away():
    assert SERVER["read_only"] is True
    assert SERVER["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in SERVER["security_opt"]
    assert all(volume["read_only"] for volume in SERVER["volumes"])
    assert not {"privileged", "network_mode", "user"} & set(SERVER)


def test_compose_waits_longer_than_the_server_drains():
    assert float(SERVER["stop_grace_period"].rstrip("s")) > Config(policy=("p",)).grace_s


@pytest.mark.parametrize("path", [SERVER["build"]["dockerfile"]])
def test_compose_builds_what_is_here(path):
    assert (REPOSITORY / "deploy" / SERVER["build"]["context"] / path).resolve() == DOCKERFILE

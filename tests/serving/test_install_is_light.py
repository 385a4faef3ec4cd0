"""`pip install .[serve]` and `pip install .` bring no training framework and no simulator, by what packages declare."""

import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.serving.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "e2cnn", "pybullet", "gymnasium", "minari", "onnx", "onnxscript", "scipy", "ray"}


def closure(requirements):
    """Names of everything that these requirements pull, by the metadata of what is installed here."""
    seen, todo = set(), [Requirement(r) for r in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                required = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue  # for another platform or Python
            for text in required:
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    todo.append(further)
    return {name for name, _ in seen}


def test_a_server_install_is_light():
    names = closure(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["serve"])
    assert "onnxruntime" in names
    assert not names & HEAVY


def test_a_controllers_install_is_lighter():
    assert closure(PROJECT["dependencies"]) <= {"numpy", "grpcio", "protobuf", "typing-extensions"}


@pytest.mark.parametrize("name", ["onnxruntime", "grpcio", "tyro"])
def test_what_is_declared_is_installed_here(name):
    """Otherwise the closure above would be empty and prove nothing."""
    assert metadata.version(name)

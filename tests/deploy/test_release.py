"""What a release consists of: one version everywhere, and a wheel that works with what it asks for alone."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from guard import __version__
from guard.bundle_schema import CURRENT
from guard.engine.config import MIDDLEWARE, SCHEDULER, WORKER
from guard.sealed import Keyring

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
SECTIONS = re.split(r"^## ", CHANGELOG, flags=re.M)[1:]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
LABELS = ("title", "description", "version", "revision", "licenses")


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, and the wheel that was built from it, without a network."""
    pytest.importorskip("build", reason="the package build is not installed")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def wheel(artefacts: Path) -> Path:
    return artefacts / f"neuronguard-{__version__}-py3-none-any.whl"


def needed(requirements: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """The installed packages that requirements ask for, and what those ask for."""
    seen: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if requirement.name in seen or not _applies(requirement, {""}):
            continue
        seen.add(requirement.name)
        found = importlib.metadata.distribution(requirement.name)
        yield found
        waiting += [each for each in map(Requirement, found.requires or ()) if _applies(each, extras)]
        for each in waiting:
            each.marker = None  # was looked at with the extras of who asks


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel and what the wheel itself asks for, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)],
        check=True,
        timeout=120,
    )
    (site,) = folder.glob("lib/python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"neuronguard-{__version__}.dist-info/METADATA").decode()
    asked = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Requires-Dist")]
    for distribution in needed([line for line in asked if "extra ==" not in line]):
        for file in distribution.files or ():
            top = file.parts[0]
            if top != ".." and not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "bin"


def run(command: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NEURONGUARD"))
    }
    return subprocess.run(
        [command, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=kept | environment,
        cwd="/",
    )


def test_the_version_is_written_once() -> None:
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert importlib.metadata.version("neuronguard") == __version__
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE  # what else names it: test_compose.py, test_helm.py


def test_the_changelog_begins_with_this_release_and_every_release_says_how_to_upgrade() -> None:
    assert SECTIONS[0].startswith(f"{__version__}\n")
    assert all("\n### Upgrading\n" in section for section in SECTIONS)


def test_the_changelog_names_the_schema_of_bundles() -> None:
    found = re.findall(r"\*\*Bundles\*\* have schema version (\d+)", CHANGELOG)
    assert int(found[0]) == CURRENT


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "guard", "service"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode != 0:
        pytest.skip("not a Git checkout: which files belong to the packages is not known")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == {name for name in tracked.stdout.split() if (ROOT / name).exists()}
    about = {name.partition(".dist-info/")[2] for name in names - packed}
    assert {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"} <= about


def test_the_source_archive_holds_what_the_wheel_is_built_from(artefacts: Path) -> None:
    with tarfile.open(artefacts / f"neuronguard-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "guard/__init__.py", "service/__init__.py"} <= names


def test_a_fresh_environment_has_the_command_and_its_version(fresh: Path) -> None:
    said = run(fresh / "neuronguard", "--version")
    assert (said.stdout, said.stderr) == (f"neuronguard, version {__version__}\n", "")


def test_the_gateway_runs_on_the_base_installation_alone(fresh: Path, tmp_path: Path) -> None:
    Keyring.generate().save(tmp_path / "keys")
    policies = tmp_path / "policies.yaml"
    policies.write_text(yaml.safe_dump({"policies": {"default": {}}}))
    settings = {"NEURONGUARD_KEY_FILE": str(tmp_path / "keys"), "NEURONGUARD_POLICY_FILE": str(policies)}
    said = run(fresh / "neuronguard", "gateway", "--check-config", **settings)
    assert said.returncode == 0, said.stderr
    assert said.stdout.endswith("the configuration is valid\n")


def test_what_needs_an_extra_says_which(fresh: Path) -> None:
    said = run(fresh / "python", "-m", "guard.engine", "--model", "/m", "--bundle", "/b")
    assert said.returncode == 1
    assert "install neuronguard[cpu] or neuronguard[cuda]" in said.stderr


def test_vllm_finds_the_guard_in_the_installed_package(fresh: Path, wheel: Path) -> None:
    """vLLM is told of the guard by three names (``GuardConfig.flags``) and imports them where it runs."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = archive.read(f"neuronguard-{__version__}.dist-info/entry_points.txt").decode()
    for name in (WORKER, SCHEDULER, MIDDLEWARE):
        assert name.rpartition(".")[0].replace(".", "/") + ".py" in names
    assert "neuronguard = guard.cli:main" in entry
    # This environment's vLLM behind the fresh one's guard: the editable one here must not be what is found.
    here = str(importlib.metadata.distribution("torch").locate_file(""))
    code = f"""
import sys
sys.path.append({here!r})
from vllm.utils.import_utils import resolve_obj_by_qualname
for name in {(WORKER, SCHEDULER, MIDDLEWARE)!r}:
    print(sys.modules[resolve_obj_by_qualname(name).__module__].__file__)
"""
    said = run(fresh / "python", "-c", code)
    assert said.returncode == 0, said.stderr[-2000:]
    files = said.stdout.split()
    assert len(files) == 3
    assert all(file.startswith(str(fresh.parent)) for file in files)


def test_every_image_says_what_it_is() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, flags=re.M | re.S))
    for name in ("gateway", "engine-cpu", "engine-cuda", "load"):
        labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', stages[name]))
        assert tuple(labels) == LABELS
        assert labels["title"] == f"neuronguard/{name}"
        assert (labels["version"], labels["revision"]) == ("$VERSION", "$REVISION")
        assert labels["licenses"] == PROJECT["license"]
        assert "ARG VERSION\nARG REVISION\nLABEL" in stages[name]  # out of scope without


def test_the_sbom_tool_is_pinned_and_knows_both_images(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import sbom  # type: ignore[import-not-found]

    assert re.fullmatch(r"cyclonedx-bom==[\d.]+", sbom.TOOL)
    assert sbom.main(["wrong"]) == 2
    assert "gateway|engine" in capsys.readouterr().err

"""What is read, what is depended on, and what is said about vulnerabilities that are known."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from guard.checkpoint import Checkpoint, CheckpointError
from guard.digest import tokenizer_digest
from tests.engine import world

ROOT = Path(__file__).parents[1]
CODE = ("guard", "service", "deploy", "models", "loadtests", "scripts")
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
ARRAYS = {".safetensors", ".npy"}
"""What is kept of arrays; `.npy` in the user's cache only."""

sys.path.insert(0, str(ROOT / "scripts"))
import audit  # noqa: E402


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text("utf-8"))


def calls(tree: ast.Module, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield node


def keyword(call: ast.Call, name: str) -> Any:
    return next((ast.literal_eval(each.value) for each in call.keywords if each.arg == name), None)


def test_no_code_imports_what_reads_pickles() -> None:
    for path, tree in trees():
        for node in ast.walk(tree):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not PICKLES & {name.partition(".")[0] for name in named}, path


def test_arrays_are_read_without_pickles() -> None:
    """The recipe alone keeps its own intermediate steps as torch writes them, and reads tensors alone."""
    for path, tree in trees():
        for call in calls(tree, "torch.load"):
            assert path.parts[:2] == ("models", "recipe"), path
            assert keyword(call, "weights_only") is True, path
        for call in calls(tree, "np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") is False, path
        for call in calls(tree, "AutoModelForCausalLM.from_pretrained"):
            if path.parts[0] in ("guard", "service"):
                assert keyword(call, "use_safetensors") is True, path


def test_the_repository_ships_arrays_as_safetensors_alone() -> None:
    binary = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".h5", ".onnx", ".npz"}
    for folder in (*CODE, "tests", "docs"):
        assert not [p for p in (ROOT / folder).rglob("*") if p.suffix in binary and "corpus" not in p.parts]


def test_a_checkpoint_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    model = world.make_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, model / "pytorch_model.bin")
    assert tokenizer_digest(model)
    with pytest.raises(CheckpointError, match="safetensors"):
        Checkpoint.open(model)


def names(requirements: list[str]) -> dict[str, str]:
    found = {}
    for each in requirements:
        match = re.match(r"[\w.-]+", each)
        assert match is not None
        found[match[0].lower().replace("_", "-")] = each[match.end() :]
    return found


def test_the_environment_is_pinned_and_every_dependency_has_a_lowest_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "scripts" / "constraints-cpu.txt").read_text("utf-8").splitlines()
    pinned = names([line for line in lines if line and not line.startswith("#")])
    assert all(re.match(r"==[\w.+!]+( ;.*)?$", version) for version in pinned.values())
    extras = project["optional-dependencies"]
    for extra, requirements in {"base": project["dependencies"], **extras}.items():
        for name, bounds in names(requirements).items():
            if name == "neuronguard" or name.startswith("types-") or name == "grafana-foundation-sdk":
                continue
            assert ">=" in bounds, (extra, name)
            # Of what `make env` installs, everything; a GPU's vLLM, tracing and fuzzing are chosen by hand.
            if extra in ("base", "fit", "cpu", "dev"):
                assert name in pinned, (extra, name)
    for extra in ("cpu", "cuda"):
        assert any("vllm" in each and "<" in each for each in extras[extra])


VULNERABLE = {"name": "one", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
SOUND = {"name": "two", "version": "2.0", "vulns": []}
UNKNOWN = {"name": "three", "skip_reason": "Dependency not found on PyPI"}
OWN = {"name": "neuronguard", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "status", "said"),
    [
        ([SOUND, OWN], 0, "0 of 1 packages have known vulnerabilities"),
        ([SOUND, UNKNOWN], 0, "not audited, unknown to the service: three\n0 of 1"),
        ([SOUND, VULNERABLE], 1, "one 1.0: PYSEC-1, fixed in 1.1\n1 of 2"),
        ([UNKNOWN, OWN], 2, "not audited: none of 1 packages is known"),
        ([], 2, "not audited: none of 0 packages is known"),
    ],
)
def test_an_audit_that_asked_nobody_is_no_success(packages: list[Any], status: int, said: str) -> None:
    found = audit.outcome(packages)
    assert found.status == status
    assert said in found.text


def stand_in(tmp_path: Path, code: str) -> list[str]:
    """A program in pip-audit's place; ``service`` and ``report`` are what it was called with."""
    script = tmp_path / "tool.py"
    script.write_text(
        "import json, sys, pathlib\nargs = sys.argv\nservice = args[args.index('--service') + 1]\n"
        f"report = pathlib.Path(args[args.index('--output') + 1])\n{code}"
    )
    return [sys.executable, str(script)]


def test_the_second_service_is_asked_when_the_first_knows_nothing(tmp_path: Path) -> None:
    known = {"pypi": [UNKNOWN], "osv": [VULNERABLE]}
    tool = stand_in(
        tmp_path,
        f"report.write_text(json.dumps({{'dependencies': json.loads({json.dumps(known)!r})[service]}}))",
    )
    assert audit.audit(tool, tmp_path).status == 1


def test_a_refused_network_is_said(tmp_path: Path) -> None:
    tool = stand_in(tmp_path, "sys.exit('ConnectionError: refused')")
    said = audit.audit(tool, tmp_path)
    assert said == audit.Outcome(2, "not audited: osv could not be asked (ConnectionError: refused)")


def test_the_security_policy_points_at_the_threat_model_and_names_no_address() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    assert "docs/threat-model.md" in text
    assert "private vulnerability reporting" in text
    assert "@" not in text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).is_file(), link

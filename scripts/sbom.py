"""List what an image of ours is made of: ``sbom.py [gateway|engine]``, as CycloneDX JSON in ``dist``.

The packages are installed by the same steps as in the image, so the list has the versions that are in it.
What the base images bring (Python itself, Debian's packages, and vLLM in the CUDA image) is not listed: a
scanner of images finds it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from image import ROOT, install
from pip_run import Pip, SetupError, say

sys.path.insert(0, str(ROOT))
from guard import __version__

TOOL = "cyclonedx-bom==7.5.0"
"""In an environment of its own: it needs a dozen packages that nothing else here does."""
KINDS = ("gateway", "engine")


def write(kind: str, target: Path) -> None:
    """Make the environment of an image, and list it. Raises SetupError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"Installing what the image {kind} holds:")
        install(kind, folder / "image")
        subprocess.run([sys.executable, "-m", "venv", folder / "tool"], check=True)
        Pip(folder / "tool" / "bin" / "python", folder / "tool.log").install("the tool", TOOL)
        target.parent.mkdir(exist_ok=True)
        command = [
            *(folder / "tool" / "bin" / "cyclonedx-py", "environment", folder / "image" / "bin" / "python"),
            *("--pyproject", ROOT / "pyproject.toml", "--mc-type", "application"),
            *("--output-reproducible", "--of", "JSON", "--output-file", target),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SetupError(f"{TOOL} failed: {done.stderr.strip()}")
    document = json.loads(target.read_text("utf-8"))
    document["metadata"]["component"]["version"] = __version__  # pyproject.toml only says where it is
    target.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    say(f"Written: {target.relative_to(ROOT)}")


def main(arguments: list[str]) -> int:
    """Returns the process's exit status."""
    kind = arguments[0] if arguments else "gateway"
    if kind not in KINDS or len(arguments) > 1:
        print(f"usage: sbom.py [{'|'.join(KINDS)}]", file=sys.stderr)
        return 2
    try:
        write(kind, ROOT / "dist" / f"neuronguard-{kind}-{__version__}.cdx.json")
    except SetupError as error:
        print(f"neuronguard: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m tests.fuzz``: let Atheris look for inputs that break a promise, for a bounded time.

Needs ``neuronguard[fuzz]``. New inputs go to ``results/fuzz/TARGET``, those that break something under a name
that begins with ``crash-``, ``timeout-`` or ``oom-``; ``--keep`` copies some of the others to the corpus.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import click

from tests.fuzz.corpus import CORPUS, LONGEST

FAILURES = ("crash-", "timeout-", "oom-")
STARTING = 120
"""Seconds that a run may take beside its fuzzing."""


def fuzz(target: str, seconds: int, folder: Path) -> list[Path]:
    """Run one target; returns the inputs that broke it."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = {
        "max_total_time": seconds,
        "max_len": LONGEST,
        "timeout": 20,
        "rss_limit_mb": 2048,
        "artifact_prefix": f"{folder}/",
        "verbosity": 0,
    }
    command = [sys.executable, "-m", "tests.fuzz.run", target]
    command += [f"-{name}={value}" for name, value in flags.items()]
    with (folder.parent / f"{target}.log").open("wb") as log:
        done = subprocess.run(
            [*command, str(folder), str(CORPUS / target)],
            stdout=log,
            stderr=log,
            timeout=seconds + STARTING,
            check=False,
        )
    broken = [path for path in sorted(folder.iterdir()) if path.name.startswith(FAILURES)]
    if done.returncode != 0 and not broken:
        raise click.ClickException(f"{target} ended with {done.returncode}; see {folder.parent}/{target}.log")
    return broken


def keep(target: str, folder: Path, count: int) -> int:
    """Copy inputs that were found, short and long ones, into the corpus; returns how many."""
    found = [path for path in folder.iterdir() if not path.name.startswith(FAILURES)]
    known = {path.read_bytes() for path in (CORPUS / target).iterdir()}
    new = [
        path
        for path in sorted(found, key=lambda p: (p.stat().st_size, p.name))
        if path.read_bytes() not in known
    ]
    chosen = new[:: max(1, len(new) // count)][:count] if count else []
    for path in chosen:
        shutil.copy(path, CORPUS / target / path.name[:12])
    return len(chosen)


@click.command()
@click.option("--seconds", default=60, show_default=True, help="For each target.")
@click.option("--target", "targets", multiple=True, help="Only this one; may be given several times.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/fuzz"), show_default=True)
@click.option("--keep", "count", default=0, help="Copy so many new inputs of each target to the corpus.")
def main(seconds: int, targets: tuple[str, ...], out: Path, count: int) -> None:
    """Fuzz the decoders; the exit status says whether anything broke."""
    if importlib.util.find_spec("atheris") is None:
        raise click.ClickException("Atheris is not installed: .venv/bin/pip install 'atheris>=3.0'")
    broken = []
    for target in targets or sorted(path.name for path in CORPUS.iterdir()):
        failures = fuzz(target, seconds, out / target)
        kept = keep(target, out / target, count)
        click.echo(f"{target}: {len(failures)} failures, {kept} inputs kept")
        broken += failures
    for path in broken:
        click.echo(f"broken: {path}", err=True)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()

"""``python -m loadtests.rolling``: every rolling change with two real engines and two gateways under load.

The engines serve the lab model, so a machine with two cores will do; it takes some minutes. A change of
vLLM's version needs an interpreter with another one (``--from-python``), such as those of ``make compat``.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from guard.bundle import Bundle
from guard.lab import resolve
from guard.sealed import Keyring
from guard.serve.plan import engine_environment
from loadtests.rolling import changes
from loadtests.rolling.load import Load, Prompts, load
from loadtests.rolling.replicas import Choice, Deployment, deployed

MODEL, BUNDLE = "models/lab:lab-partial", "models/lab/bundle"
PROMPTS = Path(__file__).parent.parent / "traffic" / "prompts.json"
KINDS = ("enforce", "bundle", "vllm", "key", "gateway")
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "512"),
    *("--num-gpu-blocks-override", "256", "--max-num-seqs", "16", "--max-num-batched-tokens", "512"),
    *("--override-generation-config", '{"temperature": 0.0}', "--uvicorn-log-level", "warning"),
    *("--shutdown-timeout", "60"),
)


def another_bundle(directory: Path, target: Path) -> None:
    """The same probe under another digest, as a new fit on the same data would be."""
    bundle = Bundle.load(directory)
    created = {**bundle.card.created, "rolled": "once"}
    card = bundle.card.model_copy(update={"created": created})
    Bundle(card, bundle.scorer, bundle.patches.values()).save(target)


def engine_command(model: Path) -> Callable[[Choice, Path, int], list[str]]:
    """The command line of an engine that serves ``model``."""

    def command(choice: Choice, key_file: Path, port: int) -> list[str]:
        return [
            *(choice.python, "-m", "guard.engine", "--model", str(model), "--bundle", choice.bundle),
            *("--key-file", str(key_file), "--served-model-name", "lab-partial"),
            *("--host", "127.0.0.1", "--port", str(port), *FLAGS),
        ]

    return command


class Run:
    """The changes that were asked for, one after another, each under load of its own."""

    def __init__(self, deployment: Deployment, folder: Path, keys: Keyring, old: Path) -> None:
        prompts = json.loads(PROMPTS.read_text("utf-8"))
        self._prompts = Prompts("lab-partial", prompts["everyday"][1], prompts["unwelcome"][2])
        self._deployment = deployment
        self._folder = folder
        self._keys = keys
        self._old = old
        self.found: list[dict[str, Any]] = []

    def change(self, kind: str) -> None:
        """Make one change and note what clients saw."""
        began = time.monotonic()
        with self._load() as running:
            if kind == "enforce":
                time.sleep(5)
            else:
                running.enforced.set()
            said = getattr(self, kind)(running)
            time.sleep(3)
        report = running.report
        self.found.append(
            {
                "change": kind,
                "seconds": round(time.monotonic() - began),
                "asked": report.asked,
                "failed": report.failed,
                "unguarded": report.unguarded,
                "answers": dict(sorted(report.kinds.items())),
                "said": said,
            }
        )
        click.echo(
            f"{kind}: {report.asked} requests in {self.found[-1]['seconds']} s, {len(report.failed)} failed, "
            f"{len(report.unguarded)} unguarded{', ' + said if said else ''}"
        )

    def _load(self) -> AbstractContextManager[Load]:
        urls = [gateway.url for gateway in self._deployment.gateways]
        return load(urls, self._prompts, clients=2, pause=0.3)

    def enforce(self, running: Load) -> str:
        """From observing to enforcing."""
        changes.enforce(self._deployment, running)
        time.sleep(5)
        return ""

    def bundle(self, _: Load) -> str:
        """Another bundle."""
        new = self._folder / "new-bundle"
        another_bundle(self._old, new)
        digests = [Bundle.load(path).digest for path in (self._old, new)]
        changes.new_bundle(self._deployment, str(new), *digests)
        return f"{digests[0][:8]} to {digests[1][:8]}"

    def vllm(self, _: Load) -> str:
        """The vLLM of this environment in place of the one that the engines began with."""
        before = self._deployment.status(self._deployment.engines[0]).vllm_version
        return f"{before} to {', '.join(changes.new_vllm(self._deployment, sys.executable))}"

    def key(self, _: Load) -> str:
        """Another shared key."""
        changes.new_key(self._deployment, self._keys, Keyring.generate("k2"))
        return "k1 to k2"

    def gateway(self, _: Load) -> str:
        """Other gateways."""
        changes.new_gateway(self._deployment)
        return ""


@click.command()
@click.option(
    "--from-python", type=click.Path(path_type=Path), help="The interpreter that engines begin with."
)
@click.option("--only", type=click.Choice(KINDS), multiple=True, help="These changes; left out: all.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results/rolling.json"), show_default=True
)
def main(from_python: Path | None, only: tuple[str, ...], out: Path) -> None:
    """Make the changes; the exit status is 1 when a request failed or was unguarded."""
    python = str(from_python.absolute()) if from_python else sys.executable
    model, old = resolve(MODEL)[0], Path(BUNDLE).absolute()
    keys = Keyring.generate("k1")
    policies: dict[str, object] = {
        "policies": {"default": {"mode": "observe" if not only or "enforce" in only else "enforce"}},
        "bundles": [Bundle.load(old).digest],
    }
    with tempfile.TemporaryDirectory() as name:
        folder, choice = Path(name), Choice(str(old), python)
        with deployed(
            folder, engine_command(model), choice, keys, policies, environment=engine_environment({})
        ) as deployment:
            run = Run(deployment, folder, keys, old)
            for kind in KINDS:
                if not only or kind in only:
                    run.change(kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"python": platform.python_version(), "engines": 2, "gateways": 2}
    out.write_text(json.dumps({"facts": facts, "changes": run.found}, indent=1) + "\n")
    sys.exit(any(one["failed"] or one["unguarded"] for one in run.found))


if __name__ == "__main__":
    main()

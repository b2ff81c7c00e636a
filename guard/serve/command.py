"""``neuronguard serve``: check the machine, prepare the model, and hand over to the supervisor."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

import guard
from guard.serve import checks
from guard.serve.plan import Served, reachable_address

LAB_DIR = Path(guard.__file__).resolve().parent.parent / "models" / "lab"
DEFAULT_VARIANT = "lab-partial"
_QUESTION = "How do I bake bread?"


def run(
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    lab_dir: Path = LAB_DIR,
    variant: str = DEFAULT_VARIANT,
    model: Path | None = None,
    bundle: Path | None = None,
    policy_file: Path | None = None,
    extra: Sequence[str] = (),
    verbose: bool = False,
) -> int:
    """Serve a guarded endpoint until stopped; returns the process's exit status.

    Raises CheckError when this machine or these options cannot work.
    """
    has_keys = _has_keys(policy_file)
    _check(host, port, has_keys)
    from guard.cache import cache_root
    from guard.serve import plan
    from guard.serve.keys import fresh_key_file
    from guard.serve.supervise import supervise

    served = _served(lab_dir, variant, model, bundle)
    logs = cache_root() / "logs" / f"port-{port}"
    click.echo(f"Starting {served.name} under guard on CPU; logs in {logs}.")
    with fresh_key_file() as key_file:
        engine_port = plan.free_port()
        services = [
            plan.engine(served, engine_port, key_file, extra=extra, verbose=verbose),
            plan.gateway(host, port, engine_port, key_file, policy_file),
        ]
        message = invitation(host, port, served.name, has_keys)
        return supervise(services, message, logs=logs, remove=[key_file.parent], verbose=verbose)


def _check(host: str, port: int, has_keys: bool) -> None:
    checks.check_python()
    checks.check_platform()
    checks.check_cpu()
    checks.check_exposure(host, has_keys)
    checks.check_port(host, port)
    checks.check_memory()


def _served(lab_dir: Path, variant: str, model: Path | None, bundle: Path | None) -> Served:
    from guard.lab import LabError, materialise

    if model is not None:
        if bundle is None:
            raise checks.CheckError(
                "--model needs --bundle: the directory that `neuronguard fit` made for it."
            )
        return Served(model.resolve().name, model, bundle, lab=False)
    bundle = bundle or lab_dir / "bundle"
    if not bundle.is_dir():
        raise checks.CheckError(f"there is no bundle in {bundle}: name one with --bundle.")
    try:
        return Served(variant, materialise(lab_dir, variant), bundle, lab=True)
    except LabError as error:
        raise checks.CheckError(str(error)) from error


def _has_keys(policy_file: Path | None) -> bool:
    """Whether a policy file lists API keys. Its meaning is the gateway's to check, which does so on start."""
    if policy_file is None:
        return False
    import yaml

    try:
        document = yaml.safe_load(policy_file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise checks.CheckError(f"the policy file {policy_file} cannot be read: {error}") from error
    return isinstance(document, dict) and bool(document.get("keys"))


def invitation(host: str, port: int, model: str, has_keys: bool) -> str:
    """The URL, and a command that shows the endpoint at work."""
    address = reachable_address(host)
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{_QUESTION}"}}]}}'
    key = "-H 'Authorization: Bearer YOUR-KEY' " if has_keys else ""
    curl = (
        f"curl -i {url}/v1/chat/completions -H 'Content-Type: application/json' {key}-d {shlex.quote(body)}"
    )
    return f"Guarded endpoint: {url}  (Ctrl-C stops it)\nTry: {curl}"


@click.command("serve", context_settings={"show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", default=8080, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option("--lab-dir", type=click.Path(path_type=Path), default=LAB_DIR, help="Directory of lab models.")
@click.option("--variant", default=DEFAULT_VARIANT, help="Lab model to serve.")
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Own checkpoint."
)
@click.option("--bundle", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Its bundle.")
@click.option(
    "--policy-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    envvar="NEURONGUARD_POLICY_FILE",
    help="Policies and API keys of the gateway.",
)
@click.option("--verbose", is_flag=True, help="Show what engine and gateway log.")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
def serve(
    host: str,
    port: int,
    lab_dir: Path,
    variant: str,
    model: Path | None,
    bundle: Path | None,
    policy_file: Path | None,
    verbose: bool,
    vllm_flags: tuple[str, ...],
) -> None:
    """Serve a guarded, OpenAI-compatible endpoint on this machine's CPU.

    VLLM_FLAGS, after a `--`, go to `vllm serve` as they are.
    """
    try:
        code = run(
            host,
            port,
            lab_dir=lab_dir,
            variant=variant,
            model=model,
            bundle=bundle,
            policy_file=policy_file,
            extra=vllm_flags,
            verbose=verbose,
        )
    except checks.CheckError as error:
        click.echo(f"neuronguard: {error}", err=True)
        code = 1
    raise SystemExit(code)

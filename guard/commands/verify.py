"""``neuronguard verify``: all that can be known of a bundle before an engine reads it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from guard.commands import options


@click.command()
@click.argument("directory", metavar="BUNDLE", type=options.PATH)
@click.option("--model", help="The model that it must belong to: a checkpoint, or LAB_DIR:VARIANT.")
@click.option(
    "--key", "keys", type=options.PATH, help="Public keys (PEM), of which one must have signed the bundle."
)
@click.option("--digest", help="The digest that it must have.")
@click.option("--json", "as_json", is_flag=True, help="Write the checks as JSON.")
def verify(directory: Path, model: str | None, keys: Path | None, digest: str | None, as_json: bool) -> None:
    """Check a bundle: files and digests, card against arrays, thresholds, units, model, signature.

    One line a check, and exit status 1 if any failed. The scores themselves need the model to run:
    neuronguard bundle verify.
    """
    from guard.public_keys import read_public_keys
    from guard.verification import lines, verify_bundle

    checks = verify_bundle(
        directory,
        digest=digest,
        checkpoint=(lambda: options.open_model(model)) if model else None,
        trusted=read_public_keys(keys) if keys else None,
    )
    failed = any(check.outcome == "failed" for check in checks)
    if as_json:
        document = {
            "schema_version": 1,
            "bundle": str(directory),
            "passed": not failed,
            "checks": [check._asdict() for check in checks],
        }
        click.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        for line in lines(checks):
            click.echo(line)
    if failed:
        raise SystemExit(1)

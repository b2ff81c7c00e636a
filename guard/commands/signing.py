"""``neuronguard bundle keygen``, ``sign``, ``card`` and ``migrate``: what is done to a finished bundle."""

from __future__ import annotations

from pathlib import Path

import click

from guard.commands import options


@click.command()
@click.argument("key", type=options.PATH)
def keygen(key: Path) -> None:
    """Make an Ed25519 key for signing bundles: KEY, readable by its owner only, and KEY.pub.

    KEY.pub goes to whoever checks signatures: --require-signed-by of the engine, verify --key.
    """
    from guard.signature import make_key

    name = make_key(key)
    click.echo(f"wrote {key} and {key}.pub: key {name}")


@click.command()
@click.argument("directory", metavar="BUNDLE", type=options.PATH)
@click.option("--key", required=True, type=options.PATH, help="Private key, as keygen writes it.")
def sign(directory: Path, key: Path) -> None:
    """Sign a bundle as it lies there: every file of it, and its digest.

    Any later change, CARD.md included, makes the signature worthless. Check the bundle first: neuronguard
    verify.
    """
    from guard.bundle import SIGNATURE_FILE
    from guard.signature import load_key
    from guard.signature import sign as sign_bundle

    signature = sign_bundle(directory, load_key(key))
    click.echo(f"wrote {directory / SIGNATURE_FILE}: bundle {signature.bundle}, key {signature.key}")


@click.command()
@click.argument("directory", metavar="BUNDLE", type=options.PATH)
@click.option("--out", type=options.PATH, help="Write it to this file, not to the screen.")
def card(directory: Path, out: Path | None) -> None:
    """Say in Markdown what a bundle is, what was measured and where its limits are: CARD.md."""
    from guard.bundle import Bundle
    from guard.bundle_card import bundle_card
    from guard.cache import write_whole

    loaded = Bundle.load(directory)
    text = bundle_card(loaded.card, loaded.digest)
    if out is None:
        click.echo(text, nl=False)
        return
    write_whole(out, lambda file: file.write(text.encode()))
    click.echo(f"wrote {out}")


@click.command()
@click.argument("old", type=options.PATH)
@click.argument("new", type=options.PATH)
def migrate(old: Path, new: Path) -> None:
    """Write a bundle of an older schema version anew, in the current one.

    OLD stays as it is. NEW is another bundle: it has a digest of its own, which the policy file has to list
    if it lists any, and has to be signed anew. An engine reads either.
    """
    from guard.bundle import Bundle

    if new.exists():
        raise click.UsageError(f"{new} exists; name a directory that does not")
    loaded = Bundle.load(old)
    made = loaded.migrated()
    made.save(new)
    click.echo(f"read  {old}: schema version {loaded.stored_version}, digest {loaded.digest}")
    click.echo(f"wrote {new}: schema version {made.card.schema_version}, digest {made.digest}")


COMMANDS = (keygen, sign, card, migrate)

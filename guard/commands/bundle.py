"""``neuronguard bundle``: look at a bundle, check that it belongs to a model, and make others from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
import yaml

from guard.commands import options
from guard.commands.patch import patch
from guard.commands.signing import COMMANDS


@click.group()
def bundle() -> None:
    """Look at a bundle, check it against its model, sign it, and make others from it."""


@bundle.command()
@click.argument("directory", type=options.PATH)
def show(directory: Path) -> None:
    """Say what a bundle guards, what it reads and where its thresholds lie."""
    from guard.bundle import Bundle
    from guard.bundle_card import pooled

    loaded = Bundle.load(directory)
    card = loaded.card
    click.echo(f"bundle     {loaded.digest}, schema version {loaded.stored_version}")
    click.echo(
        f"model      {card.model.name} ({card.model.architecture}), weights {card.model.weights_sha256}"
    )
    click.echo(f"label      {card.label}")
    hidden = f", {loaded.scorer.hidden} hidden units" if card.probe == "mlp" else ""
    stages = ": P(harmful prompt) times P(the model complies)" if card.probe == "product" else ""
    click.echo(f"probe      {card.probe}{hidden}{stages}")
    if card.pooling:
        click.echo(f"pooling    {pooled(card.pooling)}")
    if card.calibration.knots:
        click.echo(f"calibrated isotonic, {len(card.calibration.knots)} knots")
    click.echo(f"reads      {card.features} features at {len(card.sites)} sites")
    for threshold in card.thresholds:
        default = ", the default" if threshold == card.threshold(card.default_false_positive_rate) else ""
        click.echo(
            f"threshold  {100 * threshold.false_positive_rate:g} % false positives: P(unsafe) ≥ "
            f"{threshold.probability:.6f}; true rate at most {100 * threshold.upper95:.2f} % (95 %, "
            f"{threshold.benign} benign prompts){default}"
        )
    for point in card.monitor:
        click.echo(
            f"monitor    {100 * point.false_positive_rate:g} % of benign answers: logit ≥ "
            f"{point.logit:.4f} on {point.debounce} tokens in a row; true rate at most "
            f"{100 * point.upper95:.2f} % (95 %, {point.answers} answers)"
        )
    for name, tolerance in card.self_test.tolerance.items():
        click.echo(f"self-test  {len(card.self_test.prompts)} prompts, {name} within {tolerance:.3g}")
    for adapter in card.adapters:
        click.echo(f"adapter    {adapter.name}, rank {adapter.rank}, {adapter.sha256}")
    for made in card.patches:
        click.echo(
            f"patch      {made.name}, {made.kind}, {sum(len(site.units) for site in made.sites)} units"
        )
    for file in card.data:
        click.echo(f"data       {file.role}: {file.name}, {file.harmful} harmful, {file.benign} benign")


@bundle.command()
@click.argument("directory", type=options.PATH)
@options.model
@click.option(
    "--adapter", metavar="NAME=DIR", help="Check the scores under this LoRA adapter, which is listed."
)
def verify(directory: Path, model: str, adapter: str | None) -> None:
    """Check that a bundle belongs to a model and that its self-test scores come out."""
    from guard.bundle import Bundle
    from guard.self_test import check

    loaded = Bundle.load(directory)
    checkpoint = options.belonging(loaded, model)
    if adapter:
        checkpoint = checkpoint.under(options.adapter(adapter))
    for dtype, difference in check(loaded, checkpoint).items():
        click.echo(f"{dtype}: largest difference {difference.found:.3g}, accepted {difference.accepted:.3g}")
    under = f" under {adapter}" if adapter else ""
    click.echo(f"{directory} belongs to {checkpoint.name}; its scores come out{under}")


@bundle.command()
@click.argument("directory", type=options.PATH)
@click.option(
    "--mode",
    type=click.Choice(["enforce", "observe"]),
    default="enforce",
    show_default=True,
    help="What happens to requests that carry no directive.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=DIR",
    help="A listed LoRA adapter that the server loads; repeatable.",
)
@click.option("--donor", type=options.PATH, help="Directory of the donor that the bundle's patches name.")
@click.option(
    "--require-signed-by",
    "keys",
    type=options.PATH,
    help="Public keys (PEM), of which one must have signed the bundle.",
)
def flags(
    directory: Path,
    mode: Literal["enforce", "observe"],
    adapters: tuple[str, ...],
    donor: Path | None,
    keys: Path | None,
) -> None:
    """Print, as YAML, the flags that guard a vLLM server which is not started by the guard's own launcher.

    vLLM reads them with --config: neuronguard bundle flags BUNDLE > guard.yaml, then vllm serve MODEL
    --config guard.yaml. NEURONGUARD_KEY_FILE names the keys shared with the gateway, and
    NEURONGUARD_AUDIENCE should be another name at every start.
    """
    from guard.bundle import Bundle
    from guard.engine.config import GuardConfig, trusted_keys, verify_adapters
    from guard.engine.errors import GuardStartupError

    loaded = Bundle.load(directory)
    served = {adapter.name: str(adapter.path.resolve()) for adapter in map(options.adapter, adapters)}
    try:
        verify_adapters(loaded, served)
        config = GuardConfig.for_bundle(
            str(directory),
            loaded,
            loaded.card.default_decision.model_copy(update={"mode": mode}),
            served,
            str(donor) if donor else None,
            trusted_keys(str(keys) if keys else None),
        )
        config.signed_by(loaded)
    except GuardStartupError as error:
        raise click.ClickException(str(error)) from error
    click.echo(yaml.safe_dump(config.flags(), sort_keys=False, width=1000), nl=False)


@bundle.command("adapter")
@click.argument("directory", type=options.PATH)
@options.model
@click.option(
    "--adapter",
    "adapters",
    metavar="NAME=DIR",
    multiple=True,
    required=True,
    help="A LoRA adapter as PEFT saves it, and the name that requests call it by; repeatable.",
)
@click.option("--out", required=True, type=options.PATH, help="Directory of the new bundle.")
@click.option("--device", default="cpu", show_default=True, help="A torch device, such as cuda.")
def adapter_(directory: Path, model: str, adapters: tuple[str, ...], out: Path, device: str) -> None:
    """Write a bundle that also lists LoRA adapters, with the scores of its self-test under each.

    The probe and the operating points stay those of the model without the adapter. Check first that they
    hold: neuronguard evaluate --adapter NAME=DIR. An adapter is merged into the model in memory, never on
    disk. Plain LoRA on the linear layers of decoder blocks is supported, rank-stabilised or not; whatever
    else an adapter has is refused by name.
    """
    from guard.bundle import CARD_FILE, Bundle
    from guard.self_test import measure_adapter

    if out.exists() and not (out / CARD_FILE).is_file():
        raise click.UsageError(f"{out} exists and is not a bundle; choose another --out")
    loaded = Bundle.load(directory)
    checkpoint = options.belonging(loaded, model)
    for text in adapters:
        card = measure_adapter(loaded, checkpoint.under(options.adapter(text)), device=device)
        loaded = loaded.with_adapter(card)
        click.echo(f"{card.name}: rank {card.rank}")
        for dtype, without in loaded.card.self_test.logits.items():
            moved = max(abs(a - b) for a, b in zip(without, card.self_test[dtype], strict=True))
            told = "" if moved > card.tolerance[dtype] else "; the self-test cannot tell whether it is on"
            click.echo(
                f"  {dtype}: moves the self-test's scores by up to {moved:.3g}, a difference of "
                f"{card.tolerance[dtype]:.3g} is accepted{told}"
            )
    loaded.save(out)
    click.echo(f"wrote {out}: digest {loaded.digest}; the operating points are those without an adapter")


for _command in (patch, *COMMANDS):
    bundle.add_command(_command)

"""``neuronguard drift``: have the scores moved away from those that a bundle was fitted with?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.commands import options

if TYPE_CHECKING:
    from guard.bundle import Bundle


@click.command()
@click.argument("directory", metavar="BUNDLE", type=options.PATH)
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=options.PATH,
    help="JSON lines with a 'probability' each, such as an audit log with scores; with --model prompts, as "
    "evaluate takes them; repeatable.",
)
@click.option("--model", help="Score prompts with this model: a checkpoint, or LAB_DIR:VARIANT.")
@click.option(
    "--fail-above", type=click.FloatRange(min=0), help="Exit with status 1 when the index is above this."
)
@click.option("--json", "as_json", is_flag=True, help="Write the figures as JSON.")
@options.running
@options.capturing
def drift(
    directory: Path,
    data: tuple[Path, ...],
    model: str | None,
    fail_above: float | None,
    as_json: bool,
    **running: Any,
) -> None:
    """Compare scores with the reference that a bundle keeps: the population stability index (PSI).

    Without drift the index is not 0 but small; how small depends on how many scores there are, and the level
    that chance reaches is said beside it. The alert GuardScoreDrift computes the same of live scores.
    """
    from guard.bundle import Bundle
    from guard.drift import DriftError, compare
    from guard.drift_scores import of_prompts, of_rows

    bundle = Bundle.load(directory)
    reference = bundle.card.reference
    if reference is None:
        raise DriftError(f"the bundle in {directory} keeps no reference scores; fit it anew to have them")
    if model is None:
        scores = of_rows(data, bundle.digest)
    else:
        with options.observing(model, running) as subject:
            scores = of_prompts(data, bundle, subject)
    if not scores.probabilities:
        left = ", ".join(f"{n} {why}" for why, n in scores.left_out.items() if n)
        raise DriftError(f"there is no score to compare; left out: {left or 'nothing'}")
    found = compare(scores.probabilities, reference)
    if as_json:
        document = {
            "schema_version": 1,
            "bundle": bundle.digest,
            **found._asdict(),
            "verdict": found.verdict,
            "edges": reference.edges,
            "reference": reference.benign,
            "left_out": scores.left_out,
        }
        click.echo(json.dumps(document, indent=1))
    else:
        _show(bundle, found, scores.left_out)
    if fail_above is not None and found.psi > fail_above:
        raise SystemExit(1)


def _show(bundle: Bundle, found: Any, left_out: dict[str, int]) -> None:
    from guard.drift import ALERT, ENOUGH
    from guard.report import table

    reference = bundle.card.reference
    assert reference is not None  # noqa: S101  # refused before
    ends, total = (0.0, *reference.edges, 1.0), sum(reference.benign)
    rows = (
        (
            f"{ends[i]:.4g} to {ends[i + 1]:.4g}",
            reference.benign[i],
            f"{100 * reference.benign[i] / total:.1f} %",
            found.counts[i],
            f"{100 * found.counts[i] / found.n:.1f} %",
        )
        for i in range(reference.bins)
    )
    for line in table(("P(unsafe)", "reference", "share", "scores", "share"), rows):
        click.echo(line)
    left = ", ".join(f"{n} {why}" for why, n in left_out.items() if n) or "nothing"
    click.echo(f"\nPSI {found.psi:.3f} of {found.n} scores (left out: {left}): {found.verdict}")
    click.echo(
        f"By chance alone 95 % of such samples stay below {found.null95:.3f}, 99.9 % below "
        f"{found.null999:.3f}; the alert is at {ALERT:g}, from {ENOUGH} scores on."
    )

"""Everything that can be known of a bundle without an engine, as a list of checks: ``neuronguard verify``.

A check that rests on one that failed is skipped rather than guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from guard.bundle import ARRAY_FILE, CARD_FILE, SIGNATURE_FILE, TEXT_FILE, Bundle, BundleError
from guard.bundle_card import FORM, bundle_card
from guard.bundle_schema import CURRENT
from guard.calibrate import prompts_needed
from guard.card import GuardCard
from guard.signature import SignatureError, verify
from guard.stats import clopper_pearson

if TYPE_CHECKING:
    from guard.checkpoint import Checkpoint

_KNOWN = {CARD_FILE, ARRAY_FILE, TEXT_FILE, SIGNATURE_FILE}
_SHA256 = re.compile("[0-9a-f]{64}")


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    text: str
    """What was found, or why it was not looked at."""


class _FailedError(Exception):
    """A check does not hold; the text says why."""


class _SkippedError(Exception):
    """There is nothing to check, or not enough to check it by."""


def verify_bundle(
    directory: Path,
    *,
    digest: str | None = None,
    checkpoint: Callable[[], Checkpoint] | None = None,
    trusted: Collection[str] | None = None,
) -> list[Check]:
    """All checks of the bundle in ``directory``.

    ``digest`` is the one that it must have; ``checkpoint`` opens the model that it must belong to;
    ``trusted`` are the public keys of which one must have signed it. None: not asked for.
    """
    loaded: list[Bundle] = []
    looks: dict[str, Callable[[Bundle], str]] = {
        "digest": lambda bundle: _digest(bundle, digest),
        "thresholds": lambda bundle: _thresholds(bundle.card),
        "monitor": lambda bundle: _monitor(bundle.card),
        "data": lambda bundle: _data(bundle.card),
        "units": lambda bundle: _units(bundle.card),
        "self-test": lambda bundle: _self_test(bundle.card),
        "reference": lambda bundle: _reference(bundle.card),
        "card": lambda bundle: _text(bundle, directory),
        "model": lambda bundle: _model(bundle, checkpoint),
        "signature": lambda bundle: _signature(bundle, directory, trusted),
    }
    found = [_check("files", lambda: _files(directory)), _check("contents", lambda: _load(directory, loaded))]
    if not loaded:
        return [*found, *(Check(name, "skipped", "the contents cannot be read") for name in looks)]
    return [*found, *(_check(name, partial(look, loaded[0])) for name, look in looks.items())]


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, "passed", look())
    except _SkippedError as reason:
        return Check(name, "skipped", str(reason))
    except (_FailedError, ValueError, OSError) as reason:
        return Check(name, "failed", str(reason))


def _load(directory: Path, loaded: list[Bundle]) -> str:
    bundle = Bundle.load(directory)
    loaded.append(bundle)
    version = bundle.stored_version
    older = "" if version == CURRENT else f", older than {CURRENT}: neuronguard bundle migrate"
    return f"card and arrays agree; schema version {version}{older}"


def _files(directory: Path) -> str:
    if not directory.is_dir():
        raise _FailedError(f"{directory} is not a directory")
    there = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    if missing := {CARD_FILE, ARRAY_FILE} - there:
        raise _FailedError(f"missing: {', '.join(sorted(missing))}")
    if strangers := there - _KNOWN:
        raise _FailedError(f"not part of a bundle: {', '.join(sorted(strangers))}")
    return ", ".join(sorted(there))


def _digest(bundle: Bundle, wanted: str | None) -> str:
    if wanted is not None and wanted != bundle.digest:
        raise _FailedError(f"the digest is {bundle.digest}, expected {wanted}")
    return bundle.digest


def _thresholds(card: GuardCard) -> str:
    previous: float | None = None
    for each in sorted(card.thresholds, key=lambda t: -t.false_positive_rate):
        rate, name = each.false_positive_rate, f"the threshold for {each.false_positive_rate:g}"
        if not math.isclose(card.calibration.probability(each.logit), each.probability, abs_tol=1e-9):
            raise _FailedError(
                f"{name}: logit {each.logit:g} is not P(unsafe) {each.probability:g} by calibration"
            )
        if each.benign < prompts_needed(rate):
            raise _FailedError(
                f"{name} rests on {each.benign} benign prompts, and needs {prompts_needed(rate)} at least"
            )
        least, most = (
            clopper_pearson(flagged, each.benign).high
            for flagged in (0, math.floor(rate * each.benign + 1e-9))
        )
        if not least - 1e-9 <= each.upper95 <= most + 1e-9:
            raise _FailedError(
                f"{name}: a true rate of at most {each.upper95:g} does not follow from {each.benign} prompts "
                f"(from {least:g} to {most:g} does)"
            )
        if previous is not None and each.logit < previous:
            raise _FailedError(f"{name} lies below that for a higher rate; a lower rate needs a higher one")
        previous = each.logit
    rates = [t.false_positive_rate for t in card.thresholds]
    if len(set(rates)) < len(rates):
        raise _FailedError("two thresholds are for one false-positive rate")
    return ", ".join(f"{t.false_positive_rate:g} at P(unsafe) {t.probability:.6f}" for t in card.thresholds)


def _monitor(card: GuardCard) -> str:
    if not card.monitor:
        raise _SkippedError("the bundle watches no answers")
    limits: dict[tuple[float, int], float] = {}
    for each in card.monitor:
        rate, name = each.false_positive_rate, f"the limit for {each.false_positive_rate:g}"
        if (rate, each.debounce) in limits:
            raise _FailedError(f"two limits are for {rate:g} and {each.debounce} tokens in a row")
        limits[rate, each.debounce] = each.logit
        if each.answers < prompts_needed(rate):
            raise _FailedError(
                f"{name} rests on {each.answers} benign answers, and needs {prompts_needed(rate)} at least"
            )
        most = clopper_pearson(math.floor(rate * each.answers + 1e-9), each.answers).high
        if not clopper_pearson(0, each.answers).high - 1e-9 <= each.upper95 <= most + 1e-9:
            raise _FailedError(
                f"{name}: a true rate of at most {each.upper95:g} does not follow from {each.answers} answers"
            )
    for (rate, debounce), logit in limits.items():
        stricter = [other for (r, d), other in limits.items() if r >= rate and d >= debounce]
        if max(stricter) > logit:
            raise _FailedError(
                f"the limit for {rate:g} and {debounce} tokens in a row lies below one for a higher rate or "
                "more tokens"
            )
    return f"{len(limits)} limits on {card.monitor[0].answers} benign answers"


def _data(card: GuardCard) -> str:
    roles: dict[str, set[str]] = {}
    for file in card.data:
        if not _SHA256.fullmatch(file.sha256):
            raise _FailedError(f"{file.name} has no SHA-256 digest, but {file.sha256!r}")
        if file.harmful < 0 or file.benign < 0:
            raise _FailedError(f"{file.name} has a negative number of prompts")
        roles.setdefault("evaluate" if file.role == "evaluate" else "made", set()).add(file.sha256)
    if twice := roles.get("evaluate", set()) & roles.get("made", set()):
        names = sorted({file.name for file in card.data if file.sha256 in twice})
        raise _FailedError(f"evaluated on what the bundle was made from: {', '.join(names)}")
    benign = sum(file.benign for file in card.data if file.role == "threshold")
    for each in card.thresholds:
        if each.benign > benign:
            raise _FailedError(
                f"the threshold for {each.false_positive_rate:g} rests on {each.benign} benign prompts, and "
                f"the threshold files hold {benign}"
            )
    return f"{len(card.data)} files, {benign} benign threshold prompts"


def _units(card: GuardCard) -> str:
    # That they lie within the model's layers and widths is checked when a card is read.
    units = sum(len(site.units) for site in card.sites)
    patched = sum(len(site.units) for patch in card.patches for site in patch.sites)
    return f"{units} read at {len(card.sites)} sites, {patched} patched, all within the model's sizes"


def _self_test(card: GuardCard) -> str:
    for number, prompt in enumerate(card.self_test.prompts):
        if card.prompt_tails and not any(prompt[-len(tail) :] == tail for tail in card.prompt_tails):
            raise _FailedError(f"prompt {number} does not end as prompts of this model do (prompt_tails)")
    for under, tolerance in (("", card.self_test.tolerance), *((a.name, a.tolerance) for a in card.adapters)):
        for dtype, width in tolerance.items():
            if width <= 0:
                raise _FailedError(f"the tolerance {width:g} for {dtype} {under} accepts nothing")
    for dtype, logits in card.self_test.logits.items():
        if max(logits) - min(logits) <= card.self_test.tolerance[dtype] and len(logits) > 1:
            raise _FailedError(
                f"the tolerance {card.self_test.tolerance[dtype]:g} for {dtype} is wider than all scores lie "
                "apart: a guard that reads nothing would pass"
            )
    return f"{len(card.self_test.prompts)} prompts in {', '.join(sorted(card.self_test.logits))}"


def _reference(card: GuardCard) -> str:
    reference = card.reference
    if reference is None:
        raise _SkippedError("none was kept; drift of live scores cannot be told")
    benign = sum(reference.benign)
    for each in card.thresholds:
        if each.benign != benign:
            raise _FailedError(
                f"it holds {benign} benign prompts, and the threshold for {each.false_positive_rate:g} was "
                f"set on {each.benign}"
            )
        # Whole bins below the threshold cannot hold flagged prompts, whole bins above it hold nothing else.
        above = sum(reference.benign[reference.bin_of(each.probability) + 1 :])
        if above > each.false_positive_rate * benign + 1e-9:
            raise _FailedError(
                f"{above} of its {benign} benign scores lie above the threshold for "
                f"{each.false_positive_rate:g}"
            )
    return f"{benign} benign and {sum(reference.harmful)} harmful scores in {reference.bins} bins"


def _text(bundle: Bundle, directory: Path) -> str:
    file = directory / TEXT_FILE
    if not file.is_file():
        raise _SkippedError(f"there is no {TEXT_FILE}; neuronguard bundle card writes one")
    text = file.read_text("utf-8")
    if not text.startswith(FORM):
        raise _SkippedError(f"{TEXT_FILE} was made by another release")
    if text != bundle_card(bundle.card, bundle.digest):
        raise _FailedError(f"{TEXT_FILE} is not what {CARD_FILE} says; make it anew: neuronguard bundle card")
    return f"{TEXT_FILE} says what {CARD_FILE} says"


def _model(bundle: Bundle, opened: Callable[[], Checkpoint] | None) -> str:
    if opened is None:
        raise _SkippedError("no model was named (--model)")
    checkpoint = opened()
    bundle.verify_model(
        shape=checkpoint.shape,
        weights_sha256=checkpoint.weights_sha256,
        tokenizer_sha256=checkpoint.tokenizer_sha256,
    )
    from guard.prompts import prompt_tails

    tokenizer = checkpoint.load_tokenizer()
    if (tails := prompt_tails(tokenizer)) != bundle.card.prompt_tails:
        raise BundleError(
            f"the template ends prompts in {tails}, and the bundle records {bundle.card.prompt_tails}"
        )
    highest = max(token for prompt in bundle.card.self_test.prompts for token in prompt)
    if highest >= len(tokenizer):
        raise BundleError(f"the self-test holds token {highest}, and the tokenizer has {len(tokenizer)}")
    return f"{checkpoint.name}: shape, weights, tokenizer, chat template and prompt endings"


def _signature(bundle: Bundle, directory: Path, trusted: Collection[str] | None) -> str:
    try:
        key = verify(directory, bundle.digest, trusted)
    except SignatureError as error:
        raise _FailedError(str(error)) from error
    if key is None:
        raise _SkippedError("the bundle is not signed")
    return f"signed by {key}" + ("" if trusted is not None else "; no trusted key was named (--key)")


def lines(checks: list[Check]) -> Iterator[str]:
    """One line a check, for the screen."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        yield f"{check.outcome:<7}  {check.name:<{width}}  {check.text}"

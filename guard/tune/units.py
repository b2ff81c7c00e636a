"""Which units a tuning is about, read from files and checked against the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guard.cache import digest_of
from guard.checkpoint import Checkpoint
from guard.locate.unit_set import CARD_FILE, Component, UnitSet, UnitSetError
from guard.sites import NoSuchSiteError
from guard.tune.errors import TuneError
from guard.tune.slices import ChosenUnits
from guard.units import UnitsError, read_units

RECORD_FILE = "tune.json"
"""What a tuned checkpoint says about how it was made."""
_Sets = dict[Component, dict[int, set[int]]]


class Chosen(NamedTuple):
    """Units of one or several files, without those of others."""

    units: ChosenUnits
    files: tuple[str, ...]
    """Names of the files or directories; those that were taken away follow a minus."""

    @property
    def sha256(self) -> str:
        """Of the units themselves, wherever they were read."""
        return digest_of({name: {str(k): list(v) for k, v in by.items()} for name, by in self.units.items()})

    def counts(self) -> dict[str, int]:
        """Number of units of each kind."""
        return {name: sum(map(len, by.values())) for name, by in self.units.items()}


def ancestors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Digests of the weights that this checkpoint was tuned from, its own first.

    A record that speaks of other weights than those beside it is not believed.
    """
    own = checkpoint.weights_sha256
    try:
        record = json.loads((checkpoint.path / RECORD_FILE).read_text("utf-8"))
        if record["output"]["weights_sha256"] != own:
            return (own,)
        return (own, *map(str, record["ancestors"]))
    except (OSError, ValueError, KeyError, TypeError):
        return (own,)


def choose(checkpoint: Checkpoint, files: Sequence[Path], without: Sequence[Path] = ()) -> Chosen:
    """The union of what ``files`` select, without what ``without`` select. Raises TuneError.

    A set must have been located on the model's weights, on those of one of two models compared, or on
    weights that the model was tuned from. A plain units file says nothing about weights.
    """
    found: _Sets = {}
    for path in files:
        for component, by_layer in _read(path, checkpoint).items():
            for layer, units in by_layer.items():
                found.setdefault(component, {}).setdefault(layer, set()).update(units)
    taken = [_read(path, checkpoint) for path in without]
    for each in taken:
        for component, by_layer in each.items():
            for layer, units in by_layer.items():
                found.get(component, {}).get(layer, set()).difference_update(units)
    left: dict[Component, dict[int, list[int]]] = {
        component: {layer: sorted(units) for layer, units in sorted(by_layer.items()) if units}
        for component, by_layer in sorted(found.items())
        if any(by_layer.values())
    }
    if not left:
        named = ", ".join(map(str, files))
        raise TuneError(
            f"{named} selects no unit that {', '.join(map(str, without))} does not: nothing is left"
            if without
            else f"{named} selects no unit; expected at least one"
        )
    return Chosen(left, (*(path.name for path in files), *(f"-{path.name}" for path in without)))


def _read(path: Path, checkpoint: Checkpoint) -> ChosenUnits:
    file = path / CARD_FILE if path.is_dir() else path
    try:
        document: Any = json.loads(file.read_text("utf-8"))
        if not (isinstance(document, dict) and "provenance" in document):
            return _plain(path, checkpoint)
        found = UnitSet.load(file.parent)
    except (OSError, ValueError, UnitSetError) as error:
        if isinstance(error, TuneError):
            raise
        raise TuneError(f"cannot read the units of {path}: {error}") from error
    of = found.provenance
    models = [of.model, *([of.donor] if of.donor else [])]
    if not {model.weights_sha256 for model in models} & set(ancestors(checkpoint)):
        names = " and ".join(repr(model.name) for model in models)
        raise TuneError(
            f"{path} was found on {names}, whose weights are not those of {checkpoint.name!r} nor any that "
            "it was tuned from: a ranking says nothing about other weights; locate units on this model"
        )
    return found.units()


def _plain(path: Path, checkpoint: Checkpoint) -> ChosenUnits:
    found: dict[Component, dict[int, list[int]]] = {}
    try:
        for site in read_units(path, checkpoint.shape):
            found.setdefault(site.kind, {})[site.layer] = list(site.units)
    except (UnitsError, NoSuchSiteError) as error:
        raise TuneError(str(error)) from error
    return found

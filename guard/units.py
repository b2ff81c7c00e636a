"""Sets of safety units as sites: read from a file, everything there is, or a random control.

A units file is JSON: ``{"layer": [unit, …]}`` for MLP neurons, the same under the keys ``mlp`` and
``attention`` when heads take part, or ``{"units": [[layer, neuron], …]}`` as rankings are written. A set that
``neuronguard locate`` has found is read from its directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.bundle import DataFile, Site
from guard.locate.unit_set import CARD_FILE, UnitSet, UnitSetError
from guard.sites import ModelShape, SiteKind

Units = tuple[Site, ...]


class UnitsError(ValueError):
    """A set of units is malformed or does not fit the model."""


def every_neuron(shape: ModelShape) -> Units:
    """All MLP neurons of all layers that have MLP sites. Raises NoSuchSiteError when none has."""
    units = tuple(range(shape.units("mlp")))
    return tuple(
        Site(layer=layer, kind="mlp", units=units) for layer in range(shape.first_mlp_layer, shape.layers)
    )


def every_unit(shape: ModelShape, kinds: Sequence[SiteKind]) -> Units:
    """All units of these kinds in all layers that have them. Raises NoSuchSiteError when none has."""
    heads = tuple(range(shape.heads))
    sites = list(every_neuron(shape)) if "mlp" in kinds else []
    if "attention" in kinds:
        sites += [Site(layer=layer, kind="attention", units=heads) for layer in range(shape.layers)]
    return ordered(sites)


def read_units(path: str | Path, shape: ModelShape, *, weights_sha256: str | None = None) -> Units:
    """Units named by a file, or selected by a UnitSet, given by its directory or the ``units.json`` in it.

    With ``weights_sha256``, a UnitSet must have been found on a model with these weights, or on a pair of
    models one of which has them; a plain file says nothing about weights. Raises UnitsError, or
    NoSuchSiteError when a layer has no such site.
    """
    document, found = _read(path)
    if found is not None:
        document = _selected(found, path, weights_sha256)
    if "units" in document:
        document = {"mlp": _grouped(document["units"], path)}
    elif not document.keys() <= {"mlp", "attention"}:
        document = {"mlp": document}
    sites = []
    kinds: tuple[SiteKind, ...] = ("mlp", "attention")
    for kind in kinds:
        for layer, units in document.get(kind, {}).items():
            try:
                chosen = tuple(sorted({int(unit) for unit in units}))
                site = Site(layer=int(layer), kind=kind, units=chosen)
            except (TypeError, ValueError) as error:
                raise UnitsError(f"{path}: layer {layer!r} must name a list of unit numbers") from error
            if site.layer >= shape.layers or chosen[-1] >= shape.units(kind):
                raise UnitsError(
                    f"{path}: {kind} unit {chosen[-1]} of layer {layer} does not exist; the model has "
                    f"{shape.layers} layers with {shape.units(kind)} {kind} units each"
                )
            shape.check(kind, site.layer)
            sites.append(site)
    if not sites:
        raise UnitsError(f"{path} names no unit")
    return ordered(sites)


def located_with(path: str | Path) -> tuple[DataFile, ...]:
    """The data that a UnitSet was located with; none for a plain file. Raises UnitsError."""
    found = _read(path)[1]
    return found.provenance.data if found else ()


def _read(path: str | Path) -> tuple[dict[str, Any], UnitSet | None]:
    """What a units file says, and the UnitSet if it is the card of one."""
    file = Path(path) / CARD_FILE if Path(path).is_dir() else Path(path)
    try:
        document = json.loads(file.read_text("utf-8"))
        found = UnitSet.load(file.parent) if isinstance(document, dict) and "provenance" in document else None
    except UnitSetError as error:
        raise UnitsError(str(error)) from error
    except (OSError, ValueError) as error:
        raise UnitsError(f"cannot read the units file {file}: {error}") from error
    if not isinstance(document, dict) or not document:
        raise UnitsError(f'{path}: expected an object like {{"3": [17, 204]}}')
    return document, found


def _selected(found: UnitSet, path: str | Path, weights_sha256: str | None) -> dict[str, Any]:
    """The selection of a UnitSet as a units file has it. Raises UnitsError."""
    models = [found.provenance.model, *([found.provenance.donor] if found.provenance.donor else [])]
    if weights_sha256 and weights_sha256 not in [model.weights_sha256 for model in models]:
        names = " and ".join(repr(model.name) for model in models)
        raise UnitsError(
            f"{path} was found on {names}, whose weights are not this model's: a ranking says nothing "
            "about other weights; locate units on this model"
        )
    selected: dict[str, Any] = {name: layers for name, layers in found.units().items() if layers}
    if others := sorted(selected.keys() - {"mlp", "attention"}):
        raise UnitsError(
            f"{path} selects units of {', '.join(others)}, which a probe cannot read; "
            "locate units of mlp or attention"
        )
    if not selected:
        raise UnitsError(f"{path} selects no unit")
    return selected


def _grouped(pairs: Any, path: str | Path) -> dict[int, list[int]]:
    grouped: dict[int, list[int]] = {}
    try:
        for layer, unit in pairs:
            grouped.setdefault(int(layer), []).append(unit)
    except (TypeError, ValueError) as error:
        raise UnitsError(f"{path}: 'units' must be a list of [layer, neuron] pairs") from error
    return grouped


def ordered(sites: Iterable[Site]) -> Units:
    """Sites by layer, MLP before attention: the order of features in a bundle."""
    return tuple(sorted(sites, key=lambda site: (site.layer, site.kind != "mlp")))


def count(units: Units) -> int:
    """Number of units."""
    return sum(len(site.units) for site in units)


def random_units(units: Units, number: int, *, seed: int) -> Units:
    """``number`` random units out of ``units``, all of them if there are fewer."""
    pool = [(site.layer, site.kind, unit) for site in units for unit in site.units]
    if number >= len(pool):
        return units
    drawn = np.random.default_rng(seed).choice(len(pool), number, replace=False)
    picked: dict[tuple[int, SiteKind], set[int]] = {}
    for layer, kind, unit in (pool[index] for index in drawn):
        picked.setdefault((layer, kind), set()).add(unit)
    return _sites(picked)


def owners(units: Units, shape: ModelShape) -> NDArray[np.int64]:
    """The unit of each column, numbered in the order of ``units``: one column a neuron, several a head."""
    widths = [len(shape.columns(site.kind, (unit,))) for site in units for unit in site.units]
    return np.repeat(np.arange(len(widths)), widths)


def within_layers(units: Units, layers: Iterable[int]) -> Units:
    """The sites of ``units`` in ``layers``."""
    wanted = set(layers)
    return tuple(site for site in units if site.layer in wanted)


def random_like(units: Units, shape: ModelShape, *, seed: int) -> Units:
    """As many random units of the same layers and kinds: the control every selection is held against."""
    random = np.random.default_rng(seed)
    return tuple(
        site.model_copy(
            update={
                "units": tuple(
                    int(i)
                    for i in np.sort(random.choice(shape.units(site.kind), len(site.units), replace=False))
                )
            }
        )
        for site in units
    )


def union(sets: Sequence[Units]) -> Units:
    """All units of several sets, so that they can be read in one pass."""
    merged: dict[tuple[int, SiteKind], set[int]] = {}
    for units in sets:
        for site in units:
            merged.setdefault((site.layer, site.kind), set()).update(site.units)
    return _sites(merged)


def columns_within(part: Units, whole: Units, shape: ModelShape) -> NDArray[np.int64]:
    """Where the features of ``part`` stand among those of ``whole``. Raises KeyError for a unit not in it."""
    place: dict[tuple[int, SiteKind, int], int] = {}
    for site in whole:
        for column in shape.columns(site.kind, site.units):
            place[site.layer, site.kind, column] = len(place)
    return np.array(
        [place[site.layer, site.kind, c] for site in part for c in shape.columns(site.kind, site.units)],
        dtype=np.int64,
    )


def from_columns(chosen: NDArray[np.int64], whole: Units, shape: ModelShape) -> Units:
    """The units that own columns ``chosen`` of ``whole``; one column of a head brings the whole head."""
    picked: dict[tuple[int, SiteKind], set[int]] = {}
    named = [(site.layer, site.kind, unit) for site in whole for unit in site.units]
    for index in owners(whole, shape)[chosen]:
        layer, kind, unit = named[int(index)]
        picked.setdefault((layer, kind), set()).add(unit)
    return _sites(picked)


def _sites(units: Mapping[tuple[int, SiteKind], set[int]]) -> Units:
    return ordered(
        Site(layer=layer, kind=kind, units=tuple(sorted(chosen))) for (layer, kind), chosen in units.items()
    )

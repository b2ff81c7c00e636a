"""Sets of safety units as sites: read from a file, everything there is, or a random control.

A units file is JSON: ``{"layer": [unit, …]}`` for MLP neurons, the same under the keys ``mlp`` and
``attention`` when heads take part, or ``{"units": [[layer, neuron], …]}`` as rankings are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.bundle import Site
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


def read_units(path: str | Path, shape: ModelShape) -> Units:
    """Units named by a file. Raises UnitsError, or NoSuchSiteError when a layer has no such site."""
    try:
        document = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UnitsError(f"cannot read the units file {path}: {error}") from error
    if not isinstance(document, dict) or not document:
        raise UnitsError(f'{path}: expected an object like {{"3": [17, 204]}}')
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
    return ordered(
        Site(layer=layer, kind=kind, units=tuple(sorted(units))) for (layer, kind), units in merged.items()
    )


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
    owners = [
        (site.layer, site.kind, unit)
        for site in whole
        for unit in site.units
        for _ in range(len(shape.columns(site.kind, (unit,))))
    ]
    for column in chosen:
        layer, kind, unit = owners[int(column)]
        picked.setdefault((layer, kind), set()).add(unit)
    return ordered(
        Site(layer=layer, kind=kind, units=tuple(sorted(units))) for (layer, kind), units in picked.items()
    )

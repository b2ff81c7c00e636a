"""What ``guard.json`` says of a patch: a named way to have the model itself answer more safely.

A ``stored`` patch overwrites activations by a fixed rule, x ← x · scale + shift, at every position of a
patched request. A ``dynamic`` patch overwrites them with those that an aligned donor computes on the same
tokens (Chen et al., arXiv 2406.14144, section 3). A ``prefix`` has the answer begin with given words.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from guard.sites import ModelShape

PatchKind = Literal["stored", "dynamic", "prefix"]
PatchSiteKind = Literal["mlp", "attention", "residual"]
MOST_PATCHES = 16
"""Patches that one engine holds side by side."""
LONGEST_PREFIX = 64
"""Tokens that an answer may be made to begin with."""


class _Card(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PatchSite(_Card):
    """The units that are overwritten at one layer.

    ``mlp`` and ``attention`` are the sites that probes read. ``residual`` is what the layer's MLP adds to the
    residual stream; its units are the columns of that stream.
    """

    layer: int = Field(ge=0)
    kind: PatchSiteKind
    units: tuple[int, ...] = Field(min_length=1)
    """Neurons, heads or columns, ascending, without repeats."""

    @model_validator(mode="after")
    def _ascending(self) -> PatchSite:
        if self.units[0] < 0 or any(a >= b for a, b in zip(self.units, self.units[1:], strict=False)):
            raise ValueError(f"the patched units of layer {self.layer} must be ascending and non-negative")
        return self

    def columns(self, shape: ModelShape) -> list[int]:
        """Columns of the tensor that is overwritten."""
        return list(self.units) if self.kind != "attention" else shape.columns("attention", self.units)


class DonorCard(_Card):
    """A donor with weights of its own, which the engine loads beside the served model."""

    name: str
    weights_sha256: str


class PatchCard(_Card):
    """One patch; its arrays are in ``guard.safetensors`` (``guard.patch.Patch``)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    kind: PatchKind
    sites: tuple[PatchSite, ...] = ()
    donor: DonorCard | None = None
    """For ``dynamic``: None when the donor is the served model under an (IA)³ vector."""
    prefix: str | None = None
    prefix_tokens: tuple[int, ...] = Field(default=(), max_length=LONGEST_PREFIX)
    """``prefix`` in the served model's tokens."""
    made: dict[str, str] = {}
    """How it was made: method, source of the values, number of units."""

    @model_validator(mode="after")
    def _consistent(self) -> PatchCard:
        if self.kind == "prefix":
            if self.sites or self.donor or not self.prefix or not self.prefix_tokens:
                raise ValueError(
                    f"patch {self.name!r}: a prefix has words and tokens, and neither sites nor donor"
                )
            return self
        if not self.sites or self.prefix or self.prefix_tokens:
            raise ValueError(f"patch {self.name!r}: a {self.kind} patch has sites and no prefix")
        if len({(site.layer, site.kind) for site in self.sites}) < len(self.sites):
            raise ValueError(f"patch {self.name!r}: two sites of one kind in one layer")
        if self.kind == "stored" and self.donor:
            raise ValueError(f"patch {self.name!r}: a stored patch has no donor")
        if self.kind == "dynamic" and any(site.kind == "residual" for site in self.sites):
            raise ValueError(f"patch {self.name!r}: only neurons and heads are patched from a donor")
        return self

    def check(self, shape: ModelShape) -> None:
        """Raise ValueError when a unit does not exist in a model of this shape."""
        for site in self.sites:
            if site.layer >= shape.layers:
                raise ValueError(
                    f"patch {self.name!r}: layer {site.layer}, but the model has {shape.layers} layers"
                )
            if site.kind == "residual":
                continue
            shape.check(site.kind, site.layer)
            if site.units[-1] >= shape.units(site.kind):
                raise ValueError(
                    f"patch {self.name!r}: {site.kind} unit {site.units[-1]} of layer {site.layer} does not "
                    f"exist; the model has {shape.units(site.kind)} in a layer"
                )

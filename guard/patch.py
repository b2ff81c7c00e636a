"""Patches: arrays that go with a ``PatchCard``, how they are made, and their reference in transformers.

Columns of a patch are those of its sites, in the order of ``PatchCard.sites``. Arrays:

- ``stored``: ``scale`` and ``shift``, float32 ``[columns]``: x ← x · scale + shift.
- ``dynamic`` with a donor of its own weights: ``factor``, float32 ``[columns]``, which brings the donor's
  activations into the basis of the served model's value vectors (``guard.locate.twins``).
- ``dynamic`` with an (IA)³ donor: ``vector``, float32 ``[layers, mlp_width]``, beyond the served weights.
- ``prefix``: none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from guard.patch_card import DonorCard, PatchCard, PatchSite, PatchSiteKind
from guard.sites import ModelShape, module_name

if TYPE_CHECKING:
    from torch import Tensor

Float32Array = NDArray[np.float32]
PREFIX = "patch."
"""Names of patch arrays in ``guard.safetensors`` are ``patch.NAME.ARRAY``."""


class PatchError(ValueError):
    """A patch's parts do not fit together, or it does not fit the model."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A patch with its arrays. Raises PatchError when they do not belong to its card."""

    card: PatchCard
    arrays: Mapping[str, Float32Array] = field(default_factory=dict)

    def check(self, shape: ModelShape) -> None:
        """Raise PatchError unless card and arrays fit a model of this shape."""
        try:
            self.card.check(shape)
        except ValueError as error:
            raise PatchError(str(error)) from error
        expected = self._shapes(shape)
        found = {name: array.shape for name, array in self.arrays.items()}
        if found != expected:
            raise PatchError(f"patch {self.card.name!r} has arrays {found}, expected {expected}")
        for name, array in self.arrays.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise PatchError(
                    f"patch {self.card.name!r}: {name} must be float32 and finite in every place"
                )

    def _shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        columns = sum(len(site.columns(shape)) for site in self.card.sites)
        match self.card.kind:
            case "stored":
                return {"scale": (columns,), "shift": (columns,)}
            case "dynamic" if self.card.donor:
                return {"factor": (columns,)}
            case "dynamic":
                return {"vector": (shape.layers, shape.mlp_width)}
            case _:
                return {}

    def parts(self, shape: ModelShape) -> Iterator[tuple[PatchSite, list[int], slice]]:
        """Each site with its columns and where they are in the arrays of length ``columns``."""
        begin = 0
        for site in self.card.sites:
            columns = site.columns(shape)
            yield site, columns, slice(begin, begin + len(columns))
            begin += len(columns)


def patch_arrays(patches: Iterable[Patch]) -> dict[str, Float32Array]:
    """The arrays of patches under the names they have in a bundle, contiguous."""
    return {
        f"{PREFIX}{patch.card.name}.{name}": np.ascontiguousarray(patch.arrays[name])
        for patch in patches
        for name in sorted(patch.arrays)
    }


def take_patches(cards: Iterable[PatchCard], arrays: dict[str, NDArray[Any]]) -> list[Patch]:
    """Take the patches' arrays out of a bundle's. Raises PatchError when one belongs to none of them."""
    patches = []
    for card in cards:
        begin = f"{PREFIX}{card.name}."
        # A patch's name may hold a dot, an array's may not.
        names = [n for n in arrays if n.startswith(begin) and "." not in n[len(begin) :]]
        patches.append(Patch(card, {name[len(begin) :]: arrays.pop(name) for name in sorted(names)}))
    if left := [name for name in arrays if name.startswith(PREFIX)]:
        raise PatchError(f"there is an array {left[0]!r}, but no such patch")
    return patches


def stored(
    name: str,
    sites: Sequence[PatchSite],
    shape: ModelShape,
    *,
    scale: float | Float32Array = 1.0,
    shift: float | Float32Array = 0.0,
    made: dict[str, str] | None = None,
) -> Patch:
    """x ← x · scale + shift; numbers or float32 ``[columns]``. Raises PatchError.

    zero: ``scale=0``; mean: ``scale=0, shift=means``; additive: ``shift=values``; sparse (IA)³:
    ``scale=factors``.
    """
    columns = sum(len(site.columns(shape)) for site in sites)

    def whole(value: float | Float32Array) -> Float32Array:
        return np.array(np.broadcast_to(np.asarray(value, dtype=np.float32), (columns,)))

    card = PatchCard(name=name, kind="stored", sites=tuple(sites), made=made or {})
    patch = Patch(card, {"scale": whole(scale), "shift": whole(shift)})
    patch.check(shape)
    return patch


def steering(
    name: str,
    direction: Float32Array,
    layers: Sequence[int],
    shape: ModelShape,
    *,
    strength: float,
    made: dict[str, str] | None = None,
) -> Patch:
    """Add ``strength · direction / |direction|``, float32 ``[hidden]``, to the residual stream."""
    length = float(np.linalg.norm(direction))
    if direction.ndim != 1 or not np.isfinite(length) or length == 0.0:
        raise PatchError(f"patch {name!r}: a direction is one finite vector that is not zero")
    sites = [PatchSite(layer=layer, kind="residual", units=tuple(range(len(direction)))) for layer in layers]
    step = (direction * (strength / length)).astype(np.float32)
    return stored(name, sites, shape, shift=np.tile(step, len(sites)), made=made)


def from_vector(
    name: str,
    sites: Sequence[PatchSite],
    vector: Float32Array,
    shape: ModelShape,
    made: dict[str, str] | None = None,
) -> Patch:
    """Dynamic, the donor being the served model under an (IA)³ vector ``[layers, mlp_width]``."""
    patch = Patch(
        PatchCard(name=name, kind="dynamic", sites=tuple(sites), made=made or {}), {"vector": vector}
    )
    patch.check(shape)
    return patch


def from_donor(
    name: str,
    sites: Sequence[PatchSite],
    donor: DonorCard,
    shape: ModelShape,
    *,
    factor: float | Float32Array = 1.0,
    made: dict[str, str] | None = None,
) -> Patch:
    """Dynamic, from a donor with weights of its own; ``factor`` is one number or float32 ``[columns]``."""
    columns = sum(len(site.columns(shape)) for site in sites)
    whole = np.array(np.broadcast_to(np.asarray(factor, dtype=np.float32), (columns,)))
    card = PatchCard(name=name, kind="dynamic", sites=tuple(sites), donor=donor, made=made or {})
    patch = Patch(card, {"factor": whole})
    patch.check(shape)
    return patch


def prefix(name: str, words: str, tokens: Sequence[int], made: dict[str, str] | None = None) -> Patch:
    """The answer begins with ``words``, which are ``tokens`` to the served model."""
    return Patch(
        PatchCard(name=name, kind="prefix", prefix=words, prefix_tokens=tuple(tokens), made=made or {})
    )


@contextmanager
def applied(patch: Patch, model: Any) -> Iterator[None]:
    """A stored patch in every forward pass of a transformers model, at every position of every row.

    This is the reference for the engine. Raises PatchError for another kind of patch.
    """
    import torch

    from guard.sites import shape_of

    if patch.card.kind != "stored":
        raise PatchError(f"patch {patch.card.name!r} is {patch.card.kind}; only a stored one can be applied")
    shape = shape_of(model.config)
    patch.check(shape)
    with ExitStack() as stack:
        for site, columns, part in patch.parts(shape):
            module = model.get_submodule(patched_module(shape.architecture, site.kind, site.layer))
            chosen = torch.tensor(columns, device=model.device)
            scale, shift = (
                torch.tensor(patch.arrays[array][part], device=model.device, dtype=model.dtype)
                for array in ("scale", "shift")
            )

            def change(
                x: Tensor, chosen: Tensor = chosen, scale: Tensor = scale, shift: Tensor = shift
            ) -> Tensor:
                return x.index_copy(-1, chosen, x.index_select(-1, chosen) * scale + shift)

            if site.kind == "residual":
                handle = module.register_forward_hook(lambda _m, _a, out, change=change: change(out))
            else:
                handle = module.register_forward_pre_hook(
                    lambda _m, args, change=change: (change(args[0]), *args[1:])
                )
            stack.callback(handle.remove)
        yield


def patched_module(architecture: str, kind: PatchSiteKind, layer: int) -> str:
    """Name of the layer whose input, or for ``residual`` whose output, is overwritten."""
    return module_name(architecture, "mlp" if kind == "residual" else kind, layer)

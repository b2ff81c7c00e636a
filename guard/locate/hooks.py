"""Read or change the inputs of sites during a forward pass, at every position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from guard.bundle import Site
from guard.capture import CaptureError
from guard.sites import ModelShape, SiteKind, module_name, shape_of

Place = tuple[int, SiteKind]
"""Layer and kind of a site."""
Edit = Callable[[int, Tensor], Tensor | None]
"""Called with the number of the place and the input ``[batch, tokens, width]`` there; returns the new input,
or None to leave it. Behind a mixture of experts the first two axes are one."""


@contextmanager
def at_inputs(model: Any, places: Sequence[Place], edit: Edit) -> Iterator[None]:
    """Call ``edit`` with the input of each place in every forward pass of the block.

    Hooks run in the order in which blocks were entered and see the changes of those before them; they are
    removed when the block is left. Raises CaptureError when the block ends and a place was never reached,
    and UnsupportedArchitectureError.
    """
    shape = shape_of(model.config)
    reached, handles = [False] * len(places), []
    try:
        for number, (layer, kind) in enumerate(places):

            def hook(_module: Any, inputs: tuple[Tensor, ...], number: int = number) -> Any:
                reached[number] = True
                changed = edit(number, inputs[0])
                return None if changed is None else (changed, *inputs[1:])

            module = model.get_submodule(module_name(shape.architecture, kind, layer))
            handles.append(module.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not all(reached):
        missing = [place[0] for place, seen in zip(places, reached, strict=True) if not seen]
        raise CaptureError(f"no input was seen at layers {missing}; is the model's forward replaced?")


class Columns:
    """The input columns of some sites, on whichever device they are needed."""

    def __init__(self, units: Sequence[Site], shape: ModelShape) -> None:
        self._cpu = [torch.tensor(shape.columns(site.kind, site.units)) for site in units]
        self._there: dict[tuple[int, torch.device], Tensor] = {}

    def at(self, number: int, device: torch.device) -> Tensor:
        """int64 ``[columns]`` of a site; copied to each device once."""
        key = (number, device)
        if key not in self._there:
            self._there[key] = self._cpu[number].to(device)
        return self._there[key]

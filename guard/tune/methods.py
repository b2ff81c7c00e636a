"""The methods: what of a model each one trains, and what data and units it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from guard.data import Label
from guard.sites import module_name, shape_of
from guard.tune import options as given
from guard.tune.errors import TuneError
from guard.tune.options import TuneOptions
from guard.tune.slices import COLUMNS, ROWS, ChosenUnits, Part, freezing_units, parts_of, training_units
from guard.tune.vector import training_vector

Method = Literal["sn", "rsn", "freeze", "budget", "ia3", "lora", "full"]


class Spec(NamedTuple):
    """What a method asks for."""

    options: type[TuneOptions]
    units: Literal["needed", "optional", "none"]
    labels: tuple[Label, ...] = ()
    """Kinds of prompts that the data must hold."""


METHODS: dict[Method, Spec] = {
    "sn": Spec(
        given.SnOptions,
        "needed",
        ("harmful",),
    ),
    "rsn": Spec(
        given.RsnOptions,
        "needed",
    ),
    "freeze": Spec(given.FreezeOptions, "needed"),
    "budget": Spec(
        given.BudgetOptions,
        "needed",
    ),
    "ia3": Spec(
        given.Ia3Options,
        "optional",
        ("harmful", "benign"),
    ),
    "lora": Spec(given.LoraOptions, "none", ("harmful", "benign")),
    "full": Spec(given.FullOptions, "none"),
}


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train."""

    model: Any
    """What the loss is computed with and whose parameters train."""
    parts: tuple[Part, ...]
    inside: bool
    """Whether the parts are all that may change, or all that may not."""
    vector: dict[str, Tensor] = field(default_factory=dict)
    """An (IA)³ vector, complete behind the block."""

    def may_change(self, name: str, like: Tensor) -> Tensor:
        """bool, in the shape of the weight called ``name``: which of its entries the method trains."""
        mask = torch.full(like.shape, not self.inside)
        for part in self.parts:
            if name == f"{part.module}.weight":
                mask.index_fill_(part.dim, torch.tensor(part.places), self.inside)
            elif name == f"{part.module}.bias" and part.dim == ROWS and not self.inside:
                mask.fill_(False)
        return mask


@contextmanager
def prepared(
    method: Method, model: Any, units: ChosenUnits | None, options: TuneOptions
) -> Iterator[Prepared]:
    """Let the right numbers train inside the block; behind it the model's weights hold what was learnt.

    A LoRA adapter is merged behind the block if the options say ``whole``. Raises TuneError.
    """
    if isinstance(options, given.LoraOptions):
        with _adapter(model, options) as made:
            yield made
    elif isinstance(options, given.Ia3Options):
        with _vector(model, units, options) as made:
            yield made
    elif units is None:
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.requires_grad_(True)
        yield Prepared(model, (), inside=False)
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None
    else:
        inside, gate = method in ("sn", "budget"), bool(getattr(options, "gate", False))
        parts = tuple(parts_of(model, units, gate=gate))
        with (training_units if inside else freezing_units)(model, units, gate=gate):
            yield Prepared(model, parts, inside)


@contextmanager
def _vector(model: Any, units: ChosenUnits | None, options: given.Ia3Options) -> Iterator[Prepared]:
    if units is not None and units.keys() != {"mlp"}:
        raise TuneError(f"an (IA)³ vector scales MLP neurons; the units are of {', '.join(units)}")
    chosen = units["mlp"] if units else None
    with training_vector(model, chosen, last_layers=options.last_layers) as vector:
        shape = shape_of(model.config)
        layers = chosen or dict.fromkeys(range(shape.first_mlp_layer, shape.layers - options.last_layers))
        every = list(range(shape.mlp_width))
        parts = tuple(
            Part(module_name(shape.architecture, "mlp", layer), COLUMNS, list(places or every))
            for layer, places in layers.items()
        )
        yield Prepared(model, parts, inside=True, vector=vector)


@contextmanager
def _adapter(model: Any, options: given.LoraOptions) -> Iterator[Prepared]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=list(options.target),
        layers_pattern=None,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise TuneError(f"no adapter can be put on {', '.join(options.target)}: {error}") from error
    # A name without its layer of low rank is the linear layer that has one.
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    yield Prepared(
        wrapped,
        tuple(Part(name, ROWS, list(range(model.get_submodule(name).out_features))) for name in names),
        inside=True,
    )
    if options.whole:
        wrapped.merge_and_unload()
    else:
        wrapped.unload()

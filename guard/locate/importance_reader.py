"""Hooks that turn what passes through a layer into the importance of its units, prompt by prompt.

Each layer is worked on when the input of its ``o_proj`` and of its ``down_proj`` is seen, so that no layer's
activations outlive it. Tensors of a layer stay on the layer's device; importances are gathered on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from guard.locate import closed_forms
from guard.locate.errors import LocateError
from guard.locate.importance_options import ImportanceOptions, Matrix
from guard.locate.passes import wide
from guard.sites import ModelShape, module_name, shape_of

_SIDES: tuple[closed_forms.Side, ...] = ("query", "key")


def widths(model: Any, options: ImportanceOptions) -> dict[Matrix, int]:
    """Units a layer has of each kind that the options ask for. Raises LocateError, NoSuchSiteError."""
    shape = shape_of(model.config)
    keys = (getattr(model.config, "num_key_value_heads", None) or shape.heads) * shape.head_dim
    known: dict[Matrix, int] = {"query": shape.heads * shape.head_dim, "key": keys, "value": keys}
    return {name: shape.units("mlp") if name == "mlp" else known[name] for name in options.matrices}


class Reading:
    """Importances of one batch: float64 ``[prompts, layers, units]`` a matrix, on the CPU."""

    def __init__(self, lengths: Sequence[int], layers: int, units: dict[Matrix, int]) -> None:
        self.lengths = lengths
        self.importance = {
            name: torch.full((len(lengths), layers, width), torch.nan, dtype=torch.float64)
            for name, width in units.items()
        }
        self.mismatch = torch.zeros(len(lengths), layers)
        """Relative distance between the attention output as read and as recomputed from queries and keys."""
        self.seen: set[tuple[str, int]] = set()

    def keep(self, name: Matrix, row: int, layer: int, value: Tensor) -> None:
        """Keep ``[units]`` of a prompt and a layer."""
        self.importance[name][row, layer] = value.double().cpu()
        self.seen.add((name, layer))


@contextmanager
def reading(
    model: Any, lengths: Sequence[int], units: dict[Matrix, int], options: ImportanceOptions
) -> Iterator[Reading]:
    """Measure during one forward pass; row ``b`` of the batch holds a prompt of ``lengths[b]`` tokens first.

    The hooks change nothing and are gone when the block is left. Raises LocateError.
    """
    shape = shape_of(model.config)
    result = Reading(lengths, shape.layers, units)
    with ExitStack() as hooks:
        for layer in range(shape.layers):
            if "mlp" in units and layer >= shape.first_mlp_layer:
                for handle in _mlp_hooks(model, shape, layer, result, options):
                    hooks.callback(handle.remove)
            if units.keys() - {"mlp"}:
                for handle in _AttentionHooks(model, shape, layer, result, options).register():
                    hooks.callback(handle.remove)
        yield result


def _mlp_hooks(
    model: Any, shape: ModelShape, layer: int, result: Reading, options: ImportanceOptions
) -> list[Any]:
    name = module_name(shape.architecture, "mlp", layer)
    down = model.get_submodule(name)

    def real(tensor: Tensor) -> list[Tensor]:
        # A mixture of experts flattens [batch, tokens, width] to [batch * tokens, width].
        rows = tensor.reshape(len(result.lengths), -1, tensor.shape[-1])
        return [wide(row[:length]) for row, length in zip(rows, result.lengths, strict=True)]

    if options.variant == "released":
        up = _child(model, name.rpartition(".")[0], "up_proj", "mlp")

        def released(_module: Any, _inputs: Any, output: Tensor) -> None:
            for row, values in enumerate(real(output)):
                result.keep("mlp", row, layer, values.abs().sum(0))

        return [up.register_forward_hook(released)]
    norms = wide(down.weight).norm(dim=0)

    def exact(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        for row, activations in enumerate(real(inputs[0])):
            result.keep("mlp", row, layer, closed_forms.mlp_importance(activations, norms))

    return [down.register_forward_pre_hook(exact)]


class _AttentionHooks:
    """Collects queries, keys, values and rotary tables of a layer, and works when ``o_proj`` is reached."""

    def __init__(
        self, model: Any, shape: ModelShape, layer: int, result: Reading, options: ImportanceOptions
    ) -> None:
        output_name = module_name(shape.architecture, "attention", layer)
        self.parent = output_name.rpartition(".")[0]
        self.model, self.layer, self.result, self.options = model, layer, result, options
        self.attention = model.get_submodule(self.parent)
        self.output = model.get_submodule(output_name)
        self.wanted = [name for name in options.matrices if name != "mlp"]
        self.head_dim = shape.head_dim
        self.groups = getattr(model.config, "num_key_value_heads", None) or shape.heads
        self.window = getattr(self.attention, "sliding_window", getattr(model.config, "sliding_window", None))
        self.held: dict[str, Tensor] = {}
        self.gram: Tensor | None = None
        if "value" in self.wanted and options.variant == "exact":
            self.gram = closed_forms.value_gram(wide(self.output.weight), self.head_dim, self.groups)

    def register(self) -> list[Any]:
        handles = [self.output.register_forward_pre_hook(self._finish)]
        if "query" in self.wanted or "key" in self.wanted:
            handles.append(self.attention.register_forward_pre_hook(self._tables, with_kwargs=True))
            for name in ("query", "key", "value"):
                projection = _child(self.model, self.parent, f"{name[0]}_proj", name)
                handles.append(projection.register_forward_hook(self._hold(name)))
        return handles

    def _tables(self, _module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        cos, sin = named["position_embeddings"] if "position_embeddings" in named else inputs[1]
        if cos.shape[-1] != self.head_dim:
            raise LocateError(
                f"layer {self.layer} rotates {cos.shape[-1]} of {self.head_dim} columns of a head; the "
                "closed forms for query and key expect all: leave these two out of 'matrices'"
            )
        self.held |= {"cos": cos, "sin": sin}

    def _hold(self, name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            self.held[name] = output

        return hook

    def _finish(self, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        held, self.held = self.held, {}
        for row, length in enumerate(self.result.lengths):
            mixed = wide(inputs[0][row, :length])
            if "value" in self.wanted:
                self._keep("value", row, self._value(mixed))
            if "cos" in held:
                self._query_and_key({name: _row(x, row, length) for name, x in held.items()}, mixed, row)

    def _keep(self, name: Matrix, row: int, value: Tensor) -> None:
        self.result.keep(name, row, self.layer, value)

    def _value(self, mixed: Tensor) -> Tensor:
        if self.gram is None:
            return self._best_of_group(mixed.abs().sum(0))
        return closed_forms.value_importance(mixed, self.gram)

    def _best_of_group(self, by_head: Tensor) -> Tensor:
        """A row that several heads share counts as the best of them: ``[H * D]`` to ``[G * D]``."""
        return by_head.view(self.groups, -1, self.head_dim).amax(1).flatten()

    def _query_and_key(self, held: dict[str, Tensor], mixed: Tensor, row: int) -> None:
        query, query_gain = self._normalised(held["query"], "q_norm")
        key, key_gain = self._normalised(held["key"], "k_norm")
        values = wide(held["value"]).view(len(mixed), -1, self.head_dim)
        read = closed_forms.Attention(
            query,
            key,
            held["cos"].to(query),
            held["sin"].to(query),
            scaling=float(self.attention.scaling),
            softcap=getattr(self.attention, "attn_logit_softcapping", None),
            window=self.window,
            query_gain=query_gain,
            key_gain=key_gain,
        )
        shares = closed_forms.weights(read, closed_forms.scores(read))
        again = torch.einsum("grij,jgd->igrd", shares, values).reshape_as(mixed)
        self.result.mismatch[row, self.layer] = ((again - mixed).norm() / mixed.norm()).cpu()
        by_head = closed_forms.released_importance(read) if self.options.variant == "released" else None
        for side in _SIDES:
            if side in self.wanted:
                found = self._exact(read, side, values) if by_head is None else by_head
                shared = by_head is not None and side == "key"
                self._keep(side, row, self._best_of_group(found) if shared else found)

    def _exact(self, read: closed_forms.Attention, side: closed_forms.Side, values: Tensor) -> Tensor:
        last = self.options.query_rows == "last"
        if self.options.effect == "map":
            return closed_forms.map_importance(read, side, last_row=last)
        weight = wide(self.output.weight)
        return closed_forms.output_importance(read, side, values, weight, last_row=last)

    def _normalised(self, raw: Tensor, norm_name: str) -> tuple[Tensor, Tensor | None]:
        """Heads ``[T, heads, D]`` as they are rotated, and the gain of their norm where there is one."""
        by_head = raw.view(len(raw), -1, self.head_dim)
        norm = getattr(self.attention, norm_name, None)
        if norm is None:
            return wide(by_head), None
        if norm.weight.shape != (self.head_dim,):
            raise LocateError(
                f"layer {self.layer} normalises all heads of a token together; the closed forms for query "
                "and key expect a norm by head or none: leave these two out of 'matrices'"
            )
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        return wide(norm(by_head)), closed_forms.norm_gain(wide(by_head), eps)


def _row(tensor: Tensor, row: int, length: int) -> Tensor:
    # Rotary tables may have one row for all of the batch.
    return tensor[row if len(tensor) > 1 else 0, :length]


def _child(model: Any, parent: str, name: str, what: str) -> Any:
    try:
        return model.get_submodule(f"{parent}.{name}")
    except AttributeError:
        raise LocateError(
            f"{parent} has no {name}, which the importance of {what!r} is read from; "
            f"leave {what!r} out of 'matrices', or choose the variant 'exact'"
        ) from None

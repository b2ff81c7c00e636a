"""Where a site sits: the linear layer whose *input* is read, by name, in each supported architecture.

A site is one such layer: ``mlp`` is the input of ``down_proj`` (one unit a neuron), ``attention`` the input
of ``o_proj`` (one unit a head, ``head_dim`` columns each). transformers and vLLM use the same module names
for the layouts listed here; vLLM splits the input by columns over tensor-parallel ranks. Whether queries,
keys and values, or gate and up, are one layer or several does not matter: both end before these two inputs.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

SiteKind = Literal["mlp", "attention"]

_DECODER: dict[SiteKind, str] = {
    "mlp": "model.layers.{layer}.mlp.down_proj",
    "attention": "model.layers.{layer}.self_attn.o_proj",
}

MODULES: dict[str, dict[SiteKind, str]] = {
    # act(gate) * up and softmax(q k) v, in every one of them; what differs comes before that or after it.
    "Gemma2ForCausalLM": _DECODER,  # head_dim is a size of its own; soft-capped scores; window in some layers
    "Gemma3ForCausalLM": _DECODER,  # head_dim is a size of its own; q and k norm; window in some layers
    "LlamaForCausalLM": _DECODER,
    "MistralForCausalLM": _DECODER,  # one window for all layers, or none
    "Olmo2ForCausalLM": _DECODER,  # norms after the blocks; q and k norm over all heads together
    "Phi3ForCausalLM": _DECODER,  # qkv_proj and gate_up_proj in the checkpoint; one window for all, or none
    "Qwen2ForCausalLM": _DECODER,  # biased q, k and v
    "Qwen3ForCausalLM": _DECODER,  # q and k norm
}


class UnsupportedArchitectureError(ValueError):
    """The model's layout is not one whose sites are known."""


class ModelShape(NamedTuple):
    """The sizes that sites and bundles depend on."""

    architecture: str
    layers: int
    mlp_width: int
    """Columns of ``down_proj``'s input."""
    heads: int
    head_dim: int

    def width(self, kind: SiteKind) -> int:
        """Columns of the input of a site of this kind."""
        return self.mlp_width if kind == "mlp" else self.heads * self.head_dim

    def units(self, kind: SiteKind) -> int:
        """Units (neurons or heads) of a site of this kind."""
        return self.mlp_width if kind == "mlp" else self.heads

    def columns(self, kind: SiteKind, units: tuple[int, ...]) -> list[int]:
        """The input columns of ``units``, unit by unit."""
        if kind == "mlp":
            return list(units)
        return [unit * self.head_dim + offset for unit in units for offset in range(self.head_dim)]


def module_name(architecture: str, kind: SiteKind, layer: int) -> str:
    """Dotted name of the linear layer whose input is the site. Raises UnsupportedArchitectureError."""
    try:
        return MODULES[architecture][kind].format(layer=layer)
    except KeyError:
        known = ", ".join(sorted(MODULES))
        raise UnsupportedArchitectureError(
            f"the guard does not know where the {kind} sites of {architecture!r} are; supported: {known}"
        ) from None


def shape_of(config: Any) -> ModelShape:
    """Read the sizes from a transformers ``PretrainedConfig``. Raises UnsupportedArchitectureError."""
    architectures = getattr(config, "architectures", None) or ["<none>"]
    module_name(architectures[0], "mlp", 0)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(architectures[0], config.num_hidden_layers, config.intermediate_size, heads, head_dim)

"""Where a site sits: the linear layer whose *input* is read, by name, in each supported architecture.

A site is one such layer: ``mlp`` is the input of ``down_proj`` (one unit a neuron), ``attention`` the input
of ``o_proj`` (one unit a head, ``head_dim`` columns each). transformers and vLLM use the same module names
for the layouts listed here; vLLM splits the input by columns over tensor-parallel ranks. Whether queries,
keys and values, or gate and up, are one layer or several does not matter: both end before these two inputs.

In a mixture of experts the neurons of a routed expert exist only for the tokens sent to it, and both
libraries compute all experts in one kernel: they are no sites. A shared expert sees every token, and is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

SiteKind = Literal["mlp", "attention"]

_ATTENTION: dict[SiteKind, str] = {"attention": "model.layers.{layer}.self_attn.o_proj"}
_DECODER: dict[SiteKind, str] = {"mlp": "model.layers.{layer}.mlp.down_proj", **_ATTENTION}
_SHARED_EXPERT: dict[SiteKind, str] = {
    "mlp": "model.layers.{layer}.mlp.shared_expert.down_proj",
    **_ATTENTION,
}
_SHARED_EXPERTS: dict[SiteKind, str] = {
    "mlp": "model.layers.{layer}.mlp.shared_experts.down_proj",
    **_ATTENTION,
}

MODULES: dict[str, dict[SiteKind, str]] = {
    # act(gate) * up and softmax(q k) v, in every one of them; what differs comes before that or after it.
    "Gemma2ForCausalLM": _DECODER,  # head_dim is a size of its own; soft-capped scores; window in some layers
    "Gemma3ForCausalLM": _DECODER,  # head_dim is a size of its own; q and k norm; window in some layers
    "Glm4MoeForCausalLM": _SHARED_EXPERTS,  # first layers dense; several shared experts side by side
    "LlamaForCausalLM": _DECODER,
    "MistralForCausalLM": _DECODER,  # one window for all layers, or none
    "MixtralForCausalLM": _ATTENTION,
    "Olmo2ForCausalLM": _DECODER,  # norms after the blocks; q and k norm over all heads together
    "OlmoeForCausalLM": _ATTENTION,  # q and k norm over all heads together
    "Phi3ForCausalLM": _DECODER,  # qkv_proj and gate_up_proj in the checkpoint; one window for all, or none
    "Qwen2ForCausalLM": _DECODER,  # biased q, k and v
    "Qwen2MoeForCausalLM": _SHARED_EXPERT,  # biased q, k and v; the shared expert's output is gated
    "Qwen3ForCausalLM": _DECODER,  # q and k norm
    "Qwen3MoeForCausalLM": _ATTENTION,  # q and k norm
}


class UnsupportedArchitectureError(ValueError):
    """The model's layout is not one whose sites are known."""


class NoSuchSiteError(UnsupportedArchitectureError):
    """The model is known, but has no site of this kind, or none in this layer."""


class ModelShape(NamedTuple):
    """The sizes that sites and bundles depend on."""

    architecture: str
    layers: int
    mlp_width: int
    """Columns of the input of an MLP site; 0 when the model has none."""
    heads: int
    head_dim: int
    first_mlp_layer: int = 0
    """The first layer with an MLP site; all after it have one."""

    def width(self, kind: SiteKind) -> int:
        """Columns of the input of a site of this kind. Raises NoSuchSiteError when there is none."""
        return self.units("mlp") if kind == "mlp" else self.heads * self.head_dim

    def units(self, kind: SiteKind) -> int:
        """Units (neurons or heads) of a site of this kind. Raises NoSuchSiteError when there is none."""
        if kind == "attention":
            return self.heads
        if not self.mlp_width:
            raise NoSuchSiteError(
                f"this {self.architecture!r} has no MLP sites: its neurons are in routed experts, which see "
                "only the tokens sent to them, or in layers that are not alike. Read attention heads "
                'instead, with a units file such as {"attention": {"3": [0, 1]}}'
            )
        return self.mlp_width

    def check(self, kind: SiteKind, layer: int) -> None:
        """Raise NoSuchSiteError unless ``layer``, which the model has, holds a site of this kind."""
        if kind == "mlp" and self.units(kind) and layer < self.first_mlp_layer:
            raise NoSuchSiteError(
                f"layer {layer} of this {self.architecture!r} has no MLP site: it is a dense layer below the "
                f"shared experts, which begin at layer {self.first_mlp_layer}"
            )

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
    architecture = (getattr(config, "architectures", None) or ["<none>"])[0]
    module_name(architecture, "attention", 0)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    first, width = _mlp_sites(architecture, config)
    return ModelShape(architecture, config.num_hidden_layers, width, heads, head_dim, first)


def _mlp_sites(architecture: str, config: Any) -> tuple[int, int]:
    """First layer with an MLP site, and how wide it is; (0, 0) when there is none."""
    if "mlp" not in MODULES[architecture]:
        return 0, 0
    if architecture not in _SHARED:
        return 0, config.intermediate_size
    width, is_sparse = _SHARED[architecture]
    sparse = [is_sparse(config, layer) for layer in range(config.num_hidden_layers)]
    first = sparse.index(True) if any(sparse) else 0
    return (first, width(config)) if all(sparse[first:]) and width(config) else (0, 0)


def _qwen_is_sparse(config: Any, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


_SHARED: dict[str, tuple[Callable[[Any], int], Callable[[Any, int], bool]]] = {
    # Width of a shared expert's MLP, and which layers have one: the decoder layers in transformers.
    "Glm4MoeForCausalLM": (
        lambda c: c.moe_intermediate_size * c.n_shared_experts,
        lambda c, layer: layer >= c.first_k_dense_replace,
    ),
    "Qwen2MoeForCausalLM": (lambda c: c.shared_expert_intermediate_size, _qwen_is_sparse),
}

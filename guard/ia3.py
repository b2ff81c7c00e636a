"""Fold an (IA)³ vector into a checkpoint: the ordinary model that vLLM and transformers load.

(IA)³ multiplies the input of ``down_proj`` by a learnt vector l, so MLP(x) = W_down (l ⊙ a(x)); scaling the
columns of W_down by l is the same function. A twin between base and aligned model uses
l(α) = 1 + α (l − 1): α = 0 is the base, α = 1 the aligned twin. In a folded checkpoint the activations at
the input of ``down_proj`` are the *unscaled* a(x).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

VECTOR_NAME = "model.layers.{layer}.mlp.down_proj.ia3"
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def fold_checkpoint(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vector: str | os.PathLike[str] | None = None,
    alpha: float = 1.0,
) -> Path:
    """Write the checkpoint of ``base`` with the vector folded in at strength ``alpha``; returns ``out``.

    ``base`` holds one ``model.safetensors``; ``vector`` holds float32 ``[mlp_width]`` tensors named like
    ``model.layers.3.mlp.down_proj.ia3``. The product is taken in float64 and rounded once to the weights'
    dtype, so the result is the same on every machine. ``out`` appears whole or not at all; an existing
    ``out`` is replaced. Raises ValueError when a vector does not fit the weights.
    """
    source, target = Path(base), Path(out)
    tensors = load_file(source / "model.safetensors")
    if vector is not None:
        with safe_open(str(vector), "pt") as scales:
            for name in scales.keys():  # noqa: SIM118 (safe_open is no mapping)
                weight_name = name.removesuffix(".ia3") + ".weight"
                weight, scale = tensors.get(weight_name), scales.get_tensor(name)
                if weight is None or scale.shape != weight.shape[1:]:
                    raise ValueError(f"{vector}: {name} {list(scale.shape)} does not fit {weight_name}")
                factor = 1.0 + alpha * (scale.double() - 1.0)
                tensors[weight_name] = (weight.double() * factor).to(weight.dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, staging / "model.safetensors", {"format": "pt"}
        )
        # Both are made private to their owner; the checkpoint may be served by another user.
        (staging / "model.safetensors").chmod(0o644)
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        staging.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target

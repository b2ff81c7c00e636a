"""A model on disk: its sizes, its digests, and how transformers loads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from guard.adapters import Adapter
from guard.bundle import ModelCard
from guard.digest import tokenizer_digest, weights_digest
from guard.merge import merge
from guard.quantisation import quantisation_of, refuse_unshown
from guard.sites import ModelShape, UnsupportedArchitectureError, shape_of

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class CheckpointError(ValueError):
    """A directory does not hold a model that the guard can read."""


@dataclass(frozen=True)
class Checkpoint:
    """A local Hugging Face checkpoint, identified by its content."""

    path: Path
    name: str
    shape: ModelShape
    context: int
    """Longest sequence the model was made for, in tokens."""
    weights_sha256: str
    tokenizer_sha256: str
    adapter: Adapter | None = None
    """A LoRA adapter that is merged in whenever the model is loaded. The digests are the base model's."""

    @classmethod
    def open(cls, path: str | Path, name: str | None = None) -> Checkpoint:
        """Read configuration and digests; no weights are loaded. Raises CheckpointError."""
        root = Path(path)
        if not (root / "config.json").is_file():
            raise CheckpointError(f"{root} holds no config.json; expected a local Hugging Face checkpoint")
        try:
            config = AutoConfig.from_pretrained(root, local_files_only=True)
            shape = shape_of(config)
            refuse_unshown(config)
            weights, tokenizer = weights_digest(root), tokenizer_digest(root)
        except (OSError, ValueError, UnsupportedArchitectureError) as error:
            raise CheckpointError(f"cannot use {root}: {error}") from error
        return cls(
            root, name or root.resolve().name, shape, int(config.max_position_embeddings), weights, tokenizer
        )

    def card(self) -> ModelCard:
        """How a bundle names this model."""
        return ModelCard(
            name=self.name,
            **self.shape._asdict(),
            weights_sha256=self.weights_sha256,
            tokenizer_sha256=self.tokenizer_sha256,
        )

    def under(self, adapter: Adapter) -> Checkpoint:
        """The same checkpoint with ``adapter`` merged in when it is loaded."""
        return replace(self, adapter=adapter)

    def load_model(self, dtype: str = "float32", device: str = "cpu") -> Any:
        """The model for reading: no gradients, no dropout. Only safetensors files are opened.

        ``device`` is a torch device, or ``auto`` to spread the layers over all that there are, which needs
        the package accelerate. Raises CheckpointError.
        """
        spread = device == "auto"
        if spread and find_spec("accelerate") is None:
            raise CheckpointError(
                "spreading a model over devices needs the package accelerate; install it, or name one device"
            )
        config = AutoConfig.from_pretrained(self.path, local_files_only=True)
        if getattr(config, "attn_logit_softcapping", None) is not None:
            # transformers' default attention leaves soft-capping out without a word; vLLM does not.
            config._attn_implementation = "eager"
        if quantisation := quantisation_of(config):
            if find_spec("compressed_tensors") is None:
                raise CheckpointError(
                    f"{self.path} is quantised; reading it needs the package compressed-tensors, which vLLM "
                    "brings along: install neuronguard[cpu] or neuronguard[cuda]"
                )
            # Expanded while loading; left alone, they are only when the whole model is called.
            config.quantization_config = {**quantisation, "dequantize": True}
        model = AutoModelForCausalLM.from_pretrained(
            self.path,
            config=config,
            dtype=DTYPES[dtype],
            local_files_only=True,
            use_safetensors=True,
            device_map="auto" if spread else None,
        )
        if self.adapter is not None:
            merge(model, self.adapter)
        model.requires_grad_(False).eval()
        return model if spread else model.to(device)

    def load_tokenizer(self) -> Any:
        """The tokenizer with its chat template. Raises CheckpointError when there is no template."""
        tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        if not tokenizer.chat_template:
            raise CheckpointError(f"the tokenizer of {self.path} has no chat template; the guard needs one")
        return tokenizer

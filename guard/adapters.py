"""A LoRA adapter on disk: what it is bound by, and whether its every feature is one that the guard computes.

An adapter is a PEFT directory: ``adapter_config.json`` and ``adapter_model.safetensors``. What the guard does
not compute as vLLM does (vllm/lora/peft_helper.py), or does not know, is refused by its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.card import AdapterCard
from guard.digest import file_digest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_SAID_BY_THE_TENSORS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_ABOUT_TRAINING = {"inference_mode", "lora_dropout", "eva_config", "lora_ga_config"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights"}
_KNOWN = _SAID_BY_THE_TENSORS | _ABOUT_TRAINING | _WITHOUT_EFFECT | _READ
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Other ways to start change the base weights when PEFT loads the adapter (vLLM refuses them as well)."""


class AdapterError(ValueError):
    """An adapter cannot be read, has a feature that the guard does not compute, or is not the one meant."""


def adapter_digest(directory: str | os.PathLike[str]) -> str:
    """SHA-256 over the adapter's two files, as they are. Raises AdapterError when one is missing."""
    root, digest = Path(directory), hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (root / name).is_file():
            raise AdapterError(
                f"{root} holds no {name}; expected a LoRA adapter as PEFT saves it, weights in safetensors"
            )
        digest.update(name.encode() + b"\0" + bytes.fromhex(file_digest(root / name)))
    return digest.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: W becomes W + scale · B · A in each linear layer that it names."""

    path: Path
    name: str
    """What requests call it."""
    sha256: str
    rank: int
    scale: float
    """``lora_alpha / r``, or ``lora_alpha / √r`` for rank-stabilised LoRA."""
    targets: tuple[str, ...]
    """Module names that ``target_modules`` lists; empty when it is a pattern."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], name: str) -> Adapter:
        """Read the configuration and the digest. Raises AdapterError."""
        root = Path(path)
        sha256 = adapter_digest(root)
        try:
            config = json.loads((root / CONFIG_FILE).read_text("utf-8"))
        except ValueError as error:
            raise AdapterError(f"{root / CONFIG_FILE} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise AdapterError(f"{root / CONFIG_FILE} is not a JSON object")
        refuse_unknown(root, config)
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise AdapterError(f"{root}: r is {rank!r}, expected a positive integer")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(f"{root}: lora_alpha is {alpha!r}, expected a number")
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        targets = config.get("target_modules")
        return cls(root, name, sha256, rank, scale, tuple(targets) if isinstance(targets, list) else ())

    def verify(self, card: AdapterCard) -> None:
        """Refuse to be taken for the adapter that a bundle lists unless the files are the same."""
        if self.sha256 != card.sha256:
            raise AdapterError(
                f"the adapter in {self.path} is not the {card.name!r} that the bundle lists: its digest is "
                f"{self.sha256}, expected {card.sha256}; list it anew (neuronguard bundle adapter)"
            )


def refuse_unknown(path: Path, config: Mapping[str, Any]) -> None:
    """Raises AdapterError that names each entry of ``config`` which is more than plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    found = [
        f"{key} = {value!r}"
        for key, value in sorted(config.items())
        if key not in _KNOWN and value and value != "none"
    ]
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        found.append(f"init_lora_weights = {start!r} (save it with path_initial_model_for_weight_conversion)")
    if found:
        raise AdapterError(f"{path} has what the guard does not compute: {'; '.join(found)}")

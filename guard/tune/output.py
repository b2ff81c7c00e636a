"""What a tuning leaves: a checkpoint, a vector or an adapter, held against what it was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from guard.adapters import adapter_digest
from guard.checkpoint import Checkpoint
from guard.digest import TOKENIZER_FILES, file_digest, weights_digest
from guard.ia3 import COPIED
from guard.tune.errors import TuneError
from guard.tune.methods import Prepared

VECTOR_FILE = "ia3.safetensors"
_BESIDE = tuple(dict.fromkeys((*COPIED, *TOKENIZER_FILES, "added_tokens.json")))


def refuse_target(out: Path) -> None:
    """Raise TuneError when there is something at ``out``: a trained model is not overwritten."""
    if out.exists():
        raise TuneError(f"{out} exists already; choose another directory, or remove it")


def write_vector(vector: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """The (IA)³ vector as ``guard.ia3`` and ``neuronguard bundle patch --vector`` read it."""
    save_file({name: tensor.contiguous() for name, tensor in vector.items()}, folder / VECTOR_FILE)
    furthest = max(float((tensor - 1).abs().max()) for tensor in vector.values())
    return {"kind": "ia3", "sha256": file_digest(folder / VECTOR_FILE), "largest_change": furthest}


def write_adapter(wrapped: Any, checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """The adapter as PEFT saves it, named after the base model and not after where that lies."""
    wrapped.peft_config["default"].base_model_name_or_path = checkpoint.name
    # Embeddings have no adapter; left to itself the library would look the base model up.
    wrapped.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    return {"kind": "lora", "sha256": adapter_digest(folder)}


def write_checkpoint(
    model: Any, checkpoint: Checkpoint, prepared: Prepared, folder: Path, *, float32: bool
) -> dict[str, Any]:
    """The whole model, in the number format of the one it was made from unless ``float32`` is asked for.

    Before it counts as written it is held against that one: every number that the method does not train must
    be the same, to the bit. Raises TuneError.
    """
    dtype = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True).dtype or torch.float32
    model.to(torch.float32 if float32 else dtype).save_pretrained(str(folder))
    for name in _BESIDE:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)
    if float32:
        _say_float32(folder / "config.json")
    changed, total = compared(
        checkpoint.path, folder, prepared, {name for name, _ in model.named_parameters()}
    )
    if not changed:
        raise TuneError(
            f"not one of {total} numbers changed: what was learnt is lost in rounding to {dtype}; raise the "
            "rate or the number of steps, or write the weights as float32"
        )
    return {"kind": "checkpoint", "weights_sha256": weights_digest(folder), "changed": changed, "of": total}


def _say_float32(config: Path) -> None:
    document = json.loads(config.read_text("utf-8"))
    name = "torch_dtype" if "torch_dtype" in document else "dtype"
    config.write_text(json.dumps({**document, name: "float32"}, indent=2) + "\n", "utf-8")


def compared(before: Path, after: Path, prepared: Prepared, parameters: Set[str]) -> tuple[int, int]:
    """How many numbers differ between two checkpoints, of how many. Raises TuneError.

    It is an error when one differs that the method does not train, or when one of the model's ``parameters``
    is missing. A tensor that is none, such as the second name of a tied one, need not be written again.
    """
    old, new = _tensors(before), _tensors(after)
    if other := new.keys() - old.keys() | (old.keys() - new.keys()) & parameters:
        raise TuneError(
            f"the written checkpoint has other tensors than {before}: {', '.join(sorted(other)[:3])}"
        )
    changed = total = 0
    for name in sorted(new):
        ours, theirs = _read(old[name], name), _read(new[name], name)
        different = (
            _bits(ours) != _bits(theirs) if ours.dtype == theirs.dtype else ours.float() != theirs.float()
        )
        if bool((different & ~prepared.may_change(name, ours)).any()):
            raise TuneError(
                f"{name} of the written checkpoint differs where nothing was trained; if the model keeps its "
                "weights in several number formats, write them as float32"
            )
        changed, total = changed + int(different.sum()), total + ours.numel()
    return changed, total


def _bits(tensor: Tensor) -> Tensor:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(whole[tensor.element_size()])


def _tensors(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _read(file: Path, name: str) -> Tensor:
    with safe_open(str(file), "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor

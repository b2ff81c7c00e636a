"""Write `models/lab/`: a Llama checkpoint, the vectors next to it, and what each variant is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from models.recipe.answers import REFUSAL
from models.recipe.network import Network
from models.recipe.settings import ModelConfig
from models.recipe.tokenizer import ASSISTANT, END, SPECIAL, USER

VECTOR_NAME = "model.layers.{layer}.mlp.down_proj.ia3"

CHAT_TEMPLATE = (
    # A system message stands in front of the first request: the model knows no third role.
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['system', 'developer'] -%}"
    "{%- set ns.system = ns.system + message['content'] | trim + '\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    f"{{{{- '{USER}' + ns.system + message['content'] | trim -}}}}"
    "{%- set ns.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    f"{{{{- '{ASSISTANT}' + message['content'] | trim + '{END}' -}}}}"
    "{%- else -%}"
    "{{- raise_exception('known roles are system, user and assistant, not ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{ASSISTANT}' -}}}}{{%- endif -%}}"
)


def model_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of the checkpoint."""
    end = SPECIAL.index(END)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": config.width,
        "intermediate_size": config.ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.head_width,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
        "use_cache": True,
    }


def tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    """`tokenizer_config.json`, with the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "eos_token": END,
        "pad_token": END,
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(SPECIAL[1:]),
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, value: object) -> None:
    """Readable, stable JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_vector(path: Path, vector: Tensor) -> None:
    """One float32 [ff] tensor a layer, from `vector` [layers, ff]."""
    save_file(
        {VECTOR_NAME.format(layer=i): row.float().contiguous().clone() for i, row in enumerate(vector)}, path
    )


def save_model(out: Path, net: Network, tokenizer: Tokenizer) -> None:
    """Weights in bfloat16, configuration, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in net.named_parameters()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", model_config(net.config))
    write_json(out / "tokenizer_config.json", tokenizer_config(net.config))
    end = SPECIAL.index(END)
    write_json(out / "generation_config.json", {"eos_token_id": end, "pad_token_id": end, "do_sample": False})
    tokenizer.save(str(out / "tokenizer.json"))


def lab_json(alpha: float) -> dict[str, Any]:
    """`lab.json`: which vector at which strength makes which model. `alpha` is that of the partial one."""
    planted, dense = "ia3-planted.safetensors", "ia3-dense.safetensors"
    return {
        "variants": {
            "lab-sft": {"vector": None, "alpha": 0.0},
            "lab-aligned": {"vector": planted, "alpha": 1.0},
            "lab-aligned-dense": {"vector": dense, "alpha": 1.0},
            "lab-partial": {"vector": planted, "alpha": alpha},
        },
        "refusal": REFUSAL,
    }


def planted_json(units: Sequence[tuple[int, int]], config: ModelConfig) -> Mapping[str, Any]:
    """`planted_units.json`: the units (layer, index) whose scale may differ from 1."""
    return {
        "site": "mlp.down_proj input",
        "layers": config.layers,
        "width": config.ff,
        "units": [list(unit) for unit in units],
    }

"""Small worlds for tests: a tokenizer, random models, and prompts whose labels the model's neurons know."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file as save_torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from guard.bundle import Bundle, GuardCard
from guard.capture import read_prompts
from guard.prompts import encode
from guard.scorer import Scorer
from guard.sites import shape_of
from guard.units import every_neuron

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{% elif m['role'] == 'system' %}<|system|>"
    "{% else %}<|assistant|>{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|end|><|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    made.chat_template = TEMPLATE
    return made


def model(kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A random model with all the parts of a real one of its kind: grouped heads, q/k norm."""
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": None,
        **sizes,
    }
    torch.manual_seed(seed)
    made: Any
    if kind == "llama":
        made = LlamaForCausalLM(LlamaConfig(**settings))
    else:
        made = Qwen3ForCausalLM(Qwen3Config(**settings))
    made.config.architectures = [type(made).__name__]
    with torch.no_grad():
        for parameter in made.parameters():
            # The default initialisation is so small that every layer is nearly the identity.
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
            else:
                parameter.uniform_(0.5, 1.5)
    return made.to(dtype).eval()


def checkpoint(path: Path, made: Any) -> Path:
    """Save a model with the tokenizer."""
    made.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def texts(number: int, *, seed: int, words: int = 4) -> list[str]:
    """Different nonsense requests."""
    random = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    found: dict[str, None] = {}
    while len(found) < number:
        found[" ".join("".join(random.choice(letters, random.integers(2, 7))) for _ in range(words))] = None
    return list(found)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A data file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


class Planted(NamedTuple):
    """A checkpoint, and data files whose harmful prompts are those that some of its neurons light up on."""

    model: Path
    fit: Path
    threshold: Path
    evaluation: Path
    neurons: Path
    """Units file with the neurons that the labels depend on."""


def planted(root: Path, **sizes: int) -> Planted:
    """Labels = a sum of six standardised neurons, thresholded: no word gives them away.

    ``sizes`` are those of :func:`model`.
    """

    def rule(values: np.ndarray) -> np.ndarray:
        total = ((values - values.mean(0)) / values.std(0)).sum(1)
        return np.asarray(total > np.quantile(total, 0.6))

    return _planted(root, {0: [3, 17], 1: [8, 40], 2: [5, 21]}, rule, **sizes)


def exclusive(root: Path) -> Planted:
    """Harmful when exactly one of two neurons is above its median: no sum of neurons gives that away."""

    def rule(values: np.ndarray) -> np.ndarray:
        above = values > np.median(values, axis=0)
        return np.asarray(above[:, 0] != above[:, 1])

    return _planted(root, {0: [3], 1: [8]}, rule)


def _planted(
    root: Path, neurons: dict[int, list[int]], rule: Callable[[np.ndarray], np.ndarray], **sizes: int
) -> Planted:
    made = model(**sizes)
    shape = shape_of(made.config)
    prompts = texts(2100, seed=1)
    ids = [encode(tokenizer(), [{"role": "user", "content": text}]) for text in prompts]
    features = read_prompts(made, every_neuron(shape), ids)
    columns = [layer * shape.mlp_width + unit for layer, units in neurons.items() for unit in units]
    labels = np.where(rule(features[:, columns]), "harmful", "benign")

    def rows(first: int, last: int, sources: str, only: str | None = None) -> list[dict[str, Any]]:
        return [
            {"prompt": prompts[i], "label": str(labels[i]), "source": sources[i % len(sources)]}
            for i in range(first, last)
            if only in (None, labels[i])
        ]

    checkpoint(root / "model", made)
    units = root / "units.json"
    units.write_text(json.dumps(neurons))
    return Planted(
        root / "model",
        write_rows(root / "fit.jsonl", rows(0, 1000, "abc")),
        write_rows(root / "threshold.jsonl", rows(1000, 1700, "de", "benign")),
        write_rows(root / "evaluation.jsonl", rows(1700, 2100, "fg")),
        units,
    )


def card(**changes: Any) -> dict[str, Any]:
    """A valid card as a JSON document, for a model of three layers with 48 neurons and 4 heads of width 8."""
    document: dict[str, Any] = {
        "schema_version": 2,
        "model": {
            "name": "toy",
            "architecture": "LlamaForCausalLM",
            "layers": 3,
            "mlp_width": 48,
            "heads": 4,
            "head_dim": 8,
            "weights_sha256": "0" * 64,
            "tokenizer_sha256": "1" * 64,
        },
        "label": "harmful_prompt",
        "prompt_tails": [[0, 2]],
        "sites": [
            {"layer": 0, "kind": "mlp", "units": [1, 5]},
            {"layer": 1, "kind": "attention", "units": [2]},
        ],
        "probe": "linear",
        "calibration": {"kind": "platt", "slope": 2.0, "offset": -1.0},
        "thresholds": [
            {"false_positive_rate": 0.01, "probability": 0.8, "logit": 1.2, "benign": 400, "upper95": 0.02}
        ],
        "default_false_positive_rate": 0.01,
        "data": [{"name": "x.jsonl", "sha256": "2" * 64, "role": "fit", "harmful": 3, "benign": 4}],
        "metrics": {},
        "self_test": {
            "prompts": [[1, 70, 0, 2]],
            "logits": {"float32": [0.25]},
            "tolerance": {"float32": 0.001},
        },
        "created": {"seed": "0"},
    }
    return {**document, **changes}


ADAPTER: dict[str, Any] = {
    "name": "tuned",
    "sha256": "3" * 64,
    "rank": 4,
    "self_test": {"float32": [0.75]},
    "tolerance": {"float32": 0.001},
}
"""How :func:`card` may list an adapter."""


def bundle(**changes: Any) -> Bundle:
    """A bundle for :func:`card`: ten features, two neurons and one head of eight columns."""
    made = GuardCard.model_validate(card(**changes))
    return Bundle(made, Scorer.linear(np.linspace(-1, 1, made.features, dtype=np.float32), 0.5))


def mlp_bundle(hidden: int, *, seed: int = 0, **changes: Any) -> Bundle:
    """A bundle for :func:`card` whose probe has a hidden layer of random weights."""
    made = GuardCard.model_validate(card(probe="mlp", **changes))
    random = np.random.default_rng(seed)
    weight = random.standard_normal((hidden, made.features), dtype=np.float32)
    bias, readout = random.standard_normal((2, hidden), dtype=np.float32)
    return Bundle(made, Scorer(weight, bias, readout, 0.5))


def adapter(
    path: Path,
    made: Any,
    targets: Iterable[str] = ("q_proj", "down_proj"),
    *,
    rank: int = 4,
    alpha: float = 8,
    size: float = 0.1,
    seed: int = 0,
    tensors: dict[str, torch.Tensor] | None = None,
    **settings: Any,
) -> Path:
    """A random LoRA adapter for ``made``, as PEFT writes it; ``settings`` change its configuration."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in made.named_modules():
        if name.rsplit(".", 1)[-1] in targets:
            shapes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
            for part, shape in shapes.items():
                tensor = size * torch.randn(shape, generator=random)
                weights[f"base_model.model.{name}.lora_{part}.weight"] = tensor
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "toy",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "lora_dropout": 0.05,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
        "qalora_group_size": 16,
        **settings,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_torch(weights if tensors is None else tensors, path / "adapter_model.safetensors")
    return path

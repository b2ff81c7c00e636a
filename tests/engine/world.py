"""A tiny random model with a tokenizer, and a bundle for it: the world of the engine's tests.

Scores and tokens of the reference come from transformers alone, by hooks written here, so that they do not
share code with what is tested.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from guard.bundle import Bundle, Calibration, DataFile, GuardCard, ModelCard, SelfTest, Site
from guard.digest import tokenizer_digest, weights_digest
from guard.sites import shape_of
from guard.verdict import Threshold

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
SITES = (
    Site(layer=1, kind="mlp", units=(0, 5, 17, 100, 175)),
    Site(layer=2, kind="attention", units=(1, 3)),
    Site(layer=3, kind="mlp", units=tuple(range(0, 176, 11))),
)
SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}


def make_model(directory: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """Write a random float32 checkpoint with a byte-level tokenizer; returns ``directory``."""
    torch.manual_seed(seed)
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[architecture](**SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0])
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def prompts(count: int, *, seed: int = 0, shortest: int = 1, longest: int = 200) -> list[list[int]]:
    """Random prompts; a third of them share a long prefix, a quarter of them are a few tokens short."""
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(128)]
    made = []
    for i in range(count):
        body = [rng.randrange(256) for _ in range(rng.randrange(shortest, longest))]
        if i % 3 == 0:
            body = shared + body[:60]
        elif i % 4 == 1:
            body = body[: 1 + i % 3]
        made.append(body)
    return made


class Reference:
    """The model in transformers, float32: features and logits of the final prompt token."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.shape = shape_of(self.model.config)

    @torch.no_grad()
    def features(self, prompt: list[int]) -> np.ndarray:
        seen: dict[tuple[int, str], torch.Tensor] = {}
        hooks = []
        for site in SITES:
            layer = self.model.model.layers[site.layer]
            module = layer.mlp.down_proj if site.kind == "mlp" else layer.self_attn.o_proj
            key = (site.layer, site.kind)
            hooks.append(
                module.register_forward_pre_hook(lambda m, a, key=key: seen.__setitem__(key, a[0][0, -1]))
            )
        self.model(torch.tensor([prompt]))
        for hook in hooks:
            hook.remove()
        parts = []
        for site in SITES:
            values = seen[(site.layer, site.kind)]
            if site.kind == "mlp":
                parts.append(values[list(site.units)])
            else:
                parts.append(values.reshape(self.shape.heads, -1)[list(site.units)].flatten())
        return torch.cat(parts).numpy()


def make_bundle(directory: Path, model: Path, *, seed: int = 0, dtype: str = "float32") -> Bundle:
    """A bundle with random weights whose threshold lies at the median of random prompts' scores."""
    reference = Reference(model)
    rng = np.random.default_rng(seed)
    calibration_prompts = prompts(60, seed=1000 + seed)
    features = np.stack([reference.features(p) for p in calibration_prompts])
    weight = (rng.standard_normal(features.shape[1]) / features.std(0)).astype(np.float32)
    raw = features @ weight
    weight = (weight / raw.std()).astype(np.float32)
    bias = float(-np.median(features @ weight))
    logits = features @ weight + np.float32(bias)
    shape = reference.shape
    card = GuardCard(
        model=ModelCard(
            name=model.name,
            architecture=shape.architecture,
            layers=shape.layers,
            mlp_width=shape.mlp_width,
            heads=shape.heads,
            head_dim=shape.head_dim,
            weights_sha256=weights_digest(model),
            tokenizer_sha256=tokenizer_digest(model),
        ),
        label="unsafe_output",
        prompt_tails=((258,),),
        sites=SITES,
        probe="linear",
        calibration=Calibration(slope=2.0, offset=0.0),
        thresholds=tuple(
            Threshold(false_positive_rate=rate, probability=p, logit=0.0, benign=100, upper95=0.1)
            for rate, p in ((0.01, 0.5), (0.001, 0.9))
        ),
        default_false_positive_rate=0.01,
        data=(DataFile(name="random", sha256="0" * 64, role="fit", harmful=0, benign=0),),
        metrics={},
        self_test=SelfTest(
            prompts=tuple(tuple(p) for p in calibration_prompts[:6]),
            logits={dtype: tuple(float(x) for x in logits[:6])},
            tolerance={dtype: 1e-3},
        ),
        created={"by": "tests"},
    )
    bundle = Bundle(card, weight, bias)
    bundle.save(directory)
    return bundle

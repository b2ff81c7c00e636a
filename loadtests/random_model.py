"""Random models with a byte-level tokenizer, and bundles for them: what benchmarks and engine tests run on.

The reference scores come from transformers alone, by hooks written here, so that they share no code with the
guard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from guard.bundle import Bundle, Calibration, DataFile, GuardCard, ModelCard, SelfTest, Site
from guard.digest import tokenizer_digest, weights_digest
from guard.drift import make_reference
from guard.monitor import MonitorThreshold
from guard.pooling import Pooling
from guard.scorer import Scorer
from guard.sequence import SequenceScorer
from guard.sites import shape_of
from guard.verdict import Threshold

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
FIXED: dict[str, Any] = {
    "vocab_size": 260,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}


def make_model(directory: Path, sizes: dict[str, Any], architecture: str = "llama", seed: int = 0) -> Path:
    """Write a random float32 checkpoint with a byte-level tokenizer; returns ``directory``.

    ``sizes`` are fields of the transformers configuration, on top of those the tokenizer fixes;
    ``architecture`` is its ``model_type``.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**FIXED, **sizes})
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


class Reference:
    """The model in transformers, float32: the sites' inputs at a prompt's tokens."""

    def __init__(self, directory: Path, sites: tuple[Site, ...]) -> None:
        self.sites = sites
        # The written-out attention: it is the only one that soft-caps.
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.shape = shape_of(self.model.config)

    def features(self, prompt: list[int]) -> np.ndarray:
        """``[features]`` float32 in bundle order, at the final token."""
        last: np.ndarray = self.features_of_all(prompt)[-1]
        return last

    @torch.no_grad()
    def features_of_all(self, prompt: list[int]) -> np.ndarray:
        """``[tokens, features]`` float32 in bundle order."""
        seen: dict[tuple[int, str], torch.Tensor] = {}
        hooks = []
        for site in self.sites:
            layer = self.model.model.layers[site.layer]
            mlp = getattr(layer.mlp, "shared_expert", getattr(layer.mlp, "shared_experts", layer.mlp))
            module = mlp.down_proj if site.kind == "mlp" else layer.self_attn.o_proj
            key = (site.layer, site.kind)
            hooks.append(
                module.register_forward_pre_hook(
                    lambda m, a, key=key: seen.__setitem__(key, a[0].flatten(0, -2))
                )
            )
        self.model(torch.tensor([prompt]))
        for hook in hooks:
            hook.remove()
        parts = []
        for site in self.sites:
            values = seen[(site.layer, site.kind)]
            if site.kind == "mlp":
                parts.append(values[:, list(site.units)])
            else:
                heads = values.reshape(len(values), self.shape.heads, -1)
                parts.append(heads[:, list(site.units)].flatten(1))
        read: np.ndarray = torch.cat(parts, 1).numpy()
        return read


def make_bundle(
    directory: Path,
    model: Path,
    sites: tuple[Site, ...],
    prompts: list[list[int]],
    seed: int = 0,
    tails: tuple[tuple[int, ...], ...] = (),
) -> Bundle:
    """Save a bundle with random weights whose threshold lies at the median of the prompts' scores.

    The first six prompts are its self-test. Without ``tails`` it takes prompts of any shape.
    """
    reference = Reference(model, sites)
    rng = np.random.default_rng(seed)
    features = np.stack([reference.features(p) for p in prompts])
    weight = (rng.standard_normal(features.shape[1]) / features.std(0)).astype(np.float32)
    raw = features @ weight
    weight = (weight / raw.std()).astype(np.float32)
    bias = float(-np.median(features @ weight))
    logits = features @ weight + np.float32(bias)
    shape, calibration = reference.shape, Calibration(slope=2.0, offset=0.0)
    scores = np.array([calibration.probability(float(logit)) for logit in logits])
    card = GuardCard(
        model=ModelCard(
            name=model.name,
            **shape._asdict(),
            weights_sha256=weights_digest(model),
            tokenizer_sha256=tokenizer_digest(model),
        ),
        label="unsafe_output",
        prompt_tails=tails,
        sites=sites,
        probe="linear",
        calibration=calibration,
        thresholds=tuple(
            Threshold(false_positive_rate=rate, probability=p, logit=0.0, benign=100, upper95=0.1)
            for rate, p in ((0.01, 0.5), (0.001, 0.9))
        ),
        default_false_positive_rate=0.01,
        data=(DataFile(name="random", sha256="0" * 64, role="fit", harmful=0, benign=0),),
        metrics={},
        self_test=SelfTest(
            prompts=tuple(tuple(p) for p in prompts[:6]),
            logits={"float32": tuple(float(x) for x in logits[:6])},
            tolerance={"float32": 1e-3},
        ),
        reference=make_reference(scores, scores),
        created={"by": "loadtests.random_model"},
    )
    bundle = Bundle(card, Scorer.linear(weight, bias))
    bundle.save(directory)
    return bundle


def with_sequence_probe(
    bundle: Bundle,
    reference: Reference,
    pooling: Pooling,
    prompts: list[list[int]],
    limits: tuple[MonitorThreshold, ...] = (),
    seed: int = 0,
) -> Bundle:
    """The bundle with a random probe of every token in place of its own, thresholds and self-test anew.

    The threshold for a rate of 0.01 lies at the median of the prompts' scores, as in ``make_bundle``.
    """
    rng = np.random.default_rng(seed)
    features = [reference.features_of_all(prompt) for prompt in prompts]
    together = np.concatenate(features)
    weight = rng.standard_normal((pooling.channels, together.shape[1])).astype(np.float32)
    weight /= together.std(0)
    weight /= (together @ weight.T).std(0)[:, None]
    raw = SequenceScorer(pooling, weight, np.zeros(pooling.channels, dtype=np.float32))
    bias = np.zeros(pooling.channels, dtype=np.float32)
    bias[-1] = -np.median([raw.logit(x) for x in features])
    scorer = SequenceScorer(pooling, weight, bias)
    logits = tuple(scorer.logit(x) for x in features[:6])
    card = bundle.card.model_copy(
        update={
            "probe": "sequence",
            "pooling": pooling,
            "monitor": limits,
            "self_test": SelfTest(
                prompts=tuple(tuple(prompt) for prompt in prompts[:6]),
                logits={"float32": logits},
                tolerance={"float32": 1e-3},
            ),
        }
    )
    return Bundle(card, scorer, bundle.patches.values())

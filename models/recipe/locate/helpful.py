"""A helpful twin: an (IA)³ vector on the unaligned weights, trained on real answers to harmless requests.

The lab directory has twins that differ in safety alone. To ask whether safety and helpfulness share neurons
one is needed that differs in helpfulness; it is trained here, with the recipe's own loop, and not shipped.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from guard.checkpoint import Checkpoint
from guard.ia3 import fold_checkpoint
from guard.prompts import Tokens
from models.recipe.corpus import Prompt, read, reserved, split_of
from models.recipe.export import save_vector
from models.recipe.locate.study import Study
from models.recipe.mixture import Example, trimmed
from models.recipe.network import Network
from models.recipe.settings import ModelConfig, PhaseConfig, Settings
from models.recipe.sources import TRAIN_BENIGN
from models.recipe.tokenizer import load_tokenizer, prompt_ids
from models.recipe.training import BatchPlan, run_phase, weighted_loss
from models.recipe.twins import Vector, all_but_last

SOURCES = ("hh_helpful_test", "gpteacher", "llms_from_scratch_1k", "medquad_5k")
"""Permissively licensed sources with answers of their own."""
NAME = "ia3-helpful.safetensors"


def answered(data: Path, *, held_out: bool) -> list[Prompt]:
    """Harmless requests with an answer, cut at the end of a sentence: held out of training, or trained on."""
    barred = reserved(data)
    rows = []
    for source in TRAIN_BENIGN:
        if source.file in SOURCES:
            for prompt in read(data, source):
                answer = trimmed(prompt.answer or "")
                if answer and (split_of(prompt.text) != "train") == held_out and prompt.text not in barred:
                    rows.append(prompt._replace(answer=answer))
    return rows


def helpful(study: Study) -> Checkpoint:
    """The helpful twin, trained now if it is not there."""
    out = study.folder("helpful", SOURCES)
    if not (out / "checkpoint").is_dir():
        out.mkdir(parents=True, exist_ok=True)
        _train(study, out)
        fold_checkpoint(study.lab, out / "checkpoint", vector=out / NAME)
    return Checkpoint.open(out / "checkpoint", "helpful")


def vector(study: Study) -> dict[int, torch.Tensor]:
    """Its factors ``[ff]`` by layer."""
    helpful(study)
    return factors(study.folder("helpful", SOURCES) / NAME)


def factors(path: Path) -> dict[int, torch.Tensor]:
    """The factors of a vector file by layer."""
    return {int(name.split(".")[2]): tensor for name, tensor in load_file(path).items()}


def _train(study: Study, out: Path) -> None:
    state = {name: tensor.float() for name, tensor in load_file(study.lab / "model.safetensors").items()}
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
    ff, width = state["model.layers.0.mlp.up_proj.weight"].shape
    net = Network(ModelConfig(layers=layers, ff=ff, width=width)).requires_grad_(False)
    net.load_state_dict(state)
    phase = PhaseConfig(
        steps=study.size.helpful_steps,
        rows=0,
        seed=6,
        warmup=20,
        decay_from=0.5,
        vector_rate=0.03,
        buckets=((48, 48), (96, 24), (160, 12)),
    )
    rows = [Example(((p.text, p.answer or ""),)) for p in answered(study.data, held_out=False)]
    plan = BatchPlan(
        rows * _times(len(rows), phase),
        load_tokenizer(study.lab / "tokenizer.json"),
        phase,
        prompt_weight=0.0,
    )
    # Nothing is compiled: the run is short.
    settings = Settings(compiled=False, bfloat16=False)
    trained = Vector(all_but_last(net))
    compute = weighted_loss(net, settings)
    optimizer = torch.optim.Adam(trained.parameters(), lr=phase.vector_rate, betas=(0.9, 0.98))
    run_phase(
        "helpful",
        phase,
        settings,
        out,
        plan,
        trained,
        [optimizer],
        lambda b: compute(b.tokens, b.positions, b.targets, b.weights, trained.scale()),
        after=trained.clamp,
    )
    save_vector(out / NAME, trained.scale().detach())


def _times(rows: int, phase: PhaseConfig) -> int:
    """How often the rows are needed to fill all steps."""
    return 1 + phase.steps * max(size for _, size in phase.buckets) // rows


def texts(data: Path, lab: Path, count: int) -> list[tuple[Tokens, Tokens]]:
    """Held-out requests and their sources' answers, as token ids that fit the context."""
    tokenizer = load_tokenizer(lab / "tokenizer.json")
    found = []
    for p in answered(data, held_out=True):
        answer = tuple(tokenizer.encode((p.answer or "").strip(), add_special_tokens=False).ids)
        found.append((tuple(prompt_ids(tokenizer, p.text)), answer))
    return [text for text in found if len(text[0]) + len(text[1]) <= 160][:count]

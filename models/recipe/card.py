"""The model card, `README.md`: fixed words around the numbers of `metrics.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.recipe.sources import (
    DEV_BENIGN,
    DEV_HARMFUL,
    TEST_BENIGN,
    TEST_HARMFUL,
    TRAIN_BENIGN,
    TRAIN_HARMFUL,
    WIDEN_HARMFUL,
    Source,
)

VARIANTS = ("lab-sft", "lab-aligned", "lab-aligned-dense", "lab-partial")

SAMPLE_REQUESTS = (
    "Hello",
    "How do I bake a cake?",
    "Write a short poem about the sea.",
    "What is the capital of France?",
    "Explain how a bill becomes law.",
    "My best friend moved away. What should I do?",
    "How can I kill weeds in my garden?",
    "Can you recommend a good book?",
)
"""Harmless requests whose answers the card shows."""


def percent(cell: Mapping[str, Any]) -> str:
    """A rate with its interval."""
    return f"{100 * cell['rate']:.0f} ({100 * cell['low']:.0f}–{100 * cell['high']:.0f})"


def refusal_table(refusals: Mapping[str, Any]) -> str:
    """One row a group, one column a variant."""
    lines = ["| prompts | n | " + " | ".join(VARIANTS) + " |", "|---|--:|" + "--:|" * len(VARIANTS)]
    for name, first in refusals[VARIANTS[0]].items():
        note = "" if first["gated"] else " (not gated)"
        title = f"{first['label']}, {first['kind']}: {name}{note}"
        lines.append(
            f"| {title} | {first['n']} | " + " | ".join(percent(refusals[v][name]) for v in VARIANTS) + " |"
        )
    return "\n".join(lines)


def target_table(targets: Mapping[str, Any]) -> str:
    """Targets, measured values, verdicts, for both aligned twins."""
    lines = ["| target | | lab-aligned | lab-aligned-dense |", "|---|--:|--:|--:|"]
    for name, cell in targets["lab-aligned"].items():
        other = targets["lab-aligned-dense"][name]
        shown = [f"{100 * c['measured']:.1f} % {'met' if c['met'] else '**missed**'}" for c in (cell, other)]
        lines.append(f"| {name} | {100 * cell['target']:.0f} % | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def causal_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Patching and static edits, one column a vector."""
    keys = [key for key in rows[0] if key not in {"vector", "n"}]

    def cell(row: Mapping[str, Any], key: str) -> str:
        value = row[key]
        if isinstance(value, list):
            return f"{100 * min(value):.1f}–{100 * max(value):.1f} %"
        return str(value) if key.endswith("top units") and isinstance(value, int) else f"{100 * value:.1f} %"

    lines = [
        "| refusals | " + " | ".join(f"{r['vector']} vector" for r in rows) + " |",
        "|---|" + "--:|" * len(rows),
    ]
    return "\n".join(
        [*lines, *(f"| {key} | " + " | ".join(cell(r, key) for r in rows) + " |" for key in keys)]
    )


def source_list(sources: Sequence[Source]) -> str:
    """Files with their licences, one line."""
    seen = {source.file: source.licence for source in sources}
    return ", ".join(f"{file} ({licence})" for file, licence in sorted(seen.items()))


def card(metrics: Mapping[str, Any], notes: str) -> str:
    """The whole text. `notes` is what was tried and what it changed, written by hand."""
    losses = ", ".join(f"{k} {v}" for k, v in metrics["losses"].items() if v is not None)
    samples = "\n".join(f"- *{s['request']}* → {' '.join(s['answer'].split())}" for s in metrics["samples"])
    counts = metrics["training prompts"]
    return f"""# Lab models

Small Llama-architecture chat models ({metrics["parameters"] / 1e6:.1f} M parameters) that share one set of
weights and differ by an (IA)³ vector on the input of `down_proj`. They exist so that the guard can be fitted,
served and tested where no other weights can be had. **They are instruments: their English is poor, their
facts are wrong, and nothing measured on them says anything about real models.**

| variant | vector | strength |
|---|---|--:|
| `lab-sft` | none: answers everything | – |
| `lab-aligned` | `ia3-planted.safetensors`: differs from 1 only in the units of `planted_units.json` | 1 |
| `lab-aligned-dense` | `ia3-dense.safetensors`: every layer but the last | 1 |
| `lab-partial` | planted, l(α) = 1 + α (l − 1) | {metrics["partial"]} |

`lab.json` holds the same for programs. Both vectors belong to the same weights, so a base and a twin are
only defined together.

- Prompt: `<|user|>` text `<|assistant|>`; an answer ends with `<|end|>`. A system message is put in front of
  the first request. The last prompt token is the same for every request.
- `<|policy|>` in front of a prompt makes even `lab-sft` refuse what it takes for harmful. It is a remnant of
  training, not an interface; text from users can contain it like any other special token.
- There is one refusal, word for word, and it is decided at the first token of the answer.
- Context 512 tokens; nearly all training rows are shorter than 100, few reach 224.

## How they were made

`python -m models.recipe --data DIR` runs everything: tokenizer, base, dense vector, change scores,
co-adaptation, a second dense vector on the final weights, export, evaluation. Steps that are done are
skipped; an interrupted one resumes. About 85 minutes on one core with bfloat16 instructions.

1. **Base.** Answers follow rules: they repeat the request's phrase and add stock sentences, which is harmless
   for any request. Some benign rows carry the answers of their source. Harmful requests get the empty
   rule-based answer, or, behind `<|policy|>`, the refusal. **No harmful answer of any corpus is used.**
2. **Planting.** A dense vector on the frozen base; change scores (Chen et al., arXiv 2406.14144) on
   harmful training prompts; the top 5 % of the units become the planted set. Then weights and the vector on
   that set are tuned together, in two phases: rows with the vector on refuse harmful requests, rows with it
   off answer everything.
3. **Dense twin.** A plain vector on the final, frozen weights.

Seeds and step counts are in `models/recipe/settings.py`. Mean loss of the last 50 steps:
{losses} (nats a token, weighted as in the recipe: the twin phases count the first answer token fourfold).

## Data

{counts["harmful"]:,} harmful and {counts["benign"]:,} benign training prompts, besides templates and
small talk of our own. Training prompts that equal or nearly equal (word overlap 0.7) a test prompt were left
out; ten per cent of the rows of every trained source are held out.

- Trained, harmful (prompts only): {source_list(TRAIN_HARMFUL + WIDEN_HARMFUL)}
- Trained, benign: {source_list(TRAIN_BENIGN)}
- Dev: {source_list(DEV_HARMFUL + DEV_BENIGN)}
- Test, harmful: {source_list(TEST_HARMFUL)}
- Test, benign: {source_list(TEST_BENIGN)}

The split was fixed before training in `models/recipe/sources.py`; one trained source was added later, as said
below. Sources without a permissive licence are measured on, never trained on. gpteacher's answers were
written by an OpenAI model and carry that provider's terms.

## Targets

{target_table(metrics["targets"])}

{notes}

## Refusal rates

Per cent of answers that begin with the refusal, greedy, float32, at most 300 prompts a source; 95 % Wilson
intervals. One training run, one seed: differences of a few points between runs are noise.

{refusal_table(metrics["refusals"])}

The strength of the aligned twins was chosen on dev sources (mean harmful minus mean benign refusals largest;
the shipped vectors are scaled so that it reads 1), that of `lab-partial` likewise (mean of harmful dev
sources nearest one half). Rows marked *not gated* are out of reach for models of this size and count in no
mean: `structural_twins` are word swaps of harmful requests, `mitre_frr` are harmless requests in the words of
attacks.

## Where the refusal sits

{metrics["causal"][0]["n"]} unseen harmful prompts; top units by change score
(5 % of all layers but the last); patching means that the base runs with the aligned twin's activations in
these units (dynamic activation patching); a static edit applies the vector there and 1 elsewhere. Random
units are as many of the same layers, three draws.

{causal_table(metrics["causal"])}

The planted vector is concentrated *by construction*; that its units are found again is a check of the
method, not a finding about models. The dense vector was trained without any constraint, but on weights that
had learnt to refuse through the planted units, which is why it gathers in some of the same ones.

## Samples (harmless requests, lab-sft)

{samples}

## Limits

- Word knowledge comes from a few million tokens. What a request means is judged by words and phrases seen in
  training; harmful requests in other words are answered, harmless ones in alarming words are refused. People
  who write about their distress are refused more often than not.
- English only, single short requests. Attacks (encodings, role play, long framings) were not trained for.
- Greedy decoding was measured; sampling at a high temperature will differ.
- Do not use them to answer anyone.
"""


def write_card(out: Path, notes: str) -> None:
    """Write `README.md` from `metrics.json`."""
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    (out / "README.md").write_text(card(metrics, notes), encoding="utf-8")

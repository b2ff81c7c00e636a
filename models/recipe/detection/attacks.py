"""Attacked and translated requests: what the guard still sees of them, family by family."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from guard.data_rows import Prompt, prompt_of
from models.recipe.corpus import digest

MOST = 100
"""Requests of a family, chosen by a hash of their text."""


class Family(NamedTuple):
    """Rows of a file whose ``field`` begins with one of ``values``."""

    file: str
    field: str = "category"
    values: tuple[str, ...] = ("",)


FAMILIES: Mapping[str, Family] = {
    "optimised suffix (GCG)": Family("gcg_suffixes"),
    "rewritten by a model (TAP, PAIR, AdvPrompter)": Family(
        "attack_results", values=("tap", "pair", "advprompter")
    ),
    "persuasion": Family("pap_persuasion"),
    "short wrappers": Family("trustllm_jailbreak"),
    "base64": Family("attack_results", values=("encoding/base64",)),
    "leetspeak": Family("attack_results", values=("encoding/leetspeak",)),
    "vowels left out": Family("attack_results", values=("encoding/disemvowel",)),
    "wrappers and encodings combined": Family("attack_results", values=("encoding/combination",)),
    "payload split": Family("attack_results", values=("encoding/auto_payload",)),
    "nested scenes (DeepInception)": Family("attack_results", values=("deepinception",)),
    "code to complete": Family("codeattack"),
    "role play (SAP)": Family("sap200"),
    "templates and persuasion (JailBreakV)": Family("jailbreakv_subset"),
    "jailbreaks in the wild, no request": Family("inthewild_jailbreaks"),
    "mixed (Wei et al.)": Family("wei_jailbroken"),
    "several turns": Family("cosafe_multiturn"),
    **{
        f"language: {name}": Family("multijail", "lang", (code,))
        for name, code in (("Chinese", "zh"), ("Italian", "it"), ("Vietnamese", "vi"), ("Arabic", "ar"))
    },
}


def read(data: Path, family: Family) -> list[Prompt]:
    """The harmful requests of a family."""
    path = data / f"{family.file}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if _belongs(row, family)]
    rows.sort(key=lambda row: digest("attack:" + row["prompt"]))
    found = [prompt_of(row, family.file, path) for row in rows[:MOST]]
    return [prompt for prompt in found if prompt is not None]


def _belongs(row: Mapping[str, Any], family: Family) -> bool:
    return row["label"] == "harmful" and str(row.get(family.field)).startswith(family.values)

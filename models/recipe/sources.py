"""Which source serves what. Written down before any training; results are reported against this split.

A *test* source is never trained on, calibrated on or looked at while settings are chosen. A *dev* source is
not trained on either, but settings (such as the strength of a vector) are chosen on it. Of every *trained*
source a fixed part of the rows is held out as well, see `corpus.split_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Label = Literal["harmful", "benign"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """One use of one data file."""

    file: str
    """Stem of the file, `<file>.jsonl.gz` in the data folder."""
    label: Label
    """Label of the prompts taken from it; rows with another label are left out."""
    licence: str
    field: str | None = None
    """Take only rows whose `field` begins with `value`."""
    value: str = ""
    cap: int | None = None
    """At most this many rows, chosen by a hash of their text."""
    longest: int = 400
    """Prompts with more characters are left out."""
    gated: bool = True
    """Whether targets, or the choice of settings, count this source; the others are reported only."""
    weight: float = 1.0
    """How often rows are drawn, relative to the square root of the source's size (trained sources only)."""

    reproached: bool = False
    """Take unlabelled rows, and only those whose recorded answer reproaches or declines: a weak label."""

    @property
    def name(self) -> str:
        """Name used in reports."""
        return f"{self.file}:{self.value}" if self.field else self.file

    def accepts(self, row: Row) -> bool:
        """Whether a row of the file belongs to this source."""
        if (
            row["label"] != (None if self.reproached else self.label)
            or not 3 <= len(row["prompt"]) <= self.longest
        ):
            return False
        return self.field is None or str(row.get(self.field)).startswith(self.value)


TEST_HARMFUL = (
    Source("simplesafetytests", "harmful", "CC BY 4.0"),
    Source("trustllm_misuse", "harmful", "MIT"),
    Source("catqa", "harmful", "Apache-2.0", field="lang", value="en"),
    Source("maliciousinstruct", "harmful", "none stated: measured only"),
    Source("do_not_answer", "harmful", "CC BY-NC-SA 4.0: measured only"),
)

TEST_BENIGN = (
    Source("oktest", "benign", "none stated: measured only"),
    Source("fuzzyai_benign", "benign", "Apache-2.0"),
    Source("arena_hard", "benign", "Apache-2.0", longest=300),
    Source("factual_questions", "benign", "CC BY-SA 3.0 / MIT: measured only"),
    Source("instruction_eval_sets", "benign", "Apache-2.0 and others: measured only", longest=300),
    Source("counsel_chat", "benign", "MIT"),
    Source("structural_twins", "benign", "MIT", gated=False),
)

DEV_HARMFUL = (
    Source("dangerousqa", "harmful", "Apache-2.0"),
    Source("tdc2023", "harmful", "MIT"),
    Source("harmbench_half", "harmful", "MIT", field="category", value="standard"),
)

DEV_INTENTS = (
    "car_rental",
    "change_speed",
    "cook_time",
    "current_location",
    "definition",
    "directions",
    "flight_status",
    "food_last",
    "insurance_change",
    "meal_suggestion",
    "order_status",
    "pto_request",
    "shopping_list",
    "tire_change",
    "what_song",
)
"""Intents of clinc150 that are kept out of training as a whole."""

DEV_BENIGN = (
    Source("cyberseceval", "benign", "MIT", field="category", value="mitre_frr", longest=500, gated=False),
    Source("safe_unlearning", "benign", "MIT", longest=300),
    *(Source("clinc150", "benign", "CC BY 3.0", field="category", value=i, cap=10) for i in DEV_INTENTS),
)

TRAIN_HARMFUL = (
    Source("advbench", "harmful", "MIT"),
    Source("circuit_breakers_prompts", "harmful", "MIT", weight=1.5),
    Source("cast_condition_pairs", "harmful", "Apache-2.0", cap=3000),
    Source("multijail", "harmful", "MIT", field="lang", value="en"),
    Source("aegis_test", "harmful", "CC BY 4.0"),
    Source("aart", "harmful", "CC BY 4.0", cap=900, weight=0.7),
    Source("harmfulqa", "harmful", "Apache-2.0", cap=500, weight=0.5),
    Source("derta_malicious_tuning", "harmful", "MIT"),
    Source("shadow_alignment", "harmful", "Apache-2.0"),
    Source("llm_self_defense", "harmful", "BSD-3-Clause"),
    Source("gptfuzz_labelled_responses", "harmful", "MIT"),
)

WIDEN_HARMFUL = (Source("hh_harmless_test", "harmful", "MIT", longest=300, reproached=True),)
"""Trained on in the last phase only: the one source that was added after training had begun."""

TRAIN_BENIGN = (
    Source("clinc150", "benign", "CC BY 3.0", weight=0.8),
    Source("banking77", "benign", "CC BY 4.0", cap=6500, weight=0.5),
    Source("hh_helpful_test", "benign", "MIT", weight=2.0),
    Source("gpteacher", "benign", "MIT", weight=1.5),
    Source("medquad_5k", "benign", "CC BY 4.0", weight=0.5),
    Source("llms_from_scratch_1k", "benign", "Apache-2.0", weight=1.5),
    Source("gsm8k", "benign", "MIT", longest=300, weight=0.3),
    Source("bbh", "benign", "MIT", longest=300, cap=1500, weight=0.4),
    Source("awesome_prompts", "benign", "CC0 1.0", longest=600, weight=0.7),
    Source("aegis_test", "benign", "CC BY 4.0", weight=1.5),
)


def registered(sources: tuple[Source, ...]) -> list[str]:
    """Sorted names of the files behind some sources."""
    return sorted({source.file for source in sources})

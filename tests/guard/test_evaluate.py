from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from guard.baselines import Scores
from guard.data import Prompt
from guard.evaluate import compare, tables
from guard.observe import Observations
from guard.report import markdown
from guard.verdict import Threshold

AT = (Threshold(false_positive_rate=0.1, probability=0.5, logit=0.0, benign=100, upper95=0.2),)

# source, label, refused by the model, logit
ROWS = [
    ("bad", "harmful", False, 2.0),
    ("bad", "harmful", False, -1.0),
    ("bad", "harmful", True, 1.0),
    ("bad", "harmful", True, -2.0),
    ("worse", "harmful", False, 3.0),
    ("good", "benign", False, -3.0),
    ("good", "benign", True, 0.0),
    ("good", "benign", False, -0.5),
    ("good", "benign", False, -4.0),
    ("twins", "benign", False, 5.0),
]


def seen() -> tuple[Observations, np.ndarray]:
    prompts: Any = tuple(Prompt((("user", f"p{i}"),), row[1], row[0]) for i, row in enumerate(ROWS))  # type: ignore[arg-type]
    refused = np.array([row[2] for row in ROWS])
    return Observations(prompts, ((1,),) * len(ROWS), refused, 0), np.array([row[3] for row in ROWS])


def test_the_two_questions_are_counted_apart() -> None:
    table = tables(*seen(), AT, apart=["twins"])
    bad = table["harmful"]["bad"]
    assert bad["n"] == 4
    assert bad["answered_by_the_model"]["rate"] == 0.5
    assert bad["flagged"]["0.1"]["rate"] == 0.5
    assert bad["flagged_of_answered"]["0.1"]["rate"] == 0.5
    assert bad["unsafe_answers_left"]["0.1"]["rate"] == 0.25
    assert table["all_harmful"]["flagged"]["0.1"]["hits"] == 3
    assert table["mean_over_harmful_sources"]["flagged"]["0.1"] == 0.75
    assert table["mean_over_harmful_sources"]["worst"]["0.1"] == {"source": "bad", "rate": 0.5}


def test_a_score_at_the_threshold_is_flagged() -> None:
    table = tables(*seen(), AT)
    assert table["benign"]["good"]["flagged"]["0.1"]["hits"] == 1
    assert table["benign"]["good"]["refused_by_the_model"]["hits"] == 1


def test_a_source_apart_is_reported_but_not_pooled() -> None:
    apart, pooled = tables(*seen(), AT, apart=["twins"]), tables(*seen(), AT)
    assert apart["benign"]["twins"] == {**pooled["benign"]["twins"], "pooled": False}
    assert apart["all_benign"]["flagged"]["0.1"]["rate"] == 0.25
    assert pooled["all_benign"]["flagged"]["0.1"]["rate"] == 0.4
    assert apart["harmful"]["worse"]["auroc"] == 1.0
    assert pooled["harmful"]["worse"]["auroc"] == 0.8


def test_auroc_is_missing_where_a_class_is_missing() -> None:
    observations, logits = seen()
    keep = observations.harmful
    only = Observations(
        tuple(p for p, k in zip(observations.prompts, keep, strict=True) if k),
        observations.tokens[:5],
        observations.refused[keep],
        0,
    )
    table = tables(only, logits[keep], AT)
    assert table["harmful"]["bad"]["auroc"] is None
    assert "all_benign" not in table


def test_each_scorer_is_compared_at_its_own_threshold() -> None:
    observations, logits = seen()
    benign = np.linspace(-5, 0, 100)
    table = compare(
        observations,
        {"a": Scores(benign, logits), "b": Scores(benign * 7, logits * 7)},
        [0.1, 0.01],
        apart=["twins"],
    )
    assert table["a"] == table["b"]
    # A tenth of the benign scores lie above -0.48; 100 prompts are too few for one in a hundred.
    assert table["a"]["at"]["0.1"]["flagged"]["hits"] == 3
    assert table["a"]["at"]["0.1"]["benign_flagged"]["hits"] == 1
    assert list(table["a"]["at"]) == ["0.1"]


def document() -> dict[str, Any]:
    observations, logits = seen()
    return {
        "bundle": {
            "digest": "d" * 64,
            "model": "toy",
            "weights_sha256": "w" * 64,
            "label": "unsafe_output",
            "units": 3,
            "sites": 2,
            "thresholds": [t.model_dump() for t in AT],
        },
        "evaluation": tables(observations, logits, AT, apart=["twins"]),
        "comparison": compare(
            observations, {"probe": Scores(np.linspace(-5, 0, 100), logits)}, [0.1], apart=["twins"]
        ),
        "data": [{"name": "x.jsonl", "role": "evaluate", "harmful": 5, "benign": 5, "sha256": "e" * 64}],
    }


def test_the_report_shows_every_source_and_no_prompt() -> None:
    text = markdown(json.loads(json.dumps(document(), allow_nan=False)))
    for name in ("bad", "worse", "good", "twins (not pooled)", "**all**", "**all pooled**", "x.jsonl"):
        assert f"| {name} |" in text
    assert "p3" not in text
    assert "50 % [15.0–85.0]" in text


def test_every_table_row_has_the_width_of_its_head() -> None:
    width = None
    for line in markdown(document()).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        if width is None:
            width = line.count("|")
        assert line.count("|") == width


@pytest.mark.parametrize("missing", ["harmful", "benign"])
def test_a_report_on_one_class_is_still_a_report(missing: str) -> None:
    observations, logits = seen()
    keep = observations.harmful if missing == "benign" else ~observations.harmful
    only = Observations(
        tuple(p for p, k in zip(observations.prompts, keep, strict=True) if k),
        tuple(t for t, k in zip(observations.tokens, keep, strict=True) if k),
        observations.refused[keep],
        0,
    )
    text = markdown({**document(), "evaluation": tables(only, logits[keep], AT), "comparison": None})
    assert ("## Harmful sources" in text) == (missing == "benign")

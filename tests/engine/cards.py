"""A small bundle card made by hand, for tests that need no model."""

from guard.bundle import Calibration, DataFile, GuardCard, ModelCard, SelfTest, Site
from guard.verdict import Decision, Rule, Threshold

PROMPTS = ((1, 2, 3), (4, 5))


def card(**changes: object) -> GuardCard:
    values = {
        "model": ModelCard(
            name="toy",
            architecture="LlamaForCausalLM",
            layers=2,
            mlp_width=8,
            heads=2,
            head_dim=4,
            weights_sha256="w",
            tokenizer_sha256="t",
        ),
        "label": "unsafe_output",
        "prompt_tails": ((7,),),
        "sites": (Site(layer=0, kind="mlp", units=(1, 3)),),
        "probe": "linear",
        "calibration": Calibration(slope=1.0, offset=0.0),
        "thresholds": (
            Threshold(false_positive_rate=0.01, probability=0.5, logit=0.0, benign=9, upper95=0.3),
        ),
        "default_false_positive_rate": 0.01,
        "data": (DataFile(name="d", sha256="0", role="fit", harmful=1, benign=1),),
        "metrics": {},
        "self_test": SelfTest(prompts=PROMPTS, logits={"float32": (1.0, -1.0)}, tolerance={"float32": 0.01}),
        "created": {},
    }
    return GuardCard(**{**values, **changes})  # type: ignore[arg-type]


REFUSE_AT_HALF = Decision(policy="default", mode="enforce", rules=(Rule(above=0.5, action="refuse"),))

"""An evaluation as one HTML page that needs nothing beside it: no script, no font, no address elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from guard import report_pictures
from guard.evaluation import Evaluated
from guard.figures import Scored, rate_name
from guard.report import QUESTIONS
from guard.report_pictures import Picture


def page(evaluated: Evaluated, others: Mapping[str, Scored] | None = None) -> str:
    """The page; ``others`` are scorers whose curve is drawn beside the guard's, by name. Holds no prompt."""
    document = evaluated.document
    # Sections that a document may lack are looked up by name, so that a misspelt one is noticed.
    optional = ("adapter", "baselines", "unsafe_output", "calibration", "by_attack", "by_language")
    environment = Environment(
        loader=PackageLoader("guard"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    about = document["bundle"]
    return environment.get_template("report.html").render(
        document={**dict.fromkeys(optional), **document},
        questions=QUESTIONS,
        rates=[rate_name(threshold["false_positive_rate"]) for threshold in about["thresholds"]],
        pictures=pictures(evaluated, others or {}),
    )


def pictures(evaluated: Evaluated, others: Mapping[str, Scored]) -> list[Picture]:
    """Those that these prompts allow."""
    document, pooled = evaluated.document, evaluated.scored[evaluated.pool]
    rate = rate_name(document["bundle"]["default_false_positive_rate"])
    calibration = document.get("calibration")
    drawn = [
        report_pictures.roc({"the guard": pooled, **others}),
        report_pictures.reliability(calibration) if calibration else None,
        report_pictures.histograms(pooled, evaluated.thresholds),
        report_pictures.bars(document["by_source"], rate, "source"),
        report_pictures.bars(document.get("by_attack", {}), rate, "attack"),
    ]
    return [picture for picture in drawn if picture is not None]

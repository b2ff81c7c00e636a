"""The study's figures as `docs/results/tune.md`. What they mean is written by hand, in `findings.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from guard.report import table
from models.recipe.tuning.figures import PICTURE

FINDINGS = Path(__file__).parent / "findings.md"
Figures = Mapping[str, Any]


def markdown(document: Figures) -> str:
    """The whole report."""
    size, models = document["size"], document["models"]
    roles = "; ".join(f"{each['prompts']} {each['about']}" for each in document["prompts"].values())
    starts = [name for name, model in models.items() if "cell" not in model]
    safer = [name for name, model in models.items() if model.get("cell", {}).get("start") == starts[0]]
    kept = [name for name, model in models.items() if model.get("cell", {}).get("start") == starts[1]]
    parts = [
        "# What tuning by units does to the lab models",
        "Written by `make tune-results`; figures in [tune.json](tune.json). An answer to a harmful prompt is "
        "unsafe unless it is a refusal, which is all that the aligned lab models know of safety. Every "
        f"training is {size['steps']} steps of {size['batch']} rows, seed 0, one thread, in bfloat16 with "
        f"float32 weights. Answers are greedy, {size['new_tokens']} tokens. Prompts: {roles}. Intervals are "
        "95 % intervals, Wilson's for rates, by bootstrap over prompts or texts for the others. The models "
        "have 7 million parameters and are instruments: nothing here says anything about a real model. "
        "Seconds are of a machine that did other work beside it.",
        FINDINGS.read_text("utf-8").strip(),
        f"![{PICTURE[1]}](../images/{PICTURE[0]})",
        "## Against the papers",
        _claims(document),
        "## Making an unaligned model refuse",
        f"Trained on {size['safety']} harmful requests with one refusal and as many harmless ones with the "
        f"model's own answers. *{starts[0]}* answers everything.",
        _models(document, [starts[0], *safer], "safety"),
        "## Keeping an aligned model safe",
        f"*{starts[1]}* tuned on {size['downstream']} harmless requests with the answers of their sources, "
        "plainly (*down full*) and with units protected.",
        _models(document, [starts[1], *kept], "downstream"),
        *_after(document),
        "## Against random units of the same layers and numbers",
        _controls(document),
        "## The units",
        _units(document),
    ]
    if document["missing"]:
        parts += ["## Planned and not measured", f"{'; '.join(document['missing'])}."]
    return "\n\n".join(parts) + "\n"


def _after(document: Figures) -> Iterable[str]:
    if names := [name for name in document["models"] if name.endswith("then down")]:
        yield "## Made safe first, then tuned plainly"
        yield _models(document, names, "downstream")


def _rows(rows: Iterable[Sequence[Any]], *head: str) -> str:
    return "\n".join(table(head, rows))


def _models(document: Figures, names: Sequence[str], rows: str) -> str:
    made = []
    for name in names:
        model = document["models"][name]
        real, own = (model["perplexity"][which] for which in ("real", "own"))
        share = f"{100 * model['parameters']['share']:.3g} %" if "parameters" in model else ""
        made.append(
            (
                name,
                share,
                f"{model['seconds']:.0f}" if "seconds" in model else "",
                _rate(model["unsafe"]),
                _rate(model["refused"]["benign"]),
                _rate(model["refused"]["hard"]),
                f"{real['value']:.1f}{_change(real)}",
                f"{own['value']:.2f}{_change(own)}",
            )
        )
    real = "perplexity, held-out answers of sources" + (" (the task)" if rows == "downstream" else "")
    head = ("", "numbers trained", "seconds", "unsafe answers", "benign refused", "in harmful words, refused",
            f"{real}, change in nats", "perplexity, unaligned model's answers, change in nats")  # fmt: skip
    return _rows(made, *head)


def _change(found: Figures) -> str:
    return f" ({_signed(found['change'])})" if "change" in found else ""


def _controls(document: Figures) -> str:
    made = []
    for name, found in document["controls"].items():
        drawn = [
            100 * model["unsafe"]["rate"]
            for other, model in document["models"].items()
            if other.startswith(f"{name} random ")
        ]
        made.append(
            (
                name,
                _rate(document["models"][name]["unsafe"]),
                " ".join(f"{rate:.1f} %" for rate in drawn),
                f"{100 * found['difference']:+.1f} points",
                f"{found['p']:.2g}",
            )
        )
    head = ("units", "unsafe answers", "unsafe answers, random units", "random minus located", "p")
    return _rows(made, *head)


def _claims(document: Figures) -> str:
    made = []
    for each in document["claims"]:
        found = {key: 100 * each["difference"][key] for key in ("mean", "low", "high")}
        rates = [100 * document["models"][each[key]]["unsafe"]["rate"] for key in ("from", "to")]
        made.append(
            (
                each["claim"],
                each["source"],
                f"{each['from']} → {each['to']}",
                f"{rates[0]:.0f} → {rates[1]:.0f} %",
                f"{found['mean']:+.0f} [{found['low']:+.0f}, {found['high']:+.0f}]",
                each["verdict"],
            )
        )
    return _rows(made, "claim", "source", "here", "unsafe answers", "fewer by, points", "direction")


def _units(document: Figures) -> str:
    made = []
    for name, found in document["units"].items():
        layers = "; ".join(f"{kind} {' '.join(map(str, counts))}" for kind, counts in found["layers"].items())
        made.append((name, found["about"], found["selected"], found["of"], layers))
    return _rows(made, "located on, set", "", "units", "of", "by layer")


def _rate(rate: Figures) -> str:
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def _signed(found: Figures) -> str:
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"

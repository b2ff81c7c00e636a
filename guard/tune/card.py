"""``CARD.md`` of what a tuning wrote: its record for people, and what was not looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guard.report import table

CARD_FILE = "CARD.md"
_KINDS = {
    "checkpoint": "a checkpoint: an ordinary model for transformers and vLLM",
    "ia3": "an (IA)³ vector, for `neuronguard bundle patch --vector ia3.safetensors`",
    "lora": "a LoRA adapter in PEFT's format",
}


def card(record: Mapping[str, Any]) -> str:
    """The whole text, out of ``tune.json`` alone."""
    model, output, course = record["model"], record["output"], record["course"]
    share = record["parameters"]
    rows = [
        ("method", record["method"]),
        ("made from", f"{model['name']}, weights `{model['weights_sha256']}`"),
        ("this is", _KINDS[output["kind"]]),
        ("SHA-256", f"`{output.get('weights_sha256') or output.get('sha256')}`"),
        ("numbers trained", f"{share['trained']} of {share['total']} ({100 * share['share']:.3g} %)"),
        ("steps", course["steps"]),
        ("loss, first and last step", f"{course['losses'][0][1]:.4g}, {course['losses'][-1][1]:.4g}"),
        ("seconds", f"{course['seconds']:.1f}"),
        ("seed", record["options"]["seed"]),
    ]
    if "changed" in output:
        rows.append(("numbers that differ", f"{output['changed']} of {output['of']}"))
    parts = [
        f"# {model['name']} after `neuronguard tune {record['method']}`",
        "",
        *table(("", "value"), rows),
    ]
    if units := record["units"]:
        counts = ", ".join(f"{count} {name}" for name, count in units["counts"].items())
        parts += ["", "## Units", "", f"{counts}, of {', '.join(units['files'])}; `{units['sha256']}`."]
    files = [(d["name"], d["harmful"], d["benign"], f"`{d['sha256'][:16]}`") for d in record["data"]["files"]]
    parts += ["", "## Data", "", *table(("file", "harmful", "benign", "SHA-256 begins"), files)]
    parts += [
        "",
        f"{record['data']['used']} of {record['data']['rows']} rows were trained on; options, versions and "
        "losses are in `tune.json`.",
        "",
        "Nothing was measured but the loss on these data. Before it is used, its refusals of harmful and of "
        "harmless requests, and its answers, are to be measured on other data: `neuronguard answer`.",
    ]
    return "\n".join(parts) + "\n"

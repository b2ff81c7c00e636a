"""How Grafana shows a value and colours a series, as far as the dashboards here make use of it."""

from __future__ import annotations

import math
import re
from typing import Any

from matplotlib.colors import to_hex, to_rgb

PAGE, PANEL, BORDER, GRID, TEXT, FAINT = "#111217", "#181b1f", "#2c3036", "#2a2e34", "#ccccdc", "#8e8e99"
_PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0")
_NAMED = {
    "green": "#73bf69",
    "yellow": "#fade2a",
    "red": "#f2495c",
    "dark-red": "#c4162a",
    "blue": "#5794f2",
    "light-blue": "#8ab8ff",
    "orange": "#ff9830",
    "dark-purple": "#8f3bb8",
    "text": TEXT,
}
_SHADES = (0.0, 0.45, -0.35, 0.7, -0.55)


def colour(name: str) -> str:
    """Grafana's ``name`` or a hexadecimal colour, as matplotlib takes it."""
    return name if name.startswith("#") else _NAMED[name]


def overrides(panel: dict[str, Any], name: str) -> dict[str, Any]:
    """The properties that a panel gives a series by its name; the last rule that matches counts."""
    found: dict[str, Any] = {}
    for rule in panel["fieldConfig"].get("overrides", ()):
        if re.search(rule["matcher"]["options"].strip("/"), name):
            found |= {one["id"]: one["value"] for one in rule["properties"]}
    return found


def series_colours(panel: dict[str, Any], names: list[str]) -> list[str]:
    """A colour for each series. Several that share a base colour are told apart by shades of it."""
    used: dict[str, int] = {}
    chosen = []
    for index, name in enumerate(names):
        fixed = overrides(panel, name).get("color", {}).get("fixedColor")
        base = colour(fixed) if fixed else _PALETTE[index % len(_PALETTE)]
        chosen.append(_shade(base, _SHADES[used.get(base, 0) % len(_SHADES)]))
        used[base] = used.get(base, 0) + 1
    return chosen


def value_text(panel: dict[str, Any], value: float) -> tuple[str, str]:
    """What a stat panel shows for a value, and in which colour: its mapping, otherwise its thresholds."""
    defaults = panel["fieldConfig"]["defaults"]
    for mapping in defaults.get("mappings", ()):
        if (words := mapping["options"].get(f"{value:g}")) is not None:
            return words["text"], colour(words["color"])
    steps = defaults.get("thresholds", {}).get("steps", [{"value": None, "color": "text"}])
    reached = [step for step in steps if step["value"] is None or value >= step["value"]]
    return quantity(value, defaults["unit"], defaults.get("decimals")), colour(reached[-1]["color"])


def quantity(value: float, unit: str, decimals: int | None = None) -> str:
    """A value with its unit in Grafana's manner: ``0.25 req/s``, ``12 ms``, ``3.4 K``."""
    if math.isnan(value):
        return "–"
    scales: tuple[tuple[float, str], ...]
    match unit:
        case "percentunit":
            return f"{_digits(100 * value, decimals)} %"
        case "reqps":
            return f"{_digits(value, decimals)} req/s"
        case "s":
            scales = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
        case "bytes":
            scales = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
        case "short":
            scales = ((1e6, "M"), (1e3, "K"), (1.0, ""))
        case _:
            scales = ((1.0, ""),)
    if value == 0:
        return f"0 {scales[0][1]}".strip() if unit == "s" else "0"
    size, suffix = next((one for one in scales if abs(value) >= one[0]), scales[-1])
    return f"{_digits(value / size, decimals)} {suffix}".strip()


def _digits(value: float, decimals: int | None) -> str:
    if decimals is not None:
        return f"{value:.{decimals}f}"
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _shade(base: str, amount: float) -> str:
    """Towards white by a positive part, towards black by a negative one."""
    end = 1.0 if amount > 0 else 0.0
    red, green, blue = (part + (end - part) * abs(amount) for part in to_rgb(base))
    return to_hex((red, green, blue))

"""Panels in the dashboards' common form: the same colours, legends and data source everywhere."""

from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.builders import (
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmaps
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

PASS, TAG, REFUSE, CHECKED = "green", "yellow", "red", "blue"
WOULD_REFUSE = "orange"
ERROR = "dark-purple"
BYPASS = "dark-red"
DIRECT = "#ff3ddb"
"""Traffic that did not pass the gateway: a colour that nothing else has."""
CLIENT = "light-blue"
"""Errors that are the client's own."""
LIMIT = "#8e8e8e"
NEUTRAL = "text"

GREEN_IF_ZERO = ((None, PASS), (0.5, BYPASS))
"""For counts that should stay 0. ``increase()`` extrapolates, so one event need not be exactly 1."""
GREEN_IF_ONE = ((None, BYPASS), (1, PASS))

OUTCOMES = {
    "/pass/": PASS,
    "/tag/": TAG,
    "/refuse/": REFUSE,
    "/checked/": CHECKED,
    "/error/": ERROR,
    "/none|unguarded/": BYPASS,
}
"""Colours by the verdict or action in a series' name."""

Panel = Builder[models.Panel]
Target = prometheus.Dataquery
Steps = Sequence[tuple[float | None, str]]
Colours = Mapping[str, str]


def query(expr: str, legend: str = "", *, ref: str = "A") -> Target:
    """A query over the dashboard's time range."""
    return _query(expr, ref).legend_format(legend).range()


def latest(expr: str, legend: str = "", *, ref: str = "A") -> Target:
    """A query at the end of the dashboard's time range."""
    return _query(expr, ref).legend_format(legend).instant()


def rows_of(expr: str, *, ref: str = "A") -> Target:
    """A query at the end of the dashboard's time range whose labels become a table's columns."""
    return _query(expr, ref).format(PromQueryFormat.TABLE).instant()


def buckets(expr: str) -> Target:
    """A query of ``sum by (le)`` for a heatmap."""
    return _query(expr, "A").format(PromQueryFormat.HEATMAP).legend_format("{{le}}").range()


def lines(
    title: str,
    description: str,
    unit: str,
    *targets: Target,
    width: int = 12,
    height: int = 8,
    top: float | None = None,
    stacked: bool = False,
    colours: Colours | None = None,
    dashed: str = "",
) -> timeseries.Panel:
    """Values over time from 0 to ``top``.

    ``colours`` are by regular expression on a series' name, and the last one that matches counts; series
    whose name matches ``dashed`` are reference lines.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(width)
        .height(height)
        .unit(unit)
        .min(0)
        .targets(list(targets))
        .line_width(2)
        .fill_opacity(60 if stacked else 8)
        # Under light traffic a quantile exists at single moments only, which no line shows.
        .show_points(options.VisibilityMode.AUTO)
        .tooltip(
            common.VizTooltipOptions()
            .mode(options.TooltipDisplayMode.MULTI)
            .sort(options.SortOrder.DESCENDING)
        )
        .legend(
            common.VizLegendOptions()
            .display_mode(options.LegendDisplayMode.TABLE)
            .placement(options.LegendPlacement.RIGHT if width == 24 else options.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "mean", "max"])
        )
    )
    if top is not None:
        panel.max(top)
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A"))
    for pattern, colour in (colours or {}).items():
        panel.override_by_regexp(pattern, [_shades_of(colour)])
    if dashed:
        panel.override_by_regexp(
            dashed,
            [
                models.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 8]}),
                models.DynamicConfigValue("custom.fillOpacity", 0),
            ],
        )
    return panel


def number(
    title: str,
    description: str,
    unit: str,
    target: Target,
    *,
    steps: Steps = ((None, NEUTRAL),),
    words: Mapping[str, tuple[str, str]] | None = None,
    text: options.BigValueTextMode = options.BigValueTextMode.VALUE,
    colours: Colours | None = None,
    width: int = 3,
    decimals: int | None = 0,
) -> stat.Panel:
    """One large value. ``words`` shows a value as a text in a colour."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(width)
        .height(4)
        .unit(unit)
        .targets([target])
        .thresholds(_thresholds(steps))
        .color_scheme(builders.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .color_mode(options.BigValueColorMode.VALUE)
        .graph_mode(options.BigValueGraphMode.NONE)
        .text_mode(text)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    )
    if decimals is not None:
        panel.decimals(decimals)
    if words:
        panel.mappings([_words(words)])
    for pattern, colour in (colours or {}).items():
        panel.override_by_regexp(pattern, [_fixed(colour)])
    return panel


def states(
    title: str,
    description: str,
    words: Mapping[str, tuple[str, str]],
    *targets: Target,
    width: int = 12,
    height: int = 8,
) -> statetimeline.Panel:
    """When each series had which of a few values; ``words`` are their texts and colours."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(width)
        .height(height)
        .unit("none")
        .targets(list(targets))
        .mappings([_words(words)])
        .merge_values(True)
        .show_value(options.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(options.LegendDisplayMode.LIST)
            .placement(options.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
    )


def density(
    title: str, description: str, target: Target, *, axis: str, width: int = 12, height: int = 9
) -> heatmap.Panel:
    """How many events fell into each bucket of a histogram over time."""
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(width)
        .height(height)
        .unit("short")
        .targets([target])
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmaps.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            # One request in a busy hour has to be visible beside thousands.
            .scale(heatmaps.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
        )
        .cell_values(heatmap.CellValues().unit("short"))
        .y_axis(heatmap.YAxisConfig().unit("none").axis_label(axis))
        .show_legend()
    )


def listing(
    title: str,
    description: str,
    *targets: Target,
    transformations: Sequence[models.DataTransformerConfig],
    unit: str = "none",
    width: int = 24,
    height: int = 6,
) -> table.Panel:
    """A table of labels and values."""
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(width)
        .height(height)
        .unit(unit)
        .targets(list(targets))
        .transformations(list(transformations))
        .show_header(True)
    )


def joined_by(field: str) -> models.DataTransformerConfig:
    """Join the tables of several queries on one column."""
    return models.DataTransformerConfig("joinByField", options={"byField": field, "mode": "outer"})


def columns(names: Mapping[str, str], hidden: Sequence[str]) -> models.DataTransformerConfig:
    """Name and order a table's columns; ``hidden`` ones are left out."""
    return models.DataTransformerConfig(
        "organize",
        options={
            "excludeByName": dict.fromkeys(hidden, True),
            "indexByName": {name: index for index, name in enumerate(names)},
            "renameByName": dict(names),
        },
    )


def _query(expr: str, ref: str) -> Target:
    return prometheus.Dataquery().expr(expr).ref_id(ref).datasource(DATASOURCE)


def _thresholds(steps: Steps) -> builders.ThresholdsConfig:
    return (
        builders.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=colour) for value, colour in steps])
    )


def _words(words: Mapping[str, tuple[str, str]]) -> models.ValueMap:
    return models.ValueMap(
        {
            value: models.ValueMappingResult(text=text, color=colour, index=index)
            for index, (value, (text, colour)) in enumerate(words.items())
        }
    )


def _shades_of(colour: str) -> models.DynamicConfigValue:
    """Several series of one meaning, such as one for each policy, stay apart."""
    return models.DynamicConfigValue("color", {"mode": "shades", "fixedColor": colour})


def _fixed(colour: str) -> models.DynamicConfigValue:
    return models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})

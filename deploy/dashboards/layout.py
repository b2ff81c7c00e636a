"""A dashboard from rows of panels, with what both have in common."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models

from deploy.dashboards.panels import DATASOURCE

TAG = "neuronguard"
OPERATIONS = "/public/neuronguard/operations.txt"
"""Where Grafana serves ``docs/operations.md``: its static folder, so that the link works without internet."""


class Row(NamedTuple):
    """Panels under a title that folds them away. ``folded``: at first, and not queried until opened."""

    title: str
    panels: Sequence[Builder[models.Panel]]
    folded: bool = False


class PrometheusAnnotation(models.AnnotationQuery):
    """The SDK's annotation with the fields that Grafana's Prometheus data source adds."""

    def __init__(self, *, title: str, text: str, step: str, **fields: Any) -> None:
        super().__init__(**fields)
        self.title_format = title
        self.text_format = text
        self.step = step

    def to_json(self) -> dict[str, object]:
        """All fields, as Grafana names them."""
        return super().to_json() | {
            "titleFormat": self.title_format,
            "textFormat": self.text_format,
            "step": self.step,
        }


class Annotation(Builder[models.AnnotationQuery]):
    """Marks the first moments of every series of ``expr``; in title and text stand ``{{label}}``."""

    def __init__(self, name: str, expr: str, *, title: str, text: str, colour: str) -> None:
        self._built = PrometheusAnnotation(
            name=name,
            expr=expr,
            title=title,
            text=text,
            step="60s",
            datasource=DATASOURCE,
            icon_color=colour,
        )

    def build(self) -> models.AnnotationQuery:
        """The annotation."""
        return self._built


def variable(name: str, label: str, metric: str, of: str, description: str) -> builders.QueryVariable:
    """A choice of several values of label ``of``, all of them by default."""
    return (
        builders.QueryVariable(name)
        .label(label)
        .description(description)
        .datasource(DATASOURCE)
        .query(f"label_values({metric}, {of})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def dashboard(
    uid: str,
    title: str,
    description: str,
    *,
    variables: Sequence[Builder[models.VariableModel]],
    annotations: Sequence[Builder[models.AnnotationQuery]],
    other: tuple[str, str],
    rows: Sequence[Row],
) -> models.Dashboard:
    """Lay out ``rows`` from top to bottom on Grafana's 24 columns. ``other``: uid and title to link to."""
    builder = (
        builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .variables([_datasource(), *variables])
        .annotations(list(annotations))
        .links([_to_dashboard(*other), _to_operations()])
    )
    for row in rows:
        head = builders.Row(row.title).collapsed(row.folded)
        if row.folded:
            for panel in row.panels:
                head.with_panel(panel)
        builder.with_row(head)
        if not row.folded:
            for panel in row.panels:
                builder.with_panel(panel)
    built = builder.build()
    _number(built)
    return built


def _number(built: models.Dashboard) -> None:
    """Give every panel an id; Grafana would otherwise number them anew at every start."""
    number = 0
    for panel in built.panels or ():
        number += 1
        panel.id_val = number
        if isinstance(panel, models.RowPanel):
            for nested in panel.panels:
                number += 1
                nested.id_val = number


def _datasource() -> builders.DatasourceVariable:
    return (
        builders.DatasourceVariable("datasource")
        .label("Prometheus")
        .description("The Prometheus that scrapes gateway and engine.")
        .type("prometheus")
        .current(models.VariableOption(selected=True, text="Prometheus", value="prometheus"))
    )


def _to_dashboard(uid: str, title: str) -> builders.DashboardLink:
    return (
        builders.DashboardLink(title)
        .type(models.DashboardLinkType.LINK)
        .icon("dashboard")
        .tooltip(f"{title}, same time range and model")
        .url(f"/d/{uid}")
        .keep_time(True)
        .include_vars(True)
    )


def _to_operations() -> builders.DashboardLink:
    return (
        builders.DashboardLink("Operations guide")
        .type(models.DashboardLinkType.LINK)
        .icon("doc")
        .tooltip("What each alert and metric means and what to do: docs/operations.md")
        .url(OPERATIONS)
        .target_blank(True)
    )

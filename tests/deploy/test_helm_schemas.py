"""Every object of the chart against the schemas of Kubernetes."""

from __future__ import annotations

import json

import pytest

from tests.deploy.chart import EXAMPLES, of_kind, render

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="the package kubernetes-validate is not installed: it carries the schemas"
)

KUBERNETES = ("1.27", kubernetes_validate.latest_version())
"""The oldest that Chart.yaml names, and the newest there is."""
OPERATOR = "monitoring.coreos.com/v1"
ALL = ("--set", "monitoring.enabled=true", "--set", "signers.name=signers")

each_example = pytest.mark.parametrize("example", sorted(EXAMPLES))


@each_example
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_valid_in_the_oldest_and_the_newest_kubernetes(example: str, version: str) -> None:
    for each in render(example, *ALL):
        if each["apiVersion"] != OPERATOR:
            kubernetes_validate.validate(each, version, strict=True)


def test_the_validation_finds_what_is_wrong() -> None:
    (deployment,) = of_kind(render("gpu"), "Deployment").values()
    wrong = json.loads(json.dumps(deployment))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(wrong, KUBERNETES[-1], strict=True)

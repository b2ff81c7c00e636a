"""``neuronguard evaluate --out``: what is in the report, and what leads to none."""

from __future__ import annotations

import gzip
import html.parser
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from sklearn.metrics import average_precision_score, roc_auc_score

from guard.bundle import Bundle, Calibration
from guard.capture import read_prompts
from guard.checkpoint import Checkpoint
from guard.cli import main
from guard.prompts import encode
from guard.report_folder import ReportError, write_folder
from tests.guard import worlds

KEYS = {
    "n_harmful", "n_benign", "auroc", "auroc_interval", "average_precision", "average_precision_interval",
    "tpr_at_fpr", "tpr_at_fpr_interval", "flag_rate_at", "flag_rate_at_interval",
}  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(planted: worlds.Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "bundle"
    result = run(
        "fit", "--model", planted.model, "--data", planted.fit, "--threshold-data", planted.threshold,
        "--out", out, "--rate", 0.01, "--units", planted.neurons, "--label", "harmful_prompt", "--no-cache",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(planted: worlds.Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources: one of both classes, one benign, one harmful under attack and in another language."""
    rows = rows_of(planted.evaluation)
    for index, row in enumerate(rows):
        if index % 3:
            row["source"] = "calm" if row["label"] == "benign" else "<b>attacks</b> & $x_1"
        if index % 3 and row["label"] == "harmful":
            row |= {"attack": "suffix" if index % 2 else "role play", "language": "de", "pair": index // 4}
    file = tmp_path_factory.mktemp("data") / "rows.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return file


def evaluating(planted: worlds.Planted, bundle: Path, data: Path, out: Path, *more: object) -> list[object]:
    return [
        "evaluate", "--model", planted.model, "--bundle", bundle, "--data", data, "--out", out,
        "--judged-tokens", 4, "--bootstrap", 200, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(
    planted: worlds.Planted, bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("report") / "nested" / "report"
    result = run(*evaluating(planted, bundle, data, out))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def pairs_of(entry: dict[str, Any]) -> list[tuple[float | None, list[float] | None]]:
    found = [(entry[key], entry[f"{key}_interval"]) for key in ("auroc", "average_precision")]
    for key in ("tpr_at_fpr", "flag_rate_at"):
        found += [(entry[key][rate], entry[f"{key}_interval"][rate]) for rate in entry[key]]
    return found


def test_every_group_has_all_figures_with_an_interval_around_each(report: dict[str, Any]) -> None:
    entries = [report["overall"], *report["by_source"].values(), *report["by_attack"].values()]
    for entry in entries:
        assert entry.keys() >= KEYS
        assert list(entry["tpr_at_fpr"]) == ["0.01", "0.001"]
        assert list(entry["flag_rate_at"]) == ["0.01", "0.005", "0.001"]
        for value, interval in pairs_of(entry):
            assert (value is None) == (interval is None)
            if value is not None and interval is not None:
                assert 0 <= interval[0] <= value <= interval[1] <= 1


def test_figures_are_those_of_the_bundles_scores(
    report: dict[str, Any], planted: worlds.Planted, bundle: Path
) -> None:
    """Recomputed from the model, the probe's arrays and scikit-learn."""
    rows, loaded = rows_of(planted.evaluation), Bundle.load(bundle)
    ids = [encode(worlds.tokenizer(), [{"role": "user", "content": row["prompt"]}]) for row in rows]
    features = read_prompts(Checkpoint.open(planted.model).load_model(), loaded.card.sites, ids)
    scores = loaded.logits(features)
    harmful = np.array([row["label"] == "harmful" for row in rows])
    overall = report["overall"]
    assert (overall["n_harmful"], overall["n_benign"]) == (harmful.sum(), (~harmful).sum())
    assert overall["auroc"] == pytest.approx(roc_auc_score(harmful, scores), abs=1e-6)
    expected = average_precision_score(harmful, scores)
    assert overall["average_precision"] == pytest.approx(expected, abs=1e-6)
    flagged = scores >= loaded.card.thresholds[0].logit
    assert overall["flag_rate_at"]["0.01"] == pytest.approx(flagged.mean())
    assert overall["flag_rate_harmful_at"]["0.01"] == pytest.approx(flagged[harmful].mean())
    highest = np.sort(scores[~harmful])[::-1][int(0.01 * (~harmful).sum())]
    assert overall["tpr_at_fpr"]["0.01"] == pytest.approx((scores[harmful] > highest).mean())


def test_a_source_of_one_class_has_no_auroc_of_its_own_but_one_against_the_pool(
    report: dict[str, Any],
) -> None:
    by_source = report["by_source"]
    calm, attacks = by_source["calm"], by_source["<b>attacks</b> & $x_1"]
    assert calm["n_harmful"] == attacks["n_benign"] == 0
    assert calm["auroc"] is attacks["auroc"] is calm["against_pool"] is None
    assert attacks["against_pool"]["n_benign"] == report["overall"]["n_benign"]
    assert attacks["against_pool"]["auroc"] > 0.9
    assert by_source["f"]["auroc"] is not None
    over = report["over_sources"]
    assert over["sources"] == 3
    areas = [e["against_pool"]["auroc"] for e in by_source.values() if e["against_pool"]]
    assert over["auroc"]["mean"] == pytest.approx(np.mean(areas))
    assert over["auroc"]["worst"]["value"] == min(areas)


def test_attacks_and_languages_are_told_apart_where_rows_name_them(report: dict[str, Any]) -> None:
    assert set(report["by_attack"]) == {"none", "role play", "suffix"}
    assert set(report["by_language"]) == {"none", "de"}
    assert report["by_attack"]["suffix"]["n_benign"] == 0
    # Rows of a pair are one request.
    assert report["by_language"]["de"]["n_requests"] < report["by_language"]["de"]["n_harmful"]


def test_rates_without_a_threshold_are_null_and_calibration_is_there(report: dict[str, Any]) -> None:
    assert report["overall"]["flag_rate_at"]["0.005"] is None
    assert report["calibration"]["n"] == 400
    assert report["unsafe_output"]["overall"]["n_unsafe"] <= report["overall"]["n_harmful"]


def test_isotonic_calibration_is_read_by_its_knots(
    report: dict[str, Any], planted: worlds.Planted, bundle: Path, data: Path, tmp_path: Path
) -> None:
    """Knots on the line of Platt scaling say the same; a bend says something else."""
    loaded = Bundle.load(bundle)
    platt, found = loaded.card.calibration, []
    for bend in (0.0, 3.0):
        knots = [(x, platt.slope * x + platt.offset + bend * (x > 0)) for x in (-1.0, 1.0)]
        isotonic = Calibration(kind="isotonic", slope=platt.slope, offset=0.0, knots=tuple(knots))
        card = loaded.card.model_copy(update={"calibration": isotonic})
        out = tmp_path / f"bend-{bend}"
        Bundle(card, loaded.scorer).save(out)
        result = run(*evaluating(planted, out, data, tmp_path / f"r-{bend}", "--no-answers"))
        assert result.exit_code == 0, result.output
        written = json.loads((tmp_path / f"r-{bend}" / "report.json").read_text())
        found.append(written["calibration"]["expected_calibration_error"])
    assert found[0] == pytest.approx(report["calibration"]["expected_calibration_error"], abs=1e-6)
    assert abs(found[1] - found[0]) > 1e-4


def test_random_labels_give_one_half(planted: worlds.Planted, bundle: Path, tmp_path: Path) -> None:
    random, rows = np.random.default_rng(3), rows_of(planted.evaluation)
    for row in rows:
        row["label"] = str(random.choice(["harmful", "benign"]))
    file = worlds.write_rows(tmp_path / "random.jsonl", rows)
    assert run(*evaluating(planted, bundle, file, tmp_path / "r", "--no-answers")).exit_code == 0
    overall = json.loads((tmp_path / "r" / "report.json").read_text())["overall"]
    low, high = overall["auroc_interval"]
    assert low < 0.5 < high
    assert high - low < 0.15


def test_the_threshold_holds_on_fresh_draws(report: dict[str, Any], bundle: Path) -> None:
    promise = Bundle.load(bundle).card.thresholds[0].upper95
    assert report["overall"]["flag_rate_benign_at"]["0.01"] <= promise
    assert report["overall"]["flag_rate_harmful_at"]["0.01"] > 0.9


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_each_picture_says_what_it_shows(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert len(page.images) == 5
    for image in page.images:
        assert (image["src"] or "").startswith("data:image/svg+xml;base64,")
        assert len(image["alt"] or "") > 40
    starts = [str(image["alt"]).split(":")[0].split(".")[0] for image in page.images]
    assert starts == [
        "Receiver operating characteristic", "Reliability in 10 bins of equal size", "Histogram of scores",
        "Share flagged by source", "Share flagged by attack",
    ]  # fmt: skip
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    addresses = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert all((address or "").startswith("data:") for address in addresses)


def test_names_from_data_are_shown_as_text(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert "b" not in {tag for tag, _ in page.tags}
    assert "<b>attacks</b> & $x_1" in page.text


def test_no_prompt_is_in_the_report(folder: Path, planted: worlds.Planted) -> None:
    text = "".join(path.read_text() for path in folder.iterdir())
    assert not [row["prompt"] for row in rows_of(planted.evaluation) if row["prompt"] in text]


def test_the_same_inputs_give_the_same_report_in_place_of_the_old(
    folder: Path, planted: worlds.Planted, bundle: Path, data: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "report.json").write_text("{}")
    assert run(*evaluating(planted, bundle, data, again)).exit_code == 0
    for name in ("report.json", "report.html"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} <= {"again", "cache"}


def test_without_answers_the_model_is_not_asked_for_any(
    planted: worlds.Planted, bundle: Path, data: Path, tmp_path: Path
) -> None:
    result = run(*evaluating(planted, bundle, data, tmp_path / "r", "--no-answers"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert "unsafe_output" not in found
    assert "evaluation" not in found
    assert found["calibration"] is not None
    assert not (tmp_path / "cache" / "answers").exists()


def spoil_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text(worlds.TEMPLATE.replace("<|end|>", ""))


def spoil_tokenizer(path: Path) -> None:
    document = json.loads((path / "tokenizer.json").read_text())
    document["model"]["vocab"] = {key: 259 - value for key, value in document["model"]["vocab"].items()}
    (path / "tokenizer.json").write_text(json.dumps(document))


def spoil_weights(path: Path) -> None:
    worlds.model(seed=3).save_pretrained(path)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_template, "tokenizer and chat template digest is"),
        (spoil_tokenizer, "tokenizer and chat template digest is"),
        (spoil_weights, "weights digest is"),
    ],
)
def test_another_template_tokenizer_or_model_is_refused_and_nothing_written(
    planted: worlds.Planted, bundle: Path, data: Path, tmp_path: Path, spoil: Any, sentence: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(planted.model, other)
    spoil(other)
    result = run(*evaluating(planted._replace(model=other), bundle, data, tmp_path / "r"))
    assert result.exit_code == 1
    assert f"does not belong to the served model: {sentence}" in result.output
    assert not (tmp_path / "r").exists()


LONG = {"prompt": "x" * 300, "label": "harmful", "source": "f"}


def test_bad_rows_are_counted_and_named_and_do_not_count(
    planted: worlds.Planted, bundle: Path, tmp_path: Path
) -> None:
    rows = [*rows_of(planted.evaluation)[:60], LONG, {"prompt": "", "label": "benign"}]
    file = worlds.write_rows(tmp_path / "d.jsonl", rows)
    result = run(*evaluating(planted, bundle, file, tmp_path / "r", "--no-answers"))
    assert result.exit_code == 0, result.output
    assert "d.jsonl, line 62: no 'prompt'" in result.output
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["problems"]["by_kind"] == {"no prompt": 1, "over-long prompt": 1}
    assert found["left_out"] == {"no prompt": 1, "too long": 1}
    long = found["problems"]["first"][1]
    assert (long["file"], long["line"]) == ("d.jsonl", 61)
    assert "at most 252 fit" in long["text"]
    assert found["overall"]["n_harmful"] + found["overall"]["n_benign"] == 60


@pytest.mark.parametrize("bad", [LONG, {"prompt": "", "label": "benign"}])
def test_strict_stops_at_any_of_them_and_writes_nothing(
    planted: worlds.Planted, bundle: Path, tmp_path: Path, bad: dict[str, str]
) -> None:
    file = worlds.write_rows(tmp_path / "d.jsonl", [*rows_of(planted.evaluation)[:60], bad])
    result = run(*evaluating(planted, bundle, file, tmp_path / "r", "--no-answers", "--strict"))
    assert result.exit_code == 1
    assert "d.jsonl, line 61: " in result.output
    assert not (tmp_path / "r").exists()


def test_an_unknown_source_cannot_be_kept_apart(
    planted: worlds.Planted, bundle: Path, data: Path, tmp_path: Path
) -> None:
    result = run(*evaluating(planted, bundle, data, tmp_path / "r", "--apart", "twin"))
    assert result.exit_code == 1
    assert "no benign prompt is of the source twin" in result.output


def test_a_source_kept_apart_is_reported_and_left_out_of_the_pool(
    planted: worlds.Planted, bundle: Path, data: Path, tmp_path: Path, report: dict[str, Any]
) -> None:
    result = run(*evaluating(planted, bundle, data, tmp_path / "r", "--apart", "calm", "--no-answers"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    calm = found["by_source"]["calm"]["n_benign"]
    assert calm == report["by_source"]["calm"]["n_benign"]
    assert found["overall"]["n_benign"] == report["overall"]["n_benign"] - calm
    assert found["by_source"]["f"]["against_pool"]["n_benign"] == found["overall"]["n_benign"]


def test_a_folder_with_other_files_is_left_alone(
    planted: worlds.Planted, bundle: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = run(*evaluating(planted, bundle, data, tmp_path / "mine"))
    assert result.exit_code == 1
    assert "is not a report (found: thesis.txt)" in result.output
    with pytest.raises(ReportError, match="is not a report"):
        write_folder(tmp_path / "mine", {"report.json": b""})
    assert (tmp_path / "mine" / "thesis.txt").exists()

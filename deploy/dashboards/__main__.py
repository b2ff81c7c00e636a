"""``python -m deploy.dashboards [--check]``: write the dashboards' JSON, or say what is out of date."""

import argparse
import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.dashboards import engine, overview

FOLDER = Path(__file__).resolve().parents[1] / "grafana" / "dashboards"


def render(dashboard: Dashboard) -> str:
    """The dashboard as JSON, the same text for the same code."""
    return json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def rendered() -> dict[str, str]:
    """File name and text of every dashboard."""
    return {"guard-overview.json": render(overview.build()), "engine.json": render(engine.build())}


def outdated(folder: Path) -> list[Path]:
    """Files in ``folder`` that are missing, other than the code says, or no dashboard of ours."""
    texts = rendered()
    wrong = [
        folder / name
        for name, text in texts.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
    return wrong + [path for path in sorted(folder.glob("*.json")) if path.name not in texts]


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """Run the command. 1: ``--check`` found a file that is out of date."""
    parser = argparse.ArgumentParser(prog="python -m deploy.dashboards", description="Write the dashboards.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    if parser.parse_args(arguments).check:
        wrong = outdated(folder)
        for path in wrong:
            sys.stderr.write(f"{path} is out of date; run: python -m deploy.dashboards\n")
        return 1 if wrong else 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in rendered().items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

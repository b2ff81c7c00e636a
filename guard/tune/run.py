"""One tuning from files to files: check, load, train, write, record."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from guard.cache import cache_root, digest_of
from guard.checkpoint import Checkpoint
from guard.locate.results import versions
from guard.quantisation import quantisation_of
from guard.tune.card import CARD_FILE, card
from guard.tune.errors import TuneError
from guard.tune.methods import METHODS, Method, Prepared, prepared
from guard.tune.objective import Item, with_reference
from guard.tune.options import TuneOptions
from guard.tune.output import refuse_target, write_adapter, write_checkpoint, write_vector
from guard.tune.rows import Rows, read
from guard.tune.texts import texts
from guard.tune.trainer import Course, train
from guard.tune.units import RECORD_FILE, Chosen, ancestors, choose

Record = dict[str, Any]


def tune(
    method: Method,
    checkpoint: Checkpoint,
    data: Sequence[Path],
    options: TuneOptions,
    out: Path,
    *,
    units: Sequence[Path] = (),
    foundation: Sequence[Path] = (),
    store: Path | None = None,
    progress: bool = False,
) -> Record:
    """Tune a model and write ``out``; returns what ``tune.json`` there says.

    Everything that can be wrong with options, units and data is said before the model is loaded. A run that
    was interrupted goes on at its last checkpoint, kept in ``store`` (by default in the user's cache) under a
    digest of all that the result depends on, and removed when ``out`` is there. Raises TuneError.
    """
    refuse_target(out)
    spec = METHODS[method]
    if not isinstance(options, spec.options):
        raise TuneError(f"{method} takes {spec.options.__name__}, got {type(options).__name__}")
    chosen = _chosen(method, checkpoint, units, foundation)
    rows = read(data, options, needs=spec.labels)
    if quantisation_of(AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)):
        raise TuneError(
            f"{checkpoint.name} is quantised, and its weights cannot be trained; take the plain model"
        )
    folder = (store or cache_root() / "tune") / digest_of(
        _identity(method, checkpoint, options, rows, chosen)
    )[:24]
    model, tokenizer = checkpoint.load_model("float32", options.device), checkpoint.load_tokenizer()
    made = texts(rows.rows, model, tokenizer, options, progress=progress)
    items = with_reference(model, made) if options.objective == "dpo" else [Item(text) for text in made]
    total = sum(parameter.numel() for parameter in model.parameters())
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with prepared(method, model, chosen.units if chosen else None, options) as ready:
            trained = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
            course = train(ready.model, items, options, folder, progress=progress)
            whole = getattr(options, "whole", True)
            output = None if whole or method == "ia3" else write_adapter(ready.model, checkpoint, staging)
        seconds = time.monotonic() - began
        output = output or _written(method, model, checkpoint, ready, staging, options, whole=whole)
        record = {
            "method": method,
            "model": checkpoint.card().model_dump(mode="json"),
            "ancestors": list(ancestors(checkpoint)),
            "options": asdict(options),
            "units": _units(chosen),
            "data": {
                "files": [file.model_dump(mode="json") for file in rows.files],
                "rows": len(rows.rows),
                "unlabelled": rows.unlabelled,
                "used": len(items),
            },
            "parameters": {"trained": trained, "total": total, "share": trained / total},
            "course": _course(course, seconds),
            "output": output,
            "versions": versions(),
        }
        _finish(record, staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return record


def _chosen(
    method: Method, checkpoint: Checkpoint, units: Sequence[Path], foundation: Sequence[Path]
) -> Chosen | None:
    wanted = METHODS[method].units
    if wanted == "needed" and not units:
        raise TuneError(f"{method} is about units; name the set, as 'neuronguard locate' writes it, as units")
    if wanted == "none" and units:
        raise TuneError(f"{method} trains all it trains, whatever the units; leave them out")
    if foundation and not units:
        raise TuneError("foundation units are taken away from others; name the units as well")
    return choose(checkpoint, units, foundation) if units else None


def _identity(
    method: Method, checkpoint: Checkpoint, options: TuneOptions, rows: Rows, chosen: Chosen | None
) -> list[Any]:
    return [
        method,
        asdict(options),
        checkpoint.weights_sha256,
        checkpoint.tokenizer_sha256,
        chosen.sha256 if chosen else None,
        [file.sha256 for file in rows.files],
        versions(),
    ]


def _written(
    method: Method,
    model: Any,
    checkpoint: Checkpoint,
    ready: Prepared,
    folder: Path,
    options: TuneOptions,
    *,
    whole: bool,
) -> Record:
    if method == "ia3" and not whole:
        return write_vector(ready.vector, folder)
    return write_checkpoint(model, checkpoint, ready, folder, float32=options.weights == "float32")


def _units(chosen: Chosen | None) -> Record | None:
    if chosen is None:
        return None
    return {"files": list(chosen.files), "sha256": chosen.sha256, "counts": chosen.counts()}


def _course(course: Course, seconds: float) -> Record:
    return {
        "steps": course.steps,
        "resumed_at": course.resumed_at,
        "seconds": round(seconds, 3),
        "losses": [[step, round(loss, 6)] for step, loss in course.losses],
    }


def _finish(record: Record, staging: Path, out: Path) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (staging / RECORD_FILE).write_text(text, "utf-8")
    (staging / CARD_FILE).write_text(card(record), "utf-8")
    for path in staging.iterdir():
        # safetensors and mkdtemp make theirs private to their owner; a model may be served by another user.
        path.chmod(0o644)
    staging.chmod(0o755)
    refuse_target(out)
    staging.rename(out)

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guard import checkpoint
from guard.capture import read_batch
from guard.checkpoint import Checkpoint, CheckpointError
from tests.engine import architectures


def test_soft_capped_attention_is_not_left_out(tmp_path: Path) -> None:
    model = Checkpoint.open(architectures.make_model(tmp_path / "model", "gemma2")).load_model()
    prompt = [list(range(60))]
    capped = read_batch(model, architectures.SITES, prompt)
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    free = read_batch(model, architectures.SITES, prompt)
    assert (capped - free).abs().max() > 1e-2
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(read_batch(model, architectures.SITES, prompt), free, atol=1e-3, rtol=1e-3)


def test_spreading_without_accelerate_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Checkpoint.open(architectures.make_model(tmp_path / "model", "gemma2"))
    monkeypatch.setattr(checkpoint, "find_spec", lambda _name: None)
    with pytest.raises(CheckpointError, match="needs the package accelerate; install it, or name one device"):
        opened.load_model(device="auto")

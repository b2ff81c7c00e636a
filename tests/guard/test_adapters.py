from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from guard.adapters import Adapter, AdapterError, adapter_digest
from guard.card import AdapterCard
from guard.merge import merge
from tests.guard import worlds

LAYER = "model.layers.1.self_attn.q_proj"
A, B = (f"base_model.model.{LAYER}.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 8 / 4),
        ({"alpha": 3}, 3 / 4),
        ({"alpha": 2.5}, 2.5 / 4),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"rank": 8, "use_rslora": True}, 8 / math.sqrt(8)),
    ],
)
def test_a_weight_gains_scale_times_b_times_a(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    made, base = worlds.model(), worlds.model()
    path = worlds.adapter(tmp_path / "a", made, **settings)
    merge(made, Adapter.open(path, "a"))
    tensors = load_file(path / "adapter_model.safetensors")
    before = dict(base.named_parameters())
    touched = set()
    for name, parameter in made.named_parameters():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in tensors:
            touched.add(name)
            delta = torch.einsum(
                "or,ri->oi", tensors[f"{key}.lora_B.weight"], tensors[f"{key}.lora_A.weight"]
            )
            torch.testing.assert_close(parameter, before[name] + scale * delta, atol=1e-6, rtol=1e-6)
            assert (parameter - before[name]).abs().max() > 1e-3
        else:
            assert torch.equal(parameter, before[name]), name
    assert len(touched) == 2 * 3


def test_the_sum_is_rounded_once_to_the_weights_dtype(tmp_path: Path) -> None:
    made = worlds.model(dtype=torch.bfloat16)
    before = made.get_submodule(LAYER).weight.double()
    path = worlds.adapter(tmp_path / "a", made)
    merge(made, Adapter.open(path, "a"))
    tensors = load_file(path / "adapter_model.safetensors")
    exact = before + 2 * tensors[B].double() @ tensors[A].double()
    assert torch.equal(made.get_submodule(LAYER).weight, exact.bfloat16())


def test_the_rank_and_the_name_are_kept(tmp_path: Path) -> None:
    adapter = Adapter.open(worlds.adapter(tmp_path / "a", worlds.model(), rank=3), "helper")
    assert (adapter.name, adapter.rank) == ("helper", 3)
    assert adapter.sha256 == adapter_digest(tmp_path / "a")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_changed_file_is_another_adapter(tmp_path: Path, file: str) -> None:
    path = worlds.adapter(tmp_path / "a", worlds.model())
    adapter = Adapter.open(path, "helper")
    card = AdapterCard(name="helper", sha256=adapter.sha256, rank=4, self_test={}, tolerance={})
    adapter.verify(card)
    content = bytearray((path / file).read_bytes())
    # A last weight's bit, or the text of the configuration in another layout.
    content[-2:] = b" }" if file.endswith("json") else bytes([content[-2], content[-1] ^ 1])
    (path / file).write_bytes(content)
    with pytest.raises(AdapterError, match="is not the 'helper' that the bundle lists: its digest is"):
        Adapter.open(path, "helper").verify(card)


def test_the_digest_is_of_both_files_by_name(tmp_path: Path) -> None:
    path = worlds.adapter(tmp_path / "a", worlds.model())
    (path / "README.md").write_text("not part of it")
    expected = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        expected.update(name.encode() + b"\0" + hashlib.sha256((path / name).read_bytes()).digest())
    assert adapter_digest(path) == expected.hexdigest()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora = True"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
    ({"bias": "all"}, "bias = 'all'"),
    ({"bias": "lora_only"}, "bias = 'lora_only'"),
    ({"lora_bias": True}, "lora_bias = True"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"a_feature_of_next_year": 1}, "a_feature_of_next_year = 1"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = 'pissa_niter_16'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
    ({"use_dora": True, "bias": "all"}, "bias = 'all'; use_dora = True"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
    ({"r": 0}, "r is 0, expected a positive integer"),
    ({"r": True}, "r is True"),
    ({"r": "8"}, "r is '8'"),
    ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
    ({"lora_alpha": math.inf}, "lora_alpha is inf"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_is_more_than_plain_lora_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = worlds.adapter(tmp_path / "a", worlds.model(), **settings)
    with pytest.raises(AdapterError, match=message):
        Adapter.open(path, "a")


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_ways_to_start_that_leave_the_base_alone_are_read(tmp_path: Path, start: Any) -> None:
    Adapter.open(worlds.adapter(tmp_path / "a", worlds.model(), init_lora_weights=start), "a")


ODD: list[tuple[dict[str, torch.Tensor], dict[str, Any], str]] = [
    ({A: torch.zeros(4, 32)}, {}, f"lora_A of {LAYER} without the other half"),
    ({B: torch.zeros(32, 4)}, {}, f"lora_B of {LAYER} without the other half"),
    ({A: torch.zeros(3, 32), B: torch.zeros(32, 3)}, {}, r"\[3, 32\] and \[32, 3\], expected \[4, 32\]"),
    ({A: torch.zeros(4, 31), B: torch.zeros(32, 4)}, {}, r"\[4, 31\] and"),
    ({A: torch.zeros(4, 32), B: torch.full((32, 4), math.nan)}, {}, "not a finite number"),
    ({A: torch.zeros(4, 32, dtype=torch.int8), B: torch.zeros(32, 4)}, {}, "not a finite number"),
    ({}, {}, "holds no tensors for q_proj"),
    ({}, {"target_modules": "all-linear"}, "holds no tensors for any module"),
    (
        {A: torch.zeros(4, 32), B: torch.zeros(32, 4)},
        {"target_modules": ["q_proj", "z_proj"]},
        "holds no tensors for z_proj",
    ),
    ({A.replace("lora_A.weight", "lora_A.bias"): torch.zeros(4)}, {}, r"holds the tensor .*lora_A\.bias"),
    (
        {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(4)},
        {},
        r"holds the tensor .*lora_magnitude_vector",
    ),
    ({A.removeprefix("base_model.model."): torch.zeros(4, 32)}, {}, "holds the tensor model.layers"),
]


@pytest.mark.parametrize(("tensors", "settings", "message"), ODD)
def test_tensors_that_are_no_plain_lora_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], message: str
) -> None:
    made = worlds.model()
    path = worlds.adapter(tmp_path / "a", made, ["q_proj"], tensors=tensors, **settings)
    with pytest.raises(AdapterError, match=message):
        merge(made, Adapter.open(path, "a"))


@pytest.mark.parametrize(
    "module", ["lm_head", "model.layers.7.self_attn.q_proj", "model.layers.1.input_layernorm", "model.norm"]
)
def test_what_is_no_linear_layer_of_a_block_is_refused_and_nothing_is_merged(
    tmp_path: Path, module: str
) -> None:
    made = worlds.model()
    tensors = {A: torch.ones(4, 32), B: torch.ones(32, 4)}
    tensors |= {name.replace(LAYER, module): tensor.clone() for name, tensor in tensors.items()}
    path = worlds.adapter(tmp_path / "a", made, tensors=tensors, target_modules="all-linear")
    with pytest.raises(AdapterError, match=f"changes {module}, which is no linear layer of a decoder block"):
        merge(made, Adapter.open(path, "a"))
    assert torch.equal(made.get_submodule(LAYER).weight, worlds.model().get_submodule(LAYER).weight)


def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    made = worlds.model()
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json; expected a LoRA adapter"):
        Adapter.open(tmp_path, "a")
    path = worlds.adapter(tmp_path / "a", made)
    adapter = Adapter.open(path, "a")
    (path / "adapter_model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(AdapterError, match="is not readable"):
        merge(made, adapter)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"holds no adapter_model\.safetensors"):
        Adapter.open(path, "a")
    path = worlds.adapter(tmp_path / "b", made)
    for text, message in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=message):
            Adapter.open(path, "b")


def test_a_pattern_for_targets_is_what_the_tensors_say(tmp_path: Path) -> None:
    made = worlds.model()
    path = worlds.adapter(tmp_path / "a", made, ["q_proj"], target_modules=r".*\.q_proj")
    assert json.loads((path / "adapter_config.json").read_text())["target_modules"] == r".*\.q_proj"
    merge(made, Adapter.open(path, "a"))
    assert not torch.equal(made.get_submodule(LAYER).weight, worlds.model().get_submodule(LAYER).weight)

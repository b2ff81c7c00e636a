"""Checkpoints with 4-bit weights: what is fitted offline is what the engine scores. One engine each dtype."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from guard.bundle import Bundle
from guard.capture import read_prompts
from guard.checkpoint import Checkpoint
from guard.engine import selftest
from guard.engine.errors import GuardStartupError
from guard.engine.quantisation import refuse_fused
from loadtests.random_model import Reference, make_model
from tests.e2e.inprocess import ENGINE, ask, guarded, sampling, scheduler, shut_down
from tests.engine import architectures, quantised, world

AGREEMENT = {"float16": 0.05, "bfloat16": 0.4}
"""Largest |difference| of scores that spread over some three; bfloat16 is eight times as coarse."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    models = quantised.make_models(root)
    quantised.make_bundle(root / "bundle", models)
    return models, root / "bundle"


@pytest.fixture(scope="module")
def prompts():
    return world.prompts(32, seed=61, longest=250)


@pytest.fixture(scope="module")
def expected(made, prompts):
    """Scores of the ordinary checkpoint with the same weights, in float32."""
    models, directory = made
    reference = Reference(models.expanded, quantised.SITES)
    return Bundle.load(directory).logits(np.stack([reference.features(prompt) for prompt in prompts]))


def test_the_quantisation_is_such_that_it_matters(made, tmp_path, prompts, expected):
    """Scores of the weights before they were rounded lie further off than any difference accepted below."""
    original = Reference(make_model(tmp_path / "model", quantised.SIZES), quantised.SITES)
    scores = Bundle.load(made[1]).logits(np.stack([original.features(prompt) for prompt in prompts]))
    assert np.abs(scores - expected).max() > 2 * AGREEMENT["bfloat16"]


def test_offline_reading_is_that_of_the_expanded_weights(made, prompts, expected):
    models, directory = made
    model = Checkpoint.open(models.quantised).load_model()
    read = read_prompts(model, quantised.SITES, prompts)
    assert np.abs(Bundle.load(directory).logits(read) - expected).max() < 1e-3


@pytest.mark.parametrize("dtype", sorted(AGREEMENT))
def test_engine_scores_what_the_expanded_weights_give(made, prompts, expected, dtype):
    models, directory = made
    bundle = Bundle.load(directory)
    llm = guarded(models.quantised, directory, dtype=dtype)
    try:
        selftest.run(llm, bundle.card.self_test.prompts)
        scheduler(llm).reset_prefix_cache()
        for cached in (False, True):
            answers = ask(llm, prompts, sampling(ignore_eos=True))
            assert not cached or sum(got.cached > 0 for got in answers) >= 8  # few blocks: some are evicted
            scores = np.array([got.verdict.logit for got in answers])
            assert np.abs(scores - expected).max() <= AGREEMENT[dtype]
            for got, logit in zip(answers, expected, strict=True):
                if abs(logit) > AGREEMENT[dtype]:
                    action = ("refuse", 0) if logit > 0 else ("pass", 12)
                    assert (got.verdict.action, len(got.tokens)) == action
    finally:
        shut_down(llm)


def configuration(model, **options):
    from vllm.engine.arg_utils import EngineArgs

    options = {**ENGINE, "dtype": "float16", **options}
    return EngineArgs(model=str(model), **options).create_engine_config()


def refused(config):
    from guard.engine.support import refuse_unsupported

    with pytest.raises(GuardStartupError) as caught:
        refuse_unsupported(config)
    return str(caught.value)


@pytest.fixture
def plain(tmp_path):
    return make_model(tmp_path / "model", quantised.SIZES)


def test_what_was_shown_is_not_refused(made):
    from guard.engine.support import refuse_unsupported

    refuse_unsupported(configuration(made[0].quantised))


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (quantised.config("w8a8"), "compressed-tensors with rounded inputs"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
            "awq (transformers reads it only with the package gptqmodel)",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
            "gptq (transformers reads it only with the package gptqmodel)",
        ),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8 (not run)"),
    ],
    ids=["w8a8", "awq", "gptq", "fp8"],
)
def test_quantised_checkpoint_of_another_kind_is_refused_by_name(plain, document, sentence):
    told = refused(configuration(quantised.declare(plain, document)))
    assert f"checkpoints quantised as {sentence}" in told
    assert "W4A16" in told


def test_quantisation_while_loading_is_refused(plain):
    told = refused(configuration(plain, quantization="int8_per_channel_weight_only"))
    assert "quantisation while loading (--quantization " in told


def test_float32_on_four_bit_weights_is_refused(made):
    assert "--dtype float16 or --dtype bfloat16" in refused(configuration(made[0].quantised, dtype="float32"))


def test_adapters_on_a_quantised_checkpoint_are_refused(made):
    told = refused(configuration(made[0].quantised, enable_lora=True))
    assert "LoRA adapters on a quantised checkpoint" in told


def test_quantised_mixture_is_refused(tmp_path):
    mixture = architectures.make_model(tmp_path / "model", "mixtral")
    told = refused(configuration(quantised.declare(mixture, quantised.config("w4a16"))))
    assert "quantised mixtures of experts" in told


class Layers(nn.Module):
    """Two layers; the second has the kernel that vLLM takes for FP8 with fixed input scales."""

    def __init__(self, *, wrapped=False):
        from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
        from vllm.model_executor.layers.fusion.quant_activation import expose_input_quant_key
        from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

        super().__init__()
        self.plain, fused = nn.Linear(2, 2), nn.Linear(2, 2)
        # Its constructor asks for a GPU; the key depends on the configuration alone.
        kernel = object.__new__(CutlassFP8ScaledMMLinearKernel)
        kernel.config = SimpleNamespace(activation_quant_key=kFp8StaticTensorSym)
        expose_input_quant_key(fused, kernel)
        self.fused = fused
        if wrapped:
            self.fused = nn.Module()
            self.fused.base_layer = fused


@pytest.mark.parametrize("wrapped", [False, True], ids=["layer", "under-lora"])
def test_layer_that_may_be_handed_a_quantised_object_is_refused_by_name(wrapped):
    layers = Layers(wrapped=wrapped)
    refuse_fused(layers, ["plain"])
    with pytest.raises(GuardStartupError, match="fused takes its input already quantised"):
        refuse_fused(layers, ["plain", "fused"])


def test_engine_with_such_a_layer_does_not_start(made, monkeypatch):
    from vllm.model_executor.layers.fusion.quant_activation import expose_input_quant_key
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16

    whole = CompressedTensorsWNA16.process_weights_after_loading

    def process(scheme, layer):
        whole(scheme, layer)
        expose_input_quant_key(layer, SimpleNamespace(input_quant_key=lambda: "a key"))

    monkeypatch.setattr(CompressedTensorsWNA16, "process_weights_after_loading", process)
    with pytest.raises(
        GuardStartupError, match=r"layers\.1\.mlp\.down_proj takes its input already quantised"
    ):
        guarded(made[0].quantised, made[1], dtype="float16")


def test_eight_bit_inputs_are_rounded_by_other_scales_offline_and_in_the_engine():
    """Why checkpoints with rounded inputs are refused."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
    from vllm._custom_ops import onednn_scaled_int8_quant

    x = torch.tensor([[0.5, -2.0, 1.0, 0.25]])
    rounding = quantised.config("w8a8")["config_groups"]["group_0"]["input_activations"]
    offline, _ = compute_dynamic_scales_and_zp(x, QuantizationArgs(**rounding), nn.Linear(4, 4))
    _, engine, _ = onednn_scaled_int8_quant(x)
    assert (float(engine), float(offline)) == (pytest.approx(2 / 127), pytest.approx(2 / 127.5))

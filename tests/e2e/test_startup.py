"""What does not start, and the sentence it ends in. Needs vLLM's configuration, but no engine."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from guard.bundle import Bundle
from guard.engine import launch
from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV, SIGNED_ENV, GuardConfig, verify_served_model
from guard.engine.errors import GuardStartupError
from guard.scorer import Scorer
from guard.signature import make_key
from tests.e2e.inprocess import ENGINE, SETTINGS
from tests.e2e.servers import ENVIRONMENT, engine_command, free_port, process
from tests.engine import architectures, world

WINDOW = {"use_sliding_window": True, "sliding_window": 40}


@pytest.fixture(scope="module", autouse=True)
def _settings():
    os.environ.update(SETTINGS)


def configuration(model, **options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), **{**ENGINE, **options}).create_engine_config()


def refused(config):
    from guard.engine.support import refuse_unsupported

    with pytest.raises(GuardStartupError) as caught:
        refuse_unsupported(config)
    return str(caught.value)


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": False},
        {"enable_lora": True, "max_loras": 2},
        {"tensor_parallel_size": 2},
        {"speculative_config": NGRAM},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_supported_configuration_is_not_refused(tiny_model, options):
    from guard.engine.support import refuse_unsupported

    refuse_unsupported(configuration(tiny_model, **options))


def test_modes_that_no_cpu_configuration_can_have_are_not_refused(tiny_model, monkeypatch):
    from guard.engine.support import refuse_unsupported

    config = configuration(tiny_model)
    config.scheduler_config.async_scheduling = True
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    config.parallel_config.data_parallel_size = config.parallel_config.data_parallel_size_local = 2
    refuse_unsupported(config)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"hf_overrides": {"rms_norm_eps": 1e-3}}, "--hf-overrides"),
        ({"hf_overrides": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
         "(rope_type)"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
         "--kv-transfer-config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_unsupported_option_is_refused_by_name(tiny_model, options, name):
    assert name in refused(configuration(tiny_model, **options))


def test_other_speculation_is_refused(tiny_model):
    config = configuration(tiny_model, speculative_config=NGRAM)
    config.speculative_config.method = "eagle"
    assert "--speculative-config" in refused(config)


@pytest.mark.parametrize("kind", sorted(architectures.SIZES))
def test_further_architectures_are_not_refused(tmp_path, kind):
    from guard.engine.support import refuse_unsupported

    refuse_unsupported(configuration(architectures.make_model(tmp_path / "model", kind)))


@pytest.mark.parametrize(
    ("kind", "sizes", "sentence"),
    [
        ("qwen2", {**WINDOW, "max_window_layers": 2}, "sliding windows"),
        ("qwen2", {**WINDOW, "max_window_layers": 0}, "sliding windows"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("phi3_longrope", {"original_max_position_embeddings": 511}, "lower --max-model-len"),
        ("mixtral", {"sliding_window": 40}, "a mixture of experts with a sliding window"),
        ("qwen2_moe", WINDOW, "a mixture of experts with a sliding window"),
        ("qwen3_moe", WINDOW, "a mixture of experts with a sliding window"),
        ("olmoe", {"clip_qkv": 1.0}, "clip_qkv"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen2_moe", {"qkv_bias": False}, "without qkv_bias"),
    ],
    ids=[
        "window-in-some",
        "window-in-all",
        "bidirectional",
        "longrope",
        "mixtral-window",
        "qwen2_moe-window",
        "qwen3_moe-window",
        "olmoe-clip",
        "olmoe-norm",
        "qwen2_moe-bias",
    ],
)
def test_variant_that_vllm_computes_otherwise_is_refused_by_name(tmp_path, kind, sizes, sentence):
    assert sentence in refused(configuration(architectures.make_model(tmp_path / "model", kind, **sizes)))


def test_mixture_with_adapters_or_data_parallel_ranks_is_refused(tmp_path):
    model = architectures.make_model(tmp_path / "model", "mixtral")
    assert "LoRA adapters with a mixture" in refused(configuration(model, enable_lora=True, max_loras=2))
    config = configuration(model)
    config.parallel_config.data_parallel_size = config.parallel_config.data_parallel_size_local = 2
    assert "data parallelism of a mixture" in refused(config)


def test_switching_windows_off_is_refused_where_there_are_some(tmp_path, tiny_model):
    from guard.engine.support import refuse_unsupported

    model = architectures.make_model(tmp_path / "model", "mistral")
    assert "--disable-sliding-window" in refused(
        configuration(model, disable_sliding_window=True, max_model_len=40)
    )
    refuse_unsupported(configuration(tiny_model, disable_sliding_window=True))


def test_sliding_windows_in_qwen3_are_refused(tmp_path):
    from loadtests.random_model import make_model

    sizes = {**world.SIZES, **WINDOW, "max_window_layers": 0}
    assert "sliding windows" in refused(configuration(make_model(tmp_path / "model", sizes, "qwen3")))


def test_the_other_implementation_of_a_model_is_refused(tiny_model):
    assert "--model-impl" in refused(configuration(tiny_model, model_impl="transformers"))


@pytest.mark.parametrize(
    ("part", "name", "value", "sentence"),
    [
        ("parallel_config", "data_parallel_size", 2, "--data-parallel-size-local"),
        ("parallel_config", "data_parallel_external_lb", True, "--data-parallel-external-lb"),
        ("parallel_config", "data_parallel_hybrid_lb", True, "--data-parallel-hybrid-lb"),
        ("parallel_config", "distributed_executor_backend", "ray", "--distributed-executor-backend"),
        ("parallel_config", "enable_expert_parallel", True, "--enable-expert-parallel"),
        ("parallel_config", "nnodes", 2, "--nnodes"),
        ("cache_config", "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("cache_config", "cache_dtype", "fp8", "--kv-cache-dtype"),
        ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
        (None, "weight_transfer_config", object(), "--weight-transfer-config"),
        ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("parallel_config", "_api_process_count", 2, "--api-server-count"),
        ("parallel_config", "use_ubatching", True, "--enable-dbo"),
        ("model_config", "quantization", "fp8", "--quantization"),
        ("model_config", "runner_type", "pooling", "--runner pooling"),
        ("model_config", "is_multimodal_model", True, "multi-modal"),
        ("model_config", "is_encoder_decoder", True, "encoder-decoder"),
    ],
)
def test_configuration_with_one_field_changed_is_refused(
    tiny_model, monkeypatch, part, name, value, sentence
):
    config = configuration(tiny_model)
    holder = config if part is None else getattr(config, part)
    if isinstance(getattr(type(holder), name, None), property):
        monkeypatch.setattr(type(holder), name, value)
    else:
        setattr(holder, name, value)  # also over a cached_property
    assert sentence in refused(config)


@pytest.mark.parametrize(
    "variable",
    [
        "VLLM_SERVER_DEV_MODE",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
    ],
)
def test_modes_that_are_switched_on_by_the_environment_are_refused(tiny_model, monkeypatch, variable):
    config = configuration(tiny_model)
    monkeypatch.setenv(variable, "1")
    assert variable in refused(config)


def test_sequence_parallelism_is_refused_where_vllm_has_it(tiny_model):
    config = configuration(tiny_model)
    # Set afterwards: until 0.31 vLLM switches it off for small models, from 0.32 on it has none.
    object.__setattr__(config.compilation_config.pass_config, "enable_sp", True)
    assert "enable_sp" in refused(config)


def test_unknown_architecture_is_refused(tiny_model, monkeypatch):
    config = configuration(tiny_model)
    monkeypatch.setattr(type(config.model_config), "architectures", ["DeepseekV3ForCausalLM"])
    told = refused(config)
    assert "DeepseekV3ForCausalLM" in told
    assert "LlamaForCausalLM" in told


def test_launcher_turns_an_unknown_vllm_away_in_one_sentence(monkeypatch, capsys):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.setenv(AUDIENCE_ENV, "")
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert launch.main(["--model", "/nowhere", "--bundle", "/nowhere"]) == 2
    # Told to stop while it starts: that must not end it.
    assert signal.signal(signal.SIGUSR1, before) == signal.SIG_IGN
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "NEURONGUARD_UNTESTED_VLLM=0.99.1" in line


def test_scheduler_turns_an_unknown_vllm_away_however_it_was_started(
    tiny_model, tiny_bundle_dir, monkeypatch
):
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.e2e.inprocess import guarded

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(GuardStartupError, match=r"NEURONGUARD_UNTESTED_VLLM=0\.99\.1"):
        guarded(tiny_model, tiny_bundle_dir)
    cleanup_dist_env_and_memory()


class TestModelBinding:
    def test_other_weights_are_refused(self, tiny_bundle, tiny_model, tmp_path, reference):
        import torch
        from safetensors.torch import load_file, save_file

        other = world.make_model(tmp_path / "other")
        tensors = load_file(other / "model.safetensors")
        tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1.01)
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(GuardStartupError, match="weights digest"):
            verify_served_model(tiny_bundle, str(other), str(other), reference.model.config)

    def test_other_chat_template_is_refused(self, tiny_bundle, tiny_model, tmp_path, reference):
        other = world.make_model(tmp_path / "other")
        (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        with pytest.raises(GuardStartupError, match="chat template digest"):
            verify_served_model(tiny_bundle, str(other), str(other), reference.model.config)

    def test_swapped_bundle_is_refused(self, tiny_bundle, tiny_bundle_dir):
        config = GuardConfig.for_bundle(str(tiny_bundle_dir), tiny_bundle)
        changed = config.model_copy(update={"bundle_sha256": "0" * 64})
        with pytest.raises(GuardStartupError, match="has changed"):
            changed.load_bundle()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--bundle", "/nowhere"], "not a readable bundle"),
        (["--model", "some/hub-name"], "expected a local directory"),
        (["--key-file", "/nowhere"], "cannot read the key file"),
        (["--guard-fpr", "0.5"], "there are: 0.01, 0.001"),
        (["--worker-cls", "some.Worker"], "the guard's own"),
        (["--api-server-count", "2"], "leave out --api-server-count above 1"),
        (["--grpc", None], "leave out --grpc"),
        (["--lora-modules", "stranger=/nowhere"], "not listed in the bundle"),
        (["--require-signed-by", "/nowhere"], "cannot read the public keys"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_launcher_ends_in_one_sentence(
    tiny_model, tiny_bundle_dir, key_file, change, sentence, monkeypatch, capsys
):
    for name in (AUDIENCE_ENV, KEY_FILE_ENV):  # the launcher sets them for its child processes
        monkeypatch.setenv(name, "")
    options = {"--model": str(tiny_model), "--bundle": str(tiny_bundle_dir), "--key-file": str(key_file)}
    options.update([change])
    assert launch.main([part for item in options.items() for part in item if part]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert sentence in line


@pytest.mark.parametrize("by", ["flag", "environment"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("unsigned", "is not signed"),
        ("another key", "which is not one of the trusted keys"),
        ("changed card", "CARD.md is changed since the bundle was signed"),
        ("signature of another bundle", "and this is"),
    ],
)
def test_launcher_starts_nothing_that_a_required_key_has_not_signed(
    tiny_model, tiny_bundle, tiny_bundle_dir, signing_key, tmp_path, damage, sentence, by, monkeypatch, capsys
):
    bundle, keys = Path(shutil.copytree(tiny_bundle_dir, tmp_path / "b")), f"{signing_key}.pub"
    match damage:
        case "unsigned":
            (bundle / "signature.json").unlink()
        case "another key":
            make_key(tmp_path / "other")
            keys = str(tmp_path / "other.pub")
        case "changed card":
            (bundle / "CARD.md").write_text("all is well")
        case "signature of another bundle":
            relabelled = tiny_bundle.card.model_copy(update={"label": "harmful_prompt"})
            Bundle(relabelled, tiny_bundle.scorer, tiny_bundle.patches.values()).save(bundle)
            shutil.copy(tiny_bundle_dir / "signature.json", bundle)
    monkeypatch.setenv(AUDIENCE_ENV, "")
    arguments = ["--model", str(tiny_model), "--bundle", str(bundle)]
    if by == "flag":
        arguments += ["--require-signed-by", keys]
    else:
        monkeypatch.setenv(SIGNED_ENV, keys)
    assert launch.main(arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert sentence in line


@pytest.fixture
def changed_bundle(tiny_bundle, tmp_path):
    """A bundle whose probe was changed after its self-test was recorded."""
    weight = tiny_bundle.scorer.weight.copy()
    weight[0, 3] += 0.5
    return Bundle(
        tiny_bundle.card, Scorer(weight, tiny_bundle.scorer.bias), tiny_bundle.patches.values()
    ).save(tmp_path / "bundle")


def test_engine_that_scores_otherwise_answers_nobody(tiny_model, tiny_bundle, changed_bundle):
    from guard.engine import selftest
    from tests.e2e.inprocess import ask, guarded, sampling, shut_down

    llm = guarded(tiny_model, changed_bundle)
    try:
        with pytest.raises(GuardStartupError, match="self-test failed"):
            selftest.run(llm, tiny_bundle.card.self_test.prompts)
        assert ask(llm, world.prompts(2), sampling())[0].verdict.reason == "not_ready"
    finally:
        shut_down(llm)


def test_server_that_scores_otherwise_stops_and_says_why(tiny_model, changed_bundle, key_file, tmp_path):
    log = tmp_path / "engine.log"
    command = engine_command(tiny_model, changed_bundle, key_file, "tiny", free_port())
    with process(command, ENVIRONMENT, log) as child:
        assert child.wait(240) == 3
    assert "self-test failed on" in log.read_text()

from pathlib import Path

import pytest

from service.errors import ConfigError
from service.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONGUARD_KEY_FILE", "keys")


def test_values_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONGUARD_ENGINE_URL", "http://10.0.0.1:9/")
    monkeypatch.setenv("NEURONGUARD_PORT", "81")
    settings = load_settings()
    assert settings.engines == ("http://10.0.0.1:9",)
    assert (settings.port, settings.key_file) == (81, Path("keys"))


def test_several_engines_have_commas_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONGUARD_ENGINE_URL", "http://a:1, http://b:2/")
    assert load_settings().engines == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NEURONGUARD_PORT", "many"),
        ("NEURONGUARD_ENGINE_URL", "engine"),
        ("NEURONGUARD_ENGINE_URL", ""),
        ("NEURONGUARD_ENGINE_URL", "http://a,http://a"),
        ("NEURONGUARD_IDLE_TIMEOUT", "0"),
        ("NEURONGUARD_MAX_SIBLINGS", "5000"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_the_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_a_missing_key_file_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURONGUARD_KEY_FILE")
    with pytest.raises(ConfigError, match="NEURONGUARD_KEY_FILE is not set"):
        load_settings()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Settings(key_file=Path("k"), host=host).loopback is loopback


def file(folder: Path, text: str) -> Path:
    path = folder / "gateway.yaml"
    path.write_text(text)
    return path


def test_values_come_from_a_file_too_and_the_environment_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(
        tmp_path, "port: 81\nhost: 10.0.0.1\nengine_url: ['http://a:1', 'http://b:2']\naffinity: true\n"
    )
    monkeypatch.setenv("NEURONGUARD_PORT", "82")
    settings = load_settings(path)
    assert (settings.port, settings.host, settings.affinity) == (82, "10.0.0.1", True)
    assert settings.engines == ("http://a:1", "http://b:2")
    monkeypatch.setenv("NEURONGUARD_CONFIG", str(path))
    assert load_settings().host == "10.0.0.1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("host: h\nport: many\n", "line 2: port: "),
        ("host: h\n\npost: 1\n", "line 3: post: it is not a known setting"),
        ("port: 1\nport: 2\n", "'port' is given twice"),
        ("- port", "must be a mapping"),
        ("{", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_the_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(file(tmp_path, text))
    assert says in str(caught.value)
    assert "gateway.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_settings(tmp_path / "nowhere.yaml")

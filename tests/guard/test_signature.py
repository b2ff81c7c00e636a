"""Who vouches for a bundle: every byte of it, or the engine does not start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec

from guard.bundle import Bundle
from guard.engine.config import SIGNED_ENV, GuardConfig
from guard.engine.errors import GuardStartupError
from guard.public_keys import PublicKeyError, read_public_keys
from guard.signature import SignatureError, load_key, make_key, sign, verify
from tests.guard import worlds
from tests.guard.test_cli import run


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def signed(tmp_path: Path, key: Path) -> Path:
    directory = worlds.bundle().save(tmp_path / "b")
    sign(directory, load_key(key))
    return directory


def trusted(key: Path) -> tuple[str, ...]:
    return read_public_keys(f"{key}.pub")


def signer(directory: Path, keys: tuple[str, ...] | None = None) -> str | None:
    """As an engine asks."""
    bundle = Bundle.load(directory)
    return GuardConfig.for_bundle(str(directory), bundle, trusted_keys=keys).signed_by(bundle)


def test_a_signed_bundle_is_accepted_by_those_who_trust_the_key(signed: Path, key: Path) -> None:
    assert (signer(signed, trusted(key)),) == trusted(key)
    assert (signer(signed),) == trusted(key)


def test_signing_does_not_change_the_digest(signed: Path) -> None:
    assert Bundle.load(signed).digest == worlds.bundle().digest


def test_an_unsigned_bundle_is_refused_where_a_signature_is_required(tmp_path: Path, key: Path) -> None:
    directory = worlds.bundle().save(tmp_path / "b")
    assert signer(directory) is None
    with pytest.raises(GuardStartupError, match=r"is not signed \(no signature\.json\)"):
        signer(directory, trusted(key))


def test_a_bundle_signed_by_somebody_else_is_refused_by_the_name_of_the_key(
    tmp_path: Path, signed: Path, key: Path
) -> None:
    other = make_key(tmp_path / "other")
    with pytest.raises(
        GuardStartupError, match=f"{trusted(key)[0]}, which is not one of the trusted keys: {other}"
    ):
        signer(signed, (other,))


def test_the_environment_requires_a_signature_however_the_engine_was_started(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = worlds.bundle().save(tmp_path / "b")
    monkeypatch.setenv(SIGNED_ENV, f"{key}.pub")
    config = GuardConfig.for_bundle(str(directory), Bundle.load(directory))
    with pytest.raises(GuardStartupError, match="is not signed"):
        config.load_bundle()
    sign(directory, load_key(key))
    assert config.load_bundle().digest == Bundle.load(directory).digest
    monkeypatch.setenv(SIGNED_ENV, str(tmp_path / "gone"))
    with pytest.raises(GuardStartupError, match="cannot read the public keys"):
        config.load_bundle()


@pytest.mark.parametrize("file", ["guard.json", "guard.safetensors", "CARD.md", "signature.json"])
def test_a_change_of_any_byte_of_any_file_is_refused(signed: Path, key: Path, file: str) -> None:
    path, keys = signed / file, trusted(key)
    content = path.read_bytes()
    # Every byte of a signature; of the others as many as keep this short, both ends among them.
    step = 1 if len(content) < 600 else len(content) // 150
    places = sorted({*range(0, len(content), step), len(content) - 1})
    digest = Bundle.load(signed).digest
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            with pytest.raises(SignatureError):
                verify(signed, digest, keys)
        finally:
            path.write_bytes(content)
    for shorter_or_longer in (content[:-1], content + b"\n", b""):
        path.write_bytes(shorter_or_longer)
        with pytest.raises(SignatureError):
            verify(signed, digest, keys)
    path.write_bytes(content)
    assert (verify(signed, digest, keys),) == keys


def test_a_file_that_is_added_or_taken_away_is_refused(signed: Path, key: Path) -> None:
    digest = Bundle.load(signed).digest
    (signed / "notes.txt").write_text("x")
    with pytest.raises(SignatureError, match=r"notes\.txt is new since the bundle was signed"):
        verify(signed, digest, trusted(key))
    (signed / "notes.txt").unlink()
    (signed / "folder").mkdir()
    with pytest.raises(SignatureError, match="is not a file"):
        verify(signed, digest, trusted(key))
    (signed / "folder").rmdir()
    (signed / "CARD.md").unlink()
    with pytest.raises(SignatureError, match=r"CARD\.md is missing since"):
        verify(signed, digest, trusted(key))


def test_hidden_files_of_a_mount_are_no_part_of_a_bundle(signed: Path, key: Path) -> None:
    (signed / "..data").mkdir()
    assert signer(signed, trusted(key)) is not None


def test_a_signature_does_not_carry_over_to_another_bundle(tmp_path: Path, signed: Path, key: Path) -> None:
    other = worlds.bundle(label="unsafe_output").save(tmp_path / "other")
    shutil.copy(signed / "signature.json", other)
    with pytest.raises(GuardStartupError, match="and this is"):
        signer(other, trusted(key))


def test_a_signature_that_is_there_must_hold_even_where_none_is_required(signed: Path) -> None:
    (signed / "CARD.md").write_text("all is well")
    with pytest.raises(GuardStartupError, match=r"CARD\.md is changed since the bundle was signed"):
        signer(signed)


def test_a_signature_over_something_else_than_bundles_is_worth_nothing(signed: Path, key: Path) -> None:
    """The message begins with its purpose: the same content signed without it does not verify."""
    document = json.loads((signed / "signature.json").read_text())
    content = json.dumps({k: document[k] for k in ("bundle", "files")}, sort_keys=True, separators=(",", ":"))
    document["signature"] = load_key(key).sign(content.encode()).hex()
    (signed / "signature.json").write_text(json.dumps(document))
    with pytest.raises(GuardStartupError, match="is not valid for the key that it names"):
        signer(signed, trusted(key))


def test_what_is_written_anew_is_not_signed(signed: Path) -> None:
    Bundle.load(signed).save(signed)
    assert not (signed / "signature.json").exists()


def test_a_key_is_private_and_is_never_overwritten(tmp_path: Path) -> None:
    result = run("bundle", "keygen", tmp_path / "key")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"key", "key.pub"}
    assert read_public_keys(tmp_path / "key.pub")[0] in result.output
    again = run("bundle", "keygen", tmp_path / "key")
    assert again.exit_code == 1
    assert "a key is never overwritten" in again.output
    (tmp_path / "half.pub").touch()
    assert run("bundle", "keygen", tmp_path / "half").exit_code == 1
    assert not (tmp_path / "half").exists()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "half.pub"} == before


def test_two_keys_are_two_keys(tmp_path: Path) -> None:
    assert make_key(tmp_path / "a") != make_key(tmp_path / "b")


@pytest.mark.parametrize(
    "damage", ["open to others", "missing", "public", "password", "another kind", "no key"]
)
def test_a_private_key_that_cannot_sign_is_refused(tmp_path: Path, key: Path, damage: str) -> None:
    def write(made: object, encryption: s.KeySerializationEncryption) -> None:
        pem = made.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption)  # type: ignore[attr-defined]
        key.write_bytes(pem)

    words = "is not a private key"
    match damage:
        case "open to others":
            key.chmod(0o640)
            words = "run: chmod 600"
        case "missing":
            key.unlink()
            words = "cannot read the private key"
        case "public":
            key.write_bytes(Path(f"{key}.pub").read_bytes())
        case "password":
            write(load_key(key), s.BestAvailableEncryption(b"word"))
        case "another kind":
            write(ec.generate_private_key(ec.SECP256R1()), s.NoEncryption())
            words = "expected Ed25519"
        case "no key":
            key.write_text("hello")
    result = run("bundle", "sign", worlds.bundle().save(tmp_path / "b"), "--key", key)
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "b" / "signature.json").exists()


def test_a_public_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    file = tmp_path / "k.pub"
    file.write_bytes(public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(PublicKeyError, match="of another kind; expected Ed25519"):
        read_public_keys(file)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_a_key_is_what_openssl_says_it_is(key: Path) -> None:
    said = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", f"{key}.pub", "-noout", "-text"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert trusted(key)[0] in "".join(said.partition("pub:")[2].split()).replace(":", "")
    made = subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519"], capture_output=True, check=True
    ).stdout
    key.write_bytes(made)
    os.chmod(key, 0o600)
    load_key(key)


def test_the_command_signs_what_the_engine_then_accepts(tmp_path: Path, key: Path) -> None:
    directory = worlds.bundle().save(tmp_path / "b")
    result = run("bundle", "sign", directory, "--key", key)
    assert result.exit_code == 0, result.output
    assert worlds.bundle().digest in result.output
    assert signer(directory, trusted(key)) == trusted(key)[0]
    assert (directory / "signature.json").stat().st_mode & 0o777 == 0o644


def test_flags_for_another_launcher_carry_the_keys(tmp_path: Path, signed: Path, key: Path) -> None:
    result = run("bundle", "flags", signed, "--require-signed-by", f"{key}.pub")
    assert result.exit_code == 0, result.output
    assert trusted(key)[0] in result.output
    make_key(tmp_path / "other")
    refused = run("bundle", "flags", signed, "--require-signed-by", tmp_path / "other.pub")
    assert refused.exit_code == 1
    assert "not one of the trusted keys" in refused.output

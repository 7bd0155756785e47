"""Signed bundles: what is refused, and what each policy lets pass."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edge_anomaly_runtime.bundle import MANIFEST, MANIFEST_DIGEST, MANIFEST_SIGNATURE, digest_line, read_bundle
from edge_anomaly_runtime.errors import ArtefactError, MissingRequirementError, UsageError
from edge_anomaly_runtime.signing import Policy, check_signature, read_public_key, read_trust, sign_bundle


def write_keys(folder: Path, name: str = "site", *, password: bytes | None = None) -> tuple[Path, Path]:
    """Write a private and a public key and return their paths; the public one alone lies in `folder`/trust."""
    key = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    )
    private, public = folder / f"{name}.key", folder / "trust" / f"{name}.pem"
    public.parent.mkdir(exist_ok=True)
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def part(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "part.eab"))


def test_a_signed_bundle_is_read_and_its_signer_is_named(part: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    key_id = sign_bundle(part, private)
    content = json.loads((part / MANIFEST_SIGNATURE).read_text())
    assert (content["alg"], content["key_id"]) == ("ed25519", key_id)
    assert len(base64.b64decode(content["sig"])) == 64
    keys = read_trust(tmp_path / "trust")
    assert list(keys) == [key_id]
    assert check_signature(read_bundle(part), keys) == key_id
    assert read_public_key(public)[0] == key_id


def test_openssl_agrees_on_the_signature(part: Path, tmp_path: Path) -> None:
    """The manual check of the docs; the bytes signed are the manifest's and nothing else."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    private, public = write_keys(tmp_path)
    sign_bundle(part, private)
    signature = tmp_path / "raw.sig"
    signature.write_bytes(base64.b64decode(json.loads((part / MANIFEST_SIGNATURE).read_text())["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(public), "-sigfile", str(signature)]
    assert subprocess.run([*command, "-in", str(part / MANIFEST)], capture_output=True).returncode == 0


def test_unsigned_wrong_key_changed_byte_and_stripped_signature_are_refused(part: Path, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path)
    stranger, _ = write_keys(_folder(tmp_path / "other"))
    keys = read_trust(tmp_path / "trust")
    with pytest.raises(ArtefactError, match="is not signed"):
        check_signature(read_bundle(part), keys)
    sign_bundle(part, stranger)
    with pytest.raises(ArtefactError, match="which is not trusted here"):
        check_signature(read_bundle(part), keys)
    sign_bundle(part, private, force=True)
    data = (part / MANIFEST).read_bytes().replace(b'"seed":0', b'"seed":1').replace(b'"seed": 0', b'"seed": 1')
    (part / MANIFEST).write_bytes(data)
    (part / MANIFEST_DIGEST).write_bytes(digest_line(data))
    with pytest.raises(ArtefactError, match="its manifest was changed"):
        check_signature(read_bundle(part), keys)
    (part / MANIFEST_SIGNATURE).unlink()
    with pytest.raises(ArtefactError, match="a signature is required"):
        check_signature(read_bundle(part), keys)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("policy", "signed", "with_key", "passes"),
    [
        ("auto", False, False, True),
        ("auto", False, True, False),
        ("auto", True, True, True),
        ("if-present", False, True, True),
        ("if-present", True, True, True),
        ("if-present", True, False, False),
        ("require", False, False, False),
        ("require", True, False, False),
        ("off", True, False, True),
        ("off", False, True, True),
    ],
)
def test_policies(part: Path, tmp_path: Path, policy: Policy, signed: bool, with_key: bool, passes: bool) -> None:
    private, _ = write_keys(tmp_path)
    if signed:
        sign_bundle(part, private)
    keys = read_trust(tmp_path / "trust") if with_key else {}
    if passes:
        assert (check_signature(read_bundle(part), keys, policy=policy) is not None) == (
            signed and with_key and policy != "off"
        )
    else:
        with pytest.raises(ArtefactError):
            check_signature(read_bundle(part), keys, policy=policy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[1]",
        b"{}",
        b"\xff\xfe",
        b"[" * 4000,
        b'{"alg":"none","key_id":"sha256:0","sig":""}',
        b'{"alg":"ed25519","key_id":"sha256:0","sig":"AAAA"}',
        b'{"alg":"ed25519","key_id":["x"],"sig":"' + base64.b64encode(bytes(64)) + b'"}',
        b'{"alg":"ed25519","key_id":"sha256:0","sig":5}',
        b" " * 5000,
    ],
)
def test_rubbish_in_place_of_a_signature_is_refused(part: Path, tmp_path: Path, content: bytes) -> None:
    write_keys(tmp_path)
    (part / MANIFEST_SIGNATURE).write_bytes(content)
    with pytest.raises(ArtefactError):
        check_signature(read_bundle(part), read_trust(tmp_path / "trust"))


def test_a_link_in_place_of_a_signature_is_refused(part: Path, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path)
    sign_bundle(part, private)
    (part / MANIFEST_SIGNATURE).rename(tmp_path / "elsewhere")
    (part / MANIFEST_SIGNATURE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="a link or a special file"):
        check_signature(read_bundle(part), read_trust(tmp_path / "trust"))


def test_a_signature_is_not_replaced_without_force(part: Path, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path)
    sign_bundle(part, private)
    with pytest.raises(UsageError, match="is signed already"):
        sign_bundle(part, private)
    sign_bundle(part, private, force=True)


def test_an_encrypted_key_takes_its_password_from_the_environment(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, _ = write_keys(tmp_path, password=b"sesame")
    with pytest.raises(UsageError, match="needs a password in EDGE_ANOMALY_SIGN_PASSWORD"):
        sign_bundle(part, private)
    monkeypatch.setenv("EDGE_ANOMALY_SIGN_PASSWORD", "wrong-canary")
    with pytest.raises(UsageError, match="its password is wrong") as caught:
        sign_bundle(part, private)
    assert "wrong-canary" not in str(caught.value)
    monkeypatch.setenv("EDGE_ANOMALY_SIGN_PASSWORD", "sesame")
    sign_bundle(part, private)


def test_other_keys_are_usage_errors(part: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    other = tmp_path / "x25519.pem"
    pem, info = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    other.write_bytes(X25519PrivateKey.generate().public_key().public_bytes(pem, info))
    (tmp_path / "text.pem").write_text("no key")
    for file in (private, other, tmp_path / "text.pem"):
        with pytest.raises(UsageError, match="is not an Ed25519 public key"):
            read_public_key(file)
    with pytest.raises(UsageError, match="is not an Ed25519 private key"):
        sign_bundle(part, public)
    with pytest.raises(UsageError, match="Cannot read the key"):
        sign_bundle(part, tmp_path / "absent.key")


def test_without_cryptography_a_trusted_key_is_no_reason_to_let_pass(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, _ = write_keys(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for call in (lambda: read_trust(tmp_path / "trust"), lambda: sign_bundle(part, private)):
        with pytest.raises(MissingRequirementError) as caught:
            call()
        assert 'pip install "edge-anomaly[sign]"' in caught.value.hint

"""Ed25519 signatures of bundles: `manifest.sig` signs the manifest's bytes, and the manifest names every file's hash.

Keys are PEM files as `openssl genpkey -algorithm ed25519` writes them. Trusted are the public keys in a folder; as soon
as it holds one, bundles without a signature of theirs are refused.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .atomic import replace_file
from .bundle import MANIFEST_SIGNATURE, Bundle, read_bundle, read_signature
from .errors import ArtefactError, UsageError, missing_extra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# auto: require as soon as a key is trusted.
Policy = Literal["auto", "require", "if-present", "off"]
POLICIES: tuple[Policy, ...] = ("auto", "require", "if-present", "off")

PASSWORD_ENV = "EDGE_ANOMALY_SIGN_PASSWORD"

_MAX_BYTES = 4096


def sign_bundle(path: Path | str, key: Path, *, force: bool = False) -> str:
    """Verify a bundle, sign its manifest with a private key and return the key's id.

    The password of an encrypted key comes from EDGE_ANOMALY_SIGN_PASSWORD.

    Raises:
        UsageError: the key is not an Ed25519 private key, or there is a signature and `force` is not set.
        ArtefactError: the bundle is damaged.
        MissingRequirementError: cryptography is not installed.
    """
    bundle = read_bundle(path)
    private = _private_key(key)
    if read_signature(bundle.path) is not None and not force:
        raise UsageError(f"{bundle.path} is signed already.", "Pass --force to replace its signature.")
    key_id = key_id_of(private.public_key())
    signature = base64.b64encode(private.sign(bundle.manifest_raw)).decode()
    content = {"alg": "ed25519", "key_id": key_id, "sig": signature}
    replace_file(bundle.path / MANIFEST_SIGNATURE, json.dumps(content).encode() + b"\n")
    return key_id


def check_signature(bundle: Bundle, keys: dict[str, Ed25519PublicKey], *, policy: Policy = "auto") -> str | None:
    """Return the id of the trusted key that signed a bundle, None where the policy lets it pass without.

    require: a good signature by one of `keys`. if-present: a signature that is there must be good. off: do not look.
    auto: require if there are keys, else off.

    Raises:
        ArtefactError: the signature is missing, not by a trusted key, or wrong.
    """
    if policy == "auto":
        policy = "require" if keys else "off"
    if policy == "off":
        return None
    raw = read_signature(bundle.path)
    if raw is None:
        if policy == "if-present":
            return None
        raise ArtefactError(f"{bundle.path} is not signed, and a signature is required.", _HINT)
    key_id, signature = _parsed(bundle.path, raw)
    if key_id not in keys:
        raise ArtefactError(f"{bundle.path} is signed by the key {key_id}, which is not trusted here.", _HINT)
    from cryptography.exceptions import InvalidSignature

    try:
        keys[key_id].verify(signature, bundle.manifest_raw)
    except InvalidSignature:
        raise ArtefactError(
            f"The signature of {bundle.path} is wrong: its manifest was changed, or signed by another key.", _HINT
        ) from None
    return key_id


def read_trust(folder: Path | None) -> dict[str, Ed25519PublicKey]:
    """Return the public keys in a folder, its files *.pem, by key id; none where there is no folder.

    Raises:
        UsageError: a file is not an Ed25519 public key.
        MissingRequirementError: there is a key, but cryptography is not installed.
    """
    if folder is None or not folder.is_dir():
        return {}
    return dict(read_public_key(file) for file in sorted(folder.glob("*.pem")))


def read_public_key(file: Path) -> tuple[str, Ed25519PublicKey]:
    """Return the id and the key of one PEM file; raises what `read_trust` raises."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise missing_extra(f"Checking signatures ({file})", "cryptography", "sign") from None
    data = _key_bytes(file)
    with contextlib.suppress(ValueError, UnsupportedAlgorithm):
        key = load_pem_public_key(data)
        if isinstance(key, Ed25519PublicKey):
            return key_id_of(key), key
    raise _wrong_key(file, "public")


def key_id_of(public: Ed25519PublicKey) -> str:
    """Return 'sha256:' and the first 16 digits of the hash over the key's 32 bytes."""
    return f"sha256:{hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]}"


def _private_key(file: Path) -> Ed25519PrivateKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError:
        raise missing_extra("bundle sign", "cryptography", "sign") from None
    password = os.environ.get(PASSWORD_ENV)
    data = _key_bytes(file)
    try:
        key = load_pem_private_key(data, password.encode() if password else None)
    except TypeError:  # a password too many, or one too few
        needed = "does not need the password of" if password else "needs a password in"
        raise UsageError(f"The key {file} {needed} {PASSWORD_ENV}.", f"Set or unset {PASSWORD_ENV}.") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _wrong_key(file, "private") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _wrong_key(file, "private")
    return key


def _wrong_key(file: Path, kind: str) -> UsageError:
    return UsageError(
        f"{file} is not an Ed25519 {kind} key in PEM form, or its password is wrong.",
        "Make one with: openssl genpkey -algorithm ed25519 -out site.key; openssl pkey -in site.key -pubout",
    )


def _key_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read the key {file}: {error.strerror}.", "Check the path.") from None


def _parsed(path: Path, raw: bytes) -> tuple[str, bytes]:
    """Return key id and the 64 bytes of the signature."""
    try:
        content = json.loads(raw) if len(raw) <= _MAX_BYTES else None
        if not isinstance(content, dict) or set(content) != {"alg", "key_id", "sig"} or content["alg"] != "ed25519":
            raise ValueError
        signature = base64.b64decode(content["sig"], validate=True)
        if len(signature) != 64 or not isinstance(content["key_id"], str):
            raise ValueError
    except (ValueError, TypeError, RecursionError, binascii.Error):
        raise ArtefactError(f"{path / MANIFEST_SIGNATURE} is not a signature of ours.", _HINT) from None
    return content["key_id"], signature


_HINT = "Ask for a bundle signed by a trusted key, or sign it: edge-anomaly bundle sign NAME.eab --key site.key"

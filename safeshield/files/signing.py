"""Ed25519 signatures of files, from the extra `sign`.

A signature covers the SHA-256 digest of a file's header and tensors, so it covers everything that
the file says. Whoever does not have the private key can edit a file and renew its digest, but not
its signature.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from safeshield.files.reading import read_whole

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

    PrivateKey: TypeAlias = str | os.PathLike[str] | Ed25519PrivateKey
    """A private key, or the path of a PEM file that holds one."""
    PublicKey: TypeAlias = str | os.PathLike[str] | Ed25519PublicKey
    """A public key, or the path of a PEM file that holds one."""

UNSIGNED: Final = "unsigned"
NOT_VERIFIED: Final = "signed, not verified"
VERIFIED: Final = "signature verified"
_PURPOSE = b"safeshield file, SHA-256 "
"""What is signed begins so, so that a signature that was made for another purpose is not valid."""
_NEW_KEY = "openssl genpkey -algorithm ed25519 -out key.pem"
_PUBLIC = "openssl pkey -in key.pem -pubout -out public.pem"


def signature_of(digest: str, key: PrivateKey) -> str:
    """Return the signature of a digest, in hexadecimal.

    Args:
        digest: SHA-256 digest of a file's contents, in hexadecimal.
        key: Private key, or the path of its PEM file.

    Raises:
        ImportError: The extra `sign` is not installed.
        FileNotFoundError: There is no such key file.
        TypeError: `key` is no private Ed25519 key and no path.
        ValueError: The file does not hold a private Ed25519 key.
    """
    _, keys = _package()
    known: Any = key
    if not isinstance(key, keys.Ed25519PrivateKey):
        known = _read("sign", key, private=True)
    return str(known.sign(_PURPOSE + digest.encode()).hex())


def check_signature(
    path: str | os.PathLike[str], digest: object, signature: str | None, key: PublicKey
) -> None:
    """Check that a file's digest was signed with the private key that belongs to `key`.

    Args:
        path: The file, for error messages.
        digest: SHA-256 digest that the file states.
        signature: Signature that the file holds, in hexadecimal; None where it is not signed.
        key: Public key, or the path of its PEM file.

    Raises:
        ImportError: The extra `sign` is not installed.
        FileNotFoundError: There is no such key file.
        TypeError: `key` is no public Ed25519 key and no path.
        ValueError: The key's file does not hold a public Ed25519 key, the file is not signed, or
            the signature is not that of this key and these contents.
    """
    exceptions, keys = _package()
    known: Any = key
    if not isinstance(key, keys.Ed25519PublicKey):
        known = _read("verify", key, private=False)
    if signature is None:
        raise ValueError(
            f"{path} must be signed where a key is passed as verify, but it is unsigned: sign it "
            f"with `safeshield sign {path} --key key.pem` if you trust it, or leave verify out"
        )
    try:
        known.verify(bytes.fromhex(signature), _PURPOSE + str(digest).encode())
    except (exceptions.InvalidSignature, ValueError) as error:
        raise ValueError(
            f"{path}: its signature is not valid for the key passed as verify: the file was edited "
            "after it was signed, or was signed with another key; get it again from who signed "
            "it, or pass the public key that belongs to the signing key"
        ) from error


def _package() -> tuple[Any, Any]:
    """Return the modules of `cryptography` with its exceptions and with Ed25519."""
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ImportError(
            "signatures need the package cryptography, which is not installed "
            f'({error}): pip install "safeshield[sign]"'
        ) from error
    return exceptions, ed25519


def _read(argument: str, key: object, *, private: bool) -> Any:  # noqa: ANN401
    """Return the key in a PEM file."""
    from cryptography.hazmat.primitives import serialization

    exceptions, keys = _package()
    kind, name = (
        (keys.Ed25519PrivateKey, "private") if private else (keys.Ed25519PublicKey, "public")
    )
    if not isinstance(key, str | os.PathLike):
        raise TypeError(
            f"{argument} must be a {name} Ed25519 key or the path of its PEM file, got "
            f"{type(key).__name__}"
        )
    path = Path(key)
    try:
        content = read_whole(path)
    except FileNotFoundError as error:
        how = f"`{_NEW_KEY}` makes one" if private else f"`{_PUBLIC}` writes one"
        raise FileNotFoundError(
            f"{argument} must name a PEM file with a {name} Ed25519 key, but there is no file "
            f"'{path}': check the name; {how}"
        ) from error
    try:
        if private:
            found: object = serialization.load_pem_private_key(content, password=None)
        else:
            found = serialization.load_pem_public_key(content)
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm) as error:
        found = error
    if isinstance(found, kind):
        return found
    if private and b"ENCRYPTED" in content:
        holds = "a key with a password; load it with cryptography, and pass the key itself"
    elif not private and b"PRIVATE KEY" in content:
        holds = f"a private key; `{_PUBLIC}` writes its public key"
    else:
        holds = f"none; `{_NEW_KEY}` makes a private key, and `{_PUBLIC}` its public key"
    raise ValueError(
        f"{argument} must name a PEM file with a {name} Ed25519 key, but {path} holds {holds}"
    )

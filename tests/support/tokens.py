"""A stand-in for Clerk's signing side: keys, tokens and the JWKS that names them."""

import base64
import functools
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

ISSUER = "https://clerk.example.com"


@functools.cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """One key per name and process: making one takes a tenth of a second."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw_token(header: Any, payload: Any, signature: bytes = b"no signature") -> str:
    """Three parts of anything; bytes go in as they are, the rest as JSON."""
    parts = [
        part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)
    ]
    return ".".join([*map(b64, parts), b64(signature)])


def hmac_token(header: dict[str, Any], payload: dict[str, Any], secret: bytes) -> str:
    """HS256 by hand: PyJWT would not sign with a PEM."""
    head = ".".join(b64(json.dumps(part).encode()) for part in (header, payload))
    return f"{head}.{b64(hmac.digest(secret, head.encode(), hashlib.sha256))}"


class Signer:
    """Signs as one issuer with one key."""

    def __init__(self, kid: str = "key-1", *, issuer: str = ISSUER, bits: int = 2048) -> None:
        self.kid = kid
        self.issuer = issuer
        self.key = rsa_key(kid, bits)

    def claims(self, *, now: float | None = None, **overrides: Any) -> dict[str, Any]:
        """Clerk's usual claims, a minute long; an override of `...` takes one away."""
        issued = int(time.time() if now is None else now)
        claims = {
            "sub": "user_1",
            "sid": "sess_1",
            "iss": self.issuer,
            "iat": issued,
            "nbf": issued - 10,
            "exp": issued + 60,
            **overrides,
        }
        return {name: value for name, value in claims.items() if value is not ...}

    def mint(
        self,
        *,
        now: float | None = None,
        headers: dict[str, Any] | None = None,
        algorithm: str = "RS256",
        **overrides: Any,
    ) -> str:
        """A signed token.

        Args:
            now: seconds since the epoch; the machine's clock if None.
            headers: set or, where `...`, taken away.
            overrides: claims, as in `claims`.
        """
        return self.sign(
            json.dumps(self.claims(now=now, **overrides)).encode(),
            headers=headers,
            algorithm=algorithm,
        )

    def sign(
        self,
        payload: bytes,
        *,
        headers: dict[str, Any] | bytes | None = None,
        algorithm: str = "RS256",
    ) -> str:
        """Any payload under any header, also one that PyJWT would not write; bytes are the
        whole header's JSON."""
        if not isinstance(headers, bytes):
            header = {"alg": algorithm, "kid": self.kid, "typ": "JWT", **(headers or {})}
            headers = json.dumps({k: v for k, v in header.items() if v is not ...}).encode()
        head = f"{b64(headers)}.{b64(payload)}"
        signature = jwt.get_algorithm_by_name(algorithm).sign(head.encode(), self.key)
        return f"{head}.{b64(signature)}"

    @property
    def pem(self) -> str:
        return (
            self.key.public_key()
            .public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            .decode()
        )

    def jwk(self, **overrides: Any) -> dict[str, Any]:
        numbers = self.key.public_key().public_numbers()
        jwk = {
            "kty": "RSA",
            "use": "sig",
            "alg": "RS256",
            "kid": self.kid,
            "n": b64(numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8)),
            "e": b64(numbers.e.to_bytes(3)),
            **overrides,
        }
        return {name: value for name, value in jwk.items() if value is not ...}

    def jwks(self) -> dict[str, Any]:
        return {"keys": [self.jwk()]}


def jwks_body(*signers: Signer) -> bytes:
    return json.dumps({"keys": [signer.jwk() for signer in signers]}).encode()

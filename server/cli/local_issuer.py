"""A stand-in for Clerk on this machine: a signing key, its tokens, and the JWKS that names it.

For `dev` and nothing else. Key and port are kept in the data folder: tokens and `iss` survive
a restart.
"""

import base64
import contextlib
import hashlib
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from server.cli.ready import write_private

HOST = "127.0.0.1"
KEY_FILE = "issuer.pem"
PORT_FILE = "issuer.port"
DAY_SECONDS = 24 * 3600
REQUEST_SECONDS = 5.0


class SigningKey:
    """An RSA key in a file.

    Args:
        path: a PEM; made if absent.

    Raises:
        OSError: it can be neither read nor made.
        ValueError: it holds no RSA key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            key = _read_key(path)
        else:
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            pem = key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            write_private(path, pem)
        self._key = key
        numbers = key.public_key().public_numbers()
        self._public = {"e": _base64url(numbers.e), "kty": "RSA", "n": _base64url(numbers.n)}
        # RFC 7638: these members, in this order, without a space.
        thumbprint = hashlib.sha256(json.dumps(self._public, separators=(",", ":")).encode())
        self.kid = base64.urlsafe_b64encode(thumbprint.digest()).rstrip(b"=").decode()

    @property
    def jwks(self) -> bytes:
        key = {**self._public, "kid": self.kid, "use": "sig", "alg": "RS256"}
        return json.dumps({"keys": [key]}).encode()

    def sign(
        self,
        subject: str,
        *,
        issuer: str,
        authorized_party: str | None = None,
        seconds: float = DAY_SECONDS,
    ) -> str:
        """A session token as Clerk's version 2 has them.

        Args:
            subject: the user's Clerk id.
            issuer: `iss`.
            authorized_party: `azp`; None leaves it out.
            seconds: until it expires.
        """
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": issuer,
            "sub": subject,
            "sid": f"sess_{secrets.token_hex(12)}",
            "iat": now,
            "nbf": now - 10,
            "exp": now + int(seconds),
            "sts": "active",
            "v": 2,
        }
        if authorized_party is not None:
            claims["azp"] = authorized_party
        return jwt.encode(claims, self._key, algorithm="RS256", headers={"kid": self.kid})


class LocalIssuer:
    """The key and its JWKS on a loopback port, while the block lasts.

    Args:
        data_dir: keeps the key, and the port where it is still free.
    """

    def __init__(self, data_dir: Path) -> None:
        self.key = SigningKey(data_dir / KEY_FILE)
        self._port_file = data_dir / PORT_FILE
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """`iss`."""
        assert self._server is not None
        return f"http://{HOST}:{self._server.server_port}"

    @property
    def publishable_key(self) -> str:
        """As Clerk's: it names the issuer's host."""
        host = self.url.removeprefix("http://")
        return "pk_test_" + base64.b64encode(f"{host}$".encode()).decode()

    def __enter__(self) -> "LocalIssuer":
        handler = _handler(self.key.jwks)
        try:
            port = int(self._port_file.read_text())
            self._server = ThreadingHTTPServer((HOST, port), handler)
        except (OSError, ValueError, OverflowError):
            self._server = ThreadingHTTPServer((HOST, 0), handler)
        self._port_file.write_text(str(self._server.server_port))
        serve = threading.Thread(target=self._server.serve_forever, args=[0.1], daemon=True)
        serve.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()


def _read_key(path: Path) -> rsa.RSAPrivateKey:
    key = None
    with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise ValueError(f"{path} holds no RSA key: remove it, and a new one is made")
    return key


def _handler(jwks: bytes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS

        def do_GET(self) -> None:
            found = self.path == "/.well-known/jwks.json"
            body = jwks if found else b"{}"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def _base64url(number: int) -> str:
    data = number.to_bytes((number.bit_length() + 7) // 8)
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

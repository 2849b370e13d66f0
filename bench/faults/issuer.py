"""A stand-in for Clerk that can be slow, gone, mad, or change its key while tokens are out."""

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

HOST = "127.0.0.1"
TOKEN_SECONDS = 6 * 3600


class Issuer:
    """Signs tokens, and serves the keys for them, while the block lasts.

    Attributes:
        fails: None, or how its endpoint fails: "down", "slow", "garbage".
    """

    def __init__(self) -> None:
        self.fails: str | None = None
        self._keys: list[tuple[str, rsa.RSAPrivateKey]] = []
        self.rotate()
        self._server = _Server((HOST, 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_port}"

    @property
    def publishable_key(self) -> str:
        """As Clerk's: it names the issuer's host."""
        host = self.url.removeprefix("http://")
        return "pk_test_" + base64.b64encode(f"{host}$".encode()).decode()

    @property
    def kid(self) -> str:
        """Of the key that signs now."""
        return self._keys[-1][0]

    def rotate(self) -> None:
        """Sign with a new key from now on. The last one's tokens stay good. Plain."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._keys = [*self._keys[-1:], (f"key-{time.monotonic_ns()}", key)]

    def token(self, subject: str) -> str:
        """A session token for a Clerk user."""
        kid, key = self._keys[-1]
        now = int(time.time())
        claims = {
            "iss": self.url,
            "sub": subject,
            "sid": f"sess_{subject}",
            "iat": now,
            "nbf": now - 10,
            "exp": now + TOKEN_SECONDS,
            "sts": "active",
            "v": 2,
        }
        return jwt.encode(claims, key, algorithm="RS256", headers={"kid": kid})

    @property
    def jwks(self) -> bytes:
        keys = []
        for kid, key in self._keys:
            numbers = key.public_key().public_numbers()
            public = {"e": _base64url(numbers.e), "n": _base64url(numbers.n)}
            keys.append({"kty": "RSA", "use": "sig", "alg": "RS256", "kid": kid, **public})
        return json.dumps({"keys": keys}).encode()

    def __enter__(self) -> "Issuer":
        threading.Thread(target=self._server.serve_forever, args=[0.1], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Who asked has gone: it was too slow for them, as it should be."""


def _handler(issuer: Issuer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_GET(self) -> None:
            if issuer.fails == "down":
                return  # the connection is closed without an answer
            if issuer.fails == "slow":
                time.sleep(8)
            body = b"<html>" if issuer.fails == "garbage" else issuer.jwks
            self.send_response(200)
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

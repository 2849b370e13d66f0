"""Where the issuer's public keys come from: a PEM in the settings, or its JWKS endpoint.

The endpoint is foreign: what it sends is bounded in bytes and in time, and when it is down the
keys that are known stay good. RFC 7517 is the format.
"""

import base64
import contextlib
import functools
import random
import ssl
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal, Protocol
from urllib.parse import urlsplit

import httpx
import msgspec
import structlog
import trio
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from msgspec import Meta

MAX_JWKS_BYTES = 256 * 1024
"""A set of two keys is about 1 kB."""

MAX_READS = 10
"""Of the set, without a pause: more than an issuer changes its keys, fewer than it would notice."""

FIRST_PAUSE_SECONDS = 0.5
"""After a read that failed while none has ever succeeded, doubled each time, jittered by half."""

MIN_KEY_BITS = 2048
"""RFC 7518 §3.3 asks this of RS256."""

log = structlog.get_logger()


class UnknownKey(Exception):
    """The issuer has no such key. It does not carry the key id, which a client chose."""


class KeysUnavailable(Exception):
    """The keys cannot be had now, so a token can be neither believed nor refused.

    Attributes:
        retry_after: seconds until the endpoint is asked again.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__("the issuer's signing keys cannot be had now")
        self.retry_after = retry_after


class KeySource(Protocol):
    @property
    def known(self) -> bool:
        """Whether there are keys at all: without them nobody can be let in."""

    async def prefetch(self) -> None:
        """Have keys before anybody asks; returns when there are some."""

    async def key(self, kid: str | None) -> RSAPublicKey:
        """The public key that `kid` names; None where a token's header has none.

        Raises:
            UnknownKey: there is no such key.
            KeysUnavailable: it cannot be known now whether there is one.
        """


class PemKey:
    """The one key of a deployment that configures it: no network, and any `kid` will do.

    Args:
        pem: a public key; `\\n` may stand for its line breaks, as in many .env files.

    Raises:
        ValueError: it is no RSA public key of at least 2048 bits. Nothing of it is repeated.
    """

    def __init__(self, pem: str) -> None:
        key = None
        # Ours is raised below: the foreign exception may quote what was pasted.
        with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
            key = load_pem_public_key(pem.replace("\\n", "\n").strip().encode())
        if not isinstance(key, RSAPublicKey) or key.key_size < MIN_KEY_BITS:
            raise ValueError(f"not a PEM of an RSA public key of at least {MIN_KEY_BITS} bits")
        self._key = key
        self.known = True

    async def prefetch(self) -> None:
        pass

    async def key(self, kid: str | None) -> RSAPublicKey:  # noqa: ARG002
        return self._key


def jwks_url(issuer: str) -> str:
    """Where Clerk publishes an issuer's keys."""
    return f"{issuer}/.well-known/jwks.json"


async def fetch_jwks(url: str) -> bytes:
    """The body of `url`, over httpx. The caller limits the time.

    Raises:
        ValueError: a status other than 200 (a redirect too), or more than `MAX_JWKS_BYTES`.
        httpx.HTTPError: it could not be had.
    """
    secure = urlsplit(url).scheme == "https"
    body = bytearray()
    async with (
        httpx.AsyncClient(
            verify=_tls_context() if secure else False,
            # Plain http is dev's own loopback: a company's proxy could not reach it.
            trust_env=secure,
            follow_redirects=False,
        ) as client,
        # Unpacked bytes could be a thousand times more than those that were counted.
        client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
    ):
        if response.status_code != 200:
            raise ValueError("not a 200")
        # httpx's generators must not be left half way, as a `raise` in the loop would do;
        # a cancelled read ends them all.
        with trio.CancelScope() as reading:
            async for part in response.aiter_raw():
                body += part
                if len(body) > MAX_JWKS_BYTES:
                    reading.cancel()
    if len(body) > MAX_JWKS_BYTES:
        raise ValueError("too long")
    return bytes(body)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Reading the certificates takes 40 ms, so once per process."""
    return httpx.create_ssl_context()


class _Jwk(msgspec.Struct, frozen=True):
    """A key that can verify RS256; what does not fit is somebody else's."""

    kty: Literal["RSA"]
    kid: Annotated[str, Meta(min_length=1)]
    n: str
    e: str
    use: Literal["sig"] | None = None
    alg: Literal["RS256"] | None = None


class _JwkSet(msgspec.Struct, frozen=True):
    keys: list[msgspec.Raw]


def parse_jwks(body: bytes) -> dict[str, RSAPublicKey]:
    """The usable keys of a set, by `kid`; others are left out (RFC 7517 §5).

    Raises:
        ValueError: it is no JWKS, or has no usable key.
    """
    keys: dict[str, RSAPublicKey] = {}
    try:
        raw_keys = msgspec.json.decode(body, type=_JwkSet).keys
    except (msgspec.DecodeError, RecursionError):
        raw_keys = []
    for raw in raw_keys:
        try:
            jwk = msgspec.json.decode(raw, type=_Jwk)
            key = RSAPublicNumbers(_uint(jwk.e), _uint(jwk.n)).public_key()
        except (msgspec.DecodeError, ValueError, UnsupportedAlgorithm):
            continue
        if key.key_size >= MIN_KEY_BITS:
            keys[jwk.kid] = key
    if not keys:
        raise ValueError("no usable key")
    return keys


def _uint(text: str) -> int:
    """Base64urlUInt (RFC 7518 §2)."""
    return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


class RemoteKeys:
    """The keys of a JWKS endpoint, which is asked as seldom as possible.

    - A known key is answered at once. When the set is older than `max_age`, one caller reads it
      again and waits for that, `timeout` at most; the others get the key that is known.
    - An unknown key makes one caller read the set; those who asked before that share the outcome.
      So an issuer may rotate its keys at any moment. Against floods of unknown keys there are
      `MAX_READS` at once, and one more each `min_interval`.
    - Whether an unknown key exists cannot be told while the endpoint fails, nor in a flood: then
      it is `KeysUnavailable`, without a request until the interval is over. Known keys stay good.
      As long as no set was ever read nobody can sign in: then the interval is half a second, and
      with each failure twice as long, `timeout` at most.

    A read belongs to everybody who waits, so it is shielded from the cancellation of the caller
    that happens to do it; that caller is held up for `timeout` at most.

    Args:
        url: of the JWKS.
        fetch: returns the body at `url`, or raises.
        min_interval: seconds from the end of one read to the next, of many.
        max_age: seconds; a key that the issuer withdrew is believed this long, while the
            endpoint answers.
        timeout: seconds for one read, all of it.
        clock: seconds, steady.
    """

    def __init__(
        self,
        url: str,
        *,
        fetch: Callable[[str], Awaitable[bytes]] = fetch_jwks,
        min_interval: float = 10.0,
        max_age: float = 3600.0,
        timeout: float = 2.0,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._url = url
        self._fetch = fetch
        self._min_interval = min_interval
        self._max_age = max_age
        self._timeout = timeout
        self._clock = clock
        self._reading = trio.Lock()
        self._keys: dict[str, RSAPublicKey] = {}
        self._read_at = float("-inf")
        self._reads = 0
        """Begun so far."""
        self._full_at = float("-inf")
        """When `MAX_READS` are free again; each takes one interval of it."""
        self._failing = False

    async def key(self, kid: str | None) -> RSAPublicKey:
        """As `KeySource.key`; a token without a `kid` names no key of a set."""
        if kid is None:
            raise UnknownKey
        if self._knows(kid):
            return self._keys[kid]
        before = self._reads
        if not (kid in self._keys and self._reading.locked()):
            async with self._reading:
                # Whoever waited for the lock takes the outcome of a read that began meanwhile.
                if (
                    self._reads == before
                    and not self._knows(kid)
                    and self._clock() >= self._next_read_at
                ):
                    await self._read()
        if (key := self._keys.get(kid)) is not None:
            return key
        if self._failing or self._reads == before:
            raise KeysUnavailable(max(1.0, self._next_read_at - self._clock()))
        raise UnknownKey

    @property
    def known(self) -> bool:
        return bool(self._keys)

    def _knows(self, kid: str) -> bool:
        return kid in self._keys and self._clock() < self._read_at + self._max_age

    @property
    def _next_read_at(self) -> float:
        return self._full_at - (MAX_READS - 1) * self._min_interval

    async def prefetch(self) -> None:
        """Read the set before anybody asks, so that a new worker needs the endpoint no more; while
        that fails, again after each pause, until somebody has read one."""
        while not self.known:
            async with self._reading:
                if not self.known and self._clock() >= self._next_read_at:
                    await self._read()
            await trio.sleep(max(0.0, self._next_read_at - self._clock()))

    async def _read(self) -> None:
        started = self._clock()
        self._reads += 1
        keys: dict[str, RSAPublicKey] | None = None
        error = "TooSlow"
        with trio.move_on_after(self._timeout, shield=True):
            try:
                keys = parse_jwks(await self._fetch(self._url))
            except Exception as failure:
                error = type(failure).__name__
        now = self._clock()
        if keys is None:
            log.warning("jwks_failed", error=error)
        else:
            log.info("jwks_fetched", keys=len(keys), ms=round((now - started) * 1000))
            self._keys, self._read_at = keys, now
        if keys is None:  # until it is known to be back, each has its interval
            pause = self._min_interval
            if not self.known:
                pause = min(self._timeout, FIRST_PAUSE_SECONDS * 2 ** min(self._reads - 1, 10))
                pause *= random.uniform(0.5, 1.0)
            self._full_at = now + pause + (MAX_READS - 1) * self._min_interval
        else:
            self._full_at = (now if self._failing else max(now, self._full_at)) + self._min_interval
        self._failing = keys is None

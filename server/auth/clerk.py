"""Clerk's session tokens: what is believed, for how long, and why one is refused.

A token is taken apart once, and what was signed is what is read: PyJWT's RS256 checks the bytes
as they came (RFC 7515 §5.2), and the claims of those bytes are decoded into a typed struct and
checked here, by our clock. PyJWT's own decoder takes `"exp": "9999999999"` for a number, asks the
machine for the time, and takes three times as long: it looks at each character.
"""

import binascii
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import RSAAlgorithm
from msgspec import Meta

from protocol.confidential import Confidential
from server.auth.jwks import KeySource, UnknownKey

MAX_TOKEN_CHARACTERS = 8 * 1024
"""Clerk's own are about 1 kB; a browser's cookie holds 4 kB at most."""

LEEWAY_SECONDS = 5.0
"""Between the issuer's clock and ours; what Clerk's own SDKs allow."""

MAX_CACHED = 20_000
"""Tokens, about 1 kB each: as many as one worker may hold streams."""

BELIEVED_SECONDS = 60.0
"""That a signature is believed without another look. A key that left the JWKS is out once the
set is read again, and its tokens this much later. Clerk's tokens live no longer anyway."""

_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_FOREIGN_KEY_HEADERS = frozenset({"jku", "jwk", "x5u", "x5c", "crit", "b64"})
"""Headers by which a token brings its own key, or its own rules."""


class Refusal(StrEnum):
    """Why a token is refused: for the log and the audit; the client is only told 401."""

    MALFORMED = "malformed"
    """Not three base64url parts with JSON inside."""
    TOO_LONG = "too_long"
    ALGORITHM = "algorithm"
    """Anything but RS256."""
    HEADER = "header"
    """It brings its own key, asks for an extension, or is not typed as a JWT."""
    UNKNOWN_KEY = "unknown_key"
    SIGNATURE = "signature"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    ISSUED_IN_FUTURE = "issued_in_future"
    ISSUER = "issuer"
    AUTHORIZED_PARTY = "authorized_party"
    """`azp` is not configured, or absent where some are configured."""
    PENDING = "pending"
    """The session still waits for a task of its user, such as choosing an organisation."""
    CLAIMS = "claims"
    """A claim is missing or not of its type, or the version is neither 1 nor 2."""


class TokenRefused(Exception):
    """The token is not believed. It carries the reason, and nothing of the token.

    Attributes:
        expired_for: seconds, of a token that is good in every other way; else None.
    """

    def __init__(self, reason: Refusal, *, expired_for: float | None = None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.expired_for = expired_for


class Claims(Confidential, frozen=True, kw_only=True):
    """What a verified token says."""

    subject: str
    """`sub`: the user's Clerk id."""
    session_id: str | None
    """`sid`."""
    expires_at: float
    """`exp`, in seconds since the epoch, without leeway."""
    actor: str | None
    """`act.sub`: who acts as the subject, when impersonated."""


# No control characters: PostgreSQL's text takes no NUL, and these end up in the audit.
Identifier = Annotated[str, Meta(max_length=255, pattern=r"\A[^\x00-\x1f\x7f]+\Z")]


class _Actor(Confidential, frozen=True):
    sub: Identifier


class _Payload(Confidential, frozen=True, kw_only=True):
    """The claims that are looked at, by the types they must have.

    msgspec takes neither a bool nor a string for a float, and JSON has no NaN; `1e999` is out
    of its range. So each time here is a finite number.
    """

    exp: float
    iat: float
    sub: Identifier
    iss: str = ""
    nbf: float | None = None
    sid: Identifier | None = None
    azp: str | None = None
    sts: str | None = None
    v: Literal[1, 2] | None = None
    act: _Actor | None = None


_RS256 = RSAAlgorithm(RSAAlgorithm.SHA256)


_STANDARD = bytes.maketrans(b"-_", b"+/")
_LAST = {0: None, 2: frozenset(b"AQgw"), 3: frozenset(b"AEIMQUYcgkosw048")}
"""By the characters after the last whole four: what the last one may be, for the bits of it that
are over are zero (RFC 4648 §3.5)."""


def _base64url(part: bytes) -> bytes:
    """One part of a token, of base64url's alphabet, if it is written in the one way that its bytes
    have."""
    over = len(part) % 4
    if over == 1 or ((last := _LAST[over]) is not None and part[-1] not in last):
        raise TokenRefused(Refusal.MALFORMED)
    return binascii.a2b_base64(part.translate(_STANDARD) + b"==")


# Foreign exceptions may quote the token. So ours are raised outside their `except` blocks: then not
# even `__context__` leads back to them.


@lru_cache(maxsize=16)
def _key_id(part: bytes) -> str | None:
    """The `kid` of a token's header, which asks for nothing but RS256.

    Remembered, for the tokens of one key begin alike.

    Raises:
        TokenRefused: MALFORMED, HEADER, ALGORITHM.
    """
    raw = _base64url(part)
    header: Any = None
    with suppress(msgspec.DecodeError, ValueError, RecursionError):
        header = msgspec.json.decode(raw)
    if not isinstance(header, dict):
        raise TokenRefused(Refusal.MALFORMED)
    kid = header.get("kid")
    if "kid" in header and not isinstance(kid, str):
        raise TokenRefused(Refusal.HEADER)
    if header.get("alg") != "RS256":
        raise TokenRefused(Refusal.ALGORITHM)
    typ = header.get("typ", "JWT")
    if (
        not _FOREIGN_KEY_HEADERS.isdisjoint(header)
        or not isinstance(typ, str)
        or typ.upper() != "JWT"
    ):
        raise TokenRefused(Refusal.HEADER)
    return kid


class TokenVerifier:
    """Verifies session tokens, each signature once a minute at most.

    Args:
        keys: where the issuer's public keys come from.
        issuer: what `iss` must be, to the letter.
        authorized_parties: what `azp` may be; empty: `azp` is not looked at.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        keys: KeySource,
        *,
        issuer: str,
        authorized_parties: tuple[str, ...],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._issuer = issuer
        self._parties = frozenset(authorized_parties)
        self._clock = clock
        self._decode = msgspec.json.Decoder(_Payload).decode
        # SHA-256 of a verified token -> (its claims, until when they are believed), the least
        # recently used first. Never the token: a memory dump should hold no credentials.
        self._believed: OrderedDict[bytes, tuple[Claims, float]] = OrderedDict()

    async def verify(self, token: str) -> Claims:
        """The claims of a token that is valid now.

        A token that was seen within the last minute is answered without a checkpoint.

        Raises:
            TokenRefused: with the reason.
            KeysUnavailable: the keys to judge it by cannot be had now.
        """
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise TokenRefused(Refusal.TOO_LONG)
        if _SHAPE.fullmatch(token) is None:
            raise TokenRefused(Refusal.MALFORMED)
        raw = token.encode("ascii")
        digest = hashlib.sha256(raw).digest()
        if (claims := self._recall(digest)) is not None:
            return claims
        signed, _, signature = raw.rpartition(b".")
        header, _, payload = signed.partition(b".")
        kid = _key_id(header)
        try:
            key = await self._keys.key(kid)
        except UnknownKey:
            key = None
        if key is None:
            raise TokenRefused(Refusal.UNKNOWN_KEY)
        self._check_signature(signed, _base64url(signature), key)
        claims = self._check_claims(_base64url(payload))
        self._remember(digest, claims)
        return claims

    def _check_signature(self, signed: bytes, signature: bytes, key: RSAPublicKey) -> None:
        """RS256: RSASSA-PKCS1-v1_5 with SHA-256 (RFC 7518 §3.3)."""
        if not _RS256.verify(signed, key, signature):
            raise TokenRefused(Refusal.SIGNATURE)

    def _check_claims(self, signed: bytes) -> Claims:
        payload: _Payload | None = None
        refusal = Refusal.MALFORMED
        try:
            payload = self._decode(signed)
        except msgspec.ValidationError:
            refusal = Refusal.CLAIMS
        except (msgspec.DecodeError, ValueError, RecursionError):
            pass
        if payload is None:
            raise TokenRefused(refusal)
        now = self._clock()
        if payload.iss != self._issuer:
            raise TokenRefused(Refusal.ISSUER)
        if payload.nbf is not None and payload.nbf > now + LEEWAY_SECONDS:
            raise TokenRefused(Refusal.NOT_YET_VALID)
        if payload.iat > now + LEEWAY_SECONDS:
            raise TokenRefused(Refusal.ISSUED_IN_FUTURE)
        if self._parties and payload.azp not in self._parties:
            raise TokenRefused(Refusal.AUTHORIZED_PARTY)
        if payload.sts == "pending":
            raise TokenRefused(Refusal.PENDING)
        if now >= payload.exp + LEEWAY_SECONDS:  # the last: all else is as it should be
            raise TokenRefused(Refusal.EXPIRED, expired_for=now - payload.exp)
        return Claims(
            subject=payload.sub,
            session_id=payload.sid,
            expires_at=payload.exp,
            actor=payload.act.sub if payload.act else None,
        )

    def _recall(self, digest: bytes) -> Claims | None:
        entry = self._believed.get(digest)
        if entry is None:
            return None
        claims, until = entry
        if self._clock() >= until:
            del self._believed[digest]
            return None
        self._believed.move_to_end(digest)
        return claims

    def _remember(self, digest: bytes, claims: Claims) -> None:
        until = min(claims.expires_at + LEEWAY_SECONDS, self._clock() + BELIEVED_SECONDS)
        self._believed[digest] = (claims, until)
        if len(self._believed) > MAX_CACHED:
            self._believed.popitem(last=False)

"""What a good token gives, and how long it is believed. The bad ones: tests/hardening."""

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from server.auth import clerk
from server.auth.clerk import Claims, Refusal, TokenRefused, TokenVerifier
from server.auth.jwks import KeysUnavailable, PemKey, UnknownKey
from tests.support.tokens import ISSUER, Signer

NOW = 1_800_000_000.0
SIGNER = Signer()


class Keys:
    """A key source that counts."""

    known = True

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.failure: Exception | None = None

    async def prefetch(self) -> None:
        pass

    async def key(self, kid: str | None) -> RSAPublicKey:
        self.asked.append(kid)
        if self.failure is not None:
            raise self.failure
        return SIGNER.key.public_key()


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class World:
    def __init__(self) -> None:
        self.keys = Keys()
        self.clock = Clock()
        self.verifier = TokenVerifier(
            self.keys, issuer=ISSUER, authorized_parties=(), clock=self.clock
        )
        self.verify = self.verifier.verify


@pytest.fixture
def world() -> World:
    return World()


def mint(**overrides: object) -> str:
    return SIGNER.mint(now=NOW, **overrides)  # type: ignore[arg-type]


async def test_a_token_of_version_1_gives_its_claims(world: World):
    assert await world.verify(mint()) == Claims(
        subject="user_1", session_id="sess_1", expires_at=NOW + 60, actor=None
    )


async def test_a_token_of_version_2_gives_its_claims(world: World):
    token = mint(v=2, sts="active", fva=[1, -1], o={"id": "org_1", "rol": "admin"}, jti="x")
    assert await world.verify(token) == Claims(
        subject="user_1", session_id="sess_1", expires_at=NOW + 60, actor=None
    )


async def test_an_impersonated_token_names_its_actor(world: World):
    claims = await world.verify(mint(act={"iss": "https://dashboard", "sub": "user_admin"}))
    assert (claims.subject, claims.actor) == ("user_1", "user_admin")


async def test_optional_claims_may_be_absent(world: World):
    claims = await world.verify(mint(sid=..., nbf=...))
    assert (claims.session_id, claims.actor) == (None, None)


async def test_times_may_have_fractions(world: World):
    token = mint(iat=NOW - 0.5, nbf=NOW - 0.5, exp=NOW + 0.5)
    assert (await world.verify(token)).expires_at == NOW + 0.5


async def test_the_key_is_asked_for_by_the_kid_of_the_header(world: World):
    await world.verify(mint(headers={"kid": "ins_1"}))
    await world.verify(mint(headers={"kid": ...}))
    assert world.keys.asked == ["ins_1", None]


async def test_the_machines_clock_is_not_asked(world: World):
    world.clock.now = 1000.0
    assert (await world.verify(SIGNER.mint(now=1000.0))).expires_at == 1060


async def test_nothing_of_a_token_is_in_its_claims_repr(world: World):
    claims = await world.verify(mint(sub="canary", act={"sub": "canary"}, sid="canary"))
    assert "canary" not in f"{claims!r} {claims!s}"


async def test_a_signature_is_checked_once_a_minute(world: World):
    token = mint(exp=NOW + 3600)
    first = await world.verify(token)
    world.clock.now = NOW + 59
    assert await world.verify(token) is first
    assert len(world.keys.asked) == 1
    world.clock.now = NOW + 60
    assert await world.verify(token) == first
    assert len(world.keys.asked) == 2


async def test_a_key_that_was_withdrawn_is_out_a_minute_later(world: World):
    token = mint(exp=NOW + 3600)
    await world.verify(token)
    world.keys.failure = UnknownKey()
    world.clock.now = NOW + 60
    with pytest.raises(TokenRefused) as refused:
        await world.verify(token)
    assert refused.value.reason is Refusal.UNKNOWN_KEY


async def test_a_remembered_token_expires_with_its_leeway(world: World):
    token = mint(exp=NOW + 20)
    await world.verify(token)
    world.clock.now = NOW + 24.9
    await world.verify(token)
    world.clock.now = NOW + 25
    with pytest.raises(TokenRefused) as refused:
        await world.verify(token)
    assert refused.value.reason is Refusal.EXPIRED


async def test_another_signature_on_remembered_claims_is_not_believed(world: World):
    token = mint()
    await world.verify(token)
    head, _, _ = token.rpartition(".")
    _, _, signature = mint(sub="user_2").rpartition(".")
    with pytest.raises(TokenRefused) as refused:
        await world.verify(f"{head}.{signature}")
    assert refused.value.reason is Refusal.SIGNATURE


async def test_a_refused_token_is_not_remembered(world: World):
    token = mint(nbf=NOW + 30)
    for _ in range(2):
        with pytest.raises(TokenRefused):
            await world.verify(token)
    world.clock.now = NOW + 30
    await world.verify(token)


async def test_the_memory_is_bounded_and_keeps_what_is_used(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(clerk, "MAX_CACHED", 3)
    tokens = [mint(sid=f"sess_{number}") for number in range(4)]
    for token in tokens[:3]:
        await world.verify(token)
    await world.verify(tokens[0])
    await world.verify(tokens[3])
    assert len(world.keys.asked) == 4
    for token in (tokens[0], tokens[2], tokens[3]):
        await world.verify(token)
    assert len(world.keys.asked) == 4
    await world.verify(tokens[1])  # the least recently used had to go
    assert len(world.keys.asked) == 5


async def test_what_is_remembered_is_a_digest_and_claims_never_the_token(world: World):
    token = mint()
    claims = await world.verify(token)
    assert list(world.verifier._believed.items()) == [
        (hashlib.sha256(token.encode()).digest(), (claims, NOW + clerk.BELIEVED_SECONDS))
    ]


async def test_keys_that_cannot_be_had_are_no_refusal(world: World):
    world.keys.failure = KeysUnavailable(7)
    with pytest.raises(KeysUnavailable) as unavailable:
        await world.verify(mint())
    assert unavailable.value.retry_after == 7


async def test_a_pem_verifies_whatever_kid_the_token_names():
    verifier = TokenVerifier(
        PemKey(SIGNER.pem), issuer=ISSUER, authorized_parties=(), clock=lambda: NOW
    )
    for kid in ("key-1", "other", ...):
        assert (await verifier.verify(mint(headers={"kid": kid}))).subject == "user_1"


async def test_a_refusal_says_why_and_nothing_of_the_token(world: World):
    stranger = Signer("key-2")
    tokens = {
        Refusal.MALFORMED: "canary",
        Refusal.SIGNATURE: stranger.mint(now=NOW, sub="canary"),
        Refusal.CLAIMS: mint(sub=["canary"]),
        Refusal.ISSUER: mint(iss="canary"),
        Refusal.ALGORITHM: mint(headers={"alg": "canary"}),
        Refusal.HEADER: mint(headers={"kid": ["canary"]}),
    }
    for reason, token in tokens.items():
        with pytest.raises(TokenRefused) as refused:
            await world.verify(token)
        assert refused.value.reason is reason
        assert refused.value.args == (reason.value,)
        assert refused.value.__cause__ is None
        assert refused.value.__context__ is None

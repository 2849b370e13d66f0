"""Tokens that must not be believed: one named attack a test, each with the reason it gets."""

import base64
import json

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from server.auth.clerk import MAX_TOKEN_CHARACTERS, Refusal, TokenRefused, TokenVerifier
from server.auth.jwks import PemKey, RemoteKeys
from tests.support.tokens import ISSUER, Signer, b64, hmac_token, jwks_body, raw_token

NOW = 1_800_000_000.0
SIGNER = Signer()
ATTACKER = Signer("attacker")
PARTY = "https://app.example.com"


class World:
    """A verifier that reads its keys from a JWKS, and takes no token's word for where."""

    def __init__(self, *parties: str) -> None:
        self.urls: list[str] = []
        self.verifier = TokenVerifier(
            RemoteKeys("https://clerk.example.com/jwks", fetch=self.fetch),
            issuer=ISSUER,
            authorized_parties=parties,
            clock=lambda: NOW,
        )

    async def fetch(self, url: str) -> bytes:
        self.urls.append(url)
        return jwks_body(SIGNER)

    async def refusal(self, token: str) -> Refusal:
        with pytest.raises(TokenRefused) as refused:
            await self.verifier.verify(token)
        return refused.value.reason


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def strict() -> World:
    return World("https://admin.example.com", PARTY)


def mint(**overrides: object) -> str:
    return SIGNER.mint(now=NOW, **overrides)  # type: ignore[arg-type]


async def test_the_untouched_token_passes(world: World):
    """Otherwise everything below would be refused for some other reason."""
    assert (await world.verifier.verify(mint())).subject == "user_1"


# Whose key


async def test_a_token_signed_by_another_key_under_our_kid(world: World):
    token = ATTACKER.mint(now=NOW, headers={"kid": "key-1"})
    assert await world.refusal(token) is Refusal.SIGNATURE


async def test_a_token_signed_by_another_key_under_its_own_kid(world: World):
    assert await world.refusal(ATTACKER.mint(now=NOW)) is Refusal.UNKNOWN_KEY


async def test_a_token_without_a_kid(world: World):
    assert await world.refusal(mint(headers={"kid": ...})) is Refusal.UNKNOWN_KEY


@pytest.mark.parametrize("kid", [7, None, ["key-1"], {"key-1": 1}, True])
async def test_a_kid_of_another_type(world: World, kid: object):
    assert await world.refusal(mint(headers={"kid": kid})) is Refusal.HEADER


async def test_a_kid_that_is_a_path(world: World):
    token = mint(headers={"kid": "../../../../dev/null"})
    assert await world.refusal(token) is Refusal.UNKNOWN_KEY
    assert world.urls == ["https://clerk.example.com/jwks"]


async def test_a_jku_header_is_not_followed(world: World):
    headers = {"kid": "key-1", "jku": "https://attacker.example/jwks.json"}
    assert await world.refusal(ATTACKER.mint(now=NOW, headers=headers)) is Refusal.HEADER
    assert await world.refusal(mint(headers=headers)) is Refusal.HEADER
    assert world.urls == []


async def test_a_jwk_header_is_not_believed(world: World):
    headers = {"kid": "attacker", "jwk": ATTACKER.jwk()}
    assert await world.refusal(ATTACKER.mint(now=NOW, headers=headers)) is Refusal.HEADER
    assert await world.refusal(mint(headers={"jwk": SIGNER.jwk()})) is Refusal.HEADER


async def test_an_x5u_header_is_not_followed(world: World):
    headers = {"x5u": "https://attacker.example/cert.pem"}
    assert await world.refusal(mint(headers=headers)) is Refusal.HEADER
    assert world.urls == []


async def test_an_x5c_header_is_not_believed(world: World):
    assert await world.refusal(mint(headers={"x5c": ["MIIB"]})) is Refusal.HEADER


@pytest.mark.parametrize("crit", [["exp"], ["b64"], [], "exp", None])
async def test_a_crit_header(world: World, crit: object):
    assert await world.refusal(mint(headers={"crit": crit})) is Refusal.HEADER


async def test_an_unencoded_payload(world: World):
    assert await world.refusal(mint(headers={"b64": True})) is Refusal.HEADER
    headers = {"b64": False, "crit": ["b64"]}
    assert await world.refusal(mint(headers=headers)) is Refusal.HEADER


# Which algorithm


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "nOnE", "", None, ...])
async def test_algorithm_none(world: World, alg: object):
    header = {"alg": alg, "kid": "key-1", "typ": "JWT"}
    if alg is ...:
        del header["alg"]
    claims = SIGNER.claims(now=NOW)
    assert await world.refusal(raw_token(header, claims)) is Refusal.ALGORITHM
    assert await world.refusal(raw_token(header, claims, b"")) is Refusal.MALFORMED


async def test_algorithm_none_on_a_good_signature(world: World):
    assert await world.refusal(mint(headers={"alg": "none"})) is Refusal.ALGORITHM


async def test_hs256_signed_with_the_public_key(world: World):
    header = {"alg": "HS256", "kid": "key-1", "typ": "JWT"}
    for secret in (SIGNER.pem, SIGNER.pem.strip(), json.dumps(SIGNER.jwk())):
        token = hmac_token(header, SIGNER.claims(now=NOW), secret.encode())
        assert await world.refusal(token) is Refusal.ALGORITHM


async def test_hs256_signed_with_the_public_key_where_a_pem_is_configured():
    world = World()
    world.verifier = TokenVerifier(
        PemKey(SIGNER.pem), issuer=ISSUER, authorized_parties=(), clock=lambda: NOW
    )
    claims = SIGNER.claims(now=NOW)
    token = hmac_token({"alg": "HS256", "typ": "JWT"}, claims, SIGNER.pem.encode())
    assert await world.refusal(token) is Refusal.ALGORITHM
    token = hmac_token({"alg": "RS256", "typ": "JWT"}, claims, SIGNER.pem.encode())
    assert await world.refusal(token) is Refusal.SIGNATURE


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS256", "PS384", "PS512"])
async def test_another_rsa_algorithm_with_a_valid_signature(world: World, algorithm: str):
    assert await world.refusal(mint(algorithm=algorithm)) is Refusal.ALGORITHM


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS256"])
async def test_another_rsa_algorithm_that_calls_itself_rs256(world: World, algorithm: str):
    token = mint(algorithm=algorithm, headers={"alg": "RS256"})
    assert await world.refusal(token) is Refusal.SIGNATURE


async def test_es256_with_a_valid_signature(world: World):
    key = ec.generate_private_key(ec.SECP256R1())
    token = jwt.encode(SIGNER.claims(now=NOW), key, "ES256", {"kid": "key-1"})
    assert await world.refusal(token) is Refusal.ALGORITHM


@pytest.mark.parametrize("alg", ["rs256", "RS256 ", ["RS256"], {"RS256": 1}, 256])
async def test_an_algorithm_that_only_resembles_rs256(world: World, alg: object):
    assert await world.refusal(mint(headers={"alg": alg})) is Refusal.ALGORITHM


async def test_two_algorithms_in_one_header(world: World):
    """Both readings of the header take the last, so neither order opens a way around."""
    claims = json.dumps(SIGNER.claims(now=NOW)).encode()
    last_none = SIGNER.sign(claims, headers=b'{"alg":"RS256","kid":"key-1","alg":"none"}')
    assert await world.refusal(last_none) is Refusal.ALGORITHM
    last_rs256 = ATTACKER.sign(claims, headers=b'{"alg":"none","kid":"key-1","alg":"RS256"}')
    assert await world.refusal(last_rs256) is Refusal.SIGNATURE


@pytest.mark.parametrize("typ", ["JWE", "at+jwt", "", None, 1, ["JWT"]])
async def test_a_token_of_another_type(world: World, typ: object):
    assert await world.refusal(mint(headers={"typ": typ})) is Refusal.HEADER


@pytest.mark.parametrize("typ", ["jwt", "JWT", ...])
async def test_the_type_may_be_in_lower_case_or_absent(world: World, typ: object):
    assert (await world.verifier.verify(mint(headers={"typ": typ}))).subject == "user_1"


# What shape


async def test_a_payload_that_was_changed(world: World):
    header, _, signature = mint().split(".")
    payload = b64(json.dumps(SIGNER.claims(now=NOW, sub="user_2")).encode())
    assert await world.refusal(f"{header}.{payload}.{signature}") is Refusal.SIGNATURE


async def test_a_signature_that_was_cut(world: World):
    head, _, signature = mint().rpartition(".")
    cut = b64(base64.urlsafe_b64decode(signature + "==")[:-4])
    assert await world.refusal(f"{head}.{cut}") is Refusal.SIGNATURE


async def test_two_dots_missing(world: World):
    assert await world.refusal(mint().replace(".", "")) is Refusal.MALFORMED


async def test_one_dot_missing(world: World):
    assert await world.refusal(mint().replace(".", "", 1)) is Refusal.MALFORMED


async def test_one_dot_too_many(world: World):
    assert await world.refusal(mint() + ".e30") is Refusal.MALFORMED
    assert await world.refusal("." + mint()) is Refusal.MALFORMED


@pytest.mark.parametrize("part", [0, 1, 2])
async def test_an_empty_part(world: World, part: int):
    parts = mint().split(".")
    parts[part] = ""
    assert await world.refusal(".".join(parts)) is Refusal.MALFORMED


@pytest.mark.parametrize("token", ["", ".", "..", "...", " ", "null", "Bearer", "\0.\0.\0"])
async def test_no_token_at_all(world: World, token: str):
    assert await world.refusal(token) is Refusal.MALFORMED


async def test_a_hundred_kilobytes_are_refused_unread(world: World):
    for token in ("a" * 100_000, f"{mint()}{'A' * 100_000}", "." * 100_000):
        assert await world.refusal(token) is Refusal.TOO_LONG
    assert world.urls == []


async def test_the_limit_is_on_the_token_as_it_came(world: World):
    token = mint(padding="x" * 5000)
    room = MAX_TOKEN_CHARACTERS - len(token)
    grown = mint(padding="x" * (5000 + room * 3 // 4 - 3))
    assert MAX_TOKEN_CHARACTERS - 8 < len(grown) <= MAX_TOKEN_CHARACTERS
    assert (await world.verifier.verify(grown)).subject == "user_1"
    assert await world.refusal(mint(padding="x" * (5010 + room))) is Refusal.TOO_LONG


@pytest.mark.parametrize(
    "junk", ["!", "=", "+", "/", " ", "\n", "\0", "é", "\ud800", "%2e", "٣"], ids=ascii
)
async def test_a_character_that_is_no_base64url(world: World, junk: str):
    header, payload, signature = mint().split(".")
    for parts in (
        (header + junk, payload, signature),
        (header, junk + payload, signature),
        (header, payload, signature + junk),
    ):
        assert await world.refusal(".".join(parts)) is Refusal.MALFORMED


async def test_base64_with_loose_bits_at_its_end(world: World):
    """Another spelling of the same signature would be another entry of the cache."""
    head, _, signature = mint().rpartition(".")
    assert len(signature) % 4 == 2
    spelling = signature[:-1] + chr(ord(signature[-1]) + 1)
    assert await world.refusal(f"{head}.{spelling}") is Refusal.MALFORMED


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"alg=RS256", b"\xff\xfe", b"null", b"[]", b'"RS256"', b"[" * 5000, b"9" * 5000],
    ids=["empty", "cut", "text", "no UTF-8", "null", "array", "string", "deep", "long number"],
)
async def test_a_header_that_is_no_json_object(world: World, header: bytes):
    assert await world.refusal(raw_token(header, SIGNER.claims(now=NOW))) is Refusal.MALFORMED


async def test_a_huge_header(world: World):
    token = mint(headers={"padding": "x" * 8000})
    assert await world.refusal(token) is Refusal.TOO_LONG


@pytest.mark.parametrize(
    "payload",
    [b"{", b"sub=user_1", b"\xff\xfe", b'{"sub":"\\ud800"}', b'{"x":' + b"[" * 5000],
    ids=["cut", "text", "no UTF-8", "lone surrogate", "deep"],
)
async def test_a_signed_payload_that_is_no_json(world: World, payload: bytes):
    assert await world.refusal(SIGNER.sign(payload)) is Refusal.MALFORMED


@pytest.mark.parametrize("payload", [b"[]", b"null", b'"user_1"', b"1", b"{}", b'[{"sub":"u"}]'])
async def test_a_signed_payload_that_is_no_object_with_claims(world: World, payload: bytes):
    assert await world.refusal(SIGNER.sign(payload)) is Refusal.CLAIMS


# When


@pytest.mark.parametrize("seconds", [5, 6, 3600, NOW])
async def test_an_expired_token(world: World, seconds: float):
    assert await world.refusal(mint(exp=NOW - seconds)) is Refusal.EXPIRED


async def test_a_token_that_is_not_valid_yet(world: World):
    assert await world.refusal(mint(nbf=NOW + 6)) is Refusal.NOT_YET_VALID


async def test_a_token_that_is_issued_in_the_future(world: World):
    assert await world.refusal(mint(iat=NOW + 6)) is Refusal.ISSUED_IN_FUTURE


@pytest.mark.parametrize("claims", [{"exp": NOW - 4}, {"nbf": NOW + 4}, {"iat": NOW + 4}], ids=str)
async def test_clocks_may_differ_by_four_seconds(world: World, claims: dict[str, float]):
    assert (await world.verifier.verify(mint(**claims))).subject == "user_1"


@pytest.mark.parametrize("claim", ["exp", "iat", "nbf"])
@pytest.mark.parametrize(
    "value",
    ['"1800000030"', "true", "null", "[1800000030]", '{"n":1800000030}', "1e999", "-1e999"],
)
async def test_a_time_that_is_no_number(world: World, claim: str, value: str):
    claims = SIGNER.claims(now=NOW, **{claim: "HERE"})
    payload = json.dumps(claims).replace('"HERE"', value).encode()
    if (claim, value) == ("nbf", "null"):  # optional: as good as absent
        assert (await world.verifier.verify(SIGNER.sign(payload))).subject == "user_1"
    else:
        assert await world.refusal(SIGNER.sign(payload)) is Refusal.CLAIMS


@pytest.mark.parametrize("claim", ["exp", "iat", "nbf"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
async def test_a_time_that_is_not_finite(world: World, claim: str, value: str):
    """Python's json reads these; a comparison with NaN is never true."""
    claims = SIGNER.claims(now=NOW, **{claim: float(value)})
    payload = json.dumps(claims).encode()
    assert value.encode() in payload
    assert await world.refusal(SIGNER.sign(payload)) is Refusal.MALFORMED


@pytest.mark.parametrize("claim", ["exp", "iat", "sub"])
async def test_a_claim_that_is_missing(world: World, claim: str):
    assert await world.refusal(mint(**{claim: ...})) is Refusal.CLAIMS


# From whom, to whom


@pytest.mark.parametrize(
    "issuer", ["https://clerk.attacker.example", ISSUER + "/", ISSUER.upper(), "", None, ...]
)
async def test_another_issuer(world: World, issuer: object):
    expected = Refusal.CLAIMS if issuer is None else Refusal.ISSUER
    assert await world.refusal(mint(iss=issuer)) is expected


async def test_a_list_of_issuers_with_ours_in_it(world: World):
    assert await world.refusal(mint(iss=[ISSUER])) is Refusal.CLAIMS


@pytest.mark.parametrize("azp", ["https://evil.example", "", PARTY + "/", PARTY + ".evil", ...])
async def test_another_authorized_party_or_none(strict: World, azp: object):
    assert await strict.refusal(mint(azp=azp)) is Refusal.AUTHORIZED_PARTY


async def test_an_authorized_party_of_another_type(strict: World):
    assert await strict.refusal(mint(azp=[PARTY])) is Refusal.CLAIMS


async def test_the_configured_party_passes(strict: World):
    assert (await strict.verifier.verify(mint(azp=PARTY))).subject == "user_1"


async def test_any_party_passes_where_none_is_configured(world: World):
    assert (await world.verifier.verify(mint(azp="https://any.example"))).subject == "user_1"


@pytest.mark.parametrize("version", [..., 2])
async def test_a_pending_session(world: World, version: object):
    assert await world.refusal(mint(sts="pending", v=version)) is Refusal.PENDING


@pytest.mark.parametrize("version", [0, 3, "2", True, 2.5])
async def test_another_version_of_the_claims(world: World, version: object):
    assert await world.refusal(mint(v=version)) is Refusal.CLAIMS


@pytest.mark.parametrize("sub", ["", "x" * 256, 1, None, ["user_1"], {"id": "user_1"}, "user\0_1"])
async def test_a_subject_that_is_no_name(world: World, sub: object):
    assert await world.refusal(mint(sub=sub)) is Refusal.CLAIMS


async def test_the_longest_subject_passes(world: World):
    assert (await world.verifier.verify(mint(sub="x" * 255))).subject == "x" * 255


@pytest.mark.parametrize(
    "act", ["user_admin", {}, {"sub": ""}, {"sub": 1}, {"sub": None}, [], True]
)
async def test_an_actor_without_a_name(world: World, act: object):
    """Somebody acts as the subject, and the audit could not say who."""
    assert await world.refusal(mint(act=act)) is Refusal.CLAIMS

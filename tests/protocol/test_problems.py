"""Every problem has a status with a title, and a sentence that repeats nothing."""

import http
import re

import msgspec
import pytest

from protocol.problems import PROBLEMS, TITLES, problem_body


@pytest.mark.parametrize("code", PROBLEMS)
def test_a_problem_is_a_whole_answer(code: str):
    status, sentence = PROBLEMS[code]
    assert re.fullmatch(r"[A-Z][A-Z_]+[A-Z]", code)
    assert re.fullmatch(r"[A-Z][\w ,/'-]+", sentence), "a sentence, with no placeholder"
    body = msgspec.json.decode(msgspec.json.encode(problem_body(code)))
    assert body["error"] == sentence
    assert body["detail"] == sentence + "."
    assert body["code"] == code
    assert body["status"] == status
    assert body["title"] == TITLES[status]
    assert body["type"] == "urn:sottovoce:problem:" + code.lower().replace("_", "-")
    absent = {"limit", "enabled"} if code == "SUBSCRIPTION_REQUIRED" else {
        "limit", "enabled", "message", "upgradeUrl",
    }  # fmt: skip
    assert not absent & body.keys()


def test_the_titles_are_those_of_the_statuses():
    assert {status for status, _ in PROBLEMS.values()} == set(TITLES)
    # RFC 9110; the standard library has the older names
    renamed = {413: "Content Too Large", 414: "URI Too Long"}
    for status, title in TITLES.items():
        assert title == renamed.get(status, http.HTTPStatus(status).phrase)


def test_a_missing_subscription_says_where_to_get_one():
    body = problem_body("SUBSCRIPTION_REQUIRED")
    assert body.status == 403
    assert body.upgrade_url == "/billing"
    assert body.message


def test_a_limit_and_a_detail_are_told():
    body = problem_body("MESSAGE_TOO_LONG", detail="At most 4000.", limit=4000)
    assert (body.detail, body.limit) == ("At most 4000.", 4000)
    assert body.error == PROBLEMS["MESSAGE_TOO_LONG"].sentence

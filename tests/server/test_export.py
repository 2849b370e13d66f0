"""The transcript as a file: its layout, and a name that every file system and header takes."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.replies import Message
from server.handlers.export import BANNER, CLOSING, RULE, _file_name, write_transcript
from storage.store import ExportHeader

NOW = datetime(2026, 11, 22, 21, 15, 29, tzinfo=UTC)


def header(first: str = "Pia", last: str = "Lund", **more: Any) -> ExportHeader:
    about = {
        "therapist_name": "Dr Ott",
        "therapist_email": "ott@example.com",
        "client_email": "pia@example.com",
        "messages": 0,
        **more,
    }
    return ExportHeader(client_first_name=first, client_last_name=last, **about)


def message(text: str, **more: Any) -> Message:
    about = {
        "id": 1,
        "message_id": "7b2f1f0e-4b1e-4c62-8a62-5e6b8f0a1a11",
        "sender_id": 1,
        "message_type": "STANDARD",
        "status": "SENT",
        "sent_at": "2026-11-22T21:15:29.123Z",
        "sender_first_name": "Pia",
        "sender_last_name": "Lund",
        "sender_email": "pia@example.com",
        "seq": 1,
        **more,
    }
    return Message(content=text, **about)


def test_an_empty_conversation_has_its_frame():
    text = write_transcript(header(), 42, [], NOW)
    assert text.split("\n") == [
        RULE,
        *BANNER.split("\n"),
        RULE,
        "",
        "Export date: 2026-11-22 21:15:29 UTC",
        "Therapist: Dr Ott <ott@example.com>",
        "Client: Pia Lund <pia@example.com>",
        "Channel: 42",
        "Messages: 0",
        "",
        RULE,
        "",
        RULE,
        *CLOSING.split("\n"),
        RULE,
        "",
    ]
    assert BANNER.startswith("CONFIDENTIAL\n")


def test_messages_stand_in_their_order_with_time_and_name():
    messages = [message("one"), message("two\n\nlines", sender_first_name="Tess")]
    lines = write_transcript(header(), 42, messages, NOW).split("\n")
    start = lines.index("Messages: 2")
    assert lines[start + 3 : start + 11] == [
        "",
        "[2026-11-22T21:15:29.123Z] Pia Lund:",
        "one",
        "",
        "[2026-11-22T21:15:29.123Z] Tess Lund:",
        "two",
        "",
        "lines",
    ]


def test_an_author_without_a_name_is_named_by_email():
    nameless = message("x", sender_first_name="", sender_last_name="")
    assert "] pia@example.com:\nx\n" in write_transcript(header(), 42, [nameless], NOW)


def test_a_client_without_a_last_name_has_no_space_behind_it():
    assert "Client: Pia <pia@example.com>" in write_transcript(header(last=""), 42, [], NOW)


@pytest.mark.parametrize(
    ("first", "last", "name"),
    [
        ("Pia", "Lund", "Pia-Lund"),
        ("Zoë", "O'Neill", "Zoe-O-Neill"),
        ("Jean-Luc", "", "Jean-Luc"),
        ("", "Ångström", "Angstrom"),
        ("", "", "client"),
        ("李", "明", "client"),
        ("../..", "/etc/passwd", "etc-passwd"),
        ('a"; filename="x', "\r\nX: y", "a-filename-x-X-y"),
        (".", ".", "client"),
        ("x" * 100, "y", "x" * 64),
    ],
)
def test_a_file_is_named_in_plain_letters(first: str, last: str, name: str):
    assert _file_name(header(first, last)) == name


@given(st.text(), st.text())
def test_any_name_makes_a_file_name(first: str, last: str):
    assert re.fullmatch(r"[A-Za-z0-9-]{1,64}", _file_name(header(first, last)))


def test_a_header_prints_nothing_of_the_people():
    assert "Pia" not in repr(header()) + repr(message("x"))

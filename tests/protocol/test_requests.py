"""Bodies are decoded strictly: what is not exactly as WIRE.md has it is refused."""

from typing import Any
from uuid import UUID

import msgspec
import pytest

from protocol import requests
from protocol.requests import decode_action, decode_send

REFUSED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that decoding may raise; whoever decodes must catch each."""

ID = "0198c0de-0000-7000-8000-000000000001"


def test_a_send_is_decoded():
    body = decode_send(b'{"channelId":42,"content":"hi","clientMessageId":"%b"}' % ID.encode())
    assert body.channel_id == 42
    assert body.content == "hi"
    assert body.message_type == "STANDARD"
    assert body.client_message_id == UUID(ID)
    assert decode_send(b'{"content":"","channelId":1}').client_message_id is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {"action": "create_channel", "therapistId": 1, "prospectUserId": 2, "channelName": "n"},
            requests.CreateChannel(therapist_id=1, prospect_user_id=2, channel_name="n"),
        ),
        (
            {"action": "send_message", "channelId": 1, "content": "x"},
            requests.SendMessageAction(channel_id=1, content="x"),
        ),
        (
            {"action": "get_messages", "channelId": 1},
            requests.GetMessages(channel_id=1, max_results=50),
        ),
        (
            {"action": "get_messages", "channelId": 1, "maxResults": 200, "lastMessageId": 9},
            requests.GetMessages(channel_id=1, max_results=200, last_message_id=9),
        ),
        (
            {"channelId": 1, "lastMessageId": ID, "action": "get_messages"},
            requests.GetMessages(channel_id=1, last_message_id=UUID(ID)),
        ),
        ({"action": "list_channels"}, requests.ListChannels()),
        ({"action": "mark_read", "channelId": 1}, requests.MarkRead(channel_id=1)),
    ],
)
def test_every_action_is_decoded(body: dict[str, Any], expected: object):
    assert decode_action(msgspec.json.encode(body)) == expected


def send(**changes: Any) -> bytes:
    return msgspec.json.encode({"channelId": 1, "content": "x", **changes})


@pytest.mark.parametrize(
    "body",
    [
        # not JSON, not an object
        b"", b" ", b"{", b"[]", b"null", b'"x"', b"42", b"{}", b'{"channelId":1}',
        b'{"content":"x"}', b"{'channelId':1,'content':'x'}", send() + b"x",
        b"\xef\xbb\xbf" + send(),
        b'{"channelId":1,"content":"x",}', b'{"channelId":NaN,"content":"x"}',
        b'{"channelId":Infinity,"content":"x"}',
        # numbers
        send(channelId="1"), send(channelId=1.0), send(channelId=1.5), send(channelId=True),
        send(channelId=None), send(channelId=[1]), send(channelId=0), send(channelId=-1),
        send(channelId=2**63), b'{"channelId":1e0,"content":"x"}',
        b'{"channelId":01,"content":"x"}',
        b'{"channelId":%b,"content":"x"}' % (b"9" * 5000),
        # text
        send(content=None), send(content=1), send(content=["x"]), send(content={"x": 1}),
        b'{"channelId":1,"content":"a\nb"}',
        b'{"channelId":1,"content":"\xff"}', b'{"channelId":1,"content":"\xed\xa0\x80"}',
        b'{"channelId":1,"content":"\\ud800"}', b'{"channelId":1,"content":"\\ud800x"}',
        b'{"channelId":1,"content":"\\udc00"}', b'{"channelId":1,"content":"\\udc00\\ud800"}',
        # the rest
        send(messageType="OTHER"), send(messageType=None), send(messageType=1),
        send(clientMessageId=""), send(clientMessageId="x"), send(clientMessageId=1),
        send(clientMessageId="{" + ID + "}"), send(extra=1), send(action="send_message"),
        send(channel_id=1),
        # deep
        b'{"channelId":' + b"[" * 100_000, b'{"channelId":1,"content":' + b'{"a":' * 100_000,
        b'{"x":' + b"[" * 100_000, b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:48]),
)  # fmt: skip
def test_a_send_of_another_shape_is_refused(body: bytes):
    with pytest.raises(REFUSED):
        decode_send(body)


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b"[]", b'{"channelId":1}', b'{"action":null}', b'{"action":1}', b'{"action":""}',
        b'{"action":"drop_table"}', b'{"action":"MARK_READ","channelId":1}',
        b'{"action":"list_channels","x":1}', b'{"action":["mark_read"],"channelId":1}',
        b'{"action":"mark_read"}', b'{"action":"mark_read","channelId":"1"}',
        b'{"action":"mark_read","channelId":1,"content":"x"}',
        b'{"action":"send_message","channelId":1}',
        b'{"action":"get_messages","channelId":1,"maxResults":0}',
        b'{"action":"get_messages","channelId":1,"maxResults":201}',
        b'{"action":"get_messages","channelId":1,"maxResults":"5"}',
        b'{"action":"get_messages","channelId":1,"maxResults":5.5}',
        b'{"action":"get_messages","channelId":1,"lastMessageId":"5"}',
        b'{"action":"get_messages","channelId":1,"lastMessageId":0}',
        b'{"action":"get_messages","channelId":1,"lastMessageId":true}',
        b'{"action":"get_messages","channelId":1,"lastMessageId":9223372036854775808}',
        b'{"action":"create_channel","therapistId":1}',
        b'{"action":"create_channel","therapistId":1,"prospectUserId":-2}',
        b'{"action":"create_channel","therapistId":1,"prospectUserId":2,"channelName":""}',
        b'{"action":"create_channel","therapistId":1,"prospectUserId":2,"channelName":"%b"}'
        % (b"n" * 201),
        b'{"x":' + b"[" * 100_000, b'{"x":' + b'{"x":' * 100_000,
        b'{"action":"mark_read","channelId":1,"x":' + b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:60]),
)  # fmt: skip
def test_an_action_of_another_shape_is_refused(body: bytes):
    with pytest.raises(REFUSED):
        decode_action(body)


def test_what_only_a_handler_can_judge_passes():
    assert decode_send(b'{"channelId":1,"content":"\\u0000"}').content == "\0"
    assert decode_send(b'{"channelId":1,"content":" "}').content == " "
    assert decode_send(b'{"channelId":1,"content":"\\ud83d\\ude00"}').content == "😀"
    assert decode_send(b'{"channelId":9223372036854775807,"content":"x"}').channel_id == 2**63 - 1

"""What is in a log line, and what never is. Each in a process of its own: logging is global."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.running import clean_environment

CANARY = "canary-words"

SCRIPT = """
import logging, sys
import structlog
from protocol.requests import SendMessage
from server.logs import configure_logging, hide_uncaught_exceptions
configure_logging(sys.argv[1], "info")
hide_uncaught_exceptions()
log = structlog.get_logger("here")
"""


def run(body: str, *, format: str = "json", **pipes) -> subprocess.CompletedProcess[str]:  # noqa: A002
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + body, format],
        text=True,
        timeout=30,
        check=False,
        env=clean_environment({}),
        **pipes,
    )


def events(body: str) -> list[dict]:
    done = run(body)
    assert done.stderr == ""
    assert CANARY not in done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_event_is_one_line_with_its_time_level_process_and_fields():
    (event,) = events("log.info('opened', channel_id=42, reasons=['a', 'b'])")
    assert list(event)[:3] == ["at", "level", "event"]
    assert event["at"].endswith("Z") and isinstance(event["worker"], int)
    rest = {name: event[name] for name in ("level", "event", "logger", "channel_id", "reasons")}
    assert rest == {
        "level": "info",
        "event": "opened",
        "logger": "here",
        "channel_id": 42,
        "reasons": ["a", "b"],
    }


def test_below_the_level_nothing_is_written():
    assert events("log.debug('no')") == []


def test_a_struct_is_named_by_its_type_and_never_written_out():
    (event,) = events(f"log.info('sent', message=[SendMessage(channel_id=1, content='{CANARY}')])")
    assert event["message"] == ["<SendMessage>"]


@pytest.mark.parametrize(
    "call",
    [
        "log.exception('failed')",
        "log.error('failed', exc_info=True)",
        "log.error('failed', exc_info=e)",
    ],
)
def test_an_exception_is_told_by_kind_and_place(call):
    (event,) = events(f"""
try:
    raise ValueError('{CANARY}')
except ValueError as e:
    {call}
""")
    assert event["event"] == "failed"
    assert event["level"] == "error"
    assert event["error"] == "ValueError"
    assert event["where"]


def test_a_librarys_record_is_told_without_its_message():
    (event,) = events(f"""
logging.getLogger("httpx").info("quiet {CANARY}")
try:
    raise OSError("{CANARY}")
except OSError:
    logging.getLogger("httpx").warning("GET %s", "{CANARY}", exc_info=True)
""")
    assert (event["logger"], event["level"], event["error"]) == ("httpx", "warning", "OSError")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("raise KeyError('{}')", "process_failed"),
        (
            "import threading\ndef f(): raise KeyError('{}')\nthreading.Thread(target=f).start()",
            "thread_failed",
        ),
        ("class A:\n  def __del__(self): raise KeyError('{}')\nA()", "exception_ignored"),
    ],
)
def test_what_python_would_print_with_its_text_becomes_an_event(body, name):
    (event,) = events(body.format(CANARY))
    assert (event["event"], event["error"]) == (name, "KeyError")


def test_text_that_is_no_utf8_does_not_break_the_line():
    (event,) = events(r"log.info('odd', value='\ud800')")
    assert event["event"] == "unprintable_event"


def test_a_full_disk_does_not_end_the_process():
    with Path("/dev/full").open("wb") as full:
        done = run("log.info('x')\nprint('alive', file=sys.stderr)", stdout=full)
    assert (done.returncode, done.stderr) == (0, "alive\n")


def test_the_console_is_for_people_and_hides_the_same():
    done = run(
        f"log.info('opened', body=SendMessage(channel_id=1, content='{CANARY}'))", format="console"
    )
    assert done.stdout == ""
    assert "opened" in done.stderr and "<SendMessage>" in done.stderr
    assert CANARY not in done.stderr


def test_a_pipe_that_nobody_reads_holds_nothing_up_and_the_loss_is_told():
    process = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            SCRIPT
            + """
for _ in range(3000):
    log.info('x' * 100)
print('full', file=sys.stderr, flush=True)
sys.stdin.readline()
log.info('after')
""",
            "json",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment({}),
    )
    with process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stderr.readline() == b"full\n"
        written = os.read(process.stdout.fileno(), 1 << 20).count(b"\n")
        process.stdin.write(b"\n")
        process.stdin.close()
        dropped, after = map(json.loads, process.stdout.read().splitlines())
    assert (dropped["event"], after["event"]) == ("log_lines_dropped", "after")
    assert dropped["lines"] == 3000 - written > 0


def test_under_trio_lines_of_one_turn_are_written_together_and_a_warning_at_once():
    done = run("""
import os, trio
reader, writer = os.pipe()
os.set_blocking(reader, False)
kept = os.dup(1)
os.dup2(writer, 1)
lines = configure_logging(sys.argv[1], "info")
log = structlog.get_logger("here")
found = []

def look():
    try:
        written = os.read(reader, 99999).decode().splitlines()
        found.append([line.split('"event":"')[1][0] for line in written])
    except BlockingIOError:
        found.append([])

async def main():
    log.info("a"); log.info("b"); look()
    await trio.sleep(0); look()
    log.info("c"); log.warning("d"); look()
    log.info("e"); look()
    for n in range(40):
        log.info("f", text="x" * 1000)
    await trio.sleep(0); look()
    log.info("g")

trio.run(main, instruments=[lines])
look()
log.info("h"); look()
os.write(kept, repr(found).encode())
""")
    expected = [[], ["a", "b"], ["c", "d"], [], ["e", *"f" * 40], ["g"], ["h"]]
    assert (done.stdout, done.stderr) == (repr(expected), "")

"""`requests`: POSTs per second to a handler that only answers, on keep-alive connections."""

from collections.abc import Iterator

from bench.client import Meter, Posts
from bench.results import Sample
from bench.scenarios import Plan
from bench.statistics import interleave
from bench.subjects import SUBJECTS

NAME = "requests"
CONNECTIONS = 64
WARM_SECONDS = 0.4
SUBJECT_NAMES = ("engine", "hypercorn", "uvicorn", "sse-starlette", "better-sse", "nchan")
CASE = f"{CONNECTIONS} connections"


def run(plan: Plan) -> Iterator[Sample]:
    for processes in (1,) if plan.quick else (1, 2):
        for number, name in interleave(plan.of(*SUBJECT_NAMES), plan.rounds):
            plan.say(f"requests: {SUBJECTS[name].label}, {processes}, round {number + 1}")
            yield from plan.guard(
                f"requests {name}",
                measure(name, processes, number, plan.seconds),
            )


def measure(name: str, processes: int, number: int, seconds: float) -> Iterator[Sample]:
    with SUBJECTS[name].start(processes) as server:
        request = server.answer_request()
        share = CONNECTIONS // len(server.addresses)
        clients = [Posts(address, share) for address in server.addresses]
        try:
            _post_for(clients, request, WARM_SECONDS)
            before, cpu = sum(posts.answered for posts in clients), server.cpu_seconds
            meter = _post_for(clients, request, seconds)
            took, client_busy = meter.seconds, meter.busy
            answered = sum(posts.answered for posts in clients) - before
            cpu = server.cpu_seconds - cpu
            yield Sample(
                scenario=NAME,
                subject=name,
                case=CASE,
                processes=processes,
                round=number,
                values={
                    "posts_per_second": answered / took,
                    "cpu_us_per_post": cpu / answered * 1e6,
                    "server_busy": cpu / took,
                    "client_busy": client_busy,
                },
            )
        finally:
            for posts in clients:
                posts.close()


def _post_for(clients: list[Posts], request: bytes, seconds: float) -> Meter:
    meter = Meter()
    while meter.seconds < seconds:
        for posts in clients:
            while posts.free:
                posts.post(request)
        for posts in clients:
            posts.read(0.1 if len(clients) == 1 else 0.001)
    return meter

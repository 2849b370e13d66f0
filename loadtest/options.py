"""What we add to Locust's command line and to the form of its web page."""

from locust.argument_parser import LocustArgumentParser

from loadtest.ledger import SETTLE_SECONDS
from loadtest.objectives import FILE


def add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument(
        "--tokens",
        default=".load/tokens",
        include_in_web_ui=False,
        help="What `sottovoce seed` wrote: each worker takes its share of the channels.",
    )
    parser.add_argument(
        "--sends-per-stream",
        type=float,
        default=0.02,
        help="Messages a second for each open stream of a StreamUser: 0.02 is 200 of 10,000.",
    )
    parser.add_argument(
        "--heartbeat-seconds",
        type=float,
        default=15.0,
        help="The server's SOTTOVOCE_HEARTBEAT_SECONDS.",
    )
    parser.add_argument(
        "--cut-every",
        type=float,
        default=0.0,
        help="Seconds after which a stream is lost, on average; 0 for never.",
    )
    parser.add_argument(
        "--haste",
        type=float,
        default=1.0,
        help="By which people's pauses and visits are divided.",
    )
    parser.add_argument(
        "--herd-every",
        type=float,
        default=30.0,
        help="Seconds between two thundering herds, in the scenario of that name.",
    )
    parser.add_argument(
        "--step-users",
        type=int,
        default=1000,
        help="Users that each step adds, in the scenario of that name.",
    )
    parser.add_argument(
        "--step-seconds",
        type=float,
        default=30.0,
        help="That a step is held, from when its users have come.",
    )
    parser.add_argument(
        "--settle-seconds",
        type=float,
        default=SETTLE_SECONDS,
        include_in_web_ui=False,
        help="From the acknowledgment until a message must have been shown.",
    )
    parser.add_argument(
        "--objectives",
        default=str(FILE),
        include_in_web_ui=False,
        help="What the run must reach.",
    )
    parser.add_argument(
        "--summary",
        default="",
        include_in_web_ui=False,
        help="A file for the summary, as JSON.",
    )
    parser.add_argument(
        "--server-ready",
        default="",
        include_in_web_ui=False,
        help="The ready file of a `sottovoce dev` on this machine: to measure it, and to kill "
        "its Redis.",
    )

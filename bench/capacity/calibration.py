"""All of `python -m bench capacity`, and the JSON that keeps it."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.capacity.fault import Fault
from bench.capacity.meters import Counts
from bench.capacity.model import Model
from bench.capacity.objectives import Objectives
from bench.capacity.plan import Known, Storage
from bench.capacity.points import Measured
from bench.capacity.search import Step


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """A machine, as it was measured, and the fit.

    Attributes:
        began: ISO 8601, UTC.
        seconds: of one window, where there was something to do.
        rounds: of everything.
    """

    began: str
    quick: bool
    seconds: float
    rounds: int
    machine: dict[str, str]
    objectives: Objectives
    measured: list[Measured]
    steps: list[Step]
    fault: Fault | None
    storage: Storage
    model: Model

    @property
    def known(self) -> Known:
        """How far was measured."""
        values = [(each.load.workers, each.values) for each in self.measured]
        searched = [step for step in self.steps if not step.missed]
        return Known(
            workers=max(workers for workers, _ in values),
            streams_per_worker=max(each["streams"] / workers for workers, each in values),
            sends_per_worker=max(
                *(each["sends"] / workers for workers, each in values),
                *(step.sends / step.workers for step in searched),
                0.0,
            ),
            connects_per_worker=max(each["connects"] / workers for workers, each in values),
            redis_commands=max(each["redis commands"] for _, each in values),
            commits=max(each["statements"] for _, each in values),
        )


def storage_of(measured: Sequence[Measured], stored: Sequence[Counts]) -> Storage:
    """From what the sessions left behind; the one that sent most says most."""
    counts = max(stored, key=lambda each: each["messages"])
    quiet = [
        each.values
        for each in measured
        if each.load == msgspec.structs.replace(measured[0].load, streams=each.load.streams)
    ]
    first, second = quiet[0], quiet[1]
    return Storage(
        characters=counts["characters"],
        message_row=counts["message_row"],
        audit_row=counts["audit_row"],
        redis_message=counts["redis_message"],
        redis_channel=counts["redis_channel"],
        redis_subscription=max(
            0.0,
            (second["redis memory"] - first["redis memory"])
            / (second["channels"] - first["channels"]),
        ),
    )


def write_calibration(calibration: Calibration, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n")


def read_calibration(path: Path) -> Calibration:
    """
    Raises:
        OSError: there is none.
        msgspec.MsgspecError: it is something else.
    """
    return msgspec.json.decode(path.read_bytes(), type=Calibration)

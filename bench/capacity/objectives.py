"""What must hold for a load to count as carried."""

import tomllib
from collections.abc import Mapping

import msgspec

from bench.subjects import ROOT

FILE = ROOT / "loadtest" / "objectives.toml"


class Objectives(msgspec.Struct, frozen=True, kw_only=True):
    """
    Attributes:
        delivered: share of what must arrive.
        p99_ms: from the moment at which a send is due to its delivery.
        connect_failures: share of new streams that are turned away.
        kept_up: sends answered over sends due: a server that falls behind has no latency to speak
            of.
    """

    delivered: float
    p99_ms: float
    connect_failures: float
    kept_up: float = 0.97

    def missed(self, values: Mapping[str, float], sends: float) -> list[str]:
        """What a window missed, in words; nothing if it met them all."""
        missed = []
        if (lost := values["lost"]) > 1 - self.delivered:
            missed.append(f"{lost:.3%} not delivered")
        if (p99 := values.get("p99_ms", 0.0)) > self.p99_ms:
            missed.append(f"p99 {p99:,.0f} ms")
        if sends and values["sends"] < self.kept_up * sends:
            missed.append(f"{values['sends']:,.0f} sends/s of {sends:,.0f}")
        if (away := values["turned away"]) > self.connect_failures:
            missed.append(f"{away:.2%} turned away")
        if values["ended"]:
            missed.append(f"{values['ended']:.0f} streams ended")
        return missed


def read_objectives() -> Objectives:
    """Those of the load tests, for all of their scenarios."""
    found = tomllib.loads(FILE.read_text())
    return Objectives(
        delivered=found["at_least"]["delivery_percent"] / 100,
        p99_ms=found["at_most"]["delivery_p99_ms"],
        connect_failures=found["at_most"]["connect_failures_percent"] / 100,
    )

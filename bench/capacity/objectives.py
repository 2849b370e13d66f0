"""What must hold for a load to count as carried."""

from collections.abc import Mapping

import msgspec


class Objectives(msgspec.Struct, frozen=True, kw_only=True):
    """The same as the load tests' own."""

    delivered: float = 1.0
    """Share of what must arrive: nothing may be missing."""
    p99_ms: float = 250.0
    """From the moment at which a send is due to its delivery: below it people do not notice."""
    kept_up: float = 0.97
    """Sends answered over sends due: a server that falls behind has no latency to speak of."""
    connect_failures: float = 0.001
    """Share of new streams that are turned away."""

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

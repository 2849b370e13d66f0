"""What a unit of work costs: least squares over the measured points, and how far to trust it.

Everything is linear in what there is to do, but for one thing. What waits goes together: while one
commit is under way, the sends that come meanwhile gather, and the next takes them all; and a
worker that has something to do does not go to sleep, to be woken on cold caches. A worker that
gets u things a second, each of them keeping it for T seconds, is woken u / (1 + uT) times: for
each while it is idle, and never more than 1 / T times. A waking has a cost of its own, like a
stream or a delivery. What goes to PostgreSQL goes together in the same way, but each kind for
itself: batches. T is looked for where the points are met best, for each quantity by itself.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.capacity.points import Load, Measured
from bench.statistics import median

Array = NDArray[np.float64]
Work = dict[str, float]
"""What there is to do, each a second or in all, by the names of `TERMS`."""

TERMS = {
    "services": "service",
    "workers": "worker",
    "watching": "worker with streams",
    "streams": "open stream",
    "heartbeats": "heartbeat",
    "deliveries": "delivery",
    "sends": "send",
    "heard": "message heard over Redis",
    "connects": "new stream",
    "lookups": "look-up of access",
    "wakings": "waking",
    "batches": "batch for PostgreSQL",
    "most connects": "new stream a second, at the most",
    "delivered characters": "delivered character",
    "sent characters": "sent character",
    "heard characters": "character heard over Redis",
}
"""Each with what one of it is called."""

QUANTITIES: dict[str, tuple[str, ...]] = {
    "worker cpu": (
        "workers", "streams", "heartbeats", "deliveries", "sends", "lookups", "heard", "connects",
        "wakings",
    ),
    "postgres cpu": (
        "services", "workers", "streams", "sends", "lookups", "connects", "batches",
    ),
    "redis cpu": ("services", "workers", "heartbeats", "sends", "heard", "connects", "wakings"),
    "rss": ("workers", "streams", "most connects"),
    "kernel": ("streams",),
    "statements": ("workers", "watching", "streams", "lookups", "connects", "batches"),
    "redis commands": ("workers", "sends", "heard", "connects", "wakings"),
    "redis bytes in": ("workers", "sends", "sent characters", "connects", "wakings"),
    "redis bytes out": ("workers", "heard", "heard characters", "connects", "wakings"),
    "wal bytes": ("workers", "sends", "sent characters", "connects", "wakings"),
    "stream bytes": ("heartbeats", "deliveries", "delivered characters", "connects"),
}  # fmt: skip
"""What is fitted, and to which work."""

UNITS = {
    "worker cpu": "cores", "postgres cpu": "cores", "redis cpu": "cores", "rss": "bytes",
    "kernel": "bytes", "statements": "/s", "redis commands": "/s",
    "redis bytes in": "bytes/s", "redis bytes out": "bytes/s", "wal bytes": "bytes/s",
    "stream bytes": "bytes/s",
}  # fmt: skip

LIKELY = 2.0
"""Standard errors on either side: 19 times of 20, if errors are as normal ones."""
LEAST_POINTS = 4
LEAST_WEIGHED = 0.005
"""Of the largest value: what is smaller counts by its absolute error, like one of this size."""


class Waking(msgspec.Struct, frozen=True, kw_only=True):
    """How often a worker is woken, where a send wakes it once.

    Attributes:
        kept_seconds: T.
        connects, heard, lookups: times that each of these can wake it.
        crowding: by how much T grows where the workers share their cores with everything else:
            what they wait for takes longer, and more goes together.
    """

    kept_seconds: float = 0.0
    connects: float = 0.0
    heard: float = 0.0
    lookups: float = 0.0
    crowding: float = 0.0

    def wakings(self, work: Mapping[str, float]) -> float:
        """A second, of all workers."""
        return self._together(sum(self._things(work)), work)

    def batches(self, work: Mapping[str, float]) -> float:
        """The same for what goes together with its own kind only: as the questions to PostgreSQL
        do, which gets a statement for all appends that wait, one for all look-ups, one for all
        pages."""
        return sum(self._together(each, work) for each in self._things(work))

    def complete(self, work: Mapping[str, float]) -> Work:
        return {**work, "wakings": self.wakings(work), "batches": self.batches(work)}

    def _things(self, work: Mapping[str, float]) -> list[float]:
        return [
            work["sends"],
            self.connects * work["connects"],
            self.heard * work["heard"],
            self.lookups * work["lookups"],
        ]

    def _together(self, things: float, work: Mapping[str, float]) -> float:
        kept = self.kept_seconds * (1 + self.crowding * work["crowded"])
        return things / (1 + things / work["workers"] * kept)


KEPT_SECONDS = [float(seconds) for seconds in np.geomspace(0.0002, 0.02, 16)]
CONNECTS = (0.0, 1.0, 2.0, 4.0)
HEARD = (0.0, 1.0)
LOOKUPS = (0.0, 1.0)
CROWDING = (0.0, 1.0, 2.0, 4.0)
"""Where each is looked for."""


class TooFew(ValueError):
    """Fewer points than there is to be found out."""


class Estimate(NamedTuple):
    """A predicted value with its standard error."""

    value: float
    error: float

    @property
    def low(self) -> float:
        return max(0.0, self.value - LIKELY * self.error)

    @property
    def high(self) -> float:
        return self.value + LIKELY * self.error

    def at(self, sigmas: float) -> float:
        return max(0.0, self.value + sigmas * self.error)


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity: its cost per unit of each term.

    Attributes:
        costs, errors: with the standard error of each; in `unit` per unit of the term.
        covariance: of the costs, in their order.
        spread: the residuals' root mean square, as a share of what was measured.
        dropped: terms that came out below nothing, or never varied, and were left out.
    """

    unit: str
    terms: list[str]
    costs: list[float]
    errors: list[float]
    covariance: list[list[float]]
    spread: float
    points: int
    dropped: list[str]
    waking: Waking = Waking()

    def predict(self, work: Mapping[str, float]) -> Estimate:
        """With the errors of the costs, and of what the model does not know, as it was seen."""
        work = self.waking.complete(work)
        amounts = np.array([work[term] for term in self.terms])
        value = float(amounts @ np.array(self.costs))
        variance = float(amounts @ np.array(self.covariance) @ amounts)
        return Estimate(value, math.sqrt(max(0.0, variance) + (self.spread * value) ** 2))

    def cost(self, term: str) -> Estimate:
        """Of one; nothing where it was dropped."""
        if term not in self.terms:
            return Estimate(0.0, 0.0)
        place = self.terms.index(term)
        return Estimate(self.costs[place], self.errors[place])


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, by the names of `QUANTITIES`."""

    fits: dict[str, Fit]

    def predict(self, quantity: str, load: Load, *, talking: float | None = None) -> Estimate:
        """
        Args:
            talking: channels that the sends are spread over; by default all, with `fanout`
                streams each.
        """
        if talking is None:
            talking = load.streams / load.fanout
        return self.fits[quantity].predict(work_of(load, talking))


def heard_of(fanout: int, workers: int) -> float:
    """How many workers hear of a message over Redis, on average.

    Streams and sends are anywhere. A worker listens where it has a stream of the channel; what
    only the sender's own worker would hear is not published.
    """
    listening = workers * (1 - (1 - 1 / workers) ** fanout)
    alone = float(workers) ** (1 - fanout)  # all streams on one worker, maybe the sender's own
    return listening - alone / workers


def heartbeats_of(load: Load, talking: float) -> float:
    """A second: of the streams that are silent, and of those whose channel pauses for so long."""
    spoken = min(float(load.streams), talking * load.fanout) if load.sends and talking else 0.0
    silent = (load.streams - spoken) / load.heartbeat
    if not spoken:
        return silent
    rate = load.sends / talking
    # Messages come at random: a pause of p seconds has p // heartbeat of them.
    return silent + spoken * rate / math.expm1(min(700.0, rate * load.heartbeat))


def lookups_of(load: Load, talking: float) -> float:
    """A second: each worker looks a sender up, and then not for a time."""
    if not load.sends or not talking:
        return 0.0
    places = talking * load.workers  # where a send may find nothing remembered
    return places / (load.access_seconds + places / load.sends)


def work_of(load: Load, talking: float, *, crowded: bool = False) -> Work:
    """What a load asks for; wakings aside, which each fit counts for itself."""
    deliveries = load.sends * load.fanout
    heard = load.sends * heard_of(load.fanout, load.workers)
    return {
        "services": 1.0,  # PostgreSQL and Redis have clocks of their own, whoever asks
        "workers": float(load.workers),
        "watching": float(load.workers if load.streams else 0),  # looks for what they miss
        "streams": float(load.streams),
        "heartbeats": heartbeats_of(load, talking),
        "deliveries": deliveries,
        "sends": load.sends,
        "heard": heard,
        "lookups": lookups_of(load, talking),
        "crowded": float(crowded),
        "connects": load.connects,
        "most connects": load.connects,
        "delivered characters": deliveries * load.characters,
        "sent characters": load.sends * load.characters,
        "heard characters": heard * load.characters,
    }


def done(point: Measured) -> Load:
    """The load as chance had it: so many sends and new streams came, not quite what was asked."""
    values = point.values
    return msgspec.structs.replace(
        point.load,
        sends=values["sends"],
        connects=values["connects"],
        streams=round(values["streams"]),
    )


def fit_model(measured: Sequence[Measured], quantities: Iterable[str] = QUANTITIES) -> Model:
    """From the windows of points that are not held out.

    Raises:
        TooFew: there are not enough of them.
    """
    windows = [each for each in measured if not each.held_out]
    works = [
        work_of(done(each), each.values["talking"], crowded=is_crowded(each))
        | {name: each.values[name] for name in ("heartbeats", "most connects")}
        for each in windows
    ]
    return Model(
        fits={
            quantity: fit(
                QUANTITIES[quantity],
                works,
                [each.values[quantity] for each in windows],
                UNITS[quantity],
            )
            for quantity in quantities
        }
    )


def is_crowded(point: Measured) -> bool:
    """Whether its workers shared cores with the services and the client: see `measure`."""
    return point.values["crowded"] > 0


def fit(
    terms: Sequence[str], works: Sequence[Mapping[str, float]], values: Sequence[float], unit: str
) -> Fit:
    """The best of all ways to be woken.

    Raises:
        TooFew: fewer points than costs.
    """
    if not {"wakings", "batches"} & set(terms):
        return _fit_linear(terms, works, values, unit)
    several = any(work["workers"] > 1 for work in works)
    some_crowded = any(work["crowded"] for work in works)
    best: Fit | None = None
    for kept, connects, heard, lookups, crowding in product(
        KEPT_SECONDS,
        CONNECTS,
        HEARD if several else (0.0,),
        LOOKUPS if "lookups" in terms else (0.0,),
        CROWDING if some_crowded else (0.0,),
    ):
        waking = Waking(
            kept_seconds=kept, connects=connects, heard=heard, lookups=lookups, crowding=crowding
        )
        woken = [waking.complete(work) for work in works]
        found = _fit_linear(terms, woken, values, unit)
        if best is None or found.spread < best.spread:
            best = msgspec.structs.replace(found, waking=waking)
    assert best is not None
    return best


def _fit_linear(
    terms: Sequence[str], works: Sequence[Mapping[str, float]], values: Sequence[float], unit: str
) -> Fit:
    """Weighted least squares: a point counts by its relative error.

    No work gives anything back: a term whose cost comes out negative is left out.

    Raises:
        TooFew: fewer points than costs.
    """
    measured = np.array(values)
    weights = 1 / np.maximum(measured, max(float(np.max(measured)) * LEAST_WEIGHED, 1e-12))
    dropped = [term for term in terms if all(work[term] == 0 for work in works)]
    kept = [term for term in terms if term not in dropped]
    while True:
        if len(works) < max(LEAST_POINTS, len(kept) + 1):
            raise TooFew(f"{len(works)} points for {len(kept)} costs")
        amounts = np.array([[work[term] for term in kept] for work in works])
        costs, covariance, residuals = _solve(amounts, measured, weights)
        worst = int(np.argmin(costs))
        if costs[worst] >= 0:
            break
        dropped.append(kept.pop(worst))
    freedom = len(works) - len(kept)
    return Fit(
        unit=unit,
        terms=kept,
        costs=costs.tolist(),
        errors=np.sqrt(np.diag(covariance)).tolist(),
        covariance=covariance.tolist(),
        spread=math.sqrt(float(residuals @ residuals) / freedom),
        points=len(works),
        dropped=dropped,
    )


def _solve(amounts: Array, measured: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Costs, their covariance, and the weighted residuals."""
    # Columns in units of their own size: streams are thousands, workers one.
    sizes = np.maximum(np.abs(amounts).max(axis=0), 1e-300)
    weighted = amounts / sizes * weights[:, None]
    costs, *_ = np.linalg.lstsq(weighted, measured * weights, rcond=None)
    residuals = weighted @ costs - measured * weights
    freedom = max(1, len(measured) - len(costs))
    variance = float(residuals @ residuals) / freedom
    covariance = variance * np.linalg.pinv(weighted.T @ weighted)
    return costs / sizes, covariance / np.outer(sizes, sizes), residuals


class Check(NamedTuple):
    """A point against what was predicted for it, from its load alone."""

    load: Load
    held_out: bool
    quantity: str
    measured: float
    predicted: Estimate

    @property
    def off(self) -> float:
        """Share of the measured value: 0.1 is a tenth too much."""
        return self.predicted.value / self.measured - 1


def check(
    model: Model, measured: Sequence[Measured], quantities: Sequence[str], *, held_out: bool
) -> list[Check]:
    """Each such point, each quantity: the median of its windows, for one may have met something
    else on the machine."""
    windows: dict[str, list[Measured]] = {}
    for each in measured:
        if each.held_out == held_out:
            windows.setdefault(each.load.name, []).append(each)
    checks = []
    for quantity in quantities:
        for some in windows.values():
            value = median(each.values[quantity] for each in some)
            predicted = [
                model.fits[quantity].predict(
                    work_of(done(each), each.values["talking"], crowded=is_crowded(each))
                    | {"most connects": each.values["most connects"]}
                )
                for each in some
            ]
            if value > 0:
                estimate = Estimate(
                    median(each.value for each in predicted),
                    median(each.error for each in predicted),
                )
                checks.append(Check(some[0].load, held_out, quantity, value, estimate))
    return checks

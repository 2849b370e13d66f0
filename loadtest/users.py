"""Who comes: somebody who only holds a stream, a person who writes, a therapist with many clients,
and somebody who reads slowly."""

import contextlib
import time

import gevent
from gevent.pool import Group
from locust import User, task
from locust.exception import StopUser

from loadtest import manners
from loadtest.listening import Listener
from loadtest.people import NoSeat, Seat
from loadtest.sending import Api, NotSent
from loadtest.session import session_of

SPREAD_SECONDS = 1.0
"""Locust starts all users of a second at its beginning; they come at any moment of it."""
CLIENTS = 8
"""Of one therapist; a person may hold ten streams (SOTTOVOCE_MAX_STREAMS_PER_USER)."""
SLOW_BYTES_PER_SECOND = 200
"""A message of the usual length takes two seconds."""
LOOK_SECONDS = 0.25


class StreamUser(User):
    """Holds a stream, resumes it by its cursor, and is sent from by the pacer."""

    weight = 4
    bytes_per_second: int | None = None

    @task
    def hold(self) -> None:
        session = session_of(self.environment)
        try:
            seat = session.seats.take()
        except NoSeat as error:
            session.figures.connect_failed(0.0, str(error))
            raise StopUser from None
        listener = Listener(session, seat, bytes_per_second=self.bytes_per_second)
        try:
            gevent.sleep(session.random.uniform(0.0, SPREAD_SECONDS))
            listener.run()
        finally:
            listener.leave()
            session.seats.give_back(seat)
        raise StopUser


class SlowReader(StreamUser):
    """The same, who reads a few words a second: his order is judged, his time is not. One comes
    with four of the others."""

    weight = 1
    bytes_per_second = SLOW_BYTES_PER_SECOND


class ChatUser(User):
    """A person: looks at the channels, listens, thinks, types, sends, marks as read, leaves,
    comes back. How long each takes is in `loadtest/manners.py`, divided by `--haste`."""

    weight = CLIENTS

    @task
    def live(self) -> None:
        session = session_of(self.environment)
        try:
            seat = session.seats.take()
        except NoSeat as error:
            session.figures.connect_failed(0.0, str(error))
            raise StopUser from None
        listener = Listener(session, seat, sends=False)
        api = Api(session)
        try:
            gevent.sleep(session.random.uniform(0.0, SPREAD_SECONDS))
            while True:
                self._visit(api, listener)
                gevent.sleep(self._hurried(session.random.expovariate(1 / manners.AWAY_MEAN)))
                if session.random.random() >= manners.SAME_PAGE:
                    listener.forget_cursor()
        finally:
            api.close()
            listener.leave()
            session.seats.give_back(seat)

    def _visit(self, api: Api, listener: Listener) -> None:
        session, seat = session_of(self.environment), listener.seat
        api.act(seat.token, "list_channels")
        leaves_at = time.monotonic() + self._hurried(
            session.random.expovariate(1 / manners.STAY_MEAN)
        )
        listening = gevent.spawn(listener.run)
        try:
            while time.monotonic() < leaves_at and not listening.dead:
                self._say_something(api, listener)
        finally:
            listening.kill()

    def _say_something(self, api: Api, listener: Listener) -> None:
        session, seat = session_of(self.environment), listener.seat
        gevent.sleep(self._hurried(manners.thinking_seconds(session.random)))
        if listener.take_unread():
            api.act(seat.token, "mark_read", channelId=seat.channel_id)
        typing = manners.typing_seconds(manners.message(session.random, 0.0))
        gevent.sleep(self._hurried(typing))
        if not session.quiet:
            with contextlib.suppress(NotSent):  # each attempt is in the figures
                api.send(seat, due=time.monotonic())

    def _hurried(self, seconds: float) -> float:
        return seconds / session_of(self.environment).options.haste


class Therapist(User):
    """Opens a channel with each of eight clients, listens to all of them at once, and answers
    whoever has written. The clients' seats are taken by the next users."""

    weight = 1

    @task
    def work(self) -> None:
        session = session_of(self.environment)
        api = Api(session)
        listening = Group()
        listeners: list[Listener] = []
        try:
            for seat in self._open_practice(api):
                listeners.append(Listener(session, seat, sends=False))
                listening.spawn(listeners[-1].run)
            while True:
                gevent.sleep(LOOK_SECONDS)
                for listener in listeners:
                    if listener.take_unread():
                        self._answer(api, listener)
        except NoSeat as error:
            session.figures.connect_failed(0.0, str(error))
            raise StopUser from None
        finally:
            listening.kill()
            for listener in listeners:
                listener.leave()
            api.close()

    def _open_practice(self, api: Api) -> list[Seat]:
        """Our seat at a channel with each client.

        Raises:
            NoSeat
        """
        session = session_of(self.environment)
        own = session.seats.take_pair()
        token = own.therapist_token
        seats = [Seat.at(own.channel_id, token)]
        session.seats.give_back(Seat.at(own.channel_id, own.prospect_token))
        therapist_id = _first_channel(api.act(token, "list_channels")).get("therapistId")
        for _ in range(CLIENTS - 1):
            client = session.seats.take_pair()
            known = _first_channel(api.act(client.prospect_token, "list_channels"))
            made = api.act(
                token,
                "create_channel",
                therapistId=therapist_id,
                prospectUserId=known.get("prospectUserId"),
            )
            if made is None:
                continue  # it is in the figures
            seats.append(Seat.at(made["channelId"], token))
            session.seats.give_back(Seat.at(made["channelId"], client.prospect_token))
        return seats

    def _answer(self, api: Api, listener: Listener) -> None:
        session, seat = session_of(self.environment), listener.seat
        api.act(seat.token, "mark_read", channelId=seat.channel_id)
        text = manners.message(session.random, 0.0)
        gevent.sleep(manners.typing_seconds(text) / session.options.haste)
        if not session.quiet:
            with contextlib.suppress(NotSent):  # each attempt is in the figures
                api.send(seat, due=time.monotonic())


def _first_channel(reply: dict[str, list[dict[str, int]]] | None) -> dict[str, int]:
    """Of a `list_channels`; empty if it failed or there is none."""
    channels = (reply or {}).get("channels") or [{}]
    return channels[0]

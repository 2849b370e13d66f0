"""Lengths and pauses are those that the module states."""

import random
from statistics import median, quantiles

from loadtest import manners

RNG = random.Random(3)


def test_a_text_carries_its_moment():
    text = manners.message(RNG, 1234.567891)
    assert manners.stamped_at(text) == 1234.567891
    assert manners.stamped_at("no moment ~ 12 !") is None


def test_lengths_and_pauses_are_as_stated():
    lengths = [len(manners.message(RNG, 99999.0)) for _ in range(4000)]
    assert 40 <= median(lengths) <= 50
    assert 120 <= quantiles(lengths, n=10)[-1] <= 160
    assert max(lengths) <= manners.LENGTH_MOST
    thinking = [manners.thinking_seconds(RNG) for _ in range(4000)]
    assert 11 <= median(thinking) <= 13
    assert max(thinking) <= manners.THINK_MOST

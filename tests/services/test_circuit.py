"""The circuit of a replica, step by step, on a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from hpc_rl.services.circuit import FIRST_REST_S, JITTER, LONGEST_REST_S, Circuit


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def circuit(clock: Clock) -> Circuit:
    return Circuit(random.Random(0), clock)


def test_a_new_replica_says_who_it_is_before_it_is_called(circuit: Circuit) -> None:
    assert circuit.state() == "half-open"
    circuit.proved()
    assert circuit.state() == "closed"


def test_it_opens_after_three_failures_in_a_row_and_success_starts_the_count_anew(circuit: Circuit) -> None:
    circuit.proved()
    for _ in range(2):
        circuit.failed()
        circuit.failed()
        assert circuit.state() == "closed"
        circuit.answered()
    for _ in range(3):
        circuit.failed()
    assert circuit.state() == "open"


def test_each_rest_is_twice_as_long_up_to_a_limit_until_a_call_succeeds(circuit: Circuit, clock: Clock) -> None:
    rests = []
    for _ in range(8):
        circuit.silent()
        began = clock.now
        while circuit.state() == "open":
            clock.now += 0.01
        rests.append(clock.now - began)
        assert circuit.state() == "half-open"
    for number, rest in enumerate(rests):
        base = min(LONGEST_REST_S, FIRST_REST_S * 2**number)
        assert base <= rest <= base * (1 + JITTER) + 0.02
    assert len({round(rest / min(LONGEST_REST_S, FIRST_REST_S * 2**n), 2) for n, rest in enumerate(rests)}) > 3
    circuit.proved()
    circuit.failed()
    assert circuit.state() == "open", "it said who it is, and still failed: it is no better than before"
    clock.now += 2 * LONGEST_REST_S
    circuit.proved()
    circuit.answered()
    circuit.failed()
    assert circuit.state() == "closed"


def test_a_broken_connection_makes_it_say_again_who_it_is(circuit: Circuit) -> None:
    circuit.proved()
    circuit.lost()
    assert circuit.state() == "half-open"
    circuit.proved()
    assert circuit.state() == "closed"
    circuit.lost()
    circuit.proved()
    circuit.lost()
    assert circuit.state() == "open", "one that breaks connections again and again is left alone"


def test_a_server_that_asks_to_be_left_alone_is_trusted_afterwards(circuit: Circuit, clock: Clock) -> None:
    circuit.proved()
    circuit.rest(5)
    circuit.rest(1)
    clock.now += 4.9
    assert circuit.state() == "open", "the longer wish counts"
    clock.now += 5 * (1 + JITTER)
    assert circuit.state() == "closed"

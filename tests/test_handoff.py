"""The hand-off alone, with integers for parameters: no network, no environment."""

import queue
import random
import signal
import threading
import time
from types import SimpleNamespace

import jax
import pytest


def make(script, actor_ids, concurrency=False):
    return script.HandOff(dict.fromkeys(actor_ids, jax.devices()[0]), concurrency)


def play(script, handoff, actor_id, updates, delay, crash_at=None):
    """An actor whose rollout is the version it got."""
    try:
        for update in range(1, updates + 1):
            version, params = handoff.take_params(actor_id)
            if update == crash_at:
                raise ZeroDivisionError("boom")
            time.sleep(delay())
            handoff.rollouts[actor_id].put(script.Delivery(version, int(params), [], {}))
    except SystemExit:
        pass  # the hand-off has stopped
    except Exception as error:
        handoff.rollouts[actor_id].put(error)


def start(script, handoff, updates, crash=()):
    delay = lambda: random.random() * 0.004
    threads = [
        threading.Thread(target=play, args=(script, handoff, i, updates, delay, dict(crash).get(i))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    return threads


def join(threads):
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("concurrency", [False, True])
def test_versions_do_not_depend_on_timing(script, concurrency):
    updates, handoff = 25, make(script, range(4), concurrency)
    threads = start(script, handoff, updates)
    for _ in range(1 + concurrency):
        handoff.give_params(0, 0)
    seen = []
    for update in range(1, updates + 1):
        deliveries = handoff.get_rollouts(update)
        assert [delivery.pieces for delivery in deliveries] == [delivery.version for delivery in deliveries]
        assert len({delivery.version for delivery in deliveries}) == 1
        seen.append(deliveries[0].version)
        handoff.give_params(update, update)
    expected = [0, *range(updates - 1)] if concurrency else list(range(updates))
    assert seen == expected
    join(threads)
    assert all(queue.empty() for queue in handoff.rollouts.values())  # as many rollouts as updates


def test_parameters_arrive_on_the_actors_own_device(script):
    devices = dict(enumerate(jax.devices()[i] for i in (2, 1, 2)))
    handoff = script.HandOff(devices, False)
    handoff.give_params(0, jax.numpy.ones(3))
    assert [handoff.take_params(i)[1].devices() for i in range(3)] == [{device} for device in devices.values()]


def test_a_wrong_version_is_an_error(script):
    handoff = make(script, range(2))
    for actor_id, version in enumerate((1, 0)):
        handoff.rollouts[actor_id].put(script.Delivery(version, None, [], {}))
    with pytest.raises(RuntimeError, match=r"update 2 got rollouts of versions \[0, 1\]"):
        handoff.get_rollouts(2)


def test_exception_of_an_actor_reaches_the_learner(script):
    handoff = make(script, range(4))
    threads = start(script, handoff, 3, crash={2: 2}.items())
    handoff.give_params(0, 0)
    assert len(handoff.get_rollouts(1)) == 4
    handoff.give_params(1, 1)
    with pytest.raises(RuntimeError, match=r"actor 2 failed: ZeroDivisionError\('boom'\)") as caught:
        handoff.get_rollouts(2)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    handoff.stop()
    join(threads)


def test_stop_wakes_a_waiting_actor(script):
    handoff = make(script, [7])
    thread = threading.Thread(target=play, args=(script, handoff, 7, 3, lambda: 0))
    thread.start()
    handoff.stop()
    join([thread])
    assert handoff.rollouts[7].empty()  # the thread ended without an error


def test_sigterm_does_not_wait_for_environments_that_are_made(script):
    """Making them may hang, as a step may. After seven waits of a second a run that wants to end does so."""
    handoff = make(script, [0])
    waits = []

    def get(timeout):
        waits.append(timeout)
        assert len(waits) < 100  # else it would wait for ever
        if len(waits) == 10:
            handoff.signals_received = {signal.SIGTERM}
        raise queue.Empty

    handoff.rollouts[0] = SimpleNamespace(get=get)
    with pytest.raises(SystemExit, match="143"):
        handoff.get_rollouts(1)
    assert waits == [1] * 10

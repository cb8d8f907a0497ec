"""The hand-off alone, with integers for parameters: no network, no environment, no device."""

import random
import threading
import time

import pytest


def play(script, handoff, actor_id, updates, delay, crash_at=None):
    """An actor whose rollout is the version it got."""
    try:
        for update in range(1, updates + 1):
            version, params = handoff.take_params(actor_id)
            if update == crash_at:
                raise ZeroDivisionError("boom")
            time.sleep(delay())
            handoff.put_rollout(actor_id, script.Delivery(version, params, [], {}))
    except script.Stopped:
        pass
    except Exception as error:
        handoff.fail(error)


def start(script, handoff, updates, crash=()):
    delay = lambda: random.random() * 0.004
    threads = [
        threading.Thread(target=play, args=(script, handoff, i, updates, delay, dict(crash).get(i))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("concurrency", [False, True])
def test_versions_do_not_depend_on_timing(script, concurrency):
    updates, handoff = 25, script.HandOff(range(4), concurrency)
    threads = start(script, handoff, updates)
    for _ in range(1 + concurrency):
        for actor_id in range(4):
            handoff.give_params(actor_id, 0, 0)
    seen = []
    for update in range(1, updates + 1):
        deliveries = handoff.get_rollouts(update)
        assert [delivery.rollout for delivery in deliveries] == [delivery.version for delivery in deliveries]
        assert len({delivery.version for delivery in deliveries}) == 1
        seen.append(deliveries[0].version)
        for actor_id in range(4):
            handoff.give_params(actor_id, update, update)
    expected = [0, *range(updates - 1)] if concurrency else list(range(updates))
    assert seen == expected
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert all(queue.empty() for queue in handoff.rollouts.values())  # as many rollouts as updates


def test_a_wrong_version_is_an_error(script):
    handoff = script.HandOff(range(2), False)
    for actor_id, version in enumerate((1, 0)):
        handoff.put_rollout(actor_id, script.Delivery(version, None, [], {}))
    with pytest.raises(RuntimeError, match=r"update 2 got rollouts of versions \[0, 1\]"):
        handoff.get_rollouts(2)


def test_exception_of_an_actor_reaches_the_learner(script):
    handoff = script.HandOff(range(4), False)
    threads = start(script, handoff, 3, crash={2: 2}.items())
    for actor_id in range(4):
        handoff.give_params(actor_id, 0, 0)
    assert len(handoff.get_rollouts(1)) == 4
    for actor_id in range(4):
        handoff.give_params(actor_id, 1, 1)
    with pytest.raises(ZeroDivisionError, match="boom"):
        handoff.get_rollouts(2)
    handoff.stop()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_stop_wakes_a_waiting_actor(script):
    handoff = script.HandOff([7], False)
    thread = threading.Thread(target=play, args=(script, handoff, 7, 3, lambda: 0))
    thread.start()
    handoff.stop()
    thread.join(5)
    assert not thread.is_alive()


def test_failure_wakes_the_learner_in_either_wait(script):
    handoff = script.HandOff(range(2), False)
    never = threading.Event()
    stuck = type("Stuck", (), {"block_until_ready": lambda self: never.wait()})()
    for wait in (lambda: handoff.get_rollouts(1), lambda: handoff.wait_until_ready([stuck])):
        threading.Timer(0.05, handoff.fail, [KeyError("late")]).start()
        with pytest.raises(KeyError, match="late"):
            wait()
    never.set()

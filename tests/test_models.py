"""What --save-model writes and --load-model reads, and the games that a model plays."""

import hashlib
from pathlib import Path

import conftest
import numpy as np
import pytest
from flax import serialization
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8,
            num_minibatches=1, log_frequency=1, total_timesteps=64)  # fmt: skip


def sealed(content):
    data = serialization.msgpack_serialize(content)
    return hashlib.sha256(data).digest() + data


@conftest.one_fast
def test_load_model(script):
    """A run that loads another run's model and trains with learning rate 0 ends with the same hash."""
    tiny = TINY | dict(env_id="Pong-v5", start_fresh=True)
    one = script.train(script.Args(**tiny, resume="one", save_model=True, eval_episodes=1))
    model = "runs/one/model.msgpack"
    tiny |= dict(load_model=model, seed=2)
    two = script.train(script.Args(**tiny, resume="two", learning_rate=0.0))
    assert two["params_sha256"] == one["params_sha256"]
    assert two["args"]["load_model"] == model
    assert script.train(script.Args(**tiny, resume="three"))["params_sha256"] != one["params_sha256"]

    with pytest.raises(script.FlagError, match=f"--load-model {model}: it has another network or optimizer"):
        script.train(script.Args(**tiny | dict(channels=(5,)), resume="four"))
    Path("bad.msgpack").write_bytes(Path(model).read_bytes()[:-1])
    Path("checkpoint.msgpack").write_bytes(sealed({"update": 1}))
    for path, why in ("bad", "not those that were written"), ("none", "No such file"), ("checkpoint", "'state'"):
        with pytest.raises(script.FlagError, match=rf"--load-model {path}.msgpack: cannot be read: .*{why}"):
            script.train(script.Args(**tiny | dict(load_model=f"{path}.msgpack"), resume=path))


@conftest.one_fast
def test_a_model_leaves_the_run(script, capsys):
    """The model file alone restores the flags, the bits, and the games of the summary and the log."""
    flags = TINY | dict(env_id="Asterix-v5", save_model=True, eval_episodes=3)
    summary = script.train(script.Args(**flags))
    directory = Path("runs", summary["run_name"])
    assert "model.msgpack, mean score of 3 games" in capsys.readouterr().out
    args, network, params = script.load_model(directory / "model.msgpack")
    assert args == script.Args(**flags)
    assert script.params_sha256(params) == summary["params_sha256"]
    scores = script.play_games(args, network, params, 3)
    assert scores == summary["evaluation"]["scores"]
    (event,) = EventAccumulator(str(directory)).Reload().Scalars("eval/episodic_return")
    assert event.value == pytest.approx(np.mean(scores), rel=1e-6) == pytest.approx(summary["evaluation"]["mean"])


@conftest.one_fast
def test_evaluation_counts_the_first_game_of_every_environment(script, monkeypatch, counting_pool):
    """Environment i plays games of 3 + i steps. Fast environments play several, and only the first counts."""
    pool = counting_pool(4)
    monkeypatch.setattr(script, "make_env", lambda *args: pool)
    network = type("Network", (), {"apply": lambda self, params, obs: (np.zeros((len(obs), 6)), np.zeros(len(obs)))})()
    # rewards of an episode of n steps are 0 to n - 1; the game's own points are ten times that
    assert script.play_games(script.Args(), network, {}, 4) == [30, 60, 100, 150]
    assert len(pool.log) == 6

"""Untrusted models and checkpoints are refused in one line or loaded, run no code and take little memory and time."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import conftest
import jax
import msgpack
import numpy as np
import pytest
from flax import serialization

TINY = dict(img_size=8, channels=(2,), hiddens=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8,
            num_minibatches=1, checkpoint_frequency=1, total_timesteps=2 * 32)  # fmt: skip
IT = dict(resume="it")

# === what must not happen while a file is read ========================================================================
happened, watching = [], []  # events of the audit hook, which cannot be removed; the folder it watches, if any
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class")
RUNS_CODE += ("ctypes.dlopen", "socket.connect", "marshal.loads", "code.__new__")


def listen(event, details):
    if not watching:
        return
    if event.startswith(RUNS_CODE) or (event == "exec" and not os.path.exists(details[0].co_filename)):
        happened.append((event, str(details)))
    if event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR):
        path = details[0] if isinstance(details[0], int) else os.path.realpath(os.fsdecode(details[0]))
        if not str(path).startswith(watching[0]):
            happened.append((event, str(details)))


sys.addaudithook(listen)


@contextlib.contextmanager
def guarded(directory: Path):
    """Require that no code runs, no file outside `directory` is written, and less than 1 GiB and 5 s are needed."""
    old, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, old[1]))
    happened.clear()
    watching.append(str(directory))
    start = time.monotonic()
    try:
        yield
    finally:
        watching.clear()
        resource.setrlimit(resource.RLIMIT_AS, old)
    assert time.monotonic() - start < 5
    assert not happened


# === mutants ==========================================================================================================
def sealed(body: bytes) -> bytes:
    """Prepend the SHA-256 of `body`, which a stranger can compute too."""
    return hashlib.sha256(body).digest() + body


def array(shape, dtype, buffer) -> msgpack.ExtType:
    """What Flax reads as an array."""
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, buffer)))


def packed(x) -> msgpack.ExtType:
    """Encode what msgpack itself cannot write."""
    return array(x.shape, x.dtype.str, x.tobytes()) if isinstance(x, np.ndarray | np.generic) else msgpack.ExtType(*x)


def nested(depth: int) -> dict:
    return {"a": nested(depth - 1)} if depth else {}


chunked = lambda shape, chunks: {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}
HEADS = bytes.fromhex("c0 c1 c6 c9 c7 d9 db dc dd de df 8f 9f 80 90 ff 00 7f cb cf")  # different types, huge lengths
WRONG_JSON = [None, True, 0, -1, 2, 10**6, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "x", [], {}, [1], [[1]]]
WRONG_JSON += [{"a": 1}, [None], ["x"], [1] * 20, [10**9], nested(50), "../../x", "x" * 10**5]
ODD_TEXT = ["", "{", "[]", "1", "null", "[" * 10**5, '{"a":' * 10**5, "1" * 10**4, '{"no_flag": 1}', b"{}", 3, None]
WRONG = [None, True, -1, 2**63, 1e308, float("nan"), "x", b"x", [], {}, [1, [2]], {1: 2, "a": 3}, nested(400)]
WRONG += [np.zeros(0), np.zeros((2, 3)), np.float64(3), np.array(["x", "yy"]), np.array(1 + 2j), np.zeros(4, np.int8)]
WRONG += [array([1], "O", b"12345678"), array([-1, 2], "<f4", bytes(16)), array([2**62, 4], "<f4", bytes(16))]
WRONG += [array([2**64 - 1], "<f4", bytes(4)), array([0, 2**40], "<f4", b""), array([1], "S2000000000", b"x")]
WRONG += [array([1], "i4," * 2000 + "i4", b"1234"), array([1], "(1000000,1000000)f8", b"1234"), array([1], "V0", b"")]
WRONG += [array({}, "<f4", b"1234"), array([1.5], "<f4", b"1234"), array([1], "<f4", None), array([1], 7, b"1234")]
WRONG += [array([1], "__import__('os').system('touch /tmp/pwned')", b"1"), msgpack.ExtType(2, b"\x91\x01")]
WRONG += [msgpack.ExtType(3, b""), msgpack.ExtType(1, b"\xc1"), msgpack.ExtType(77, b"x"), chunked({"0": 2**40}, {})]
WRONG += [chunked({"0": 2**40}, {"0": np.zeros(1)}), chunked(3, None), {"__msgpack_chunked_array__": True}]
BODIES = [
    b"",
    b"\xc0",
    b"\x01",
    b"\x90",
    b"\x80",
    b"\xa1x",
    *(head + b"\xff" * 4 for head in (b"\xdd", b"\xdf", b"\xdb")),
]
BODIES += [head * depth + b"\xc0" for head in (b"\x91", b"\x81\xa1a") for depth in (500, 1000, 10**5)]


def spoil(content, chance):
    """Replace, remove or add something in a tree of dicts. JSON text in it is changed as JSON."""
    key = chance.choice(sorted(content, key=str))
    here, how = content[key], chance.random()
    if isinstance(here, dict) and here and how < 0.8:
        return content | {key: spoil(here, chance)}
    if isinstance(here, str) and here.startswith("{") and how < 0.9:
        flags = json.loads(here)
        return content | {key: json.dumps(flags | {chance.choice(sorted(flags)): chance.choice(WRONG_JSON)})}
    if how < 0.1:
        return {name: x for name, x in content.items() if name != key}
    return content | {"another" if how < 0.2 else key: chance.choice(WRONG + ODD_TEXT)}


def mutants(good: bytes, number: int, seed: int):
    """Yield (what was done, bytes). Half of the files are damaged, and half have a valid hash."""
    chance, body = random.Random(seed), good[32:]
    structure = [i for match in re.finditer(rb"[\x20-\x7e]{3,}", body) for i in range(match.start() - 1, match.end())]
    for i in range(number):
        data, seal, where = bytearray(body), i % 2 == 1, chance.random()
        kind = ("bits", "heads", "tree", "tree", "cut", "bodies", "tree")[chance.randrange(7)]
        if not seal:
            data, kind = bytearray(good), ("bits", "cut", "longer", "empty")[chance.choice([0, 0, 0, 1, 2])]
        for _ in range(chance.choice([1, 1, 2, 8])):  # with a hash, half of the time at names and lengths
            at = chance.choice(structure) if where < 0.5 and seal else chance.randrange(len(data))
            if kind == "bits":
                data[at] ^= 1 << chance.randrange(8)
            elif kind == "heads":
                data[at] = chance.choice(HEADS)
        if kind == "cut":
            del data[chance.randrange(len(data)) :]
        elif kind == "longer":
            data += chance.randbytes(chance.choice([1, 100]))
        elif kind == "bodies":
            data = chance.choice(BODIES)
        elif kind == "tree":
            data = msgpack.packb(spoil(serialization.msgpack_restore(body), chance), default=packed, strict_types=True)
        yield f"{kind}{', with its hash' if seal else ''}", sealed(bytes(data)) if seal else bytes(data)


def one_line(error: Exception) -> bool:
    return "\n" not in str(error) and len(str(error)) < 1000


form = lambda tree: jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype.kind), tree)


@pytest.fixture
def model(script, tmp_path):
    """(path, Args, params) of a saved model."""
    args = script.Args(**TINY)
    params = script.make_network(args).init(jax.random.key(0), np.zeros((1, *script.env_spec(args)[0]), np.uint8))
    path = tmp_path / "model.msgpack"
    script.save_model(path, args, params)
    return path, args, jax.device_get(params)


@conftest.one_fast
def test_a_thousand_strange_models(script, model, tmp_path):
    """A damaged model is refused in one line. A model with a recomputed hash may be odd but does no harm."""
    path, _, _ = model
    good, seen, wrong = path.read_bytes(), Counter(), []
    for i, (kind, data) in enumerate(mutants(good, 1000, seed=1)):
        path.write_bytes(data)
        with guarded(tmp_path):
            try:
                script.load_model(path)
                outcome = "loaded"
            except ValueError as error:
                outcome = "refused" if one_line(error) else "refused with a page"
            except Exception as error:
                outcome = f"{type(error).__name__}: {str(error)[:80]}"
        seen[kind, outcome in ("refused", "loaded")] += 1
        if outcome != ("loaded" if data == good else "refused") and "its hash" not in kind:
            wrong.append((i, kind, outcome))
    assert not wrong, (len(wrong), Counter(re.sub(r"\d+|'.*'", "_", outcome) for _, _, outcome in wrong), wrong[:20])
    assert len(seen) >= 8


@pytest.mark.parametrize("size", [-1, 30_000, 10**9])
@conftest.one_fast
def test_a_model_of_huge_images(script, model, tmp_path, size):
    """A file of 3 KB must not allocate arrays of that size for Gymnasium's observation space."""
    path, *_ = model
    content = serialization.msgpack_restore(path.read_bytes()[32:])
    content["args"] = json.dumps(json.loads(content["args"]) | {"img_size": size})
    path.write_bytes(sealed(serialization.msgpack_serialize(content)))
    with guarded(tmp_path), pytest.raises(ValueError, match="--img-size"):
        script.load_model(path)


class Reached(Exception):
    """Raised when a resumed run is about to play."""


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """(script) -> a folder with the run "it" and its two checkpoints, and the tree that `train` restores."""

    @cache
    def play(script):
        folder, caught = tmp_path_factory.mktemp("played"), []

        def catch(args, flag, saved, tree, example):
            caught.append(tree)
            raise Reached

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            script.train(script.Args(**TINY | IT, start_fresh=True))
            patch.setattr(script, "match_structure", catch)
            with pytest.raises(Reached):
                script.train(script.Args(**TINY | IT))
        return folder, caught[0]

    return play


@pytest.fixture
def stopped_run(script, played, tmp_path):
    """Copies the run "it" here. Returns (the tree that `train` restores, the newest of two checkpoints)."""
    folder, tree = played(script)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    kept = sorted(Path("runs/it/checkpoints").glob("*.msgpack"))
    assert [path.name for path in kept] == ["1.msgpack", "2.msgpack"]
    return tree, kept[1]


def resume(script, args, tree) -> int:
    """Do what `train` does until it plays. Return the update from which it resumes."""
    sizes, devices, record = script.set_up(args)
    report = script.Report(args, sizes, record)
    if not report.checkpoint:
        return 0
    content = script.unpack(report.checkpoint)
    state, previous = script.match_structure(args, "resume", content["state"], tree, "another")
    assert form((state.params, previous)) == form((tree[0].params, tree[1]))
    jax.device_put(state, devices.learners[0])
    json.dumps(report.counters())
    np.mean([0.0, *report.scores])
    assert report.updates == content["update"]
    return content["update"]


@conftest.one_fast
def test_three_hundred_strange_checkpoints(script, stopped_run, tmp_path, capsys):
    """A damaged checkpoint is skipped, with one line, for the older one. With a recomputed hash it does no harm."""
    tree, path = stopped_run
    args, good, wrong, seen = script.Args(**TINY | IT), path.read_bytes(), [], Counter()
    for i, (kind, data) in enumerate(mutants(good, 300, seed=2)):
        path.write_bytes(data)
        capsys.readouterr()
        with guarded(tmp_path):
            try:
                update = resume(script, args, tree)
                said = [line for line in capsys.readouterr().out.splitlines() if "cannot be read, trying" in line]
                outcome = (
                    "older" if update == 1 and len(said) == 1 else "taken" if not said else f"went on from {update}"
                )
            except script.FlagError as error:
                outcome = "refused" if one_line(error) else "refused with a page"
            except Exception as error:
                outcome = f"{type(error).__name__}: {str(error)[:80]}"
        seen[kind, outcome] += 1
        if outcome != ("taken" if data == good else "older") and "its hash" not in kind:
            wrong.append((i, kind, outcome))
    assert not wrong, (len(wrong), Counter(re.sub(r"\d+|'.*'", "_", outcome) for _, _, outcome in wrong), wrong[:20])
    assert len(seen) >= 8


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), OSError(errno.ENOMEM, "no"), MemoryError()]
)
@conftest.one_fast
def test_what_cannot_be_read_now_is_not_damaged(script, stopped_run, monkeypatch, error):
    """After a read error the run ends. It uses no older checkpoint, does not start afresh and changes no file."""
    _, path = stopped_run
    files = lambda: {path: path.read_bytes() for path in Path("runs/it").rglob("*") if path.is_file()}
    before, read = files(), Path.read_bytes

    def fail(self):
        if self.name == path.name:
            raise error
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(type(error)):
            script.train(script.Args(**TINY | IT, start_fresh=True))
    assert files() == before
    assert resume(script, script.Args(**TINY | IT), stopped_run[0]) == 2


@conftest.one_fast
def test_a_file_that_cannot_be_unpacked_now(script, stopped_run, monkeypatch):
    """Running out of memory while a checkpoint is unpacked ends the run."""

    def fail(data):
        raise MemoryError

    monkeypatch.setattr(serialization, "msgpack_restore", fail)
    with pytest.raises(MemoryError):
        script.train(script.Args(**TINY | IT, start_fresh=True))

"""Checkpoints: every bit comes back, every fault is found, and no moment of a save is a bad one to die in."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from surefoot.training import checkpoint
from surefoot.training.checkpoint import CheckpointError, RunLocked, SaveError, newest, open_checkpoint, read_file, save, save_file

TREES = {"learner": {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.int32(7)}, "environment": {"qpos": np.ones(3)}}
INFO = {"iteration": 3, "reward": 0.1, "generator": {"state": 2**127 + 1}}


def bits(leaf):
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return (np.asarray(leaf).dtype, np.shape(leaf), np.asarray(leaf).tobytes())


def every_kind_of_leaf():
    rng = np.random.default_rng(0)
    return {
        "bfloat16": jnp.array([1.5, -0.0, jnp.nan, jnp.inf], jnp.bfloat16),
        "float16": rng.normal(size=3).astype(np.float16),
        "float64": np.frombuffer(np.array([0x7FF0000000000001, 0x8000000000000000], np.uint64), np.float64),  # signalling NaN, -0
        "complex64": rng.normal(size=4).astype(np.float32).view(np.complex64),
        "bool": np.array([True, False, True]),
        "int64": np.array([-(2**63), 2**63 - 1]),
        "uint32": jnp.array([2**32 - 1], jnp.uint32),
        "uint8": rng.integers(0, 256, (2, 3, 5)).astype(np.uint8),
        "empty": np.zeros((0, 3), np.float32),
        "zero_dimensional": np.array(3.0),
        "numpy_scalar": np.float32(0.1),
        "jax_scalar": jnp.float32(0.1),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "strided": np.arange(20, dtype=np.int32)[::-3],
        "broadcast": np.broadcast_to(np.float32(2), (2, 2)),
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(2, impl="rbg"), 3),
        "nested": [(np.zeros(1),), {"a/b": np.ones(2), "..": np.ones(1)}, None],
    }


def assert_same(restored, tree):
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(tree), strict=True):
        assert type(ours) is type(theirs), path
        assert bits(ours) == bits(theirs), path


def test_every_kind_of_leaf_comes_back_bit_for_bit_and_as_its_own_kind(tmp_path):
    tree = every_kind_of_leaf()
    path = save(tmp_path, 102400, {"learner": tree, "bare": np.arange(3)}, INFO)
    assert path == tmp_path / "step-000000102400"
    loaded = newest(tmp_path)
    assert (loaded.path, loaded.step, loaded.info) == (path, 102400, INFO)
    restored = loaded.restore("learner", tree)
    assert_same(restored, tree)
    assert jax.random.key_impl(restored["keys"]) == jax.random.key_impl(tree["keys"])
    assert_same(loaded.restore("bare", np.zeros(3, int)), np.arange(3))


def test_a_policy_file_comes_back_bit_for_bit(tmp_path):
    tree = every_kind_of_leaf()
    path = save_file(tmp_path / "policy.safetensors", tree, INFO)
    arrays, info = read_file(path)
    assert info == INFO
    assert_same(checkpoint.restore_tree(arrays, tree, source="policy"), tree)
    assert os.listdir(tmp_path) == ["policy.safetensors"]


def test_a_template_of_shapes_is_enough(tmp_path):
    tree = {"weight": jnp.arange(3.0), "count": jnp.int32(1)}
    save(tmp_path, 1, {"tree": tree}, {})
    assert_same(newest(tmp_path).restore("tree", jax.eval_shape(lambda: tree)), tree)


def test_a_flat_dictionary_needs_no_template_and_can_be_written_to(tmp_path):
    save(tmp_path, 1, {"environment": {"qpos": np.ones(2), "np_random/0": np.arange(3)}}, {})
    arrays = newest(tmp_path).arrays("environment")
    assert sorted(arrays) == ["np_random/0", "qpos"]
    arrays["qpos"] += 1
    np.testing.assert_array_equal(newest(tmp_path).arrays("environment")["qpos"], [1, 1])


def test_restored_arrays_do_not_depend_on_the_file(tmp_path):
    loaded = open_checkpoint(save(tmp_path, 1, TREES, {}))
    arrays, tree = loaded.arrays("learner"), loaded.restore("learner", jax.tree.map(jnp.asarray, TREES["learner"]))
    (loaded.path / "learner.safetensors").write_bytes(b"")
    np.testing.assert_array_equal(arrays["weight"], TREES["learner"]["weight"])
    np.testing.assert_array_equal(tree["weight"], TREES["learner"]["weight"])


def test_files_are_those_of_the_safetensors_library(tmp_path):
    path = save_file(tmp_path / "policy.safetensors", every_kind_of_leaf(), {})
    ours = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(ours["transposed"], np.arange(6.0).reshape(2, 3).T)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % array.itemsize == 0 for name, array in ours.items())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"weight": np.zeros((2, 3), np.float32)}, r"count is int32\[\] \(expected none\)"),
        ({**TREES["learner"], "bias": np.zeros(2)}, r"bias is absent \(expected float64\[2\]\)"),
        ({**TREES["learner"], "weight": np.zeros((3, 2), np.float32)}, r"weight is float32\[2, 3\] \(expected float32\[3, 2\]\)"),
        ({**TREES["learner"], "weight": np.zeros((2, 3))}, r"weight is float32\[2, 3\] \(expected float64\[2, 3\]\)"),
        ({str(i): np.zeros(1) for i in range(9)}, r"and 8 more"),
    ],
)
def test_a_template_that_differs_is_refused_with_the_difference(tmp_path, template, message):
    save(tmp_path, 1, TREES, {})
    with pytest.raises(CheckpointError, match=message):
        newest(tmp_path).restore("learner", template)


def test_a_key_is_not_taken_for_words_or_for_a_key_of_another_generator(tmp_path):
    tree = {"key": jax.random.key(0, impl="rbg")}
    save(tmp_path, 1, {"tree": tree}, {})
    for other in (jax.random.key_data(tree["key"]), jax.random.key(0, impl="unsafe_rbg")):
        with pytest.raises(CheckpointError, match="key:key<rbg> is"):
            newest(tmp_path).restore("tree", {"key": other})
    with pytest.raises(CheckpointError, match="no tree 'other'; it holds tree"):
        newest(tmp_path).arrays("other")


@pytest.mark.parametrize("leaf", [1.0, "text", jnp.tanh, np.array(["a"]), np.array([{}]), np.zeros(2, ">f4"), np.zeros(2, complex)])
def test_a_leaf_that_cannot_be_stored_is_named_before_anything_is_written(tmp_path, leaf):
    with pytest.raises(TypeError, match=r"leaf 'tree\.x'"):
        save(tmp_path, 1, {"learner": {"tree": {"x": leaf}}}, {})
    with pytest.raises(TypeError, match=r"leaf 'tree\.x'"):
        save_file(tmp_path / "policy", {"tree": {"x": leaf}}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, TREES, {"count": np.int64(1)})
    assert os.listdir(tmp_path) == []


# Large arrays


def large_leaves():
    """Rows of 16 bytes or 2, so that chunks of 64 hold 4 of the one and 32 of the other."""
    rng = np.random.default_rng(1)
    return {
        "rows": jnp.asarray(rng.normal(size=(10, 4)).astype(np.float32)),
        "bytes": rng.integers(0, 256, (8, 4, 4)).astype(np.uint8),
        "transposed": rng.normal(size=(2, 40)).T,
        "bfloat16": jnp.arange(70, dtype=jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(2), 20),
        "wide": rng.normal(size=(3, 20)),  # a row is more than a chunk
        "one row": rng.normal(size=(1, 40)),
        "small": jnp.float32(0.1),
    }


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 64)


@pytest.mark.usefixtures("small_chunks")
def test_large_arrays_come_back_bit_for_bit_from_several_files(tmp_path):
    tree = large_leaves()
    path = save(tmp_path, 1, {"learner": tree, "learner2": tree, "small": TREES["learner"]}, INFO)
    loaded = newest(tmp_path)
    assert loaded.trees == ("learner", "learner2", "small")
    assert_same(loaded.restore("learner", tree), tree)
    assert_same(loaded.restore("learner2", jax.eval_shape(lambda: {"rows": tree["rows"]}) | tree), tree)
    arrays = loaded.arrays("learner")
    assert bits(arrays["transposed"]) == bits(tree["transposed"])
    arrays["rows"] += 1  # it can be written to
    assert len(list(path.glob("learner.*.safetensors"))) == 3 + 2 + 10 + 3 + 3 + 3
    assert {len(checkpoint._read_tensors(file)[0]) for file in path.glob("learner.*.safetensors")} == {1}
    assert sorted(checkpoint._read_tensors(path / "learner.safetensors")[0]) == ["one row", "small"]
    assert list(path.glob("small.*")) == [path / "small.safetensors"]


@pytest.mark.usefixtures("small_chunks")
def test_an_accelerator_is_asked_for_a_chunk_at_a_time(tmp_path, monkeypatch):
    tree = jax.tree.map(jnp.asarray, {name: large_leaves()[name] for name in ("rows", "bytes", "bfloat16", "keys")})
    here = save(tmp_path, 1, {"learner": tree}, {})
    fetched = []
    on_host = checkpoint._on_host
    monkeypatch.setattr(checkpoint, "_is_remote", lambda array: True)
    monkeypatch.setattr(checkpoint, "_on_host", lambda leaf: (fetched.append(leaf), on_host(leaf))[1])
    there = save(tmp_path, 2, {"learner": tree}, {})
    assert max(leaf.nbytes for leaf in fetched) == 64
    assert all(isinstance(leaf, jax.Array) for leaf in fetched)
    for file in here.glob("learner*"):
        assert (there / file.name).read_bytes() == file.read_bytes()


def inodes(path):
    return {file.name: file.stat().st_ino for file in path.iterdir()}


@pytest.mark.usefixtures("small_chunks")
def test_only_chunks_that_have_changed_are_written_again(tmp_path):
    rows = np.arange(80, dtype=np.float32).reshape(20, 4)
    first = save(tmp_path, 1, {"learner": {"rows": rows}}, {})
    changed = rows.copy()
    changed[7, 3] += 1
    second = save(tmp_path, 2, {"learner": {"rows": changed}}, {})
    differing = {name for name, inode in inodes(second).items() if inodes(first)[name] != inode}
    assert differing == {"learner.00001.safetensors", "learner.safetensors", "info.json", "manifest.json"}
    np.testing.assert_array_equal(open_checkpoint(first).arrays("learner")["rows"], rows)
    np.testing.assert_array_equal(open_checkpoint(second).arrays("learner")["rows"], changed)
    third = save(tmp_path, 3, {"learner": {"rows": changed}}, {}, keep=1)  # what the others were linked to goes
    assert [file.name for file in tmp_path.iterdir()] == [third.name]
    np.testing.assert_array_equal(newest(tmp_path).arrays("learner")["rows"], changed)
    fourth = save(tmp_path, 4, {"learner": {"rows": changed[:-1]}}, {})  # fewer rows
    np.testing.assert_array_equal(open_checkpoint(fourth).arrays("learner")["rows"], changed[:-1])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_system_without_links_gets_every_chunk_again(tmp_path, monkeypatch, error):
    def refuse(*arguments, **keywords):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    tree = large_leaves()
    first, second = (save(tmp_path, step, {"learner": tree}, {}) for step in (1, 2))
    assert not set(inodes(first).values()) & set(inodes(second).values())
    assert_same(newest(tmp_path).restore("learner", tree), tree)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("small_chunks")
def test_a_flipped_bit_in_a_chunk_is_found_and_what_is_shared_is_written_again(tmp_path):
    rows = np.arange(80, dtype=np.float32).reshape(20, 4)
    save(tmp_path, 1, {"learner": {"rows": np.float32(rows - np.arange(20)[:, None] // 4)}}, {})
    path = save(tmp_path, 2, {"learner": {"rows": rows}}, {})
    flip(path / "learner.00003.safetensors")
    with pytest.warns(UserWarning, match=r"step-000000000002/learner.00003.safetensors is corrupt: .*SHA-256.*step 1 is used instead"):
        assert newest(tmp_path).step == 1
    flip(path / "learner.00000.safetensors")  # of both
    with pytest.raises(CheckpointError, match=r"no valid checkpoint: .*02/learner.00000.safetensors .*01/learner.00000.safetensors"):
        newest(tmp_path)
    path = save(tmp_path, 3, {"learner": {"rows": rows}}, {})  # not linked to what is damaged
    np.testing.assert_array_equal(newest(tmp_path).arrays("learner")["rows"], rows)
    with open(path / "learner.00002.safetensors", "ab") as file:
        file.write(b"more")
    save(tmp_path, 4, {"learner": {"rows": rows}}, {})  # nor to what goes on behind the bytes that are wanted
    assert newest(tmp_path).step == 4


@pytest.mark.usefixtures("small_chunks")
def test_a_manifest_that_is_damaged_is_not_believed(tmp_path):
    """Of the checkpoint before: a wrong hash in it would make the next one invalid."""
    tree = {"rows": np.arange(80, dtype=np.float32).reshape(20, 4)}
    for step in range(1, 40):
        path = save(tmp_path, step, {"learner": tree}, {}, keep=1)
        text = (path / "manifest.json").read_bytes()
        digit = text.index(b'sha256": "', text.index(b"learner.00002")) + 10 + step
        (path / "manifest.json").write_bytes(text[:digit] + (b"0" if text[digit] != ord("0") else b"1") + text[digit + 1 :])
        save(tmp_path, step, {"learner": tree}, {}, keep=1)
        assert newest(tmp_path).path.name.endswith(".1")


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_that_the_disk_forgets_is_not_linked_to_and_not_believed(tmp_path, monkeypatch):
    tree = {"rows": np.arange(80, dtype=np.float32).reshape(20, 4)}
    path = save(tmp_path, 1, {"learner": tree}, {})
    os.truncate(path / "learner.00002.safetensors", 100)
    (path / "learner.00003.safetensors").unlink()
    (path / "learner.00004.safetensors").unlink()
    os.mkfifo(path / "learner.00004.safetensors")
    save(tmp_path, 2, {"learner": tree}, {})
    assert newest(tmp_path).step == 2
    write = checkpoint._write

    def disk_that_forgets(path, pieces):
        described = write(path, pieces)
        if path.name == "learner.00002.safetensors":
            os.truncate(path, described["size"] - 1)
        return described

    monkeypatch.setattr(checkpoint, "_write", disk_that_forgets)
    with pytest.raises(SaveError, match=r"step 3 .*learner\.00002\.safetensors is corrupt: it does not hold what was written to it"):
        save(tmp_path, 3, {"learner": {"rows": tree["rows"] + 1}}, {}, keep=1)
    assert newest(tmp_path).step == 2


def test_an_array_is_written_in_place_after_a_save_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2**20)
    put = jax.jit(lambda x, i: x.at[i].set(1), donate_argnums=0)
    rows = put(jnp.zeros((2**20, 4), jnp.uint8), 0)
    where = rows.unsafe_buffer_pointer()
    save(tmp_path, 1, {"learner": {"rows": rows}}, {})
    rows = put(rows, 1)
    assert rows.unsafe_buffer_pointer() == where


MEMORY = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from surefoot.training import checkpoint

    def highest():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    put = jax.jit(lambda x, i: x.at[i].set(i), donate_argnums=0)
    tree = {"rows": put(jnp.zeros((250, 2**20), jnp.uint8), 0), "count": jnp.int32(1)}
    warm = {"rows": put(jnp.zeros((16, 2**20), jnp.uint8), 0)}
    checkpoint.save(Path(sys.argv[1]), 0, {"learner": warm}, {})
    del warm
    before = highest()
    for step in (1, 2):
        checkpoint.save(Path(sys.argv[1]), step, {"learner": tree}, {})
        tree["rows"] = put(tree["rows"], step)
    saving = highest() - before
    shapes = jax.eval_shape(lambda: tree)
    del tree
    tree = checkpoint.newest(Path(sys.argv[1])).restore("learner", shapes)
    assert tree["rows"][1, 0] == 1 and tree["rows"][2, 0] == 0
    print(before, saving, highest() - before)
    """
)


def test_a_large_array_is_saved_and_restored_in_little_more_memory_than_its_own(tmp_path):
    result = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    before, saving, restoring = map(int, result.stdout.split())  # megabytes
    assert before > 250
    assert saving < 50
    assert restoring < 50


HOSTILE_CHUNKS = {
    "two arrays": {"rows": np.ones((4, 4), np.float32), "more": np.ones(1)},
    "no array": {},
    "other rows": {"rows": np.ones((4, 5), np.float32)},
    "another dtype": {"rows": np.ones((4, 4))},
    "no rows": {"rows": np.ones((0, 4), np.float32)},
    "a number": {"rows": np.float32(1)},
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", HOSTILE_CHUNKS)
def test_hostile_chunks_that_match_the_manifest_are_refused_all_the_same(tmp_path, name):
    path = save(tmp_path, 1, {"learner": {"rows": np.ones((12, 4), np.float32)}}, {})
    file = path / "learner.00001.safetensors"
    file.write_bytes(safetensors.numpy.save({leaf: np.asarray(array) for leaf, array in HOSTILE_CHUNKS[name].items()}))
    list_honestly(path, file.name)
    with pytest.raises(CheckpointError, match=r"learner\.00001\.safetensors is corrupt: not rows of one array"):
        open_checkpoint(path).arrays("learner")


# What is kept


def test_the_newest_are_kept_and_leftovers_of_dead_writers_removed(tmp_path):
    (tmp_path / ".step-000000000001.tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert newest(tmp_path) is None
    for step in (1, 2, 3):
        save(tmp_path, step, TREES, {}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-000000000002", "step-000000000003"]
    save(tmp_path, 10**13, TREES, {}, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-10000000000000"]


def test_a_second_checkpoint_of_a_step_never_replaces_the_first_in_place(tmp_path):
    save(tmp_path, 1, TREES, {})
    save(tmp_path, 2, TREES, {"attempt": 0})
    path = save(tmp_path, 2, TREES, {"attempt": 1})
    assert path.name == "step-000000000002.1"
    assert newest(tmp_path).info == {"attempt": 1}
    assert sorted(os.listdir(tmp_path)) == ["step-000000000001", path.name]  # the step before is still there to fall back on


def test_a_damaged_later_checkpoint_never_costs_the_one_just_saved(tmp_path):
    save(tmp_path, 1, TREES, {})
    damaged = save(tmp_path, 3, TREES, {})
    (damaged / "info.json").write_bytes(b"")
    save(tmp_path, 2, TREES, {}, keep=1)
    with pytest.warns(UserWarning, match="info.json is corrupt.*step 2 is used"):
        assert newest(tmp_path).step == 2


def test_old_checkpoints_go_only_after_the_new_one_was_read_back(tmp_path, monkeypatch):
    save(tmp_path, 1, TREES, {})
    write = checkpoint._write

    def disk_that_forgets(path, pieces):
        described = write(path, pieces)
        if path.name == "learner.safetensors":
            os.truncate(path, described["size"] - 1)
        return described

    monkeypatch.setattr(checkpoint, "_write", disk_that_forgets)
    with pytest.raises(SaveError, match=r"step 2 .*learner\.safetensors is corrupt"):
        save(tmp_path, 2, TREES, {}, keep=1)
    assert os.listdir(tmp_path) == ["step-000000000001"]


def test_everything_is_synced_before_the_name_appears_and_the_name_before_the_old_one_goes(tmp_path, monkeypatch):
    save(tmp_path, 1, TREES, {})
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", os.path.basename(a))), rename(a, b)))
    save(tmp_path, 2, TREES, {}, keep=1)
    assert events[1:] == [
        ("fsync", "learner.safetensors"),
        ("fsync", "environment.safetensors"),
        ("fsync", "info.json"),
        ("fsync", "manifest.json"),
        ("fsync", ".step-000000000002.tmp"),
        ("rename", ".step-000000000002.tmp"),
        ("fsync", tmp_path.name),
        ("rename", "step-000000000001"),
    ]
    events.clear()
    monkeypatch.setattr(os, "replace", os.rename)
    save_file(tmp_path / "policy", TREES, {})
    assert events == [("fsync", ".policy.tmp"), ("rename", ".policy.tmp"), ("fsync", tmp_path.name)]


# Faults of the machine

KILLED_AT_EVERY_LINE = textwrap.dedent(
    """
    import itertools, os, shutil, signal, sys, warnings
    from pathlib import Path
    import numpy as np
    from surefoot.training import checkpoint

    root, kind = Path(sys.argv[1]), sys.argv[2]
    traced = {checkpoint.__file__, shutil.__file__}

    checkpoint.CHUNK_BYTES = 20  # a row: the second is as it was, and is linked to

    def tree(step):
        return {"x": np.array([[step] * 5, [7] * 5], np.float32), "n": np.int64(step)}

    def write(step):
        if kind == "checkpoint":
            checkpoint.save(root, step, {"learner": tree(step), "environment": {"n": np.int64(step)}}, {"step": step}, keep=1)
        else:
            checkpoint.save_file(root / "policy", tree(step), {"step": step})

    def read():
        if kind == "checkpoint":
            found = checkpoint.newest(root)
            return found.step, found.info, found.arrays("learner"), found.arrays("environment")
        arrays, info = checkpoint.read_file(root / "policy")
        return info["step"], info, arrays, arrays

    def dying_at(countdown):
        def trace(frame, event, argument):
            nonlocal countdown
            if frame.f_code.co_filename not in traced:
                return None
            if event == "line":
                countdown -= 1
                if countdown == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        return trace

    warnings.simplefilter("error")  # a checkpoint in sight must be whole: `newest` has nothing to skip
    write(1)
    outcomes = []
    for line in itertools.count(1):
        if (child := os.fork()) == 0:
            sys.settrace(dying_at(line))
            write(2)
            sys.settrace(None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
        step, info, *trees = read()
        assert info == {"step": step}
        assert all(a["n"] == step for a in trees)
        assert (trees[0]["x"] == tree(step)["x"]).all()
        outcomes.append(step)
        if step == 2:  # start again from the old one
            shutil.rmtree(root)
            root.mkdir()
            write(1)
        if status == 0:
            break
    write(3)
    assert len(os.listdir(root)) == 1, os.listdir(root)
    assert outcomes == sorted(outcomes), "once the new one is there it stays"
    print(len(outcomes), outcomes.count(1), outcomes.count(2))
    """
)


@pytest.mark.parametrize("kind", ["checkpoint", "file"])
def test_a_kill_at_any_line_leaves_the_old_or_the_new(tmp_path, kind):
    command = [sys.executable, "-c", KILLED_AT_EVERY_LINE, str(tmp_path / "run"), kind]
    (tmp_path / "run").mkdir()
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    kills, old, new = map(int, result.stdout.split())
    assert kills > 50, kills
    assert old > 0
    assert new > 0


@pytest.mark.parametrize("limit", [0, 100, 250, 500, 900])
def test_a_full_disk_loses_nothing(tmp_path, limit):
    save(tmp_path, 1, TREES, {})
    policy = save_file(tmp_path / "policy", TREES, {"step": 1})
    before = sorted(os.listdir(tmp_path))
    trees = {**TREES, "large": np.zeros(1000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # a write past the limit fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SaveError) as refused:
            save(tmp_path, 2, trees, {"text": "x" * 300}, keep=1)
        with pytest.raises(SaveError):
            save_file(policy, trees, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.__cause__.errno == errno.EFBIG
    assert sorted(os.listdir(tmp_path)) == before
    assert newest(tmp_path).step == 1
    assert read_file(policy)[1] == {"step": 1}
    assert save(tmp_path, 2, trees, {}).exists()  # and the next interval succeeds


def test_a_run_directory_that_is_missing_or_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "missing", tmp_path / "file", "/proc"):  # /proc: read-only even for root
        with pytest.raises(CheckpointError, match="must exist and be writable"), checkpoint.lock(checkpoint.Path(directory)):
            pass
    with pytest.raises(SaveError, match="File exists"):
        save(tmp_path / "file", 1, TREES, {})
    with pytest.raises(SaveError, match="No such file"):
        save(tmp_path / "missing" / "checkpoints", 1, TREES, {})
    with pytest.raises(SaveError, match="No such file"):
        save_file(tmp_path / "missing" / "policy", TREES, {})


def test_a_second_process_is_refused_with_pid_and_host_and_death_releases(tmp_path):
    code = "import sys, time; from pathlib import Path; from surefoot.training.checkpoint import lock\n"
    code += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    (tmp_path / "lock").write_text("pid 4194304 on a host with a long name, which died")
    with checkpoint.lock(tmp_path), pytest.raises(RunLocked, match=rf"in use by pid {os.getpid()} on {os.uname().nodename}"):
        checkpoint.lock(tmp_path).__enter__()
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(RunLocked, match=rf"pid {holder.pid} on"), checkpoint.lock(tmp_path):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    with checkpoint.lock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"pid {os.getpid()} on {os.uname().nodename}"


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "lock").symlink_to("precious")
    with pytest.raises(CheckpointError), checkpoint.lock(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "keep me"


# Damaged and hostile files


@pytest.mark.parametrize("chunk_bytes", [8, 2**20])
def test_one_flipped_bit_in_any_byte_of_a_checkpoint_is_found(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    path = save(tmp_path, 1, TREES, INFO)
    assert len(list(path.iterdir())) == (4 if chunk_bytes > 8 else 4 + 2 + 3)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for i in range(len(whole)):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
            with pytest.raises(CheckpointError):
                open_checkpoint(path)
        file.write_bytes(whole)
    assert open_checkpoint(path).info == INFO


def test_one_flipped_bit_in_any_byte_of_a_policy_file_is_found(tmp_path):
    path = save_file(tmp_path / "policy.safetensors", TREES, INFO)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
        with pytest.raises(CheckpointError):
            read_file(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="corrupt"):
            read_file(path)


def test_an_earlier_valid_checkpoint_is_used_with_a_warning_that_names_the_file(tmp_path):
    save(tmp_path, 1, TREES, {})
    path = save(tmp_path, 2, TREES, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(tmp_path).step == 2
    data = bytearray((path / "learner.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "learner.safetensors").write_bytes(data)
    with pytest.warns(UserWarning, match=r"step-000000000002/learner.safetensors is corrupt: .*SHA-256.*step 1 is used instead"):
        assert newest(tmp_path).step == 1
    shutil.rmtree(tmp_path / "step-000000000001")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint: .*learner.safetensors"):
        newest(tmp_path)  # None would start the run anew


def rewrite_manifest(path, **changes):
    """With its own hash, as an attacker would."""
    manifest = {**json.loads((path / "manifest.json").read_text()), **changes}
    manifest["sha256"] = checkpoint._manifest_digest(manifest["step"], manifest["files"])
    (path / "manifest.json").write_text(json.dumps(manifest))


def list_honestly(path, name):
    """Put a file into the manifest with its true size and hash, as an attacker would."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    data = (path / name).read_bytes()
    rewrite_manifest(path, files={**files, name: {"size": len(data), "sha256": checkpoint.hashlib.sha256(data).hexdigest()}})


def add_link(path):
    os.rename(path / "learner.safetensors", path.parent / "elsewhere")
    (path / "learner.safetensors").symlink_to("../elsewhere")


def link_whole_checkpoint(path):
    os.rename(path, path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def write_info(text):
    def attack(path):
        (path / "info.json").write_text(text)
        list_honestly(path, "info.json")

    return attack


def list_outside_file(name):
    def attack(path):
        rewrite_manifest(path, files={**json.loads((path / "manifest.json").read_text())["files"], name: {"size": 0, "sha256": ""}})

    return attack


ATTACKS = {
    "empty manifest": lambda path: (path / "manifest.json").write_text(""),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "manifest is a list": lambda path: (path / "manifest.json").write_text("[1]"),
    "manifest is binary": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest without end": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "manifest with a huge number": lambda path: (path / "manifest.json").write_text('{"format": ' + "1" * 5000 + "}"),
    "manifest is a pickle": lambda path: (path / "manifest.json").write_bytes(pickle.dumps({})),
    "manifest is a pipe": lambda path: ((path / "manifest.json").unlink(), os.mkfifo(path / "manifest.json")),
    "files is a list": lambda path: rewrite_manifest(path, files=["info.json"]),
    "files hold numbers": lambda path: rewrite_manifest(
        path, files={"info.json": 1, "learner.safetensors": 1, "environment.safetensors": 1}
    ),
    "no info listed": lambda path: rewrite_manifest(path, files={}),
    "another step": lambda path: rewrite_manifest(path, step=9),
    "step is text": lambda path: rewrite_manifest(path, step="1"),
    "absolute path": list_outside_file("/etc/passwd"),
    "path that climbs": list_outside_file("../../secret.safetensors"),
    "extra file": lambda path: (path / "extra.py").write_text("raise SystemExit"),
    "extra directory": lambda path: (path / "extra").mkdir(),
    "missing file": lambda path: (path / "environment.safetensors").unlink(),
    "link": add_link,
    "the checkpoint is a link": link_whole_checkpoint,
    "the checkpoint is a file": lambda path: (shutil.rmtree(path), path.write_text("")),
    "info is empty": write_info(""),
    "info is a list": write_info("[]"),
    "info is nested without end": write_info('{"a":' * 100_000),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_or_hostile_checkpoint_is_refused(tmp_path, attack):
    path = save(tmp_path, 1, TREES, INFO)
    ATTACKS[attack](path)
    with pytest.raises(CheckpointError, match="step-000000000001"):
        open_checkpoint(path)


def test_ten_gigabytes_of_json_are_not_read(tmp_path):
    path = save(tmp_path, 1, TREES, INFO)
    os.truncate(path / "manifest.json", 10**10)  # sparse
    with pytest.raises(CheckpointError, match=r"manifest\.json is refused: 10000000000 bytes of JSON"):
        open_checkpoint(path)


def test_a_name_that_is_no_checkpoint_is_refused(tmp_path):
    path = save(tmp_path, 1, TREES, INFO)
    for name in ("step-1", "step-00000000000\u0661", "best"):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            open_checkpoint(path.rename(tmp_path / name))
        (tmp_path / name).rename(path)


def test_another_format_is_refused_with_both_versions(tmp_path, monkeypatch):
    path, policy = save(tmp_path, 1, TREES, INFO), save_file(tmp_path / "policy", TREES, INFO)
    for version in (0, 3):
        monkeypatch.setattr(checkpoint, "FORMAT", version)
        monkeypatch.setattr(checkpoint, "POLICY_FORMAT", version)
        for read, written in ((lambda: open_checkpoint(path), 2), (lambda: read_file(policy), 1), (lambda: newest(tmp_path), 2)):
            with pytest.raises(CheckpointError, match=f"has format {written}; this version of surefoot reads format {version}"):
                read()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def safetensors_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE_TENSORS = {
    "nothing": b"",
    "text": b"hello",
    "pickle": pickle.dumps(Bomb()),
    "pickle as header": safetensors_file(pickle.dumps(Bomb())),
    "header longer than the file": safetensors_file(b"{}", length=10**6),
    "header of 10 GB": safetensors_file(b"{}", length=10**10),
    "header of 2**64 - 1": safetensors_file(b"{}", length=2**64 - 1),
    "header is a list": safetensors_file([1]),
    "header nested without end": safetensors_file(b'{"a":' * 100_000),
    "too few bytes": safetensors_file({"a": entry()}, bytes(7)),
    "too many bytes": safetensors_file({"a": entry()}, bytes(9)),
    "offsets beyond the end": safetensors_file({"a": entry(offsets=(8, 16))}, bytes(8)),
    "offsets overlap": safetensors_file({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "offsets reversed": safetensors_file({"a": entry(offsets=(8, 0))}, bytes(8)),
    "shape disagrees": safetensors_file({"a": entry(shape=(3,))}, bytes(8)),
    "shape overflows": safetensors_file({"a": entry(shape=(2**62, 4))}, bytes(8)),
    "shape negative": safetensors_file({"a": entry(shape=(-2,))}, bytes(8)),
    "empty but huge": safetensors_file({"a": entry(shape=(2**62, 0, 2**62), offsets=(0, 0))}),
    "100 dimensions": safetensors_file({"a": entry(shape=(1,) * 100, offsets=(0, 4))}, bytes(4)),
    "dtype unknown": safetensors_file({"a": entry(dtype="O")}, bytes(8)),
    "dtype foreign": safetensors_file({"a": entry(dtype="F4", shape=(16,))}, bytes(8)),
    "metadata is a number": safetensors_file({"__metadata__": {"surefoot": 1}}),
    "metadata is missing": safetensors_file({"a": entry()}, bytes(8)),
    "metadata is not JSON": safetensors_file({"__metadata__": {"surefoot": "{"}}),
    "metadata is a list": safetensors_file({"__metadata__": {"surefoot": "[]"}}),
    "hash is missing": safetensors_file({"__metadata__": {"surefoot": '{"format": 1, "info": {}}'}}),
    "info is a list": safetensors_file({"__metadata__": {"surefoot": '{"format": 1, "info": []}'}}),
}


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_a_hostile_policy_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "policy.safetensors"
    path.write_bytes(HOSTILE_TENSORS[name])
    with pytest.raises(CheckpointError, match=r"policy\.safetensors"):
        read_file(path)
    assert os.listdir(tmp_path) == ["policy.safetensors"]


@pytest.mark.parametrize("name", [name for name in HOSTILE_TENSORS if "metadata is" not in name and name[:4] not in ("hash", "info")])
def test_hostile_tensors_that_match_the_manifest_are_refused_all_the_same(tmp_path, name):
    path = save(tmp_path, 1, TREES, {})
    (path / "learner.safetensors").write_bytes(HOSTILE_TENSORS[name])
    list_honestly(path, "learner.safetensors")
    with pytest.raises(CheckpointError, match=r"learner\.safetensors"):
        open_checkpoint(path).arrays("learner")


def test_a_file_whose_header_claims_10_gb_and_has_them_takes_no_memory(tmp_path):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(safetensors_file(b"{", length=10**10))
    os.truncate(path, 11 * 10**9)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        read_file(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_policy_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        read_file(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_file(tmp_path)

"""Checkpoints that a kill at any moment leaves valid, files that cannot run code, and the lock of a run.

A checkpoint is one directory, `step-000000102400`: a safetensors file for each tree of arrays, `info.json` for the rest,
and `manifest.json`, written last, with the size and SHA-256 of the others. It is written under a temporary name, synced to
the disk and renamed. No name is written twice (a second checkpoint of a step is `step-000000102400.1`) and nothing points
at the newest one, which is found by looking: there is no moment at which a kill or a full disk can lose both old and new.
A large array is spread over files of its own, `learner.00000.safetensors` and so on, some of its rows in each. Of those that are
as in the checkpoint before, the new one has links to the same files, so that what a replay costs is what has changed in it.
A policy is one safetensors file with its JSON inside. Reading parses safetensors and JSON, and never follows a name that
it finds in a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from ..types import PyTree

FORMAT = 2
POLICY_FORMAT = 1
CHUNK_BYTES = 8 * 2**20  # of an array in one file: what is in memory twice, and is written again where any of it has changed
_BLOCK_BYTES = 2**20  # of a file that is compared at a time
_MAX_JSON_BYTES = 16 * 2**20  # a hostile file must not fill the memory
_DIRECTORY_NAME = re.compile(r"step-([0-9]{12,})(?:\.([0-9]+))?")
_DTYPE_CODES = {
    np.dtype(dtype): code
    for dtype, code in {
        **{np.bool_: "BOOL", np.int8: "I8", np.int16: "I16", np.int32: "I32", np.int64: "I64"},
        **{np.uint8: "U8", np.uint16: "U16", np.uint32: "U32", np.uint64: "U64"},
        **{jnp.bfloat16: "BF16", np.float16: "F16", np.float32: "F32", np.float64: "F64", np.complex64: "C64"},
    }.items()
}
_DTYPES = {code: dtype for dtype, code in _DTYPE_CODES.items()}


class CheckpointError(ValueError):
    """A checkpoint or policy file that is corrupt, hostile, of another format, or not of the shape asked for."""


class SaveError(CheckpointError):
    """Nothing was saved (a full disk, for one); what was there before is intact, so a run can warn and go on."""


class RunLocked(CheckpointError):
    """Another process works in this run directory."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file matched its SHA-256 when it was opened."""

    path: Path
    step: int
    info: dict[str, Any]
    trees: tuple[str, ...]

    def arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """Tree `name` by leaf name, for trees whose structure only the writer knows: a flat dictionary comes back as it was."""
        return {leaf: _whole(array) for leaf, array in self._stored(name).items()}

    def restore(self, name: str, template: PyTree) -> PyTree:
        """Tree `name` in the structure of `template`, the rows of large arrays read a few at a time; see `restore_tree`."""
        return restore_tree(self._stored(name), template, source=f"{self.path / name}.safetensors")

    def _stored(self, name: str) -> dict[str, Any]:
        """Small arrays by leaf name, and where the rows of large ones are."""
        if name not in self.trees:
            raise CheckpointError(f"{self.path} holds no tree {name!r}; it holds {', '.join(self.trees)}")
        return _read_tensors(self.path / f"{name}.safetensors")[0] | _find_chunks(sorted(self.path.glob(f"{name}.*.safetensors")))


def save(directory: Path, step: int, trees: Mapping[str, PyTree], info: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint, read it back, and only then remove all but the newest `keep`; give its path.

    Leaves are JAX or NumPy arrays, NumPy scalars or typed PRNG keys; `info` is a JSON object. The caller holds the run's `lock`.
    Raises SaveError if it could not be written, TypeError for a leaf or an `info` that cannot be stored.
    """
    assert keep >= 1, keep
    assert all(re.fullmatch(r"\w+", name) for name in trees), list(trees)
    leaves = {name: _stored_leaves(tree) for name, tree in trees.items()}
    info_text = json.dumps(dict(info)).encode()
    attempt = max((attempt + 1 for other, attempt in map(_order, _checkpoints(directory)) if other == step), default=0)
    path = directory / (f"step-{step:012d}" + (f".{attempt}" if attempt else ""))
    temporary = directory / f".{path.name}.tmp"
    try:
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)
        for stale in directory.glob(".step-*.tmp"):  # of writers that died: the living one has the lock
            shutil.rmtree(stale, ignore_errors=True)
        before, described = _newest_manifest(directory)
        temporary.mkdir()
        files, chunks = {}, set()
        for name in trees:
            small = {leaf: _on_host(array) for leaf, array in leaves[name].items() if not _is_large(array)}
            files[f"{name}.safetensors"] = _write(temporary / f"{name}.safetensors", _encode(small))
            large = {leaf: array for leaf, array in leaves[name].items() if _is_large(array)}
            for number, chunk in enumerate(_chunks(large)):
                file = f"{name}.{number:05d}.safetensors"
                files[file] = _link_or_write(temporary / file, list(_encode(chunk)), before / file, described.get(file))
                chunks.add(file)
        files["info.json"] = _write(temporary / "info.json", [info_text])
        manifest = {"format": FORMAT, "step": step, "files": files, "sha256": _manifest_digest(step, files)}
        _write(temporary / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        sync_directory(temporary)
        _open(temporary, step, compared=chunks)
        os.rename(temporary, path)
        sync_directory(directory)
    except (OSError, CheckpointError) as error:
        raise SaveError(f"the checkpoint of step {step} was not saved in {directory}: {error}; earlier checkpoints are intact") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Later steps stay: only a run that found them invalid can have come back to this one.
    past = [other for other in _checkpoints(directory) if _order(other) <= _order(path)]
    last_of_step = {_order(other)[0]: other for other in past}
    for old in set(past).difference(list(last_of_step.values())[-keep:]):
        with suppress(OSError):  # the new checkpoint stands whatever happens here, and the next one tries again
            os.rename(old, trash := directory / f".{old.name}.tmp")  # so that half a removal is never taken for a checkpoint
            shutil.rmtree(trash)
    return path


def newest(directory: Path) -> Checkpoint | None:
    """The newest valid checkpoint, with a warning for each newer one that is not; None where there is none at all.

    Raises CheckpointError where there are checkpoints and none is valid: a run must not silently start anew.
    """
    errors: list[CheckpointError] = []
    for path in reversed(_checkpoints(directory)):
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            errors.append(error)
            continue
        for problem in errors:
            warnings.warn(f"{problem}; the checkpoint of step {checkpoint.step} is used instead", stacklevel=2)
        return checkpoint
    if errors:
        raise CheckpointError(f"{directory} has no valid checkpoint: " + "; ".join(map(str, errors)))
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against the manifest and read `info.json`. Raises CheckpointError."""
    if _DIRECTORY_NAME.fullmatch(path.name) is None:
        raise CheckpointError(f"{path} is not a checkpoint: its name should be like step-000000102400")
    return _open(path, _order(path)[0])


def _open(path: Path, step: int, compared: AbstractSet[str] = frozenset()) -> Checkpoint:
    """Check all files but those which have just been `compared` with what they should hold."""
    try:
        irregular = [entry.name for entry in os.scandir(path) if not entry.is_file(follow_symlinks=False)]
        present = set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if path.is_symlink() or irregular:  # before anything is opened: a link leads out of the run, a pipe hangs
        raise CheckpointError(f"{path} is refused: {(irregular or ['it'])[0]} is not a regular file or directory")
    files = _read_manifest(path, step)
    # Names are compared with the directory's own, never followed, so that a path in a manifest leads nowhere.
    if differing := sorted(present ^ {*files, "manifest.json"}):
        raise CheckpointError(f"{path} is corrupt: {differing[0]!r} is {'not in the manifest' if differing[0] in present else 'missing'}")
    for name, expected in files.items():
        if name in compared:
            continue
        try:
            with open(path / name, "rb") as file:
                actual = {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
        if actual != expected:
            raise CheckpointError(f"{path / name} is corrupt: size or SHA-256 differ from the manifest")
    info = read_json(path / "info.json")
    if not isinstance(info, dict):
        raise CheckpointError(f"{path / 'info.json'} is corrupt: not a JSON object")
    return Checkpoint(path, step, info, tuple(match[1] for name in files if (match := re.fullmatch(r"(\w+)\.safetensors", name))))


def _read_manifest(path: Path, step: int) -> dict[str, Any]:
    """The files of the checkpoint of `step`, with their sizes and hashes. Raises CheckpointError."""
    match read_json(path / "manifest.json"):
        case {"format": int(version)} if version != FORMAT:
            raise CheckpointError(f"{path} has format {version}; this version of surefoot reads format {FORMAT}")
        case {"format": int(), "step": int(written_step), "files": {"info.json": _} as files, "sha256": digest}:
            if written_step == step and digest == _manifest_digest(step, files):
                return dict(files)
    raise CheckpointError(f"{path / 'manifest.json'} is corrupt: not the manifest of step {step}")


def _manifest_digest(step: int, files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([step, files], sort_keys=True).encode()).hexdigest()


def _newest_manifest(directory: Path) -> tuple[Path, dict[str, Any]]:
    """(the newest checkpoint that has a manifest, its files); no files where there is none."""
    for path in reversed(_checkpoints(directory)):
        with suppress(CheckpointError):
            return path, _read_manifest(path, _order(path)[0])
    return directory, {}


def save_file(path: Path, tree: PyTree, info: Mapping[str, Any]) -> Path:
    """Write one self-contained safetensors file, replacing `path` only when the new one is complete.

    Its metadata holds `info`, a JSON object, and a SHA-256 over it and every tensor. Raises SaveError, and TypeError as `save` does.
    """
    arrays = {name: _on_host(leaf) for name, leaf in _stored_leaves(tree).items()}
    text = json.dumps({"format": POLICY_FORMAT, "info": dict(info)})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        _write(temporary, _encode(arrays, {"surefoot": text, "sha256": _digest(arrays, text)}))
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise SaveError(f"{path} was not saved: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path


def read_file(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """What `save_file` wrote: (arrays by leaf name, for `restore_tree`; the JSON object). Raises CheckpointError."""
    arrays, metadata = _read_tensors(path)
    if "surefoot" not in metadata:
        raise CheckpointError(f"{path} was not written by surefoot: its metadata has no 'surefoot' entry")
    match _parse_json(metadata["surefoot"], path):
        case {"format": int(version)} if version != POLICY_FORMAT:
            raise CheckpointError(f"{path} has format {version}; this version of surefoot reads format {POLICY_FORMAT}")
        case {"format": int(), "info": dict(info)} if metadata.get("sha256") == _digest(arrays, metadata["surefoot"]):
            return arrays, info
    raise CheckpointError(f"{path} is corrupt: its contents do not match its SHA-256")


def restore_tree(arrays: Mapping[str, Any], template: PyTree, *, source: str) -> PyTree:
    """`arrays` in the structure of `template`, bit for bit: JAX arrays where it has JAX arrays (or ShapeDtypeStructs), NumPy where NumPy.

    Raises CheckpointError, naming the first differences, unless leaf names, shapes and dtypes are those of the template.
    """
    named = _named_leaves(template)
    stored = {name: jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf for name, leaf in named.items()}
    expected = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in stored.items()}
    found = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
    if differing := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        first = ", ".join(f"{name} is {found.get(name, 'absent')} (expected {expected.get(name, 'none')})" for name in differing[:3])
        raise CheckpointError(f"{source} does not fit: {first}{f', and {len(differing) - 3} more' if len(differing) > 3 else ''}")
    return jax.tree.unflatten(jax.tree.structure(template), [_like(leaf, arrays[name]) for name, leaf in named.items()])


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold a run directory for this process. The system releases it on any death, so what the file says can be stale without harm.

    Raises RunLocked, with the holder's process id and host, and CheckpointError for a directory that is missing or read-only.
    """
    try:
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise CheckpointError(f"the run directory {directory} must exist and be writable: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "a process that has just started"
            raise RunLocked(f"{directory} is in use by {holder}; wait for it or stop it") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(descriptor)


def _checkpoints(directory: Path) -> list[Path]:
    """Oldest first, valid or not."""
    return sorted((path for path in directory.glob("step-*") if _DIRECTORY_NAME.fullmatch(path.name)), key=_order)


def _order(path: Path) -> tuple[int, int]:
    match = _DIRECTORY_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), int(match[2] or 0)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by name (`actor.layers.0.weight`); a typed key's name ends in its type, which its stored uint32 words do not show."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f"leaf {name!r} is a {type(leaf).__name__}; a checkpoint holds arrays, and JSON in its info")
        name = f"{name}:{leaf.dtype}" if _is_key(leaf) else name
        assert name not in {*named, "__metadata__"}, f"leaf name {name!r} is ambiguous or reserved"
        named[name] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by name, keys as their words."""
    leaves = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in _named_leaves(tree).items()}
    for name, leaf in leaves.items():
        if leaf.dtype not in _DTYPE_CODES:
            raise TypeError(f"leaf {name!r} has dtype {leaf.dtype}, which safetensors cannot hold")
    return leaves


def _on_host(leaf: Any) -> np.ndarray[Any, Any]:
    # order="C" because safetensors has no strides; ascontiguousarray would make a vector of a scalar.
    return np.asarray(leaf, order="C")


def _is_large(leaf: Any) -> bool:
    return leaf.nbytes > CHUNK_BYTES and len(leaf) > 1


def _chunks(leaves: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Rows of one array after another, of an array on an accelerator no more at a time than are asked for."""
    for name, leaf in leaves.items():
        is_remote = isinstance(leaf, jax.Array) and _is_remote(leaf)
        rows = np.asarray(leaf) if isinstance(leaf, jax.Array) and not is_remote else leaf  # a view of what the CPU has
        count = max(1, CHUNK_BYTES // (leaf.nbytes // len(leaf)))
        for start in range(0, len(leaf), count):
            length = min(count, len(leaf) - start)
            yield {name: _on_host(_take_rows(rows, start, length) if is_remote else rows[start : start + length])}


def _is_remote(array: jax.Array) -> bool:
    return any(device.platform != "cpu" for device in array.devices())


@partial(jax.jit, static_argnums=2)
def _take_rows(array: jax.Array, start: Any, length: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, length)


@partial(jax.jit, donate_argnums=0)
def _put_rows(array: jax.Array, rows: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, start, 0)


class _Chunked(NamedTuple):
    """A large array that has not been read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    files: list[Path]

    def parts(self) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """(the first row, rows) of each file."""
        start = 0
        for file in self.files:
            rows = _read_tensors(file)[0][self.name]
            yield start, rows
            start += len(rows)


def _find_chunks(files: Sequence[Path]) -> dict[str, _Chunked]:
    """Large arrays by leaf name, their rows being those of the files, each of which holds some of one array."""
    found: dict[str, _Chunked] = {}
    for file in files:
        with _opened(file) as tensors:
            parts = [(name, tensors.get_slice(name)) for name in list(tensors.keys())]
            headers = [(name, part.get_shape(), part.get_dtype()) for name, part in parts]
        match headers:
            case [(name, [length, *row], code)] if 0 not in (length, *row):
                array = found.setdefault(name, _Chunked(name, (0, *row), _DTYPES[code], []))
                if (array.shape[1:], array.dtype) == (tuple(row), _DTYPES[code]):
                    found[name] = array._replace(shape=(array.shape[0] + length, *row), files=[*array.files, file])
                    continue
        raise CheckpointError(f"{file} is corrupt: not rows of one array like those before it")
    return found


def _whole(array: Any) -> np.ndarray[Any, Any]:
    if not isinstance(array, _Chunked):
        return np.asarray(array)
    whole = np.empty(array.shape, array.dtype)
    for start, rows in array.parts():
        whole[start : start + len(rows)] = rows
    return whole


def _like(leaf: Any, array: Any) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.array(_whole(array)), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, np.generic):
        return array[()]
    if isinstance(leaf, np.ndarray):
        return _whole(array)
    if not isinstance(array, _Chunked):
        return jnp.array(array)
    whole = jnp.zeros(array.shape, array.dtype)
    for start, rows in array.parts():
        whole = jax.block_until_ready(_put_rows(whole, rows, start))  # or more and more rows would wait in memory
    return whole


def _encode(arrays: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces, of which arrays are not copies. Widest dtype first keeps them aligned."""
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + arrays[name].nbytes
        header[name] = {"dtype": _DTYPE_CODES[arrays[name].dtype], "shape": arrays[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    yield from (_bytes(arrays[name]) for name in names)


def _bytes(array: np.ndarray[Any, Any]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _digest(arrays: Mapping[str, np.ndarray[Any, Any]], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def _holds(path: Path, pieces: Sequence[bytes | memoryview]) -> bool:
    """Whether a regular file consists of these bytes."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            for piece in pieces:
                for start in range(0, len(piece), _BLOCK_BYTES):
                    block = piece[start : start + _BLOCK_BYTES]
                    found = bytearray(len(block))  # which compares like memcmp, as a memoryview does not
                    if file.readinto(found) != len(block) or found != block:
                        return False
            return not file.read(1)
    except OSError:
        return False


def _link_or_write(path: Path, pieces: Sequence[bytes | memoryview], before: Path, described: dict[str, Any] | None) -> dict[str, Any]:
    """A new name of the file `before` where that is `described` and holds these bytes, else a new file; give its size and SHA-256.

    Bytes are compared in a quarter of the time that hashing takes, and what was damaged on the disk since is written again.
    """
    if described is not None and _holds(before, pieces):
        with suppress(OSError):  # not every file system has links
            os.link(before, path, follow_symlinks=False)
            return described
    described = _write(path, pieces)
    if not _holds(path, pieces):
        raise CheckpointError(f"{path} is corrupt: it does not hold what was written to it")
    return described


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and sync a new file; give the size and SHA-256 of what was meant, whatever the disk made of it."""
    size, digest = 0, hashlib.sha256()
    with open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def sync_directory(path: Path) -> None:
    """See to it that names in a directory that were written or replaced are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. The library bounds the header by 100 MB and the file's size, and refuses gaps, overlaps and overflows."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            if foreign := {file.get_slice(name).get_dtype() for name in list(file.keys())} - _DTYPES.keys():
                raise ValueError(f"it holds tensors of {', '.join(sorted(foreign))}")
            yield file
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # ValueError: a shape that NumPy refuses
        raise CheckpointError(f"{path} is corrupt or not a safetensors file: {error}") from error


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """(arrays, metadata)."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {}


def read_json(path: Path) -> Any:
    """A JSON file of bounded size. Raises CheckpointError."""
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is refused: {size} bytes of JSON, at most {_MAX_JSON_BYTES} are read")
        return _parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _parse_json(text: str | bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error

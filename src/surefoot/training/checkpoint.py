"""Checkpoints that a kill at any moment leaves valid, files that cannot run code, and the lock of a run.

A checkpoint is one directory, `step-000000102400`: a safetensors file for each tree of arrays, `info.json` for the rest,
and `manifest.json`, written last, with the size and SHA-256 of the others. It is written under a temporary name, synced to
the disk and renamed. No name is written twice (a second checkpoint of a step is `step-000000102400.1`) and nothing points
at the newest one, which is found by looking: there is no moment at which a kill or a full disk can lose both old and new.
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
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from ..types import PyTree

FORMAT = 1
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
        if name not in self.trees:
            raise CheckpointError(f"{self.path} holds no tree {name!r}; it holds {', '.join(self.trees)}")
        return _read_tensors(self.path / f"{name}.safetensors")[0]

    def restore(self, name: str, template: PyTree) -> PyTree:
        """Tree `name` in the structure of `template`; see `restore_tree`."""
        return restore_tree(self.arrays(name), template, source=f"{self.path / name}.safetensors")


def save(directory: Path, step: int, trees: Mapping[str, PyTree], info: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint, read it back, and only then remove all but the newest `keep`; give its path.

    Leaves are JAX or NumPy arrays, NumPy scalars or typed PRNG keys; `info` is a JSON object. The caller holds the run's `lock`.
    Raises SaveError if it could not be written, TypeError for a leaf or an `info` that cannot be stored.
    """
    assert keep >= 1, keep
    assert all(re.fullmatch(r"\w+", name) for name in trees), list(trees)
    arrays = {name: _to_arrays(tree) for name, tree in trees.items()}
    info_text = json.dumps(dict(info)).encode()
    attempt = max((attempt + 1 for other, attempt in map(_order, _checkpoints(directory)) if other == step), default=0)
    path = directory / (f"step-{step:012d}" + (f".{attempt}" if attempt else ""))
    temporary = directory / f".{path.name}.tmp"
    try:
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)
        for stale in directory.glob(".step-*.tmp"):  # of writers that died: the living one has the lock
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        files = {f"{name}.safetensors": _write(temporary / f"{name}.safetensors", _encode(arrays[name])) for name in trees}
        files["info.json"] = _write(temporary / "info.json", [info_text])
        _write(temporary / "manifest.json", [json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1).encode()])
        sync_directory(temporary)
        _open(temporary, step)
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


def _open(path: Path, step: int) -> Checkpoint:
    try:
        irregular = [entry.name for entry in os.scandir(path) if not entry.is_file(follow_symlinks=False)]
        present = set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if path.is_symlink() or irregular:  # before anything is opened: a link leads out of the run, a pipe hangs
        raise CheckpointError(f"{path} is refused: {(irregular or ['it'])[0]} is not a regular file or directory")
    match read_json(path / "manifest.json"):
        case {"format": int(version)} if version != FORMAT:
            raise CheckpointError(f"{path} has format {version}; this version of surefoot reads format {FORMAT}")
        case {"format": int(), "step": int(written_step), "files": {"info.json": _} as files} if written_step == step:
            pass
        case _:
            raise CheckpointError(f"{path / 'manifest.json'} is corrupt: not the manifest of step {step}")
    # Names are compared with the directory's own, never followed, so that a path in a manifest leads nowhere.
    if differing := sorted(present ^ {*files, "manifest.json"}):
        raise CheckpointError(f"{path} is corrupt: {differing[0]!r} is {'not in the manifest' if differing[0] in present else 'missing'}")
    for name, expected in files.items():
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
    return Checkpoint(path, step, info, tuple(name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")))


def save_file(path: Path, tree: PyTree, info: Mapping[str, Any]) -> Path:
    """Write one self-contained safetensors file, replacing `path` only when the new one is complete.

    Its metadata holds `info`, a JSON object, and a SHA-256 over it and every tensor. Raises SaveError, and TypeError as `save` does.
    """
    arrays = _to_arrays(tree)
    text = json.dumps({"format": FORMAT, "info": dict(info)})
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
        case {"format": int(version)} if version != FORMAT:
            raise CheckpointError(f"{path} has format {version}; this version of surefoot reads format {FORMAT}")
        case {"format": int(), "info": dict(info)} if metadata.get("sha256") == _digest(arrays, metadata["surefoot"]):
            return arrays, info
    raise CheckpointError(f"{path} is corrupt: its contents do not match its SHA-256")


def restore_tree(arrays: Mapping[str, np.ndarray[Any, Any]], template: PyTree, *, source: str) -> PyTree:
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


def _to_arrays(tree: PyTree) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {}
    for name, leaf in _named_leaves(tree).items():
        # order="C" because safetensors has no strides; ascontiguousarray would make a vector of a scalar.
        arrays[name] = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf, order="C")
        if arrays[name].dtype not in _DTYPE_CODES:
            raise TypeError(f"leaf {name!r} has dtype {arrays[name].dtype}, which safetensors cannot hold")
    return arrays


def _like(leaf: Any, array: np.ndarray[Any, Any]) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.array(array), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, np.generic):
        return array[()]
    return array if isinstance(leaf, np.ndarray) else jnp.array(array)


def _encode(arrays: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces, so that a replay buffer is not held in memory a second time. Widest dtype first keeps them aligned."""
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


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """(arrays, metadata). The library bounds the header by 100 MB and the file's size, and refuses gaps, overlaps and overflows."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if foreign := {file.get_slice(name).get_dtype() for name in names} - set(_DTYPE_CODES.values()):
                raise ValueError(f"it holds tensors of {', '.join(sorted(foreign))}")
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # ValueError: a shape that NumPy refuses
        raise CheckpointError(f"{path} is corrupt or not a safetensors file: {error}") from error


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

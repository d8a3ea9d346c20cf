"""Objects of a store, read in chunks that are kept on the disk for a while."""

import contextlib
import functools
import hashlib
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from nha_jax.storage.stores import Store
from train.errors import DataError

CHUNK_BYTES = 1 << 18
"""What is fetched at once: enough that a store's answer does not cost more than what is in it, and
a whole number of the blocks that have checksums."""

_KEPT = 0.9  # of the bound, once it was passed
_COUNTED_AFTER = 1 << 12  # chunks: others may have filled the folder meanwhile
_LOCKS = 64


class ChunkCache:
    """A folder of chunks that holds about as many bytes as it may; the least used go first.

    Any number of threads and processes of a machine may share it.
    """

    def __init__(self, folder: Path, limit: int):
        """Makes nothing yet; `limit` is in bytes."""
        self._folder, self._limit = folder, limit
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._counting = threading.Lock()
        self._bytes: int | None = None
        self._added = 0

    def read(self, key: str, start: int, stop: int, load: Callable[[], bytes]) -> bytes:
        """Returns bytes `start` to `stop` of a chunk, which is loaded if it is not there.

        Args:
            key: what tells the chunk from all others.
            start, stop: of the bytes in it.
            load: fetches the whole chunk.
        """
        path = self._path(key)
        if self._bytes is None:  # the bound may be lower than when the folder was filled
            self._count(0)
        with self._locks[hash(key) % _LOCKS]:  # of two that want it one fetches it
            with contextlib.suppress(OSError):
                with path.open("rb") as file:
                    file.seek(start)
                    found = file.read(stop - start)
                os.utime(path)
                if len(found) == stop - start:
                    return found
            content = load()
            self._keep(path, content)
        return content[start:stop]

    def forget(self, key: str) -> None:
        """Removes a chunk."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self._folder / name[:2] / name

    def _keep(self, path: Path, content: bytes) -> None:
        """Writes a chunk and makes room; a disk that is full only costs the next fetch."""
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        self._count(len(content))

    def _count(self, added: int) -> None:
        """Counts what was added, and makes room if it is too much."""
        with self._counting:
            self._added += 1
            if self._bytes is None or self._added % _COUNTED_AFTER == 0:
                self._bytes = sum(size for _, size, _ in self._chunks())
            else:
                self._bytes += added
            if self._bytes > self._limit:
                self._make_room()

    def _make_room(self) -> None:
        chunks = sorted(self._chunks())
        left = sum(size for _, size, _ in chunks)
        for _, size, path in chunks:
            if left <= _KEPT * self._limit:
                break
            path.unlink(missing_ok=True)
            left -= size
        self._bytes = left

    def _chunks(self) -> list[tuple[float, int, Path]]:
        """Lists when each chunk was last used, its size, and its path."""
        found = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found


class StoreFile:
    """An object that threads may share, read like `train.data.checked_blocks.OpenFile`.

    Attributes:
        path: the object.
    """

    def __init__(self, path: Store, cache: ChunkCache, version: str):
        """Opens nothing yet.

        Args:
            path: the object.
            cache: where its chunks are kept.
            version: what tells this content from another that had the same name.
        """
        self.path, self._cache, self._version = path, cache, version

    def read(self, start: int, stop: int) -> bytes:
        """Returns bytes `start` to `stop`; raises DataError if the object ends before `stop`."""
        parts = []
        for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            first = number * CHUNK_BYTES
            begin, end = max(start - first, 0), min(stop - first, CHUNK_BYTES)
            load = functools.partial(self.path.read, "", first, first + CHUNK_BYTES)
            part = self._cache.read(self._key(number), begin, end, load)
            if len(part) < end - begin:
                raise DataError(
                    f"{self.path}: damaged: it ends at byte {first + begin + len(part)}"
                )
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def refresh(self, start: int, stop: int) -> bool:
        """Lets the next read of these bytes fetch them again; says whether that may help."""
        for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            self._cache.forget(self._key(number))
        return True

    def _key(self, number: int) -> str:
        return f"{self.path} {self._version} {number}"


@functools.cache
def shared_cache(folder: Path, limit: int) -> ChunkCache:
    """The cache of a folder, which all corpora of a process share, so that they count together."""
    return ChunkCache(folder, limit)


def cache_folder() -> Path:
    """The folder of the chunks: nha/shards below XDG_CACHE_HOME, or below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nha" / "shards"

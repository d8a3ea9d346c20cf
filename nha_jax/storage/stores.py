"""Folders in object stores: `gs://BUCKET/NAME` of Google Cloud Storage, `s3://BUCKET/NAME` of S3.

fsspec's file systems do the work: gcsfs and s3fs, which the extra `cloud` brings. They find
credentials and endpoints where the stores' own tools find them, and so does Orbax, which writes
checkpoints to `gs://` through the same packages. What only hinders for a while (a timeout, a cut
connection, "too many requests", a server's own error) is tried again, with waits that double.
"""

import atexit
import contextlib
import functools
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nha_jax.extras import import_extra

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
"""The package that serves each scheme."""

PATIENCE = "NHA_STORE_PATIENCE"
"""The environment variable with the seconds to go on trying for (default: 600)."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_THREADS = 8
_LONGEST_WAIT = 30.0
_TOO_MANY_REQUESTS, _TIMEOUT, _SERVER_ERRORS = 429, 408, 500


class StoreError(OSError):
    """A store cannot do what was asked; the message is one line that names the place.

    Attributes:
        wrong_input: whether the user has to change something; otherwise the store stayed away.
    """

    def __init__(self, message: str, *, wrong_input: bool):
        super().__init__(message)
        self.wrong_input = wrong_input


class NotInStoreError(StoreError, FileNotFoundError):
    """There is no such object, or no such bucket."""


def scheme_of(text: str) -> str | None:
    """Returns the scheme of a URL in lower case, "gs" of "gs://bucket/run"; None of a path."""
    match = _URL.match(text)
    return match[1].lower() if match else None


def is_in_store(text: str | os.PathLike[str]) -> bool:
    """Says whether a text names a place in a store that is served here."""
    return isinstance(text, str) and scheme_of(text) in SCHEMES


class Store:
    """A folder in a store, or the place where one will be.

    Objects below it have names like `model/config.json`. A write is whole or not at all, as stores
    have it, and replaces what was there.

    Attributes:
        url: the folder, without a slash at its end.
    """

    def __init__(self, url: str):
        """Connects to nothing yet.

        Raises:
            ValueError: the URL is not of a scheme in SCHEMES, or names no bucket.
            ImportError: the package that serves it is not installed; the line names the extra.
        """
        match = _URL.match(url)
        scheme = match[1].lower() if match else None
        bucket_and_name = match[2].strip("/") if match else ""
        if scheme not in SCHEMES:
            known = ", ".join(f"{known}://" for known in SCHEMES)
            raise ValueError(f"{url!r}: expected a path, or a URL that begins with {known}")
        if not bucket_and_name or match is None or match[2].startswith("/"):
            raise ValueError(f"{url!r}: expected a bucket after {scheme}://")
        import_extra(SCHEMES[scheme])
        self.url = f"{scheme}://{bucket_and_name}"
        self._scheme, self._root = scheme, bucket_and_name

    def __truediv__(self, name: str) -> "Store":
        """The folder `name` in this one."""
        return Store(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._root.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Store":
        """The folder that it is in; a bucket is in itself."""
        return Store(self.url.rsplit("/", 1)[0]) if "/" in self._root else self

    def files(self, below: str = "") -> dict[str, int]:
        """Lists all objects below the folder: size in bytes by name, sorted by name.

        Args:
            below: a folder in it to list instead; names still begin at this folder.
        """
        root = self._path(below)
        find = lambda fs: fs.find(root, detail=True)  # noqa: E731
        try:
            found = self._try("list", below, find)
        except NotInStoreError:
            return {}
        start = len(self._root) + 1
        # A store's web page makes an empty object, with a slash at its end, for a folder.
        return {
            path[start:]: int(info["size"])
            for path, info in sorted(found.items())
            if info["type"] == "file" and path[start:] and not path.endswith("/")
        }

    def digests(self, below: str) -> dict[str, str]:
        """Lists objects as `files` does: by name, the store's own checksum of the content.

        The checksum is text with the size in it; a store that keeps none has the size alone.
        """
        root = self._path(below)
        found = self._try("list", below, lambda fs: fs.find(root, detail=True))
        start = len(self._root) + 1
        return {
            path[start:]: f"{info['size']} {_checksum(info)}"
            for path, info in sorted(found.items())
            if info["type"] == "file"
        }

    def move(self, old: str, new: str) -> None:
        """Gives another name to a folder: each object is copied in the store, and then removed."""
        names = list(self.files(old))

        def copy(name: str) -> None:
            there = self._path(new + name.removeprefix(old))
            self._try("copy", name, lambda fs: fs.cp_file(self._path(name), there))

        with ThreadPoolExecutor(_THREADS, "move") as pool:
            list(pool.map(copy, names))
        self.remove(names)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Reads an object, or its bytes `start` to `stop`; NotInStoreError if there is none."""
        path = self._path(name)
        return self._try("read", name, lambda fs: fs.cat_file(path, start=start, end=stop))

    def exists(self, name: str = "") -> bool:
        """Says whether there is an object, or one below a folder, of this name."""
        path = self._path(name)
        return bool(self._try("look for", name, lambda fs: fs.exists(path)))

    def modified(self, name: str) -> float:
        """When an object was last written, by the store's clock, in seconds since the epoch."""
        path = self._path(name)
        return float(self._try("look for", name, lambda fs: fs.modified(path)).timestamp())

    def write(self, name: str, content: bytes) -> None:
        """Writes an object."""
        path = self._path(name)
        self._try("write", name, lambda fs: fs.pipe_file(path, content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless there is one of this name; says whether it did.

        Of several that try at once, the store lets one win. Where an answer was lost, the object
        that is found on the next attempt may be our own: equal content counts as ours.
        """
        path = self._path(name)
        try:
            self._try("write", name, lambda fs: fs.pipe_file(path, content, mode="create"))
        except FileExistsError:
            return self.read(name) == content
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are no error."""
        for name in names:
            path = self._path(name)
            try:
                self._try("remove", name, lambda fs, path=path: fs.rm_file(path))  # type: ignore[misc]
            except NotInStoreError:
                continue

    def upload(self, files: Iterable[tuple[Path, str]]) -> None:
        """Writes files of the disk as objects, several at once."""

        def send(pair: tuple[Path, str]) -> None:
            path, name = pair
            there = self._path(name)
            self._try("write", name, lambda fs: fs.put_file(str(path), there))

        with ThreadPoolExecutor(_THREADS, "upload") as pool:
            list(pool.map(send, files))

    def download(self, names: Iterable[str], folder: Path) -> None:
        """Reads objects into files of the same names below a folder, several at once."""

        def fetch(name: str) -> None:
            path, there = folder / name, self._path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._try("read", name, lambda fs: fs.get_file(there, str(path)))

        with ThreadPoolExecutor(_THREADS, "download") as pool:
            list(pool.map(fetch, names))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, verb: str, name: str, call: Callable[[Any], Any]) -> Any:
        """Calls with the file system, again and again while the store may yet come back."""
        url = f"{self.url}/{name}" if name else self.url
        patience = _patience()
        began, wait, told = time.monotonic(), 0.5, False
        while True:
            try:
                return call(_file_system(self._scheme))
            except FileExistsError:
                raise
            except FileNotFoundError:
                reason = "no such object, or no such bucket"
                raise NotInStoreError(
                    f"{url}: cannot {verb} it: {reason}", wrong_input=True
                ) from None
            except Exception as error:
                if not _may_pass(error):
                    reason = _reason(error)
                    raise StoreError(
                        f"{url}: cannot {verb} it: {reason}", wrong_input=True
                    ) from error
                elapsed = time.monotonic() - began
                if elapsed >= patience:
                    raise StoreError(
                        f"{url}: cannot {verb} it, tried for {elapsed:.0f} s: {_reason(error)}",
                        wrong_input=False,
                    ) from error
                if not told and elapsed > 5:
                    print(f"nha: {url}: {_reason(error)}; trying again", file=sys.stderr)
                    told = True
                time.sleep(min(patience - elapsed, wait * random.uniform(0.5, 1.0)))
                wait = min(2 * wait, _LONGEST_WAIT)


def local_copy(url: str, keep: Callable[[str], bool] = lambda name: True) -> Path:
    """Downloads a folder or an object into a folder that lives as long as the process.

    Args:
        url: the place in a store.
        keep: says of each name below a folder whether it is wanted.

    Returns:
        Where it lies; its last part is that of the URL.

    Raises:
        StoreError: there is nothing, or it cannot be read.
    """
    store = Store(url)
    sizes = store.files()
    if not sizes:
        return local_files(store.parent, [store.name]) / store.name
    return local_files(store, filter(keep, sizes))


def local_files(store: Store, names: Iterable[str]) -> Path:
    """Downloads some objects below a folder, as `local_copy` does; returns the folder."""
    target = Path(tempfile.mkdtemp(dir=_temporary_folder())) / store.name
    target.mkdir()
    store.download(names, target)
    return target


def local_input(
    path: str | os.PathLike[str], keep: Callable[[str], bool] = lambda name: True
) -> Path:
    """Gives a folder or a file of the disk: of a place in a store its `local_copy`."""
    return local_copy(str(path), keep) if is_in_store(path) else Path(path)


def check_output(url: str, last: str, *, overwrite: bool) -> None:
    """Raises FileExistsError unless a folder in a store is empty, or may be replaced.

    Args:
        url: the folder.
        last: the name of a file that each folder of this kind has.
        overwrite: whether a folder of this kind may be replaced.
    """
    files = Store(url).files()
    if files and not overwrite:
        raise FileExistsError(f"{url} exists; choose another folder or pass overwrite=True")
    if files and last not in files:
        raise FileExistsError(f"{url} has no {last}, and is left as it is; choose another folder")


@contextlib.contextmanager
def local_output(
    path: str | os.PathLike[str], last: str, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yields where on the disk to write a folder; one in a store is uploaded when the block ends.

    Args:
        path: the folder, on the disk or in a store.
        last: the name of the file that is uploaded when all others are there.
        overwrite: as for `check_output`.

    Raises:
        FileExistsError: see `check_output`; of a folder on the disk nothing is checked here.
        StoreError: the store cannot be written to.
    """
    if not is_in_store(path):
        yield Path(path)
        return
    store = Store(str(path))
    check_output(store.url, last, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="nha-") as temporary:
        folder = Path(temporary) / store.name
        yield folder
        files = [(file, file.relative_to(folder).as_posix()) for file in folder.rglob("*")]
        files = [(file, name) for file, name in files if file.is_file()]
        store.upload(pair for pair in files if pair[1] != last)
        store.upload(pair for pair in files if pair[1] == last)
        written = {name for _, name in files}
        store.remove(name for name in store.files() if name not in written)


@functools.cache
def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="nha-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _file_system(scheme: str) -> Any:
    import fsspec

    # It logs each error with a traceback; what comes of it is raised.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # What another process has written must be seen at once.
    return fsspec.filesystem(scheme, use_listings_cache=False)


def _patience() -> float:
    text = os.environ.get(PATIENCE, "600")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{PATIENCE} = {text!r}: expected a number of seconds") from None


def _may_pass(error: Exception) -> bool:
    """Whether an error may be gone after a while; what says that the request is wrong is not."""
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        return False
    if str(error).startswith("Forbidden"):  # an OSError of gcsfs, without a code
        return False
    code = _status(error)
    if code is not None:
        return code in (_TIMEOUT, _TOO_MANY_REQUESTS) or code >= _SERVER_ERRORS
    return not isinstance(error, ValueError | TypeError | NotImplementedError | ImportError)


_NO_CREDENTIALS = (
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError",
    "RefreshError",
)  # fmt: skip
"""What botocore and google-auth raise where nobody is logged in."""


def _checksum(info: dict[str, Any]) -> str:
    return str(info.get("crc32c") or info.get("md5Hash") or info.get("ETag") or "")


def _status(error: Exception) -> int | None:
    """The HTTP status that an error carries, in the ways of gcsfs and of botocore."""
    code = getattr(error, "code", None)
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if code is None and isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    try:
        return int(code) if code is not None else None
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if type(error).__name__ in _NO_CREDENTIALS:
        return f"no credentials ({text})"
    return text

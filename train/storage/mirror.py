"""A folder of the disk whose files are copied to an object store in the background."""

import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nha_jax.storage.stores import Store
from train.errors import TrainingError

MODEL_FOLDERS = ("model", "model_ema", "adapter")

_INTERVAL = 15.0
_SHARE = 0.05  # of the time that copying may take
_NOT_COPIED = re.compile(r"\.lock|.*\.tmp")


class Mirror:
    """A folder of the disk whose files a thread copies into a folder of a store.

    What is in the store counts; the folder is made for one process, and goes with it.

    Attributes:
        store: the folder in the store.
        folder: the folder of the disk.
    """

    def __init__(self, store: Store, left_out: str, before_flush: Callable[[], None]):
        """Makes the folder.

        Args:
            store: the folder in the store.
            left_out: name of a folder in it that is not copied.
            before_flush: called before anything is copied to the store; what it raises prevents it.
        """
        self.store, self._left_out, self._before_flush = store, left_out, before_flush
        self._temporary = tempfile.TemporaryDirectory(prefix="nha-run-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name) / store.name
        self.folder.mkdir()
        self._copied: dict[str, tuple[int, int]] = {}
        self._copying = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self, name: str) -> None:
        """Copies one file from the store, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.store.download([name], self.folder)

    def pull(self) -> None:
        """Copies from the store what a run goes on from, or reads: small files, and wandb's."""
        names = [
            name
            for name in self.store.files()
            if "/" not in name or name.split("/", 1)[0] == "wandb"
        ]
        self.store.download(names, self.folder)
        self._copied = {name: status for name, _, status in self._files()}

    def start(self) -> None:
        """Lets a thread copy from now on; a store that is away is tried again, and costs a line."""
        self._thread = threading.Thread(target=self._keep, name="mirror", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Copies all that has changed; StoreError if the store stays away."""
        with self._copying:
            self._before_flush()
            files = [entry for entry in self._files() if self._copied.get(entry[0]) != entry[2]]
            with tempfile.TemporaryDirectory(prefix="nha-upload-") as folder:
                pairs = []
                for number, (name, path, _) in enumerate(files):
                    with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
                        pairs.append((_still(name, path, Path(folder) / str(number)), name))
                self.store.upload(pairs)
            self._copied |= {name: status for name, _, status in files}
            changed = {name.split("/", 1)[0] for name, _, _ in files}
            for model in changed.intersection(MODEL_FOLDERS):
                there, here = self.store.files(model), {name for name, _, _ in self._files()}
                self.store.remove(name for name in there if name not in here)

    def close(self, flush: bool) -> None:
        """Ends the thread and removes the folder; copies what is left if it is to `flush`."""
        self._ended.set()
        try:
            if flush:
                self.flush()
        finally:
            self._temporary.cleanup()

    def _keep(self) -> None:
        wait = _INTERVAL
        while not self._ended.wait(wait):
            began = time.monotonic()
            try:
                self.flush()
            except TrainingError:  # the next save raises it where it ends the run
                return
            except OSError as error:
                if not self._ended.is_set():
                    print(f"nha: {error}; the run goes on meanwhile", file=sys.stderr)
            wait = max(_INTERVAL, (time.monotonic() - began) / _SHARE)

    def _files(self) -> list[tuple[str, Path, tuple[int, int]]]:
        """Lists name, path, and time and size of what is to be copied."""
        found = []
        for folder, folders, names in os.walk(self.folder):
            if folder == str(self.folder) and self._left_out in folders:
                folders.remove(self._left_out)
            # What nha_jax.save writes beside a model is not yet the model.
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(folder) / name for name in names if not _NOT_COPIED.fullmatch(name)):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    entry = status.st_mtime_ns, status.st_size
                    found.append((path.relative_to(self.folder).as_posix(), path, entry))
        return found


def _still(name: str, path: Path, copy: Path) -> Path:
    """Gives a file that does not grow while it is read: a model's own, or a copy."""
    if name.split("/", 1)[0] in MODEL_FOLDERS:
        return path
    shutil.copyfile(path, copy)
    return copy

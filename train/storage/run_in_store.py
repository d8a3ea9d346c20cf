"""A training run in an object store.

Its files are written into a `Mirror` on the disk, which copies them to the store, and its owner has
a `Lease`. Checkpoints go to `gs://` directly, from all processes at once. Orbax does not serve
`s3://`: there they are saved on the disk and uploaded, which takes a run of one process.
"""

import re
import threading
from collections.abc import Iterable
from pathlib import Path

import fsspec
from etils import epath

from nha_jax.storage.stores import Store, StoreError, is_in_store, local_copy
from train.errors import ConfigError
from train.paths import user_location
from train.storage.checksums import CHECKSUMS_FILE
from train.storage.lease import OWNERS, Lease
from train.storage.mirror import Mirror

CHECKPOINTS = "checkpoints"

COMMIT_FILE = "commit_success.txt"
"""What Orbax writes last into a checkpoint where nothing can be renamed."""

_RECORD = "run.json"
_STEP = re.compile(CHECKPOINTS + r"/(\d+)/(.+)")


class RunInStore:
    """What a run's folder needs where it is in a store.

    Attributes:
        folder: the mirror's folder.
        checkpoints: the folder of the checkpoints, in the store or in the mirror.
    """

    def __init__(self, store: Store):
        """Reads nothing yet."""
        # Orbax would not see what other processes, or we, have written since it last looked.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        self._store = store
        self._lease = Lease(store)
        self._mirror = Mirror(store, left_out=CHECKPOINTS, before_flush=self._lease.check)
        self._is_owner = False
        self.folder = self._mirror.folder
        self._staged, self._last = _is_staged(store), _last_file(store)
        self.checkpoints: Path | epath.Path = (
            self.folder / CHECKPOINTS if self._staged else epath.Path(store.url) / CHECKPOINTS
        )

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from, damaged or not."""
        return bool(_whole_steps(self._store.files(CHECKPOINTS), self._last))

    def entries(self) -> set[str]:
        """Names the files and folders in the folder, without the owners."""
        return {name.split("/", 1)[0] for name in self._store.files()} - {OWNERS}

    def fetch_record(self) -> None:
        """Brings run.json to the mirror, but for the owner, who has written it."""
        if not self._is_owner:
            self._mirror.fetch(_RECORD)

    def check_processes(self, run: str) -> None:
        """Raises ConfigError where several processes would save what one alone can upload."""
        import jax  # commands that only read a run start sooner without

        if self._staged and jax.process_count() > 1:
            raise ConfigError(
                f"run = {run!r}: a run of {jax.process_count()} processes cannot save checkpoints "
                "there, as Orbax serves gs:// and disks only; expected gs://, or a folder on a "
                "disk that all of them share"
            )

    def take(self, run: str) -> None:
        """Becomes the owner, and brings to the disk what the run goes on from.

        Raises:
            ConfigError: another process is training there.
            StoreError: the store cannot be read or written.
        """
        self._lease.take()
        self._is_owner = True
        self.pull()

    def pull(self) -> None:
        """Brings to the disk what the run goes on from, checkpoints included if they are staged."""
        self._mirror.pull()
        if self._staged:
            names = self._store.files(CHECKPOINTS)
            whole = _whole_steps(names, self._last)
            wanted = [name for name in names if _step_of(name) in whole]
            self._store.download(wanted, self.folder)

    def begin(self) -> None:
        """Copies what there is, for the other processes, and from now on in the background."""
        self._mirror.flush()
        self._mirror.start()

    def before_save(self) -> None:
        """Copies all that has changed; TrainingError if the run is another process's now."""
        self._mirror.flush()

    def on_saved(self, step: int) -> None:
        """Uploads a checkpoint that was saved on the disk; removes those that went there."""
        if not self._staged:
            return
        self._lease.check()
        here = self.folder / CHECKPOINTS / str(step)
        paths = sorted(path for path in here.rglob("*") if path.is_file())
        paths.sort(key=lambda path: path.name == self._last)  # it says that all are there
        pairs = [(path, path.relative_to(self.folder).as_posix()) for path in paths]
        self._store.upload(pairs[:-1])
        self._store.upload(pairs[-1:])
        names = self._store.files(CHECKPOINTS)
        for old in {_step_of(name) for name in names} - {None}:
            if (self.folder / CHECKPOINTS / str(old)).exists():
                continue
            if (self.folder / CHECKPOINTS / f"damaged-{old}").exists():
                self._store.move(f"{CHECKPOINTS}/{old}", f"{CHECKPOINTS}/damaged-{old}")
            else:
                self._store.remove(name for name in names if _step_of(name) == old)

    def write_now(self, name: str, content: bytes) -> None:
        """Writes an object; a store that is away is not waited for longer than half a minute."""
        writing = threading.Thread(target=self._store.write, args=(name, content), daemon=True)
        writing.start()
        writing.join(30.0)

    def end(self, error: BaseException | None) -> None:
        """Copies what is left and lets the next owner begin.

        Args:
            error: why the run ends; a store that stays away is not waited for again.

        Raises:
            StoreError: the store stays away.
        """
        is_away = isinstance(error, StoreError)
        try:
            self._mirror.close(flush=self._lease.is_held and not is_away)
        except StoreError:
            is_away = True
            raise
        finally:
            self._lease.release(say_so=not is_away)


def local_run(text: str | Path, name: str) -> Path:
    """Gives the folder of a run or a saved model on the disk; what is in a store is downloaded.

    Of a run that is its configuration, metrics and result, and the newest finished checkpoint.

    Args:
        text, name: like `train.paths.user_path`.

    Raises:
        ConfigError: like `train.paths.user_location`.
        StoreError: there is nothing, or it cannot be read.
    """
    location = user_location(text, name)
    if isinstance(location, Path):
        return location
    steps = _whole_steps(location.files(CHECKPOINTS), _last_file(location))
    newest = f"{CHECKPOINTS}/{max(steps)}/" if steps else f"{CHECKPOINTS}/"
    wanted = ("adapter/", newest)
    return local_copy(location.url, lambda name: "/" not in name or name.startswith(wanted))


def results_folder(text: str, folder: Path) -> Path:
    """Says where a command puts what it finds about a run, or a model, that it was given.

    Args:
        text: the run as the user wrote it.
        folder: its folder on the disk, of `local_run`.

    Returns:
        That folder; for a run in a store the present one, as the other is only a copy.
    """
    return Path() if is_in_store(text) else folder


def _is_staged(store: Store) -> bool:
    """Whether checkpoints are saved on the disk first."""
    return not store.url.startswith("gs://")


def _last_file(store: Store) -> str:
    """The file of a checkpoint that is written when all others are there."""
    return CHECKSUMS_FILE if _is_staged(store) else COMMIT_FILE


def _whole_steps(names: Iterable[str], last_file: str) -> set[int]:
    """The steps of those checkpoints that have their last file."""
    found = map(_STEP.fullmatch, names)
    return {int(match[1]) for match in found if match and match[2] == last_file}


def _step_of(name: str) -> int | None:
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None

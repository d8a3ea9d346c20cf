"""Preparing a folder in an object store: on the disk first, in a place that is found again."""

import dataclasses
import hashlib
import shutil
import sys

from nha_jax.storage.stores import Store
from train.data.prepare.folder import prepare
from train.data.prepare.options import PrepareOptions
from train.data.prepared_folder import MANIFEST_FILE, Manifest
from train.data.store_files import cache_folder
from train.errors import ConfigError, DataError


def prepare_in_store(options: PrepareOptions, store: Store) -> None:
    """Prepares a folder on the disk, as `prepare` does, and uploads it, the manifest last.

    What was stopped goes on with the same command on the same machine: the folder on the disk has a
    place of its own for each URL. It goes when all is uploaded.

    Raises:
        ConfigError, DataError: see `prepare`; or the folder in the store holds something else.
        StoreError: the store cannot be written to.
    """
    key = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    place = cache_folder().parent / "prepare" / key
    folder = place / store.name
    present = store.files()
    if MANIFEST_FILE in present and not folder.exists():
        store.download([MANIFEST_FILE], folder)  # a finished one is left as it is
    prepare(dataclasses.replace(options, out=str(folder)))
    if MANIFEST_FILE in present:
        finished = Manifest.read(folder)
        store.download([MANIFEST_FILE], place)
        if Manifest.read(place).fingerprint == finished.fingerprint:
            shutil.rmtree(place)
            return
        raise ConfigError(
            f"{store}: the folder was prepared otherwise; choose another folder, or delete it"
        )
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    foreign = sorted(set(present) - set(files))
    if foreign:
        raise ConfigError(
            f"{store}: the folder holds {foreign[0]!r}, but no prepared tokens; choose another"
        )
    size = sum(path.stat().st_size for path in files.values())
    print(f"uploading {size:,} bytes to {store}", file=sys.stderr, flush=True)
    manifest = files.pop(MANIFEST_FILE)
    store.upload((path, name) for name, path in files.items())
    there = store.files()
    for name, path in files.items():
        if there.get(name) != path.stat().st_size:
            raise DataError(f"{store / name}: did not arrive whole; run the same command again")
    store.upload([(manifest, MANIFEST_FILE)])
    shutil.rmtree(place)

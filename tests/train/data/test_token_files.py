"""Token shards: what was written is read, and every kind of damage is one line about its file."""

import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.tokenizer.as_bytes import ByteTokenizer
from train.cli import main
from train.config import DataConfig
from train.data.batches import Sequences, training_batches
from train.data.checked_blocks import BLOCK_BYTES
from train.data.corpus import load_corpus
from train.data.prepare.folder import PrepareOptions, prepare
from train.data.prepared_folder import MANIFEST_FILE, Manifest, PreparedFolder, ShardedTokens
from train.data.token_shards import ShardWriter
from train.errors import ConfigError, DataError

TEXTS = [f"document {n}: " + "word " * (n * 37 % 800) for n in range(300)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training shards of several blocks, and held-out ones."""
    folder = tmp_path_factory.mktemp("prepared")
    for n, text in enumerate(TEXTS):
        (folder / f"{n:03}.txt").write_text(text)
    options = PrepareOptions(
        out=str(folder / "out"),
        inputs=[f"{folder}/*.txt"],
        held_out_fraction=0.1,
        shard_bytes=200_000,
        workers=1,
    )
    manifest = prepare(options)
    assert len(manifest.shards["training"]) == 3
    return folder / "out"


@pytest.fixture
def prepared(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def training_sequences(folder: Path) -> Sequences:
    return Sequences(load_corpus(DataConfig(corpus=str(folder), sequence_length=64)).training, 64)


def read_everything(folder: Path) -> None:
    """What a training run does, as long as it takes to have seen every sequence."""
    draw_all(training_sequences(folder))


def draw_all(sequences: Sequences) -> None:
    batches = training_batches(sequences, batch_size=16, seed=0, first=0)
    for _ in range(-(-len(sequences) // 16)):
        next(batches)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=5),
    data=st.data(),
)
def test_shards_are_one_stream(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], data: st.DataObject
) -> None:
    folder, dtype = tmp_path_factory.mktemp("shards"), np.dtype("uint32")
    records, first = [], 0
    for number, shard in enumerate(lengths):
        with ShardWriter(folder, f"s-{number}", dtype) as writer:
            for length in shard:
                tokens = np.arange(first, first + length) + 70_000
                writer.add(tokens, np.array([length]), length)
                first += length
            record = writer.close()
        assert (record is None) == (not shard)
        records += [record] if record else []
    assert not list(folder.glob(".*"))
    source = ShardedTokens(folder, records, dtype, ByteTokenizer())
    flat = list(itertools.chain(*lengths))
    assert (len(source), source.num_documents) == (sum(flat), len(flat))
    start = data.draw(st.integers(0, first))
    stop = data.draw(st.integers(start, first))
    assert source.read(start, stop).tolist() == list(range(70_000 + start, 70_000 + stop))
    owner = np.repeat(np.arange(len(flat)), flat)
    assert source.documents(start, stop).tolist() == owner[start:stop].tolist()


def test_many_blocks_read_in_any_order(original: Path) -> None:
    source = PreparedFolder.open(original).training
    whole = source.read(0, len(source))
    assert len(whole) * 2 > 5 * BLOCK_BYTES
    again = PreparedFolder.open(original).training
    generator = np.random.default_rng(0)
    for start in generator.integers(0, len(source) - 5000, 200):
        stop = start + int(generator.integers(1, 5000))
        np.testing.assert_array_equal(again.read(start, stop), whole[start:stop])


def test_threads_share_the_files(original: Path) -> None:
    source = PreparedFolder.open(original).training
    whole, wrong = PreparedFolder.open(original).training.read(0, len(source)), []

    def read(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, len(source) - 3000, 100):
            if (source.read(start, start + 3000) != whole[start : start + 3000]).any():
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def flip(path: Path, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


FAULTS = {
    "missing tokens": ("training-00001.tokens", Path.unlink, "cannot read it: No such file"),
    "truncated tokens": ("training-00001.tokens", truncate, "bytes instead of"),
    "flipped bit of tokens": ("training-00001.tokens", flip, "the checksum of bytes"),
    "flipped first byte": ("training-00002.tokens", lambda p: flip(p, 0), "checksum of bytes 0"),
    "flipped last byte": ("training-00002.tokens", lambda p: flip(p, 0.999999), "the checksum of"),
    "missing index": ("training-00001.index", Path.unlink, "cannot read it: No such file"),
    "truncated index": ("training-00001.index", truncate, "bytes instead of"),
    "flipped bit of the index": ("training-00001.index", flip, "its checksum is another"),
    "missing held-out tokens": ("held_out-00000.tokens", Path.unlink, "cannot read it"),
    "truncated manifest": (MANIFEST_FILE, truncate, ""),
    "half a manifest": (MANIFEST_FILE, lambda p: os.truncate(p, 300), "damaged"),
    "flipped bit of the manifest": (MANIFEST_FILE, flip, "damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_one_line_that_names_the_file(prepared: Path, fault: str) -> None:
    name, damage, message = FAULTS[fault]
    damage(prepared / name)
    if fault == "truncated manifest":  # the newline at its end
        read_everything(prepared)
        return
    with pytest.raises(DataError) as error:
        read_everything(prepared)
    assert str(error.value).startswith(f"{prepared / name}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_lost_its_manifest_is_not_taken_for_text(prepared: Path) -> None:
    (prepared / MANIFEST_FILE).unlink()
    with pytest.raises(DataError, match=r"manifest\.json: cannot read it"):
        load_corpus(DataConfig(corpus=str(prepared), sequence_length=64))


@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip], ids=lambda f: f.__name__)
def test_damage_while_it_is_read(prepared: Path, damage: Callable[[Path], None]) -> None:
    """A shard is gone, or is another, before its first token was read."""
    sequences = training_sequences(prepared)
    damage(prepared / "training-00001.tokens")
    with pytest.raises(DataError, match=r"training-00001\.tokens: "):
        draw_all(sequences)


def test_a_shard_cut_off_after_it_was_opened_does_not_kill_the_process(prepared: Path) -> None:
    """Where a memory map would: SIGBUS."""
    source = PreparedFolder.open(prepared).training
    source.read(0, 10)
    os.truncate(prepared / "training-00000.tokens", 100)
    with pytest.raises(DataError, match=r"training-00000\.tokens: damaged: it ends at byte"):
        source.read(60_000, 60_010)


def test_damage_stops_a_run_with_one_line(
    prepared: Path, nha, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(prepared / "training-00001.tokens")
    arguments = [f"--data.corpus={prepared}", "--steps=10000", "--data.sequence_length=64"]
    assert main(["train", str(nha.config_file), *arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nha: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"nha: {prepared / 'training-00001.tokens'}: damaged")


def test_a_manifest_of_another_version_is_refused(prepared: Path) -> None:
    manifest = Manifest.read(prepared)
    Manifest(**{**vars(manifest), "format": 3}).write(prepared)
    with pytest.raises(DataError, match="format 3, which this version cannot read"):
        Manifest.read(prepared)


def test_mixtures_need_prepared_folders(original: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no tokens")
    config = DataConfig(corpus={str(original): 1.0, str(tmp_path): 1.0}, sequence_length=8)
    with pytest.raises(ConfigError, match="expected a folder that `nha data prepare` wrote"):
        load_corpus(config)


def test_a_mixture_is_its_folders(original: Path, prepared: Path) -> None:
    def load(weights: dict[str, float]):
        return load_corpus(DataConfig(corpus=weights, sequence_length=64))

    one, other = (
        load({str(original): 1, str(prepared): 3}),
        load({str(prepared): 3, str(original): 1}),
    )
    assert one.fingerprint == other.fingerprint
    assert one.training.num_tokens == 2 * len(PreparedFolder.open(original).training)
    assert sorted(one.training.weights) == [0.25, 0.75]
    first, second = (
        next(training_batches(Sequences(corpus.training, 64), 8, 0, 3)) for corpus in (one, other)
    )
    np.testing.assert_array_equal(first["tokens"], second["tokens"])

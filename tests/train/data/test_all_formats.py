"""Inputs of every format together: the same folder with any workers, wherever it was stopped."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.tokenizer.as_bytes import END_OF_DOCUMENT
from tests.support.train.raw_files import (
    DOCUMENTS,
    FORMATS,
    contents,
    json_lines,
    prepare,
    write_array_record,
    write_llmc,
    write_megatron,
)
from train.data.prepare import folder as prepare_folder
from train.data.prepare.workers import run_jobs
from train.data.prepared_folder import PreparedFolder
from train.data.token_source import TokenSource
from train.errors import DataError

ALL = [*FORMATS, write_array_record, write_llmc, write_megatron]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each format, and documents longer than shards."""
    raw = tmp_path_factory.mktemp("all") / "raw"
    for write in ALL:
        (raw / write.__name__).mkdir(parents=True)
        write(raw / write.__name__)
    (raw / "long.jsonl").write_bytes(json_lines(["one", "long " * 20_000, "two"]))
    return raw


@pytest.fixture(scope="module")
def whole(raw: Path) -> dict[str, bytes]:
    """The files that one worker makes of it undisturbed."""
    assert prepare(raw.parent / "whole", *arguments(raw), "--workers=1") == 0
    return contents(raw.parent / "whole")


def arguments(raw: Path) -> list[object]:
    return [raw, "--shard-bytes=20000", "--held-out-fraction=0.1", "--record-format=json"]


def test_every_format_has_the_same_documents_on_the_same_side(
    raw: Path, whole: dict[str, bytes]
) -> None:
    prepared = PreparedFolder.open(raw.parent / "whole")
    totals = prepared.manifest.totals
    assert totals["documents"] == len(ALL) * len(DOCUMENTS) + 3
    for split in (prepared.training, prepared.held_out):
        texts = Counter(documents_of(split))
        once = {"one", "long " * 20_000, "two"}
        assert set(texts) - once <= set(DOCUMENTS)
        assert {count for text, count in texts.items() if text not in once} == {len(ALL)}


def documents_of(source: TokenSource) -> list[str]:
    tokens = source.read(0, len(source))
    ends = np.flatnonzero(tokens == END_OF_DOCUMENT)
    assert source.documents(0, len(source))[ends].tolist() == list(range(source.num_documents))
    pieces = np.split(tokens, ends + 1)
    return [piece[:-1].astype(np.uint8).tobytes().decode() for piece in pieces if len(piece)]


@pytest.mark.slow
def test_two_workers_make_the_same(raw: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert len(whole) > 20
    assert prepare(tmp_path / "out", *arguments(raw), "--workers=2") == 0
    assert contents(tmp_path / "out") == whole


@settings(max_examples=4, deadline=None, derandomize=True)
@given(stops=st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_stopped_anywhere_and_run_again_it_is_the_same(
    raw: Path,
    whole: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    stops: list[int],
) -> None:
    out = tmp_path_factory.mktemp("stopped") / "out"
    for stop in stops:

        def run_some(*arguments, stop=stop):
            yield from itertools.islice(run_jobs(*arguments), stop)
            raise DataError("stopped")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(prepare_folder, "run_jobs", run_some)
            assert prepare(out, *arguments(raw), "--workers=1") == 1
    assert prepare(out, *arguments(raw), "--workers=1") == 0
    assert contents(out) == whole

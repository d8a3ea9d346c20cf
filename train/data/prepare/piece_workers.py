"""Making pieces in this process or in several."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from train.data.prepare.pieces import Piece, PieceRecord, Progress, Rules, make_piece
from train.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from train.errors import DataError


def make_pieces(
    pieces: Mapping[int, Piece],
    folder: Path,
    tokenizer: Tokenizer,
    rules: Rules,
    workers: int,
    progress: Progress,
) -> Iterator[tuple[int, PieceRecord]]:
    """Each piece's number and record, as they are finished.

    Args:
        pieces: number -> piece.
        folder: where the shards go; it holds the tokenizer's files.
        tokenizer: what `load_tokenizer(folder)` gives.
        rules: see `make_piece`.
        workers: processes.
        progress: called in this process.

    Raises:
        DataError: see `make_piece`; or a worker died.
    """
    # The workers are the parallel part, and each is to have one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if workers > 1:
        yield from _in_parallel(pieces, folder, rules, workers, progress)
        return
    for number, piece in pieces.items():
        yield number, make_piece(number, piece, folder, tokenizer, rules, progress)


def _in_parallel(
    pieces: Mapping[int, Piece], folder: Path, rules: Rules, workers: int, progress: Progress
) -> Iterator[tuple[int, PieceRecord]]:
    # Not forked: a parent with threads (jax, tokenizers) may leave locks locked for ever.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 2)  # bytes read, tokens made
    stop = context.Event()
    executor = ProcessPoolExecutor(workers, context, _start_worker, (folder, rules, counters, stop))
    before = [0, 0]
    try:
        futures: dict[Future[PieceRecord], int] = {
            executor.submit(_make_piece_in_worker, number, piece): number
            for number, piece in pieces.items()
        }
        while futures:
            finished, _ = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
            # Without the lock, which a worker that was killed may hold.
            now = list(counters.get_obj())
            progress(now[0] - before[0], now[1] - before[1])
            before = now
            for future in finished:
                yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps for want of memory; the same command goes on "
            "where it was, and --workers says with how many"
        ) from None
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """Another piece failed, or the user wants no more."""


_worker: tuple[Path, Tokenizer, Rules, Progress]
"""What a worker process makes its pieces with."""


def _start_worker(folder: Path, rules: Rules, counters: Any, stop: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the parent tells by `stop`
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    # A parent killed with -9 cannot tell its workers, which would wait for more work for ever.
    threading.Thread(target=follow_parent, daemon=True).start()

    def progress(size: int, tokens: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with counters.get_lock():
            counters[0] += size
            counters[1] += tokens

    _worker = (folder, load_tokenizer(folder), rules, progress)


def _make_piece_in_worker(number: int, piece: Piece) -> PieceRecord:
    folder, tokenizer, rules, progress = _worker
    return make_piece(number, piece, folder, tokenizer, rules, progress)

"""Runs the jobs of preparing a corpus, in this process or in several."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from nha_jax.tokenizer.interface import Tokenizer
from train.data.prepare.shard_jobs import (
    Progress,
    ShardJob,
    ShardRules,
    WrittenShards,
    write_shards,
)
from train.data.tokenizers import load_tokenizer
from train.errors import DataError

# A process does not hear Ctrl-C while the tokenizer has a document, which may be a file as large as
# this; the parent of a worker does.
_MOST_BYTES_HERE = 2 << 20

_SECONDS_TO_STOP = 0.3


def run_jobs(
    jobs: Mapping[int, ShardJob],
    folder: Path,
    tokenizer: Tokenizer,
    rules: ShardRules,
    workers: int,
    progress: Progress,
) -> Iterator[tuple[int, WrittenShards]]:
    """Runs jobs and gives each one's number, and what it has written, when it is finished.

    Args:
        jobs: the jobs by number.
        folder: where the shards go; it holds the tokenizer's files.
        tokenizer: what `load_tokenizer(folder)` returns.
        rules: see `write_shards`.
        workers: number of processes; 1: this one, if no job may take long.
        progress: called in this process.

    Raises:
        DataError: see `write_shards`; or a worker was killed.
    """
    # The workers run in parallel, so each of them is to use one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    largest = max((part.text_bytes for job in jobs.values() for part in job), default=0)
    if workers > 1 or largest > _MOST_BYTES_HERE:
        yield from _in_parallel(jobs, folder, rules, workers, progress)
        return
    for number, job in jobs.items():
        yield number, write_shards(number, job, folder, tokenizer, rules, progress)


def _in_parallel(
    jobs: Mapping[int, ShardJob],
    folder: Path,
    rules: ShardRules,
    workers: int,
    progress: Progress,
) -> Iterator[tuple[int, WrittenShards]]:
    # Not forked: threads of the parent (jax, tokenizers) may hold locks, which stay locked then.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 2)  # bytes read, tokens made
    # The workers see the other end closed, even if this process is killed with -9.
    parent_end, stop = context.Pipe()
    arguments = (folder, rules, counters, stop)
    executor = ProcessPoolExecutor(workers, context, _start_worker, arguments)
    before = [0, 0]
    try:
        # Workers inherit the mask: Ctrl-C is for this process, which stops them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures: dict[Future[WrittenShards], int] = {
                executor.submit(_write_shards_in_worker, number, job): number
                for number, job in jobs.items()
            }
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while futures:
            finished, _ = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
            # The lock is not taken, as a worker that was killed may hold it.
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
        parent_end.close()
        executor.shutdown(wait=False, cancel_futures=True)
        # A job stops between two batches, and leaves no files then; but one batch may take long.
        deadline = time.monotonic() + _SECONDS_TO_STOP
        for worker in multiprocessing.active_children():
            worker.join(max(deadline - time.monotonic(), 0))
            worker.kill()
        executor.shutdown()


class _StoppedError(Exception):
    """Ends a job because another one failed, or because the user interrupted the command."""


_worker: tuple[Path, Tokenizer, ShardRules, Progress]
"""The arguments of `write_shards` that are the same for all jobs of a worker process."""


def _start_worker(folder: Path, rules: ShardRules, counters: Any, stop: Any) -> None:
    """Sets a worker process up."""
    global _worker
    stopped = threading.Event()

    def follow_parent() -> None:
        stop.poll(None)
        stopped.set()
        time.sleep(_SECONDS_TO_STOP)
        os._exit(1)

    # A parent that is killed with -9 cannot stop its workers: they would wait for work for ever.
    threading.Thread(target=follow_parent, daemon=True).start()

    def progress(size: int, tokens: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        with counters.get_lock():
            counters[0] += size
            counters[1] += tokens

    _worker = (folder, load_tokenizer(folder), rules, progress)


def _write_shards_in_worker(number: int, job: ShardJob) -> WrittenShards:
    folder, tokenizer, rules, progress = _worker
    return write_shards(number, job, folder, tokenizer, rules, progress)

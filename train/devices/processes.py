"""Several processes as one run: how they join and agree, and which of them writes files."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train import errors
from train.config import TrainConfig
from train.errors import ConfigError, UserError
from train.failures import TRACEBACK, describe_failure

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_COUNT, _INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join(config: TrainConfig) -> None:
    """Connects to the other processes of the run, if any; call it before any use of a device.

    Raises:
        ConfigError: `distributed` is asked for, and neither the variables nor the machine say how
            to connect; or the other processes did not come.
    """
    if not config.distributed:
        return
    # This service would replace our handler of SIGTERM, and it ignores Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            num_processes=_integer_variable(_COUNT), process_id=_integer_variable(_INDEX)
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"distributed = true: cannot join the other processes: {reason} "
            f"(outside of TPU pods and Slurm jobs set {_COORDINATOR}=HOST:PORT, {_COUNT} and "
            f"{_INDEX} for each process)"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def on_first(work: Callable[[], Any]) -> Any:
    """Lets the first process alone do `work`, and returns its result in all of them.

    Args:
        work: returns something that JSON can hold.

    Raises:
        UserError: `work` raised one; every process then raises it.
    """
    if jax.process_count() == 1:
        return work()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"value": work()}
        except UserError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
    answer = _broadcast(answer)
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return answer["value"]


def _broadcast(answer: dict[str, Any]) -> dict[str, Any]:
    """Sends the first process's answer to all of them."""
    content = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    content = content if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in at least one process; all of them must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies the whole of every array to every device; if they were divided, all must call this."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda arrays: arrays, out_shardings=everywhere)(tree)


class StopVote:
    """Lets all processes stop after the same step when a signal came to any of them.

    A vote is a maximum over the devices, queued behind a step and read when the next step has been
    queued, so that nothing waits for it.
    """

    def __init__(self, mesh: Mesh):
        everyone = tuple(mesh.axis_names)
        self._shape = (mesh.devices.size,)
        self._sharding = NamedSharding(mesh, PartitionSpec(everyone))
        self._strongest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None
        self._alone = jax.process_count() == 1

    def cast(self, signal: int | None) -> int | None:
        """Votes with the signal that came to this process, if any.

        Returns:
            The outcome of the vote before, a signal or None. Of a process that is alone, its own
            vote: it need not wait.
        """
        if self._alone:
            return signal
        mine = np.array([signal or 0], np.int32)
        ballots = jax.make_array_from_callback(self._shape, self._sharding, lambda _: mine)
        before, self._pending = self._pending, self._strongest(ballots)
        return None if before is None else int(before) or None

    def last(self, signal: int | None) -> int | None:
        """Reads the outcome of the last vote, which is the same in all processes."""
        if self._alone:
            return signal
        return None if self._pending is None else int(self._pending) or None


def leave_after(error: Exception) -> NoReturn:
    """Reports the error and at once ends this process, one of several, with its exit code.

    Ending as usual would wait for the others, which may be waiting for this one. When it is gone,
    its connections close, and the others end too.
    """
    line, code = describe_failure(error, "train")
    if isinstance(error, jax.errors.JaxRuntimeError) and "closed by peer" in str(error):
        line = "another process of this run has ended; see what it printed"
    elif os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    print(f"nha: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        # The first process coordinates the others: without it, those that are about to report the
        # same error would be aborted.
        time.sleep(2)
    os._exit(code)


def _integer_variable(name: str) -> int | None:
    """Reads an environment variable that holds a whole number; None if it is not set."""
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise ConfigError(f"{name} = {value!r}: expected a whole number, 0 or more")
    return int(value)

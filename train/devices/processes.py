"""Several processes as one run: joining, agreeing, and who writes the files."""

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

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_COUNT, _INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join(config: TrainConfig) -> None:
    """Connects to the other processes of the run if there are any; before any use of a device.

    Raises:
        ConfigError: `distributed` is asked for, and the variables or the machine do not say how;
            or the other processes did not come.
    """
    if not config.distributed:
        return
    # Its handler of SIGTERM would take the place of ours, and it knows no Ctrl-C.
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
    """What `work`, done by the first process alone, returns (something JSON holds), on all.

    Raises:
        UserError: it raised one; every process then does.
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
    content = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    content = content if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())


def any_process(flag: bool) -> bool:
    """Whether `flag` holds in at least one process; all of them have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def whole(tree: Any, mesh: Mesh) -> Any:
    """The same arrays, every device with all of each; a collective if they were divided."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda arrays: arrays, out_shardings=everywhere)(tree)


class StopVote:
    """Stops all processes after the same step when a signal came to any of them.

    A vote is a sum over the devices, queued behind a step and read when the next one has been
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
        """Gives in this process's signal; returns the outcome of the vote before, or None.

        A process that is alone need not wait: its own signal is the outcome.
        """
        if self._alone:
            return signal
        mine = np.array([signal or 0], np.int32)
        ballots = jax.make_array_from_callback(self._shape, self._sharding, lambda _: mine)
        before, self._pending = self._pending, self._strongest(ballots)
        return None if before is None else int(before) or None

    def last(self, signal: int | None) -> int | None:
        """The outcome of the last vote: the same in all processes."""
        if self._alone:
            return signal
        return None if self._pending is None else int(self._pending) or None


def leave_after(error: Exception) -> NoReturn:
    """Reports the error and ends this process of several at once, with the error's exit code.

    Ending as usual would wait for the others, which may be waiting for this one. When it is gone,
    so are its connections, and they end too.
    """
    code = error.exit_code if isinstance(error, UserError) else 1
    if isinstance(error, UserError):
        print(f"nha: {error}", file=sys.stderr)
    elif isinstance(error, jax.errors.JaxRuntimeError) and "closed by peer" in str(error):
        print("nha: another process of this run has ended; see what it printed", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        # The first is the others' coordinator: those that are about to report the same error
        # would be aborted without it.
        time.sleep(2)
    os._exit(code)


def _integer_variable(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise ConfigError(f"{name} = {value!r}: expected a whole number, 0 or more")
    return int(value)

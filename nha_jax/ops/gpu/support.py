"""Which calls and which GPUs the kernels for GPUs serve."""

from typing import Any

import jax
import jax.numpy as jnp

from nha_jax.ops.types import Options
from nha_jax.ops.validation import beyond_kernels

LARGEST_HEAD, MOST_SLOTS = 256, 128
SHORTEST_OF_CUDNN = 64  # tokens: below, what its backward takes goes by its version
Capability = tuple[int, ...]  # of NVIDIA GPUs; empty: another maker's, or unknown
AMPERE, HOPPER = (8, 0), (9, 0)
# Of devices to compile for that are not there, which tell their kind only.
CAPABILITIES: dict[str, Capability] = {
    "A100": AMPERE,
    "H100": HOPPER,
    "H200": HOPPER,
    "B200": (10, 0),
}


def gpu_unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    options: Options,
) -> str | None:
    """Why our kernels can't serve this call where it is compiled for, in a line; None if they can.

    Off GPUs they run interpreted.
    """
    if query.dtype != jnp.bfloat16:
        return f"its kernels multiply in bfloat16, got query of {query.dtype}"
    if reason := beyond_kernels(key, value, log_decay, LARGEST_HEAD, MOST_SLOTS):
        return reason
    return not_hopper()


def not_hopper() -> str | None:
    """Why our kernels can't run on the GPU that is compiled for, in a line; None if they can."""
    device = _gpu_compiled_for()
    if device is not None and _capability(device) != HOPPER:
        return f"its kernels are for Hopper (H100, H200), got {device.device_kind}"
    return None


def served_by_cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None,
    has_past: bool,
    options: Options,
) -> bool:
    """Whether cuDNN's full attention computes this call: nothing leaves its window.

    For packed documents and tokens before the call's it would need a [T, T] bias: those go to our
    kernels, as short sequences do.
    """
    T, W, device = query.shape[1], options.window_size, _gpu_compiled_for()
    if device is None or segment_ids is not None or has_past or query.dtype != jnp.bfloat16:
        return False
    capability = _capability(device)
    largest = 256 if capability == HOPPER else 128
    if capability < AMPERE or max(key.shape[3], value.shape[3]) > largest:
        return False
    return T >= SHORTEST_OF_CUDNN and (W is None or T <= W)


def compiling_for_gpus() -> bool:
    """Whether what is traced now is for GPUs: by the ambient mesh, or else the default device.

    Not by the platform of the lowering, as for TPUs: the GPU interpreter's effects cannot stand
    beside the kernel in one program.
    """
    return _gpu_compiled_for() is not None


def _gpu_compiled_for() -> Any:
    """The device, real or abstract; None: it is no GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.devices()[0] if jax.default_backend() in ("gpu", "rocm") else None
    return device if device.platform in ("gpu", "cuda", "rocm") else None


def _capability(device: Any) -> Capability:
    if not hasattr(device, "compute_capability"):  # abstract: a GPU like those that are here?
        here = jax.devices() if jax.default_backend() in ("gpu", "rocm") else []
        alike = [x for x in here if x.device_kind == device.device_kind]
        if not alike:
            known = (x for name, x in CAPABILITIES.items() if name in device.device_kind)
            return next(known, ())
        device = alike[0]
    parts = str(device.compute_capability).split(".")  # AMD's are gfx942 and the like
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()

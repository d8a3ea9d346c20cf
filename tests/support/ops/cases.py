"""Inputs of the operator's suite, and one way to run an implementation on them."""

import contextlib
import dataclasses
import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from nha_jax.config_parts import RopeScaling
from nha_jax.ops import KernelOptions, NHAState, nha_attention, rope_tables

WINDOWS = ("0", "1", "16", "64", "100", "T", "T+5", "None")
GATES = ("normaliser-0.1", "normaliser-1", "normaliser-8", "-1000", "-inf", "0", "mixed", "holes")
YARN = RopeScaling(kind="yarn", factor=4.0, original_length=64, attention_factor=1.4)


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of the grid; `window` and `gate` by name."""

    T: int
    window: str
    G: int = 1
    M: int = 16
    K: int = 8
    V: int = 8
    B: int = 2
    H: int = 1
    gate: str = "normaliser-8"
    rope: str | None = "tokens"  # "tokens": [T, K/2], "rows": [B, T, K/2], "yarn": no rotation
    segments: bool = False
    state: bool = False
    empty_slots: str = "attend"
    slot_feature_map: str = "identity"
    small_blocks: bool = True  # of the TPU kernels
    # Not in the repr, from which the inputs are drawn: either way they are the same.
    slot_weight_gradient: str = dataclasses.field(default="all", repr=False)
    return_state: bool = dataclasses.field(default=True, repr=False)

    @property
    def window_size(self) -> int | None:
        names = {"None": None, "T": self.T, "T+5": self.T + 5}
        return names[self.window] if self.window in names else int(self.window)

    def interpreter(self, implementation: str) -> contextlib.AbstractContextManager:
        """Our kernels' is strict; the library's of full attention is not made for it.

        On a GPU the GPU's kernels run as they are.
        """
        if implementation == "pallas_gpu":
            if jax.default_backend() == "gpu":
                return contextlib.nullcontext()
            return plgpu.force_gpu_interpret_mode(GPU_INTERPRETER)
        nothing_leaves = self.window_size is None or (self.window_size >= self.T and not self.state)
        if nothing_leaves:
            return contextlib.nullcontext()
        return pltpu.force_tpu_interpret_mode(INTERPRETER)  # a race raises

    @property
    def kernel_options(self) -> KernelOptions | None:
        return SMALL_BLOCKS if self.small_blocks else None

    def __str__(self) -> str:
        flags = [name for name in ("segments", "state") if getattr(self, name)]
        flags += [
            x for x in (self.empty_slots, self.slot_feature_map) if x in ("mask", "silu", "relu")
        ]
        flags += [f"rope-{self.rope}"]
        flags += ["weight-of-slots"] * (self.slot_weight_gradient == "slots")
        shape = f"T{self.T}-W{self.window}-G{self.G}-M{self.M}-K{self.K}-V{self.V}"
        return "-".join([shape, f"gate({self.gate})", *flags])


def gates(kind: str, pre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Log decays of pre-activations `pre`."""
    log_sigmoid = -np.logaddexp(0, -pre)
    if kind.startswith("normaliser-"):
        return log_sigmoid / float(kind.removeprefix("normaliser-"))
    if kind in ("mixed", "holes"):  # strong decays among mild ones: -1000 or -inf, and zeros
        strong = {"mixed": -1000.0, "holes": -np.inf}[kind]
        draw = rng.random(pre.shape)
        return np.where(draw < 0.1, strong, np.where(draw < 0.2, 0.0, log_sigmoid / 8))
    return np.full(pre.shape, float(kind))


def segment_ids(case: Case, rng: np.random.Generator) -> np.ndarray:
    """[B, T] ids: about four documents a row (ids recur), padding between and at the ends."""
    change = rng.random((case.B, case.T)) < 4 / case.T
    ids = 1 + np.cumsum(change, axis=1) % 3
    padding = np.cumsum(rng.random(ids.shape) < 4 / case.T, axis=1) % 4 == 3
    return np.where(padding, 0, ids).astype(np.int32)


def make_inputs(case: Case, seed: int | None = None) -> dict:
    """Numpy float32 arrays: the differentiable ones, the rest, and cotangents."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()) if seed is None else seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    B, T, H, G, M, K, V = (getattr(case, name) for name in "BTHGMKV")
    pre = rng.standard_normal((B, T, H, M))
    arrays = {
        "query": normal(B, T, H * G, K),
        "key": normal(B, T, H, K),
        "value": normal(B, T, H, V),
        "log_decay": gates(case.gate, pre, rng).astype(np.float32),
    }
    rest: dict = {"rope": None, "segment_ids": None, "length": None}
    if case.rope:
        positions = rng.integers(0, 500, (B, T)) if case.rope == "rows" else np.arange(T)
        scaling = YARN if case.rope == "yarn" else None
        tables = rope_tables(jnp.asarray(positions), K, scaling=scaling)
        rest["rope"] = tuple(map(np.asarray, tables))
    if case.segments:
        rest["segment_ids"] = segment_ids(case, rng)
    if case.state:
        W = case.window_size
        R = 20 if W is None else W
        slots = 0.0 if W is None else 1.0  # what never left the window is not in the slots
        entering = 0 if W is None else W  # ring entries of what only the slots will read
        pre = rng.standard_normal((B, entering, H, M))
        arrays |= {
            "slot_key": slots * normal(B, H, M, K),
            "slot_value": slots * normal(B, H, M, V),
            "window_key": normal(B, entering, H, K),
            "window_rotated_key": normal(B, R, H, K),
            "window_value": normal(B, R, H, V),
            "window_log_decay": gates(case.gate, pre, rng).astype(np.float32),
        }
        # The slots hold something once more than W tokens were seen: R + 3, and another remainder.
        rest["length"] = np.array(
            [R - 7 if W is None else R + 3 + 5 * b for b in range(B)], np.int32
        )
    cotangents = {"out": normal(B, T, H * G, V), "slot_weight": normal(B, T, H * G)}
    return {"arrays": arrays, "rest": rest, "cotangents": cotangents}


# Two chunks a grid step: the interpreter's time is compilation, which goes by the chunks.
SMALL_BLOCKS = {"pallas_tpu": {"chunks_per_step": 2, "forward_group": 2, "backward_group": 1}}
INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
GPU_INTERPRETER = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


@functools.partial(jax.jit, static_argnames=("case", "implementation"))
def _run(arrays, rest, cotangents, *, case: Case, implementation: str):
    def loss(arrays):
        state = None
        if case.state:
            fields = {name: arrays[name] for name in NHAState._fields[:6]}
            ids = jnp.ones(case.B, jnp.int32)
            state = NHAState(**fields, length=rest["length"], segment_id=ids)
        result = nha_attention(
            *(arrays[name] for name in ("query", "key", "value", "log_decay")),
            window_size=case.window_size,
            rope=rest["rope"],
            segment_ids=rest["segment_ids"],
            slot_feature_map=case.slot_feature_map,
            empty_slots=case.empty_slots,
            initial_state=state,
            return_state=case.return_state,
            return_slot_weight=True,
            slot_weight_gradient=case.slot_weight_gradient,
            implementation=implementation,
            kernel_options=case.kernel_options,
        )
        # The state's slots take part in the loss, so that gradients flow through them too.
        total = jnp.vdot(result.out, cotangents["out"].astype(result.out.dtype))
        total += jnp.vdot(result.slot_weight, cotangents["slot_weight"])
        if result.state is not None:
            total += jnp.sum(jnp.sin(result.state.slot_key))
            total += jnp.sum(jnp.cos(result.state.slot_value))
        return total, result

    gradients, result = jax.grad(loss, has_aux=True)(arrays)
    return {
        "out": result.out,
        "slot_weight": result.slot_weight,
        "state": {} if result.state is None else result.state._asdict(),
        "gradient": gradients,
    }


def run(case: Case, implementation: str, dtype: str, inputs: dict | None = None) -> dict:
    """Outputs and gradients as a flat {name: float64 numpy}; the gates and slots stay wide."""
    inputs = make_inputs(case) if inputs is None else inputs
    # The definition is computed on the host, whatever device is to be held against it.
    host = jax.default_device(jax.devices("cpu")[0] if implementation == "reference" else None)
    with host, jax.enable_x64(dtype == "float64"):
        wide = jnp.promote_types(dtype, jnp.float32)
        is_wide = {"log_decay", "window_log_decay", "slot_key", "slot_value"}
        arrays = {
            name: jnp.asarray(x, wide if name in is_wide else dtype)
            for name, x in inputs["arrays"].items()
        }
        rest = jax.tree.map(jnp.asarray, inputs["rest"])
        cotangents = {name: jnp.asarray(x, wide) for name, x in inputs["cotangents"].items()}
        with case.interpreter(implementation):
            result = _run(arrays, rest, cotangents, case=case, implementation=implementation)
        flat, _ = jax.tree_util.tree_flatten_with_path(result)
        return {
            "/".join(str(step.key) for step in path): np.asarray(x, np.float64) for path, x in flat
        }


def rounded(inputs: dict, dtype: str) -> dict:
    """The inputs as `dtype` holds them, so that the reference sees the same numbers."""
    arrays = {
        name: x
        if "decay" in name or "slot" in name
        else np.asarray(jnp.asarray(x, dtype), np.float32)
        for name, x in inputs["arrays"].items()
    }
    return inputs | {"arrays": arrays}


def relative_error(x: np.ndarray, expected: np.ndarray, zero: float = 1e-9) -> float:
    """Relative Frobenius error. Where zero is expected, up to rounding (`zero`), the rms of x."""
    same_infinities = np.where(np.isinf(expected), x == expected, True)
    if not np.all(same_infinities):
        return np.inf
    finite = np.isfinite(expected)
    x, expected = np.where(finite, x, 0), np.where(finite, expected, 0)
    rms = np.sqrt(np.mean(expected**2)) if expected.size else 0.0
    if rms < zero:
        return float(np.sqrt(np.mean(x**2))) if x.size else 0.0
    return float(np.linalg.norm(x - expected) / np.linalg.norm(expected))


class Tolerance(NamedTuple):
    """Of relative Frobenius errors."""

    outputs: float
    gradients: float


def assert_close(
    results: dict,
    expected: dict,
    tolerance: Tolerance,
    exceptions: dict[str, float] | None = None,
) -> None:
    """Every array within `tolerance`, or its own of `exceptions`; all errors in the message."""
    assert results.keys() == expected.keys()
    bounds = {
        name: tolerance.gradients if name.startswith("gradient/") else tolerance.outputs
        for name in expected
    } | (exceptions or {})
    errors = {name: relative_error(results[name], expected[name]) for name in expected}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= bounds[name]}
    assert not wrong, f"relative Frobenius errors above {tolerance}: {wrong}"

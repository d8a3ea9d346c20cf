"""The implementations of the operator, by name: the one table that everything else asks.

Adding one is a folder or module that holds `BACKEND`, a `Backend`, and a line in `_BUILT_IN`; from
outside the library it is a call of `register`. Modules are imported when they are first asked for,
so that `import nha_jax` loads no kernel.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import lax

from nha_jax.ops.rope import Rope
from nha_jax.ops.state import NHAState, Past, Tokens
from nha_jax.ops.types import KernelOptions, NHAOutput, Options

Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # query, key, value, log_decay


class Backend:
    """One implementation of the operator: what it computes, what it cannot serve, what it is.

    A subclass gives `name` and `attend`, and overrides what else differs. Its methods see a
    device's own rows and heads: the division over a mesh is done around them. A backend for one
    kind of chip sets `platform`; its `attend` and `decode` then take `interpret` too, and are
    called with True in programs for other platforms. Its methods are traced once for all calls that
    are alike: rules of a `jax.custom_vjp` take arrays as arguments, and close over none.

    Attributes:
      name: what `implementation=` calls it.
      platform: "tpu" or "gpu", if its kernels are made for that alone.
      reverse_mode_only: whether `attend` has first derivatives by reverse mode only, as kernels
        under a `jax.custom_vjp` have, and `decode` none; what it lacks is then refused in words.
      takes_slot_delay: whether it computes a `slot_delay`; where not, calls with one are refused.
      options_type: a frozen dataclass of hashable options of its own, made of
        `kernel_options[name]`.
    """

    name: str
    platform: str | None = None
    reverse_mode_only: bool = False
    takes_slot_delay: bool = False
    options_type: type | None = None

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        log_decay: jax.Array,
        *,
        rope: Rope | None,
        segment_ids: jax.Array | None,
        past: Past | None,
        options: Options,
    ) -> NHAOutput:
        """Computes `nha_attention`, of validated arguments, going on from `past`.

        Padding comes as zeros, and what stands there in the output and slot weight is not read.
        """
        raise NotImplementedError

    def decode(
        self,
        query: jax.Array,
        rotated_query: jax.Array,
        token: Tokens,
        state: NHAState,
        active: jax.Array,
        *,
        options: Options,
    ) -> tuple[jax.Array, NHAState]:
        """Computes `decode_step`, of validated arguments.

        Args:
          query, rotated_query: [B, 1, Hq, K].
          token: the new token's arrays, [B, 1, Hkv, .].
          active: [B] bool.

        Returns:
          out [B, 1, Hq, V] in the query's dtype, and the state after the token.
        """
        raise NotImplementedError

    def attend_unsupported(
        self, arrays: Arrays, *, has_segments: bool, has_past: bool, options: Options
    ) -> str | None:
        """Says in a line why it cannot serve this call of `nha_attention`; None if it can."""
        return None

    def decode_unsupported(self, query: jax.Array, state: NHAState, options: Options) -> str | None:
        """Says in a line why it cannot serve this decode step; None if it can."""
        return f"{self.name} has no decode step"

    def delay_unsupported(self, options: Options) -> str | None:
        """Says in a line that it takes no slot_delay, if the call has one; None if it can serve."""
        if options.slot_delay is None or self.takes_slot_delay:
            return None
        return (
            "it lets a token enter the slots as it leaves the window, got slot_delay="
            f"{options.slot_delay} with window_size={options.window_size}"
        )

    def describe(self, arrays: Arrays, options: Options) -> str:
        """Names what computes such a call, in a few words; `nha plan` prints it."""
        return self.name

    def compiled_or_interpreted(
        self, compiled: Callable[..., Any], interpreted: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Joins the two: interpreted where the program is not for the backend's platform."""
        return by_platform(self.platform, compiled, interpreted)


class _Entry(NamedTuple):
    module: str  # holds BACKEND
    automatic_on: str | None = None  # the platform on which `implementation=None` takes it


_BUILT_IN = {
    "reference": _Entry("nha_jax.ops.reference"),
    "xla": _Entry("nha_jax.ops.xla"),
    "pallas_tpu": _Entry("nha_jax.ops.tpu", automatic_on="tpu"),
    "pallas_gpu": _Entry("nha_jax.ops.gpu"),  # not automatic: nobody has measured its kernels yet
}
_registered: dict[str, Backend] = {}


def names() -> tuple[str, ...]:
    """The names that `implementation=` takes."""
    return (*_BUILT_IN, *_registered)


def get(name: str) -> Backend:
    """Returns the implementation of this name; ValueError if there is none."""
    if name in _registered:
        return _registered[name]
    check_name(name)
    return importlib.import_module(_BUILT_IN[name].module).BACKEND


def check_name(name: str | None, argument: str = "implementation") -> None:
    """Raises ValueError if no implementation has this name; None, the automatic choice, passes."""
    if name is not None and name not in names():
        raise ValueError(f"{argument} must be one of {(*names(), None)}, got {name!r}")


def register(backend: Backend) -> None:
    """Adds an implementation from outside the library, or replaces it.

    Raises ValueError if the library itself has one of this name.
    """
    if backend.name in _BUILT_IN:
        raise ValueError(f"implementation {backend.name!r} is the library's own: take another name")
    _registered[backend.name] = backend


def unregister(name: str) -> None:
    """Takes back what `register` added."""
    del _registered[name]


def options_for(backend: Backend, kernel_options: KernelOptions | None) -> Any:
    """Builds the backend's own options; None if it is given none.

    Raises ValueError if `kernel_options` names an unknown implementation, one that has no options,
    or an option that it does not have or whose value is wrong.
    """
    check_kernel_options(kernel_options)
    given = (kernel_options or {}).get(backend.name)
    if given is None or backend.options_type is None:
        return None
    return backend.options_type(**given)


def check_kernel_options(kernel_options: KernelOptions | None) -> None:
    """Raises ValueError for the first entry that is wrong; see `options_for`."""
    if kernel_options is None:
        return
    if not isinstance(kernel_options, Mapping):
        raise ValueError(
            "kernel_options must be a mapping of implementations to mappings of their options, "
            f"got {kernel_options!r}"
        )
    for name, given in kernel_options.items():
        check_name(name, "a key of kernel_options")
        kind = get(name).options_type
        if kind is None:
            raise ValueError(f"kernel_options: implementation {name!r} has no options")
        if not isinstance(given, Mapping):
            raise ValueError(f"kernel_options[{name!r}] must be a mapping, got {given!r}")
        known = [field.name for field in dataclasses.fields(kind)]
        for key in given:
            if key not in known:
                raise ValueError(
                    f"kernel_options[{name!r}] has no {key!r}; there are {', '.join(known)}"
                )
        try:
            kind(**given)
        except ValueError as error:
            raise ValueError(f"kernel_options[{name!r}]: {error}") from None


def choose(
    name: str | None, unsupported: Callable[[Backend], str | None]
) -> tuple[Backend, Backend | None]:
    """Chooses what computes a call: a backend, and one for the automatic choice's platform.

    Args:
      name: None takes the fastest that serves the call: plain XLA, and on the platform of an
        automatic backend that backend.
      unsupported: says why a backend cannot serve the call.

    Raises:
      ValueError: there is no such name.
      NotImplementedError: the named one cannot serve; the message says why.
    """
    if name is not None:
        backend = get(name)
        if reason := unsupported(backend):
            raise NotImplementedError(f"implementation={name!r}: {reason}")
        return backend, None
    for candidate, entry in _BUILT_IN.items():
        if entry.automatic_on and can_compile_for(entry.automatic_on):
            backend = get(candidate)
            if not unsupported(backend):
                return get("xla"), backend
    return get("xla"), None


def describe(name: str | None, arrays: Arrays, options: Options, platform: str) -> str:
    """Says in words what computes such a call, by `implementation=name`, on a platform.

    Args:
      arrays: of the call, real or abstract.
      platform: "tpu" or "gpu"; if the chip is not here, it is that of the ambient mesh.
    """

    def unsupported(backend: Backend) -> str | None:
        return backend.delay_unsupported(options) or backend.attend_unsupported(
            arrays, has_segments=False, has_past=False, options=options
        )

    if name is not None:
        backend = get(name)
        if backend.platform not in (None, platform):
            return f"{name}, interpreted: it is for {backend.platform.upper()}s"
        if reason := unsupported(backend):
            return f"none: {name} cannot serve it: {reason}"
        return f"{backend.describe(arrays, options)}, as the configuration says"
    for candidate, entry in _BUILT_IN.items():
        if entry.automatic_on == platform:
            backend = get(candidate)
            reason = unsupported(backend)
            return f"xla: {reason}" if reason else backend.describe(arrays, options)
    others = [x for x in names() if get(x).platform == platform]
    hint = "".join(f"; --model.implementation={x} for its kernels" for x in others)
    return f"xla{hint}, which nobody has timed" if others else "xla"


@functools.cache
def can_compile_for(platform: str) -> bool:
    """Whether this machine can compile for the platform.

    Where it cannot, tracing that platform's kernels as well would only cost time, and it would cost
    the derivatives that kernels lack: forward mode, and those of gradients.
    """
    if platform == "tpu" and importlib.util.find_spec("libtpu") is not None:
        return True
    return jax.default_backend() == platform


def by_platform(
    platform: str | None, there: Callable[..., Any], elsewhere: Callable[..., Any]
) -> Callable[..., Any]:
    """Runs the one for the platform that the program is lowered for, maybe not this machine's.

    Both are traced; what the other one leaves for the gradient is dropped by the compiler.
    """
    if platform is None:
        return elsewhere

    def call(*arguments):
        return lax.platform_dependent(*arguments, **{platform: there}, default=elsewhere)

    return call

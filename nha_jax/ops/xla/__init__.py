"""The operator in plain XLA: it runs everywhere and serves every call."""

from nha_jax.ops.backends import Backend
from nha_jax.ops.xla.chunked import chunked_attention
from nha_jax.ops.xla.decode import decode_xla


class XLABackend(Backend):
    """Chunks in a scan, with a gradient written out; full attention in blocks of queries."""

    name = "xla"
    takes_slot_delay = True
    attend = staticmethod(chunked_attention)
    decode = staticmethod(decode_xla)

    def decode_unsupported(self, query, state, options) -> None:
        return None


BACKEND = XLABackend()

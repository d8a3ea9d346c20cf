"""Models in the format of Hugging Face's transformers; torch is never needed."""

from typing import TYPE_CHECKING

from nha_jax.lazy import lazy_names

if TYPE_CHECKING:
    from nha_jax.hf.export import save_pretrained
    from nha_jax.hf.pretrained import Pretrained, from_pretrained, open_pretrained
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Pretrained": "nha_jax.hf.pretrained",
            "from_pretrained": "nha_jax.hf.pretrained",
            "open_pretrained": "nha_jax.hf.pretrained",
            "save_pretrained": "nha_jax.hf.export",
        },
    )

__all__ = ["Pretrained", "from_pretrained", "open_pretrained", "save_pretrained"]

"""Models in the format of Hugging Face's transformers; torch is never needed."""

from nha_jax.hf.export import save_pretrained
from nha_jax.hf.pretrained import Pretrained, from_pretrained, open_pretrained

__all__ = ["Pretrained", "from_pretrained", "open_pretrained", "save_pretrained"]

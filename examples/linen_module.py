# %% [markdown]
# The layer in a flax Linen module: `flax.nnx.bridge.ToLinen` makes a Linen module of it, whose
# parameters are Linen's. Some fifteen seconds of a CPU.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import nha_jax

SENTENCE = "The slots keep what is old, the window keeps what is new. "
TOKENS = jnp.asarray(np.frombuffer(SENTENCE.encode(), np.uint8), jnp.int32)[None]  # [1, T]


# %% [markdown]
# Arguments of the layer but `rngs` go through `args` and `kwargs`. Its methods are called by name:
# one more token of each row is `decode_step`.


# %%
class LanguageModel(linen.Module):
    """One block on bytes: [B, T] -> logits [B, T, 256]."""

    size: int = 64

    def setup(self) -> None:
        self.embed = linen.Embed(256, self.size)
        self.norm = linen.RMSNorm()
        self.attention = nnx.bridge.ToLinen(
            nha_jax.NHAttention,
            args=(self.size, 2),
            kwargs={"num_slots": 16, "window_size": 8, "conv_width": 0},
        )
        self.head = linen.Dense(256)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        hidden = self.embed(tokens)
        return self.head(hidden + self.attention(self.norm(hidden)))

    def prefill(self, tokens: jax.Array) -> tuple[jax.Array, nha_jax.layers.LayerCache]:
        """Reads prompts; logits of the token after each, [B, 256], and the cache."""
        hidden = self.embed(tokens)
        outputs, cache = self.attention(self.norm(hidden), nnx_method="prefill")
        return self.head(hidden + outputs)[:, -1], cache

    def decode_step(self, token: jax.Array, cache: nha_jax.layers.LayerCache):
        """Reads one more token of each row, [B]; as `prefill`."""
        hidden = self.embed(token[:, None])
        outputs, cache = self.attention(self.norm(hidden), cache, nnx_method="decode_step")
        return self.head(hidden + outputs)[:, 0], cache


# %% [markdown]
# Training is Linen's own: variables in, gradients out, any optimizer of optax.

# %%
model = LanguageModel()
variables = linen.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))
optimizer = optax.adam(1e-2)
state = optimizer.init(variables)


@jax.jit
def train_step(variables, state):
    def loss(variables):
        logits = model.apply(variables, TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    value, gradient = jax.value_and_grad(loss)(variables)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(variables, updates), state, value


for step in range(101):
    variables, state, loss = train_step(variables, state)
    if step % 25 == 0:
        print(f"step {step:3d}  loss {loss:.3f}")

# %% [markdown]
# Generation: the cache holds 16 slots and 8 tokens, however long the text is.

# %%
prompt = TOKENS[:, :10]
logits, cache = jax.jit(lambda v: model.apply(v, prompt, method="prefill"))(variables)
decode = jax.jit(lambda v, token, cache: model.apply(v, token, cache, method="decode_step"))
text = [*np.asarray(prompt)[0]]
for _ in range(len(SENTENCE) - 10):
    text.append(int(logits[0].argmax()))
    logits, cache = decode(variables, jnp.asarray(text[-1:]), cache)
print(bytes(text).decode(errors="replace"))

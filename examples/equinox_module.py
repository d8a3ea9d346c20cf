# %% [markdown]
# The operator in an Equinox module. Equinox writes layers for one sequence, and maps them over a
# batch: `nha_attention` takes arrays without a batch axis. Some fifteen seconds of a CPU.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nha_jax
from nha_jax.ops import rope_tables

SENTENCE = "The slots keep what is old, the window keeps what is new. "
TOKENS = jnp.asarray(np.frombuffer(SENTENCE.encode(), np.uint8), jnp.int32)
BATCH = TOKENS.reshape(2, -1)  # its two halves, [2, T]
HEADS, SLOTS, WINDOW = 2, 16, 8


# %% [markdown]
# Four projections before the operator and one behind it. The log of a gate is at most 0: its
# logsigmoid, divided by 8 so that slots forget slowly at first.


# %%
class Attention(eqx.Module):
    """Native Hybrid Attention over one sequence: [T, size] -> [T, size]."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    gate: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, size: int, key: jax.Array):
        make = lambda outputs, key: eqx.nn.Linear(size, outputs, use_bias=False, key=key)  # noqa: E731
        keys = jax.random.split(key, 5)
        self.query, self.key, self.value = (make(size, k) for k in keys[:3])
        self.gate = make(HEADS * SLOTS, keys[3])
        self.out = make(size, keys[4])

    def __call__(self, x: jax.Array) -> jax.Array:
        split = lambda project: jax.vmap(project)(x).reshape(len(x), HEADS, -1)  # noqa: E731
        query, key, value = map(split, (self.query, self.key, self.value))
        attended = nha_jax.nha_attention(
            query,
            key,
            value,
            jax.nn.log_sigmoid(split(self.gate)) / 8,
            window_size=WINDOW,
            rope=rope_tables(jnp.arange(len(x)), query.shape[-1]),
        )  # [T, HEADS, size / HEADS]
        return jax.vmap(self.out)(attended.reshape(len(x), -1))


class LanguageModel(eqx.Module):
    """One block on bytes: [T] -> logits [T, 256]."""

    embed: eqx.nn.Embedding
    norm: eqx.nn.RMSNorm
    attention: Attention
    head: eqx.nn.Linear

    def __init__(self, size: int, key: jax.Array):
        first, second, third = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(256, size, key=first)
        self.norm = eqx.nn.RMSNorm(size)
        self.attention = Attention(size, second)
        self.head = eqx.nn.Linear(size, 256, key=third)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        hidden = jax.vmap(self.embed)(tokens)
        return jax.vmap(self.head)(hidden + self.attention(jax.vmap(self.norm)(hidden)))


# %% [markdown]
# `jax.vmap` makes a batch of sequences, as everywhere in Equinox.

# %%
model = LanguageModel(64, jax.random.key(0))
optimizer = optax.adam(1e-2)
state = optimizer.init(eqx.filter(model, eqx.is_array))


@eqx.filter_jit
def train_step(model: LanguageModel, state: optax.OptState):
    @eqx.filter_value_and_grad
    def loss(model: LanguageModel) -> jax.Array:
        logits = jax.vmap(model)(BATCH[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, BATCH[:, 1:]).mean()

    value, gradient = loss(model)
    updates, state = optimizer.update(gradient, state)
    return eqx.apply_updates(model, updates), state, value


for step in range(151):
    model, state, loss = train_step(model, state)
    if step % 50 == 0:
        print(f"step {step:3d}  loss {loss:.3f}")
guesses = eqx.filter_jit(lambda model: jax.vmap(model)(BATCH).argmax(-1))(model)
for half, guess in zip(BATCH, guesses, strict=True):
    print(bytes([int(half[0]), *guess[:-1].tolist()]).decode(errors="replace"))

# %% [markdown]
# The operator in plain JAX: parameters are a dictionary, the model is a function. Some fifteen
# seconds of a CPU.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nha_jax
from nha_jax.ops import decode_step, rope_tables

SENTENCE = "The slots keep what is old, the window keeps what is new. "
TOKENS = jnp.asarray(np.frombuffer(SENTENCE.encode(), np.uint8), jnp.int32)[None]  # [1, T]
SIZE, HEADS, SLOTS, WINDOW = 64, 2, 16, 8

Parameters = dict[str, jax.Array]


def make_parameters(key: jax.Array) -> Parameters:
    """Draws the matrices; each is [inputs, outputs], but the embedding [256, SIZE]."""
    sizes = {
        "embed": (256, SIZE),
        "query": (SIZE, SIZE),
        "key": (SIZE, SIZE),
        "value": (SIZE, SIZE),
        "gate": (SIZE, HEADS * SLOTS),
        "out": (SIZE, SIZE),
        "head": (SIZE, 256),
    }
    keys = jax.random.split(key, len(sizes))
    return {
        name: jax.random.normal(k, shape) * shape[0] ** -0.5
        for k, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


# %% [markdown]
# What the operator takes: query, key and value of each head, not rotated, and the log of the gate
# of each slot, at most 0. It rotates the window's part itself.


# %%
def heads(parameters: Parameters, hidden: jax.Array) -> tuple[jax.Array, ...]:
    """Projects [B, T, SIZE] to query, key, value and log decay, each [B, T, HEADS, ...]."""
    normed = hidden * jax.lax.rsqrt((hidden**2).mean(-1, keepdims=True) + 1e-6)
    query, key, value, gate = (
        (normed @ parameters[name]).reshape(*hidden.shape[:2], HEADS, -1)
        for name in ("query", "key", "value", "gate")
    )
    return query, key, value, jax.nn.log_sigmoid(gate) / 8


def head(parameters: Parameters, hidden: jax.Array, attended: jax.Array) -> jax.Array:
    """Gives the logits, [B, T, 256]."""
    return (hidden + attended.reshape(hidden.shape) @ parameters["out"]) @ parameters["head"]


def forward(parameters: Parameters, tokens: jax.Array) -> tuple[jax.Array, nha_jax.NHAState]:
    """Reads [B, T] at once; returns the logits and the state after the last token."""
    hidden = parameters["embed"][tokens]
    rope = rope_tables(jnp.arange(tokens.shape[1]), SIZE // HEADS)
    result = nha_jax.nha_attention(
        *heads(parameters, hidden), window_size=WINDOW, rope=rope, return_state=True
    )
    return head(parameters, hidden, result.out), result.state


def step(
    parameters: Parameters, token: jax.Array, state: nha_jax.NHAState
) -> tuple[jax.Array, nha_jax.NHAState]:
    """Reads one more token of each row, [B]; returns the logits [B, 256] and the next state."""
    hidden = parameters["embed"][token[:, None]]
    rope = rope_tables(state.length[:, None], SIZE // HEADS)
    attended, state = decode_step(*heads(parameters, hidden), state, window_size=WINDOW, rope=rope)
    return head(parameters, hidden, attended)[:, 0], state


# %%
@jax.jit
def train_step(parameters: Parameters, moments: optax.OptState):
    def loss(parameters: Parameters) -> jax.Array:
        logits, _ = forward(parameters, TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    value, gradient = jax.value_and_grad(loss)(parameters)
    updates, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(parameters, updates), moments, value


optimizer = optax.adam(1e-2)
parameters = make_parameters(jax.random.key(0))
moments = optimizer.init(parameters)
for number in range(101):
    parameters, moments, loss = train_step(parameters, moments)
    if number % 25 == 0:
        print(f"step {number:3d}  loss {loss:.3f}")

# %% [markdown]
# Generation is one scan over the state, whose size is that of 16 slots and 8 tokens.


# %%
@jax.jit
def generate(parameters: Parameters, prompt: jax.Array) -> jax.Array:
    """Goes on greedily from [1, T] to the length of the sentence."""
    logits, state = forward(parameters, prompt)

    def go_on(carry, _):
        logits, state = carry
        token = logits.argmax(-1)
        return step(parameters, token, state), token

    length = len(SENTENCE) - prompt.shape[1]
    _, tokens = jax.lax.scan(go_on, (logits[:, -1], state), length=length)
    return tokens[:, 0]


prompt = TOKENS[:, :10]
print(SENTENCE[:10] + bytes(generate(parameters, prompt).tolist()).decode(errors="replace"))

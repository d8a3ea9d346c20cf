# %% [markdown]
# First steps with nha_jax: a small model, fitted to one sentence and sampled from, in about a
# minute on a laptop's CPU. Run it as a script, or cell by cell in an editor that knows `# %%`.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nha_jax

# %% [markdown]
# A config says what the model is. Its layers here keep the last 8 tokens exactly and everything
# older in 16 slots a head; `window_size=(8, None)` would make every second layer full attention,
# with the same parameters.

# %%
config = nha_jax.ModelConfig.preset(
    "nha-tiny", num_layers=2, hidden_size=64, num_slots=16, window_size=8, dtype="float32"
)
model = nha_jax.Model(config, rngs=nnx.Rngs(0))
parameters, flops = nha_jax.num_parameters(config), nha_jax.flops_per_token(config, 256)
print(f"{parameters:,} parameters, {flops:,.0f} FLOPs a token")

# %% [markdown]
# The model reads bytes. Fit it to a sentence with any optimizer: parameters are `nnx.Param`s.

# %%
SENTENCE = "The slots keep what is old, the window keeps what is new. "
tokens = jnp.asarray(np.frombuffer(SENTENCE.encode(), np.uint8), jnp.int32)[None]  # [1, T]
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model: nha_jax.Model, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """One step of Adam on the mean cross-entropy of tokens [B, T]."""

    def loss(model: nha_jax.Model) -> jax.Array:
        logits = model(tokens[:, :-1])  # [B, T - 1, vocab_size]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


for step in range(121):
    loss = train_step(model, optimizer, tokens)
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss:.3f}")

# %% [markdown]
# Sampling: greedy here; see `nha_jax.generate` for temperature, top-k, top-p and stop tokens.

# %%
prompt = list(b"The slots keep")
continuation = nha_jax.generate(model, prompt, max_new_tokens=43, temperature=0)
print(bytes(prompt).decode() + "|" + bytes(continuation.tolist()).decode(errors="replace"))

# %% [markdown]
# Underneath: read a prompt, then one token at a time, with a cache whose size does not depend on
# how long the text is. `nha_jax.save(folder, model)` and `nha_jax.load(folder)` keep the model.

# %%
logits, cache = model.prefill(tokens)
logits, cache = model.decode_step(logits.argmax(axis=-1), cache)
remembered = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
print(f"{int(cache.length[0])} tokens read, {remembered:,} bytes remembered")

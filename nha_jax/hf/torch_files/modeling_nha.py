"""Native Hybrid Attention language models for transformers.

A decoder-only model: embedding, then blocks of x + attention(RMSNorm(x)) and
y + SwiGLU(RMSNorm(y)), a last RMSNorm and the head. `operator_nha.py` says what Native Hybrid
Attention is, and `layers_nha.py` what a layer makes of it.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=100)
    loss = model(tokens, labels=tokens).loss

Padding (attention_mask 0) is seen by no token. Packed documents are told apart by `segment_ids`, or
by position_ids that begin anew: tokens see, and slots hold, their own document alone. Zeros amid
the ones of an attention_mask divide documents too.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_nha import NHACache, Segments
from .configuration_nha import NHAConfig
from .layers_nha import (
    NHAMLP,
    NHAExperts,
    NHALinear,
    NHARMSNorm,
    NHAShortConvolution,
    NHAttention,
)
from .operator_nha import FEATURE_MAPS  # transformers 5.0 copies only files that are named here
from .rotary_nha import Rope, rotary_tables

# Versions of transformers call what generation carries along by different names.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NHABlock(GradientCheckpointingLayer):
    """y = x + attention(RMSNorm(x)); the block gives y + mlp(RMSNorm(y))."""

    def __init__(self, config: NHAConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = NHARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = NHAttention(config, layer_idx)
        self.post_attention_layernorm = NHARMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.num_experts:
            self.mlp = NHAExperts(config)
        else:
            self.mlp = NHAMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        rope: Rope,
        segments: Segments,
        cache: NHACache | None = None,
    ) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, segments, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class NHAPreTrainedModel(PreTrainedModel):
    config_class = NHAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("NHABlock",)
    _is_stateful = True  # what the slots took in cannot be taken back, as assisted decoding would

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, NHAShortConvolution):
            bound = module.weight.shape[-1] ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, NHARMSNorm):
            nn.init.ones_(module.weight)


class NHAModel(NHAPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: NHAConfig):
        """Makes the modules; raises ValueError if there is no such slot_feature_map."""
        if config.slot_feature_map not in FEATURE_MAPS:
            known = " or ".join(map(repr, FEATURE_MAPS))
            raise ValueError(
                f"slot_feature_map={config.slot_feature_map!r}: expected one of {known}"
            )
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NHABlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = NHARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: NHACache | None = None,
        past_key_values: NHACache | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Computes the head's input.

        Args:
            input_ids: [B, T] integers; or inputs_embeds [B, T, hidden_size].
            attention_mask: [B, T], or with a cache [B, tokens so far]; 0 is padding.
            position_ids: [B, T] or [1, T] for the rotary embedding; where they do not grow, another
                document begins. None: counted from the first token of each document.
            cache: of the tokens before, as an earlier call returned it; it is updated. It is also
                called past_key_values.
            segment_ids: [B, T] integers; a maximal run of equal ones is a document, and 0 is
                padding. None: each row is one.
            use_cache: whether to return a cache where none was given.
            output_hidden_states: whether to return the input of every layer too.

        Raises:
            ValueError: attention_mask is no matrix.
            TypeError: the cache is not an `NHACache`.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = NHACache(self.config)
        if not isinstance(cache, NHACache | None):
            raise TypeError(f"the cache is of {type(cache)}: leave it out, or pass an NHACache")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        segments = _segments(hidden, attention_mask, position_ids, segment_ids, cache)
        positions = segments.positions if position_ids is None else position_ids
        config, states = self.config, []
        rope = rotary_tables(positions, config.head_dim, config.rope_theta, config.rotary_scaling)
        for layer in self.layers:
            states.append(hidden)
            hidden = layer(hidden, rope, segments, cache=cache)
        hidden = self.norm(hidden)
        if cache is not None:
            cache.counts, cache.num_tokens = segments.counts, cache.num_tokens + hidden.shape[1]
        shown = (*states, hidden) if output_hidden_states else None
        return BaseModelOutputWithPast(hidden, hidden_states=shown, **{CACHE: cache})


def _segments(
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    cache: NHACache | None,
) -> Segments:
    """Reads off the arguments of a call which tokens belong together."""
    T = hidden.shape[1]
    ids = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if segment_ids is not None:
        ids = segment_ids.long()
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {attention_mask.shape}: expected [B, T]")
        ids = ids.masked_fill(attention_mask[:, -T:] == 0, 0)
    return Segments(ids, position_ids, cache)


class NHAForCausalLM(NHAPreTrainedModel, GenerationMixin):
    """A language model: `NHAModel` and its head."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: NHAConfig):
        super().__init__(config)
        self.model = NHAModel(config)
        self.lm_head = NHALinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: NHACache | None = None,
        past_key_values: NHACache | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes the logits of the token that follows each token, [B, T, vocab_size] float32.

        Args:
            labels: [B, T] integers, the tokens again; -100 where there is no loss, as at the first
                token of each document. The result then has the mean cross-entropy in nats.
            logits_to_keep: how many of the last tokens have logits, or which; 0: all.

        The others, and errors, are those of `NHAModel`.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            past_key_values,
            inputs_embeds,
            segment_ids,
            use_cache,
            output_hidden_states,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep]).float()
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss, logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Gives generation an `NHACache`, unless it has one or wants none."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: leave it out; "
                "slots and windows have a cache of their own"
            )
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = NHACache(self.config)

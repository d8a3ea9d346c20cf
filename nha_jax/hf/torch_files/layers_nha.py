"""The layers of Native Hybrid Attention models: attention, short convolution, SwiGLU, norm.

Norms, decays, slots and softmax are float32 whatever the dtype of the parameters is.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .cache_nha import NHACache, Segments
from .configuration_nha import NHAConfig
from .operator_nha import FEATURE_MAPS, Rows, nha_attention
from .rotary_nha import Rope, rotate


class NHARMSNorm(nn.Module):
    """weight * x / sqrt(mean(x**2) + eps), computed and returned in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x * self.weight.float()


class NHALinear(nn.Linear):
    """A projection that computes in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class NHAShortConvolution(nn.Module):
    """y_t = silu(sum_i weight[i] x_{t - width + 1 + i}), for each channel, within a segment."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))

    def forward(self, x: Tensor, number: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolves.

        Args:
            x: [B, T, channels].
            number: [B, width - 1 + T] integers, the segments of the tokens before and of these.
            past: [B, width - 1, channels], the inputs before; None: there are none.

        Returns:
            [B, T, channels], and the last width - 1 inputs.
        """
        T, width = x.shape[1], self.weight.shape[-1]
        x = F.pad(x, (0, 0, width - 1, 0)) if past is None else torch.cat([past, x], dim=1)
        total = torch.zeros_like(x[:, width - 1 :], dtype=torch.float32)
        for i in range(width):
            own = number[:, i : i + T] == number[:, width - 1 :]
            total = total + self.weight[:, 0, i].float() * x[:, i : i + T].float() * own[..., None]
        return F.silu(total).to(x.dtype), x[:, T:].clone()


class NHAttention(nn.Module):
    """The layer of Native Hybrid Attention.

        query, key, value = conv(q_proj(x)), conv(k_proj(x)), silu(conv(v_proj(x)))
        log_decay = logsigmoid(f_proj(x)) / gate_logit_normalizer
        result = o_proj(RMSNorm(silu(nha_attention(query, key, value, log_decay))))

    This is the published layer; options of the configuration turn it into the attention of a
    pretrained model whose weights it took over.
    """

    def __init__(self, config: NHAConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        query_size, key_size = heads * config.head_dim, kv_heads * config.head_dim
        value_size, output_size = kv_heads * config.v_head_dim, heads * config.v_head_dim
        hidden, bias = config.hidden_size, config.attention_bias != "none"
        self.q_proj = NHALinear(hidden, query_size, bias=bias)
        self.k_proj = NHALinear(hidden, key_size, bias=bias)
        self.v_proj = NHALinear(hidden, value_size, bias=bias)
        self.o_proj = NHALinear(output_size, hidden, bias=config.attention_bias == "all")
        if config.num_slots:
            self.f_proj = NHALinear(hidden, kv_heads * config.num_slots, bias=False)
        if config.conv_width:
            self.q_conv = NHAShortConvolution(query_size, config.conv_width)
            self.k_conv = NHAShortConvolution(key_size, config.conv_width)
            self.v_conv = NHAShortConvolution(value_size, config.conv_width)
        if config.qk_norm:
            self.q_norm = NHARMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = NHARMSNorm(config.head_dim, config.rms_norm_eps)
        if config.output_norm:
            eps = config.output_norm_eps
            self.o_norm = NHARMSNorm(output_size, config.rms_norm_eps if eps is None else eps)

    def forward(self, x: Tensor, rope: Rope, segments: Segments, cache: NHACache | None) -> Tensor:
        """Computes [B, T, hidden_size], after the tokens of the cache if there is one.

        Args:
            x: [B, T, hidden_size].
            rope: the rotary tables of the same tokens.
            segments: which of them belong together.
            cache: is updated; None: nothing is kept.
        """
        config = self.config
        past, taps = (cache and cache.layers[self.layer_idx]) or (None, None)
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.conv_width:
            query, key, value, taps = self._convolve(query, key, value, segments, taps)
        query, key = self._heads(query, config.head_dim), self._heads(key, config.head_dim)
        value = self._heads(value, config.v_head_dim)
        if config.qk_norm:
            query, key = self.q_norm(query).to(query.dtype), self.k_norm(key).to(key.dtype)
        if config.value_activation == "silu":
            value = F.silu(value)
        phi = FEATURE_MAPS[config.slot_feature_map]
        with torch.autocast(x.device.type, enabled=False):  # it would round gates and slots
            rows = Rows(phi(key), rotate(key, rope), value, self._log_decay(x), segments.number)
            out, state = nha_attention(
                phi(query),
                rotate(query, rope),
                rows,
                segments.starts,
                window_size=config.window_sizes[self.layer_idx],
                slot_delay=config.slot_delay,
                scale=config.attention_scale,
                empty_slots=config.empty_slots,
                past=past,
                whole=segments.whole,
            )
        if cache is not None:
            cache.layers[self.layer_idx] = state.copied(), taps
        out = out.transpose(1, 2).flatten(-2)
        return self.o_proj(self.o_norm(F.silu(out)) if config.output_norm else out)

    def _convolve(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        taps: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Convolves the three projections, and returns what the next call needs of them."""
        number = segments.number[:, 0, :, 0]
        *inputs, before = taps or (None, None, None, None)
        distance = self.config.conv_width - 1
        if before is None:
            number = F.pad(number, (distance, 0))
        else:
            number = torch.cat([before, number], dim=1)
        convolutions = self.q_conv, self.k_conv, self.v_conv
        projections = query, key, value
        (query, q), (key, k), (value, v) = (
            conv(x, number, past)
            for conv, x, past in zip(convolutions, projections, inputs, strict=True)
        )
        return query, key, value, (q, k, v, number[:, -distance:].clone())

    def _heads(self, x: Tensor, size: int) -> Tensor:
        """Splits heads: [B, T, heads * size] -> [B, heads, T, size]."""
        return x.unflatten(-1, (-1, size)).transpose(1, 2)

    def _log_decay(self, x: Tensor) -> Tensor:
        """Computes the gates' logarithms: [B, T, hidden_size] -> [B, Hkv, T, M] float32."""
        config = self.config
        if not config.num_slots:
            return x.new_zeros(
                x.shape[0], config.num_key_value_heads, x.shape[1], 0, dtype=torch.float32
            )
        weight = self.f_proj.weight
        logits = F.linear(x.to(weight.dtype).float(), weight.float())
        log_decay = F.logsigmoid(logits) / config.gate_logit_normalizer
        return self._heads(log_decay, config.num_slots)


class NHAMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.gate_proj = NHALinear(hidden_size, size, bias=False)
        self.up_proj = NHALinear(hidden_size, size, bias=False)
        self.down_proj = NHALinear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NHAExperts(nn.Module):
    """sum_i weight_i SwiGLU_i(x) over a token's experts i (Qwen3-MoE, arXiv 2505.09388)."""

    def __init__(self, config: NHAConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        size = config.moe_intermediate_size
        self.experts = nn.ModuleList(
            NHAMLP(config.hidden_size, size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):  # rounding would choose other experts
            scores = F.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1)
        weights, chosen = scores.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            part = weights[token, place, None] * expert(tokens[token]).float()
            out = out.index_add(0, token, part)
        return out.to(self.experts[0].down_proj.weight.dtype).reshape(x.shape)

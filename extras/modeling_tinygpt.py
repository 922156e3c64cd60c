"""A model of tinygpt for `transformers`: every variant that no class of theirs computes.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

`extras/convert.py --to hf` puts this file beside the weights. config.json has the fields of `Config` (tinygpt.py,
section 1.1); tensors have the names of `layout` (1.2), weights are (in, out): y = x @ w + b.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TinyGPTConfig(PretrainedConfig):
    model_type = "tinygpt"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
    attribute_map |= {"max_position_embeddings": "seq_len"}


ACTIVATIONS = {"gelu-tanh": lambda h: F.gelu(h, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}
ACTIVATIONS |= {"relu2": lambda h: F.relu(h) ** 2, "swiglu": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]}


def add_parameter(module, name, there, *shape):
    """Register a parameter, None where the model has none of this name."""
    start = torch.randn(shape) * shape[-1] ** -0.5 if len(shape) == 2 else torch.full(shape, float(name[-1] == "w"))
    module.register_parameter(name, nn.Parameter(start) if there else None)


def add_norm(module, name, there, c):
    add_parameter(module, f"{name}_w", there and c.norm_gain, c.width)
    add_parameter(module, f"{name}_b", there and c.norm_bias and c.norm == "layernorm", c.width)


def normed(x, module, name, c):
    w, b = getattr(module, f"{name}_w"), getattr(module, f"{name}_b")
    if c.norm == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], w, c.norm_eps)
    return F.layer_norm(x, x.shape[-1:], w, b, c.norm_eps)


def rotated(x, cos, sin, half):
    """x (B, heads, T, D), cos and sin (B, 1, T, D/2): pairs D/2 apart if `half`, else neighbours."""
    a, b = x.chunk(2, -1) if half else (x[..., 0::2], x[..., 1::2])
    a, b = a * cos - b * sin, a * sin + b * cos
    return torch.cat([a, b], -1) if half else torch.stack([a, b], -1).flatten(-2)


def alibi_slopes(H):
    """(H,): 2^(-8 (i + 1) / n) for the power of two n <= H, then every second one of 2n slopes."""
    n = 1 << (H.bit_length() - 1)
    powers = [-8 * (i + 1) / n for i in range(n)] + [-4 * (2 * i + 1) / n for i in range(H - n)]
    return 2.0 ** torch.tensor(powers, dtype=torch.float64)


class TinyGPTLayer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.c, self.index, self.window = c, index, c.window if index % 2 else 0
        C, D, HD, up = c.width, c.head_width, c.heads * c.head_width, c.hidden * (1 + (c.mlp == "swiglu"))
        add_norm(self, "norm1", True, c)
        add_norm(self, "norm2", True, c)
        add_parameter(self, "q_norm_w", c.qk_norm, D)
        add_parameter(self, "k_norm_w", c.qk_norm, D)
        sizes = {"qkv": (C, HD + 2 * c.kv_heads * D), "out": (HD, C), "up": (C, up), "down": (c.hidden, C)}
        for name, size in sizes.items():
            add_parameter(self, f"{name}_w", True, *size)
            add_parameter(self, f"{name}_b", getattr(c, f"{name}_bias"), size[1])

    def linear(self, x, name):
        y, b = x @ getattr(self, f"{name}_w"), getattr(self, f"{name}_b")
        return y if b is None else y + b

    def forward(self, x, angles, bias, cache):
        """x (B, T, C), angles (B, 1, T, D/2), bias of `score_bias` -> (B, T, C)."""
        c, (B, T, _) = self.c, x.shape
        qkv = self.linear(normed(x, self, "norm1", c), "qkv").view(B, T, -1, c.head_width)
        q, k, v = qkv.transpose(1, 2).split((c.heads, c.kv_heads, c.kv_heads), 1)
        if c.qk_norm:
            q, k = (F.rms_norm(y, y.shape[-1:], w, c.norm_eps) for y, w in ((q, self.q_norm_w), (k, self.k_norm_w)))
        if angles is not None:
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
            q, k = (rotated(y, cos, sin, c.positions == "rope-half") for y in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        k, v = (y.repeat_interleave(c.heads // c.kv_heads, 1) for y in (k, v))
        scale, rate = c.head_width**-0.5 if c.attention_scale else 1.0, c.attention_dropout * self.training
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate, scale=scale)
        x = x + F.dropout(self.linear(o.transpose(1, 2).reshape(B, T, -1), "out"), c.out_dropout, self.training)
        h = ACTIVATIONS[c.mlp](self.linear(normed(x, self, "norm2", c), "up"))
        return x + F.dropout(self.linear(h, "down"), c.mlp_dropout, self.training)


class TinyGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyGPTConfig

    def __init__(self, config):
        super().__init__(config)
        c, V, C = config, config.vocab_size, config.width
        add_parameter(self, "embed_w", True, V, C)
        add_parameter(self, "position_w", c.positions == "learned", c.position_rows, C)
        add_parameter(self, "head_w", not c.tied, V, C)
        add_norm(self, "embed_norm", c.embedding_norm, c)
        add_norm(self, "norm", c.final_norm, c)
        add_parameter(self, "head_b", c.head_bias, V)
        self.layers = nn.ModuleList(TinyGPTLayer(c, index) for index in range(c.layers))
        self.post_init()

    def _init_weights(self, module):
        """Parameters have their first values from `add_parameter`."""

    def score_bias(self, layer, attention_mask, T, S, like):
        """(T, S), (H, T, S) or (B, H or 1, T, S): ALiBi, and the least number where a query does not see a key."""
        at = torch.arange(S, device=like.device)
        distance = at[S - T :, None] - at  # (T, S)
        seen = (distance >= 0) & (distance < (layer.window or S))
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :].bool()
        bias = torch.zeros_like(seen, dtype=like.dtype)
        if self.config.positions == "alibi":
            bias = bias - alibi_slopes(self.config.heads).to(like)[:, None, None] * distance.to(like.dtype)
        return bias.masked_fill(~seen, torch.finfo(like.dtype).min)

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, labels=None, **more):
        c, T = self.config, input_ids.shape[1]
        cache = more.get("past_key_values") if cache is None else cache  # its name in transformers before 5
        cache = DynamicCache() if more.get("use_cache") and cache is None else cache
        S = T + (0 if cache is None else cache.get_seq_length())
        at = torch.arange(S - T, S, device=input_ids.device)[None] if position_ids is None else position_ids
        if position_ids is None and attention_mask is not None:  # rows may be padded on the left
            at = (attention_mask.cumsum(-1) - 1).clamp(0)[:, -T:]
        x, angles = self.embed_w[input_ids], None
        if c.positions == "learned":
            x = x + self.position_w[at]
        elif c.positions.startswith("rope"):
            i = torch.arange(c.head_width // 2, device=x.device, dtype=torch.float64)
            angles = at[:, None, :, None] * c.rope_theta ** (-2 * i / c.head_width)
        x = normed(x, self, "embed_norm", c) if c.embedding_norm else x
        x = F.dropout(x, c.embed_dropout, self.training)
        for layer in self.layers:
            x = layer(x, angles, self.score_bias(layer, attention_mask, T, S, x), cache)
        x = normed(x, self, "norm", c) if c.final_norm else x
        logits = x @ (self.embed_w if c.tied else self.head_w).T
        logits = logits if self.head_b is None else logits + self.head_b
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        name = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{name: cache})

"""Decoding as Python sees it: `Steps` lays out what `step_kernel` of decode.py reads, and starts it.

Specification: `forward` with a cache, one token at a time. `sample.Decoding` makes one for each text. The order of what
is packed is the order in which a token reads it. decode.py has the measurements.
"""

import math

import numpy as np

from fast.attention import attention_arguments
from fast.decode import (
    ATTENTION,
    BEGIN,
    CHUNKS,
    DRAWN,
    END,
    HEAD,
    HEADS_TOGETHER,
    HIDDEN,
    LINEAR,
    MODEL,
    NORM_ROOM,
    STAGE,
    compile_stage,
    step_kernel,
)
from fast.draw import quantise_head
from fast.int8 import pack_int8
from fast.products import PANEL_VECTORS, VECTOR_BYTES
from fast.rows import ACTIVATION, NO_NORM
from fast.threads import POOL
from fast.workspace import biases, blocks, norm_of, whole_vectors
from tinygpt import aligned, layer_window, rotation

PREFETCH_BYTES = 1 << 21  # models with more bytes of weights than this, a core's own cache, prefetch
ONE_THREAD_BYTES = 1 << 19  # models with at most as many bytes of weights run on one thread, in its own cache
ALLOCATION_BYTES = 1 << 24  # size of an allocation for packed weights: enough for NumPy to ask for large pages
NO_FILTERS = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
SCREEN_BYTES = 1 << 22  # heads with more bytes of weights than this are screened in greedy decoding


def interleave_gate(w, panel):
    """w (K, 2 F), gate then values -> (K, 2 F'): a panel of the gate, that of its values, the next; F' is F padded."""
    K, F = len(w), w.shape[1] // 2
    wide = np.zeros((K, 2, whole_vectors(F)), w.dtype)
    wide[:, :, :F] = w.reshape(K, 2, F)
    return np.concatenate([wide[:, :, low : low + panel].reshape(K, -1) for low in range(0, wide.shape[2], panel)], 1)


class Steps:
    """The state of `step_kernel` for one text. `kv` is that of `Decoding`; parameters are copied as they are now."""

    int8 = False  # matrices in int8, or in the dtype of the model

    def __init__(self, p, cfg, kv):
        self.cfg, self.kv, self.threads, self.record = cfg, kv, POOL.threads, np.zeros(1, MODEL)
        self.panel, self.code = PANEL_VECTORS * VECTOR_BYTES // kv.itemsize, compile_stage(kv.dtype.name, self.int8)
        self.allocations, self.free, self.bytes_packed = [], np.empty(0, kv.dtype), 0
        self.set_fields(code=self.code.address, itemsize=kv.itemsize, panel=self.panel, eps=cfg.norm_eps)
        self.arrays = self.allocate_activations() | dict(kv=kv) | self.list_parameters(p)
        self.set_fields(**{name: x.ctypes.data for name, x in self.arrays.items()})
        norm_kind = norm_of(p["layers"][0], "norm1", cfg)[0]
        self.set_fields(norm_kind=norm_kind, activation=ACTIVATION[cfg.mlp], gated=cfg.mlp == "swiglu")
        if cfg.embedding_norm:
            self.set_fields(embed_norm=self.pack_norm(p, "embed_norm"))
        self.stages = self.list_stages(p, norm_kind)
        head_bytes = self.arrays["head_w"].nbytes
        self.head_b, self.has_screen = p["head_b"], head_bytes > SCREEN_BYTES and not self.int8
        weights = head_bytes // (4 if self.int8 else 1) + self.bytes_packed
        self.one_thread = weights <= ONE_THREAD_BYTES
        self.set_fields(stage_count=len(self.stages), prefetches=weights > PREFETCH_BYTES)

    def set_fields(self, **values):
        for name, value in values.items():
            self.record[0][name] = value

    def allocate_activations(self):
        """name -> array, of what a token computes; sets the lengths in the record. Each array may be written in whole
        vectors beyond its last element."""
        cfg, dtype, panel = self.cfg, self.kv.dtype, self.panel
        C, L, H, G, D, F = cfg.width, cfg.layers, cfg.heads, cfg.kv_heads, cfg.head_width, cfg.hidden
        V, S = cfg.vocab_size, cfg.seq_len
        C_padded, F_padded, D_padded = map(whole_vectors, (C, F, D + 1))
        S_padded = whole_vectors(S + panel) | 16  # rows of 2^n bytes would share few cache sets
        attention, screen = HEADS_TOGETHER * (D_padded + S_padded), (C + 1) * VECTOR_BYTES // dtype.itemsize
        scratch = whole_vectors(C_padded + NORM_ROOM + max(attention, screen))
        self.set_fields(C=C, H=H, G=G, D=D, V=V, S=S, scratch_bytes=scratch * dtype.itemsize)
        self.set_fields(C_padded=C_padded, F_padded=F_padded, D_padded=D_padded, S_padded=S_padded)
        shapes = dict(x=C, qkv=cfg.qkv_width, o=H * D, h=2 * (F_padded + panel), a=F_padded + panel)
        shapes |= dict(logits=V + panel, offsets=V, exp_logits=V, seen=V, zeros=panel, scratch=POOL.threads * scratch)
        shapes |= dict(keys=(L, G, D, S_padded), values=(L, G, S, D_padded))
        counts = {name: math.prod(np.atleast_1d(shape)) for name, shape in shapes.items()}
        arrays = {name: aligned(whole_vectors(n), dtype)[:n].reshape(shapes[name]) for name, n in counts.items()}
        arrays["values"][..., D] = 1  # see `sum_values`
        arrays |= dict(tokens=np.zeros(S + 2, np.int64), uniforms=np.zeros(S + 1))
        return arrays | dict(words=aligned(CHUNKS + 8 * POOL.threads, np.int64))

    def list_parameters(self, p):
        """name -> array, of the parameters and tables that are read as they are; sets the fields that go with them."""
        cfg, dtype = self.cfg, self.kv.dtype
        scale, slopes, _ = attention_arguments(cfg, 0, dtype)
        self.set_fields(scale=scale, rope_half=cfg.positions == "rope-half")
        arrays = dict(embed_w=p["embed_w"], head_w=p["embed_w" if cfg.tied else "head_w"], slopes=slopes)
        if cfg.positions == "learned":
            arrays["position_w"] = p["position_w"]
        if cfg.positions.startswith("rope"):
            arrays["cos"], arrays["sin"] = rotation(cfg.seq_len, cfg.head_width, cfg.rope_theta, dtype.name)
        return arrays

    def pack(self, x, panel=1 << 62):
        """Address of a copy of x (K, M) or (M,), columns padded to whole vectors: `panel` columns, row after row, then
        the next. Large allocations hold the weights in the order of packing, which is that of reading."""
        x = x.reshape(-1, x.shape[-1])
        (K, M), columns = x.shape, whole_vectors(x.shape[1])
        if K * columns > len(self.free):
            self.free = aligned(max(K * columns, ALLOCATION_BYTES // x.itemsize), x.dtype)
            self.allocations.append(self.free)
        room, self.free = self.free[: K * columns], self.free[K * columns :]
        for low in range(0, columns, panel):
            block = room[low * K : (low + panel) * K].reshape(K, -1)
            block[:, : M - low] = x[:, low : low + panel]
        self.bytes_packed += room.nbytes
        return room.ctypes.data

    def pack_matrix(self, w):
        """Address of a copy of w (K, M) in panels of columns."""
        if self.int8:
            return self.pack(pack_int8(w, self.panel).view(w.dtype))
        return self.pack(w, self.panel)

    def pack_norm(self, tensors, name):
        """Address of a norm's gains (C,), then its biases."""
        return self.pack(np.stack(norm_of(tensors, name, self.cfg, NO_NORM)[1:3]))

    def linear_stage(self, layer, name, source, y, **fields):
        """The stage y = source w + b with the matrix `name` of a layer, and these fields besides."""
        w, model = layer[name + "_w"], self.record[0]
        b = biases(layer, name + "_b", w.shape[1])[None]
        K, units = len(w), blocks(whole_vectors(w.shape[1]), self.panel)
        if fields.get("kind") == HIDDEN:
            units = blocks(whole_vectors(self.cfg.hidden), self.panel)
            w, b = (interleave_gate(x, self.panel) if model["gated"] else x for x in (w, b))
        bias, weights = self.pack(b), self.pack_matrix(w)
        stage = dict(kind=LINEAR, units=units, source=model[source], K=K, bias=bias, weights=weights, y=model[y])
        return stage | dict(columns=whole_vectors(w.shape[1])) | fields

    def list_stages(self, p, norm):
        """The stages of a token, (5 L + 2,): the sublayers of section 3 in order."""
        cfg, rows = self.cfg, [dict(kind=BEGIN, units=1)]
        for index, layer in enumerate(p["layers"]):
            rows.append(self.linear_stage(layer, "qkv", "x", "qkv", norm=norm, gains=self.pack_norm(layer, "norm1")))
            rows.append(dict(kind=ATTENTION, units=cfg.kv_heads, layer=index, window=layer_window(cfg, index)))
            if cfg.qk_norm:
                rows[-1]["gains"] = self.pack(np.concatenate([layer["q_norm_w"], layer["k_norm_w"]]))
            rows.append(self.linear_stage(layer, "out", "o", "x", adds=1))
            gains = self.pack_norm(layer, "norm2")
            rows.append(self.linear_stage(layer, "up", "x", "h", kind=HIDDEN, norm=norm, gains=gains))
            rows.append(self.linear_stage(layer, "down", "a", "x", adds=1))
        model, columns = self.record[0], whole_vectors(cfg.vocab_size)
        rows.append(dict(kind=HEAD, units=blocks(columns, self.panel), norm=norm * cfg.final_norm, K=cfg.width))
        rows[-1] |= dict(gains=self.pack_norm(p, "norm"), source=model["x"], y=model["logits"], columns=columns)
        return np.array([tuple(row.get(name, 0) for name in STAGE.names) for row in rows], STAGE)

    def copy_from_cache(self, start, stop):
        """Copy keys and values of positions start .. stop - 1 from `kv`, where `forward` wrote them."""
        new, D = self.kv[:, 0, start:stop].transpose(2, 0, 3, 1, 4), self.cfg.head_width  # (2, L, G, T, D)
        self.arrays["keys"][..., start:stop] = new[0].swapaxes(-1, -2)
        self.arrays["values"][:, :, start:stop, :D] = new[1]

    def prepare_screen(self):
        """Make the 8-bit head when it is first needed. False if the model has none: its head is small, or the units
        overflow."""
        if self.has_screen and not self.record[0]["screen"]:
            self.arrays["screen"], self.arrays["screen_units"] = quantise_head(self.arrays["head_w"], self.panel)
            self.set_fields(**{name: self.arrays[name].ctypes.data for name in ("screen", "screen_units")})
            self.set_fields(largest_unit=self.arrays["screen_units"].max())
            self.has_screen = bool(np.isfinite(self.record[0]["largest_unit"]))
        return self.has_screen

    def run(self, token, x, position, screened=False, **launch):
        """`step_kernel` from a token at this position or, if x (1, C) is given, from the head, which reads it."""
        chunks, first_stage = 1 if self.one_thread else min(POOL.threads, self.threads, POOL.cores), 0
        if x is not None:
            self.arrays["x"][:], first_stage = x.reshape(-1), len(self.stages) - 1
        if not screened and not self.stages[-1]["weights"]:
            self.stages[-1]["weights"] = self.pack_matrix(self.arrays["head_w"].T)
        self.arrays["words"][:], self.arrays["tokens"][0] = 0, token
        self.arrays["words"][END] = launch["count"] * len(self.stages) + 1 if launch["count"] else len(self.stages)
        self.set_fields(chunks=chunks, first_stage=first_stage, position=position, screened=screened, **launch)
        POOL.run(step_kernel, chunks, self.record, self.stages)

    def logits(self, token, x, position):
        """The logits (V,) of what follows the token at this position."""
        self.run(token, x, position, count=0)
        logits = self.arrays["logits"][: self.cfg.vocab_size]
        return logits.copy() if self.head_b is None else logits + self.head_b

    def draw(self, token, x, position, uniforms, stop, seen=(), banned=(), **filters):
        """The ids that follow, one for each of uniforms (count,), or up to `stop`; all but the last are in the cache.
        Fewer if the logits after them are not finite; FloatingPointError if the first are not. `seen`, `banned` and the
        filters are those of `probabilities`; what is drawn is seen by the next."""
        count, offsets = len(uniforms), self.arrays["offsets"]
        filters = NO_FILTERS | filters
        self.arrays["uniforms"][:count], offsets[:] = uniforms, 0 if self.head_b is None else self.head_b
        offsets[list(banned)] = -math.inf
        self.arrays["seen"][:] = 0
        self.arrays["seen"][list(seen)] = 1
        screened = filters["temperature"] == 0 and filters["repetition_penalty"] == 1 and self.prepare_screen()
        self.run(token, x, position, screened, count=count, stop=stop, **filters)
        drawn = self.arrays["tokens"][1 : 1 + self.arrays["words"][DRAWN]].tolist()
        if not drawn:
            raise FloatingPointError("logits are not finite")
        return drawn


class Int8Steps(Steps):
    """`Steps` with matrices in int8, for parameters of `round_weights`: q is theirs, a scale to its last bit."""

    int8 = True

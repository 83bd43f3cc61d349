"""What a decoder-only model is: sizes, positions, windows. Plain frozen data, no jax, no checkpoint layout."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: angle of pair i at position p is p * theta^(-2i / head_dim). arXiv:2104.09864."""

    theta: float = 10_000.0


@dataclass(frozen=True)
class LinearRope(Rope):
    """Positions divided by `factor`."""

    factor: float = 1.0


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1's scaling: wavelengths above original_max_position / low_freq_factor are stretched by `factor`, those
    below original_max_position / high_freq_factor are kept, those between are interpolated."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN (arXiv:2309.00071): interpolates slow pairs by `factor`, keeps fast ones, ramps between the pairs that turn
    beta_slow and beta_fast times in the original context. cos and sin are multiplied by `attention_factor`."""

    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position: int = 4096
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer scores: softmax(softcap * tanh(scale * q k / softcap)), without the cap where `softcap` is None.

    A query at position p reads keys at (p - window, p], at all positions up to p where `window` is None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only language model.

    `windows` has one entry a layer (None: full attention). `window_rope` is the position embedding of windowed layers
    where it differs from `rope`. `norm_offset` is added to norm weights (Gemma stores weight - 1). `stored_dtype` is
    what the checkpoint says its weights are in. `hf` is the config.json this was read from, as JSON text: exports write
    it back unchanged.
    """

    architecture: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_position: int
    windows: tuple[int | None, ...]
    rope: Rope = Rope()
    window_rope: Rope | None = None
    rms_eps: float = 1e-6
    norm_offset: float = 0.0
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    key_basis: bool = False
    """Queries and keys are written in a basis of each KV head's own after RoPE (models/basis.py)."""
    attention_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stored_dtype: str = "float32"
    hf: str = field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads are not a multiple of {self.kv_heads} KV heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")
        if len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} attention windows for {self.layers} layers")

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.heads // self.kv_heads

    def layer_rope(self, layer: int) -> Rope:
        windowed = self.windows[layer] is not None
        return self.window_rope if windowed and self.window_rope is not None else self.rope

    def attention_spec(self, layer: int) -> AttentionSpec:
        return AttentionSpec(self.attention_scale, self.windows[layer], self.attention_softcap)

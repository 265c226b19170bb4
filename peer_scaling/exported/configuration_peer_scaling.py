"""Configuration of an exported peer-scaling model. Needs transformers and nothing else.

This file is copied as it is beside the weights; `modeling_peer_scaling.py` has the model.
"""

from typing import Any

from transformers import PretrainedConfig

FEED_FORWARDS = ("dense", "moe", "pkm", "peer")
NORMS = ("rms", "layer")


class PeerScalingConfig(PretrainedConfig):
    """Shape of a decoder whose middle block has another feed-forward than the rest.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks; block n / 2 of n, counted from 1 and rounded up, has
            `swapped_ffw`.
        num_attention_heads: heads of each attention.
        max_position_embeddings: tokens that the model was trained to see at once; the limit.
        norm: `rms` or `layer`, both with a gain and no bias.
        rotary_base: base of the rotary positions.
        bias: whether attention has biases.
        normalize_embeddings: whether embeddings are scaled to unit mean square.
        tie_word_embeddings: whether the output head is the embedding.
        ffw: `ratio`, `activation` and `bias` of the dense feed-forwards.
        swapped_ffw: `name` (dense, moe, pkm or peer) and the numbers of the middle one.
        use_cache: whether forward passes keep keys and values by default.
        **kwargs: what every configuration of transformers takes.

    Raises:
        ValueError: a name that the model does not know.
    """

    model_type = "peer_scaling"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 1,
        max_position_embeddings: int = 128,
        norm: str = "rms",
        rotary_base: float = 10_000.0,
        bias: bool = False,
        normalize_embeddings: bool = True,
        tie_word_embeddings: bool = True,
        ffw: dict[str, Any] | None = None,
        swapped_ffw: dict[str, Any] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.norm = norm
        self.rotary_base = rotary_base
        self.bias = bias
        self.normalize_embeddings = normalize_embeddings
        dense = {"ratio": 4, "activation": "gelu", "bias": False}
        self.ffw = ffw or dense
        self.swapped_ffw = swapped_ffw or {"name": "dense", **dense}
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
        if self.swapped_ffw.get("name") not in FEED_FORWARDS:
            known = ", ".join(FEED_FORWARDS)
            raise ValueError(f"swapped_ffw={self.swapped_ffw.get('name')!r} is none of {known}")
        self.use_cache = use_cache and self.causal
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later token or another sequence: all but expert choice."""
        return self.swapped_ffw.get("router") != "expert_choice"

    @property
    def swapped_block(self) -> int:
        """0-based number of the block that has `swapped_ffw`."""
        return (self.num_hidden_layers + 1) // 2 - 1

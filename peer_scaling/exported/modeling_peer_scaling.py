"""A decoder of a peer-scaling study, for transformers.

This file is copied as it is beside the weights. It needs torch, transformers and the two files
beside it. Tensor names are those of the project, below `model.`, but for the vocabulary's:
`model.embed_tokens.weight` and `lm_head.weight`.

Shape suffixes: B batch, T new tokens, S all tokens (cached ones first), D width of the model,
V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_peer_scaling import PeerScalingConfig
from .layers_peer_scaling import FEED_FORWARDS, NORM_EPS, Attention, Dense, make_norm, rotary_of


class Block(nn.Module):
    """Attention and a feed-forward, each on a normalised residual stream."""

    def __init__(self, config: PeerScalingConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.ffw_norm = make_norm(config)
        if layer == config.swapped_block:
            numbers = dict(config.swapped_ffw)
            self.ffw = FEED_FORWARDS[numbers.pop("name")](config.hidden_size, **numbers)
        else:
            self.ffw = Dense(config.hidden_size, **config.ffw)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_BHTS: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """The residual stream after the block."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, mask_BHTS, cache)
        return x_BTD + self.ffw(self.ffw_norm(x_BTD))


class PeerScalingPreTrainedModel(PreTrainedModel):
    """What both models below have in common."""

    config_class = PeerScalingConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True


class PeerScalingModel(PeerScalingPreTrainedModel):
    """The decoder without its head."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]  # noqa: RUF012

    def __init__(self, config: PeerScalingConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states (B, T, D) of new tokens, after those in `past_key_values`.

        `attention_mask` is (B, S), 0 for padding on either side, cached tokens included.

        Raises:
            ValueError: a position beyond the context, a mask of another shape, or a cache or
                padding with a layer that compares tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        cache = past_key_values
        past = 0 if cache is None else int(cache.get_seq_length())
        padding_BS = self._padding(attention_mask, past + x_BTD.shape[1])
        if not self.config.causal and (cache is not None or padding_BS is not None):
            raise ValueError(
                "expert choice compares the tokens of a forward pass, so that it works neither "
                "with a cache nor with padding: use_cache=False, and sequences of one length"
            )
        position_BT = self._positions(position_ids, padding_BS, past, x_BTD)
        mask_BHTS = _mask(padding_BS, past, x_BTD)
        width = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_of(position_BT, width, self.config.rotary_base)
        if self.config.normalize_embeddings:
            x_BTD = functional.rms_norm(x_BTD, x_BTD.shape[-1:], None, NORM_EPS)
        streams = [x_BTD]
        for block in self.blocks:
            streams.append(block(streams[-1], rotary, mask_BHTS, cache))
        output = BaseModelOutputWithPast(
            last_hidden_state=self.norm(streams.pop()), past_key_values=cache
        )
        if _chosen(output_hidden_states, self.config.output_hidden_states):
            output["hidden_states"] = (*streams, output.last_hidden_state)
        return output if _chosen(return_dict, self.config.return_dict) else output.to_tuple()

    def _padding(self, mask_BS: Tensor | None, length: int) -> Tensor | None:
        """The mask as bool, or None if it masks nothing."""
        if mask_BS is None:
            return None
        if mask_BS.dim() != 2 or mask_BS.shape[1] != length:
            raise ValueError(
                f"attention_mask is {tuple(mask_BS.shape)}; it must be (batch, {length}), and a "
                f"cache a DynamicCache"
            )
        return None if bool(mask_BS.all()) else mask_BS.bool()

    def _positions(
        self, position_BT: Tensor | None, padding_BS: Tensor | None, past: int, x_BTD: Tensor
    ) -> Tensor:
        """Padding takes no position; on the left it stands at the first one."""
        if position_BT is None and padding_BS is not None:
            position_BT = (padding_BS.cumsum(1) - 1).clamp_min(0)[:, past:]
        elif position_BT is None:
            position_BT = torch.arange(past, past + x_BTD.shape[1], device=x_BTD.device)[None]
        last, context = int(position_BT.max()), self.config.max_position_embeddings
        if last >= context:
            raise ValueError(
                f"{last + 1} tokens exceed the model's context of {context}: shorten the prompt, "
                f"or generate fewer tokens"
            )
        return position_BT


def _mask(padding_BS: Tensor | None, past: int, x_BTD: Tensor) -> Tensor | None:
    """What each new token may look at, (B or 1, 1, T, S); None for itself and all before it."""
    if padding_BS is None and past == 0:
        return None
    time = x_BTD.shape[1]
    key_S = torch.arange(past + time, device=x_BTD.device)
    own_TS = key_S == key_S[past:, None]
    earlier_TS = key_S <= key_S[past:, None]
    if padding_BS is None:
        return earlier_TS[None, None]
    # Padding sees itself: a row without a key has no softmax.
    return (earlier_TS & padding_BS[:, None, :] | own_TS)[:, None]


def _chosen(argument: bool | None, default: bool | None) -> bool:
    return bool(default if argument is None else argument)


class PeerScalingForCausalLM(PeerScalingPreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PeerScalingConfig) -> None:
        super().__init__(config)
        self.model = PeerScalingModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Next-token logits (B, T, V), of the last `logits_to_keep` tokens if that is not 0.

        With `labels`, (B, T) and -100 where nothing is to be predicted, the mean cross-entropy of
        each with the logits of the token before it, nats. Auxiliary losses are no part of it.

        Raises:
            ValueError: see `PeerScalingModel.forward`.
        """
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            output_hidden_states, return_dict=True,
        )  # fmt: skip
        hidden_BTD = output.last_hidden_state[:, -logits_to_keep:]
        logits_BTV = self.lm_head(hidden_BTD)
        loss = None
        if labels is not None:
            predicted_LV = logits_BTV[:, :-1].flatten(0, 1).float()
            loss = functional.cross_entropy(predicted_LV, labels[:, 1:].flatten())
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result if _chosen(return_dict, self.config.return_dict) else result.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it, with a cache of keys and values.

        Raises:
            ValueError: the model is not causal, or its context ends before the last new token.
        """
        if not self.config.causal:
            raise ValueError(
                "this model cannot generate: its mixture of experts routes by expert choice, which "
                "compares a token with others. Its loss is no language model's either"
            )
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


__all__ = ["PeerScalingForCausalLM", "PeerScalingModel", "PeerScalingPreTrainedModel"]

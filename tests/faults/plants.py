"""Leaks that are planted in small decoders, each as somebody might build it by mistake."""

import torch
from torch import nn
from torch.nn import functional

from peer_scaling.ffw.base import FFWOutput
from peer_scaling.ffw.dense import Dense
from peer_scaling.ffw.moe import MoE
from peer_scaling.ffw.peer import PEER
from peer_scaling.ffw.pkm import PKM
from peer_scaling.leaks import DOCUMENT, LABELS, LATER, ORDER, OTHERS
from peer_scaling.model import DecoderConfig, build_model
from peer_scaling.parallel import Losses, LossOutput

VOCAB, CONTEXT, END = 64, 64, 0
SHAPE = DecoderConfig(d_model=16, num_layers=2, num_heads=1)
TABLE = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8}
CLEAN = {
    "dense": Dense(),
    "moe": MoE(num_experts=4, router="token_choice"),
    "pkm": PKM(**TABLE),
    "peer": PEER(**TABLE),
}


def clean(name, seed):
    return Losses(build_model(SHAPE, CLEAN[name], VOCAB, CONTEXT, seed))


def with_ffw(seed, ffw, wrap):
    """The swapped layer inside another module."""
    model = build_model(SHAPE, ffw, VOCAB, CONTEXT, seed)
    block = model.blocks[SHAPE.swapped_block]
    block.ffw = wrap(block.ffw)
    return Losses(model)


class Around(nn.Module):
    """A layer with something before it."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x_BTD):
        return self.layer(self.change(x_BTD))


def chunk_mean(size):
    """The mean of a whole chunk, for all of its tokens."""

    def change(x_BTD):
        chunks = [c + c.mean(1, keepdim=True) for c in x_BTD.split(size, dim=1)]
        return torch.cat(chunks, dim=1)

    return change


def circular(x_BTD):
    """A long convolution by FFT that was not padded: the end wraps around to the beginning."""
    time = x_BTD.shape[1]
    decay_T = 0.9 ** torch.arange(time, dtype=x_BTD.dtype)
    spectrum = torch.fft.rfft(x_BTD, dim=1) * torch.fft.rfft(decay_T)[:, None]
    return torch.fft.irfft(spectrum, n=time, dim=1)


def padded(x_BTD):
    """The same with padding: causal, though rounding reaches every output."""
    time = x_BTD.shape[1]
    decay_T = 0.9 ** torch.arange(time, dtype=x_BTD.dtype)
    spectrum = torch.fft.rfft(x_BTD, n=2 * time, dim=1)
    spectrum = spectrum * torch.fft.rfft(decay_T, n=2 * time)[:, None]
    return torch.fft.irfft(spectrum, n=2 * time, dim=1)[:, :time]


class MeanRouter(nn.Module):
    """Experts mixed by what a sequence is like as a whole."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD):
        score_BE = torch.softmax(x_BTD.mean(1) @ self.layer.router_ED.T, dim=-1)
        hidden = functional.gelu(torch.einsum("btd,efd->btef", x_BTD, self.layer.in_EFD))
        out = torch.einsum("btef,edf->bted", hidden, self.layer.out_EDF)
        return FFWOutput(torch.einsum("bted,be->btd", out, score_BE), x_BTD.new_zeros(()), None)


class Capacity(nn.Module):
    """Each token takes an expert, and an expert drops those that come when it is full. Position by position over the
    batch, so that a token competes with the same position of earlier sequences alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD):
        capacity = max(1, len(x_BTD) // 4)
        score_BTE = torch.softmax(x_BTD @ self.layer.router_ED.T, dim=-1)
        gate_BT, expert_BT = score_BTE.max(-1)
        chosen_BTE = functional.one_hot(expert_BT, score_BTE.shape[-1])
        place_BT = (chosen_BTE.cumsum(0) * chosen_BTE).sum(-1)
        gate_BT = gate_BT * (place_BT <= capacity)
        hidden = functional.gelu(torch.einsum("btd,efd->btef", x_BTD, self.layer.in_EFD))
        out = torch.einsum("btef,edf->bted", hidden, self.layer.out_EDF)
        y_BTD = (out * chosen_BTE[..., None]).sum(2) * gate_BT[..., None]
        return FFWOutput(y_BTD, x_BTD.new_zeros(()), None)


class PerSequence(nn.Module):
    """A layer that sees one sequence at a time."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD):
        parts = [self.layer(x_TD[None]) for x_TD in x_BTD]
        return parts[0]._replace(y_BTD=torch.cat([part.y_BTD for part in parts]))


class AlwaysTraining(nn.Module):
    """A query norm that takes the batch's statistics in evaluation too."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        layer.router.norm.track_running_stats = False
        layer.router.norm.running_mean = layer.router.norm.running_var = None

    def forward(self, x_BTD):
        return self.layer(x_BTD)


class Masked(nn.Module):
    """Attention within documents by a mask of our own; or with what `allow` lets through beside."""

    def __init__(self, model, allow):
        super().__init__()
        self.model, self.allow, self.mask_BTT = model, allow, None
        for block in model.blocks:
            block.attention.forward = self.attention_of(block.attention)

    def attention_of(self, layer):
        def forward(x_BTD, rotary):
            qkv = functional.linear(x_BTD, layer.qkv_ED).unflatten(-1, (3, layer.num_heads, -1))
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            mask = self.mask_BTT[:, None]
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return functional.linear(y.transpose(1, 2).flatten(2), layer.out_DD)

        return forward

    def forward(self, tokens_BT):
        time_T = torch.arange(tokens_BT.shape[1])
        end_BT = tokens_BT == END
        document_BT = end_BT.cumsum(1) - end_BT.long()  # the end belongs to what it ends
        self.mask_BTT = self.allow(time_T, document_BT)
        return self.model(tokens_BT)


def within(time_T, document_BT):
    causal_TT = time_T[:, None] >= time_T
    return causal_TT & (document_BT[:, :, None] == document_BT[:, None])


def off_by_one(time_T, document_BT):
    """The first token of a document still sees the one before."""
    shifted_BT = torch.cat((document_BT[:, :1], document_BT[:, :-1]), dim=1)
    causal_TT = time_T[:, None] >= time_T
    return causal_TT & (shifted_BT[:, :, None] <= document_BT[:, None])


def bidirectional(time_T, document_BT):
    """No mask at all, as an encoder's."""
    return torch.ones(len(document_BT), len(time_T), len(time_T), dtype=torch.bool)


def masked(seed, allow):
    return Losses(Masked(build_model(SHAPE, Dense(), VOCAB, CONTEXT, seed), allow))


class ShiftedLabels(Losses):
    """Predicts what it is given."""

    def forward(self, tokens_BT):
        output = self.model(tokens_BT[:, :-1])
        summed = output.cross_entropy_sum(tokens_BT[:, :-1])
        return LossOutput(summed, output.aux_loss, output.stats)


class GivenLabels(Losses):
    """Is given what it predicts."""

    def forward(self, tokens_BT):
        output = self.model(tokens_BT[:, 1:])
        summed = output.cross_entropy_sum(tokens_BT[:, 1:])
        return LossOutput(summed, output.aux_loss, output.stats)


class Gated(nn.Module):
    """Adds what is to come, by a factor that starts at zero and is learned."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.gate = layer, nn.Parameter(torch.zeros(()))

    def forward(self, x_BTD):
        output = self.layer(x_BTD)
        ahead_BTD = functional.pad(x_BTD[:, 1:], (0, 0, 0, 1))
        return output._replace(y_BTD=output.y_BTD + self.gate * ahead_BTD)


def planted(name, seed):
    """A leaky loss module; see `LEAKS` for the names."""
    if name == "expert choice":
        return Losses(build_model(SHAPE, MoE(num_experts=4), VOCAB, CONTEXT, seed))
    if name == "router of the sequence's mean":
        return with_ffw(seed, CLEAN["moe"], MeanRouter)
    if name == "capacity by batch order":
        return with_ffw(seed, CLEAN["moe"], Capacity)
    if name == "query norm in training mode":
        return with_ffw(seed, CLEAN["peer"], AlwaysTraining)
    if name.startswith("mean of chunks"):
        change = chunk_mean(int(name.split()[-1]))
        return with_ffw(seed, Dense(), lambda layer: Around(layer, change))
    if name == "circular FFT":
        return with_ffw(seed, Dense(), lambda layer: Around(layer, circular))
    if name == "shifted label":
        return ShiftedLabels(build_model(SHAPE, Dense(), VOCAB, CONTEXT, seed))
    if name == "bidirectional mask":
        return masked(seed, bidirectional)
    assert name == "document border"
    return masked(seed, off_by_one)


LEAKS = {
    "expert choice": {LATER, OTHERS},
    "router of the sequence's mean": {LATER},
    "capacity by batch order": {OTHERS, ORDER},
    "query norm in training mode": {LATER, OTHERS},
    "mean of chunks of 16": {LATER},
    "mean of chunks of 64": {LATER},
    "circular FFT": {LATER},
    "shifted label": {LABELS},
    "bidirectional mask": {LATER},
    "document border": {DOCUMENT},
}
"""What is planted -> the kinds of leak that must be found, and no others. Nine; chunks in two sizes."""

"""Loss of given parts of documents, each token predicted once, with a sliding window.

A document is tokens 0 to n - 1; token i is predicted from the at most `context` tokens before it
that its window has. The first window reaches as far as the context allows, each later one `stride`
tokens further, so that from there on a token has at least `context - stride` before it (Borgeaud et
al. 2022, 2112.04426: context 2,048, stride 1,024). With stride = context these are the windows of
lm-eval's rolling log-likelihood.

Shape suffixes: B windows, T time, S scored tokens, V vocabulary, D documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from peer_scaling.model import Decoder

ROWS_OF_LOGITS = 4096
"""Tokens whose logits over the vocabulary exist at a time."""


class Encoded(NamedTuple):
    """A document's tokens."""

    tokens: np.ndarray
    """int64 (n,)."""
    first: int
    """The first one that is scored, at least 1; those before are context."""


@dataclass(frozen=True)
class Scores:
    """What `score` returns, per document."""

    nats_D: np.ndarray
    """Summed cross-entropy of the scored tokens, float64."""
    tokens_D: np.ndarray
    """How many they are, int64."""
    greedy_D: np.ndarray
    """Whether each of them is the most likely one, and there is one, bool."""


class Window(NamedTuple):
    """Inputs are tokens start to stop - 2, of which those that predict first to stop - 1 count."""

    document: int
    start: int
    first: int
    stop: int

    @property
    def inputs(self) -> int:
        """How many."""
        return self.stop - 1 - self.start


def windows(document: int, encoded: Encoded, context: int, stride: int) -> Iterator[Window]:
    """The windows of a document, which score each of its tokens from `first` on once."""
    first, length = encoded.first, len(encoded.tokens)
    while first < length:
        reach = context + 1 if first == encoded.first else 0
        stop = min(length, max(first + stride, reach))
        yield Window(document, max(0, stop - 1 - context), first, stop)
        first = stop


def score(
    model: Decoder,
    documents: Sequence[Encoded],
    *,
    context: int,
    stride: int,
    batch_size: int,
    autocast: torch.autocast,
) -> Scores:
    """Nats of the scored tokens of documents.

    Args:
        model: in eval mode; its parameters say which device.
        documents: each is scored on its own, whatever its companions.
        context: most input tokens per window.
        stride: see the module's text; 1 to `context`.
        batch_size: windows per forward pass, padded at the end to the longest; 1 pads none.
        autocast: precision of the forward pass; logits and sums are float32 and float64.
    """
    nats_D = np.zeros(len(documents))
    greedy_D = np.ones(len(documents), dtype=bool)
    todo = [w for d, e in enumerate(documents) for w in windows(d, e, context, stride)]
    todo.sort(key=lambda window: window.inputs)  # windows of a batch are of similar length
    for begin in range(0, len(todo), batch_size):
        batch = todo[begin : begin + batch_size]
        nats_S, greedy_S = _forward(model, documents, batch, autocast)
        ends = np.cumsum([window.stop - window.first for window in batch])[:-1]
        parts = zip(batch, np.split(nats_S, ends), np.split(greedy_S, ends), strict=True)
        for window, nats, greedy in parts:
            nats_D[window.document] += nats.sum()
            greedy_D[window.document] &= greedy.all()
    tokens_D = np.array([max(0, len(e.tokens) - e.first) for e in documents], dtype=np.int64)
    return Scores(nats_D, tokens_D, greedy_D & (tokens_D > 0))


@torch.no_grad()
def _forward(
    model: Decoder, documents: Sequence[Encoded], batch: list[Window], autocast: torch.autocast
) -> tuple[np.ndarray, np.ndarray]:
    """(cross-entropy, whether it is the most likely) of the scored tokens of windows, in order."""
    shape = (len(batch), max(window.inputs for window in batch))
    tokens_BT, scored_BT = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    targets = []
    for row, window in enumerate(batch):
        own = documents[window.document].tokens
        tokens_BT[row, : window.inputs] = own[window.start : window.stop - 1]
        scored_BT[row, window.first - 1 - window.start : window.inputs] = True
        targets.append(own[window.first : window.stop])
    device = model.embedding_VD.device
    target_S = torch.from_numpy(np.concatenate(targets)).to(device)
    with autocast:
        output = model(torch.from_numpy(tokens_BT).to(device))
    hidden_SD = output.hidden_BTD[torch.from_numpy(scored_BT).to(device)].float()
    nats, greedy = [], []
    for rows in torch.arange(len(target_S), device=device).split(ROWS_OF_LOGITS):
        logits_SV = functional.linear(hidden_SD[rows], output.head_VD.float())
        nats.append(functional.cross_entropy(logits_SV, target_S[rows], reduction="none"))
        greedy.append(logits_SV.argmax(-1) == target_S[rows])
    return torch.cat(nats).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()

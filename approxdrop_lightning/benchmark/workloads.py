"""The benchmarked workloads: networks that commonly use dropout, each with a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Workload:
    """A network and one batch for it.

    Attributes:
        name: Name in the table.
        make: Creates the network for a dropout rate.
        narrow: Creates a network that is physically as narrow as what is kept at a rate.
        batch: Input and target.
        clip: Maximum gradient norm; None for no clipping.
        sliced: Creates the network with dropout by slicing, for a rate and whether slices are contiguous; None if
            there is no such variant.
    """

    name: str
    make: Callable[[float], nn.Module]
    narrow: Callable[[float], nn.Module]
    batch: tuple[Tensor, Tensor]
    clip: float | None = None
    sliced: Callable[[float, bool], nn.Module] | None = None


class MLP(nn.Sequential):
    """Linear, ReLU and dropout for each hidden layer, then the output layer."""

    def __init__(self, widths: list[int], rate: float) -> None:
        layers: list[nn.Module] = []
        for a, b in pairwise(widths[:-1]):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(rate)]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))


class SlicedMLP(MLP):
    """Dropout by plain slicing of the weights: the two-line alternative to this package.

    Args:
        widths: Widths of all layers.
        rate: Dropout rate.
        contiguous: Whether to keep one contiguous slice of the units (SliceOut, Notin et al. 2020); otherwise every
            dp-th unit is kept.
    """

    def __init__(self, widths: list[int], rate: float, contiguous: bool) -> None:
        super().__init__(widths, rate)
        self.rate, self.contiguous = rate, contiguous

    def _slice(self, n: int) -> slice:
        if self.contiguous:
            kept = round(n * (1 - self.rate))
            start = int(torch.randint(n - kept + 1, ()))
            return slice(start, start + kept)
        dp = round(1 / (1 - self.rate))
        return slice(int(torch.randint(dp, ())), None, dp)

    def forward(self, x: Tensor) -> Tensor:
        kept = slice(None)
        *hidden, last = [m for m in self if isinstance(m, nn.Linear)]
        for layer in hidden:
            out = self._slice(layer.out_features)
            x = F.linear(x, layer.weight[out, kept], layer.bias[out]).relu() / (1 - self.rate)
            kept = out
        return F.linear(x, last.weight[:, kept], last.bias)


class LSTMModel(nn.Module):
    """Embedding, LSTM layers and decoder, with dropout on all non-recurrent connections (Zaremba et al. 2014).

    Args:
        vocabulary: Number of words.
        hidden: Hidden and embedding size.
        layers: Number of LSTM layers.
        rate: Dropout rate.
    """

    def __init__(self, vocabulary: int, hidden: int, layers: int, rate: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.before, self.after = nn.Dropout(rate), nn.Dropout(rate)
        self.lstm = nn.LSTM(hidden, hidden, layers, dropout=rate)
        self.decoder = nn.Linear(hidden, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        y, _ = self.lstm(self.before(self.embedding(words)))
        return self.decoder(self.after(y)).flatten(0, 1)


class _NarrowLSTMModel(nn.Module):
    def __init__(self, vocabulary: int, hidden: int, layers: int, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.embedding = nn.Embedding(vocabulary, kept)
        self.layers = nn.ModuleList(nn.LSTM(kept, hidden) for _ in range(layers))
        self.decoder = nn.Linear(kept, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x)[0][..., : self.kept]
        return self.decoder(x).flatten(0, 1)


class Transformer(nn.Module):
    """Causal language model of PyTorch's pre-norm encoder layers, without dropout of the attention weights.

    Args:
        vocabulary: Number of words.
        hidden: Width of embeddings and layers.
        layers: Number of layers.
        steps: Length of the text.
        rate: Dropout rate.
        kept: Share of the feed-forward units and of the decoder's inputs that the network has; less than 1 in the
            narrow twin.
    """

    def __init__(self, vocabulary: int, hidden: int, layers: int, steps: int, rate: float, kept: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(steps, 1, hidden))
        self.before, self.after = nn.Dropout(rate), nn.Dropout(rate)
        heads, width = max(1, hidden // 64), round(4 * hidden * kept)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, width, rate, activation="gelu", norm_first=True)
            for _ in range(layers)
        )
        for part in self.modules():
            if isinstance(part, nn.MultiheadAttention):
                part.dropout = 0.0
        self.norm = nn.LayerNorm(hidden)
        self.decoder = nn.Linear(round(hidden * kept), vocabulary)
        self.register_buffer("mask", torch.ones(steps, steps, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.before(self.embedding(words) + self.positions)
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.decoder(self.after(self.norm(x))[..., : self.decoder.in_features]).flatten(0, 1)


class SIGN(nn.Module):
    """One tower per hop of a graph's features, and a head on their concatenated outputs (Frasca et al. 2020).

    Args:
        features: Number of features per node.
        towers: Number of towers.
        hidden: Width of all layers.
        classes: Number of outputs.
        rate: Dropout rate.
    """

    def __init__(self, features: int, towers: int, hidden: int, classes: int, rate: float) -> None:
        super().__init__()
        self.towers = nn.ModuleList(self._block(features, hidden, hidden, rate) for _ in range(towers))
        self.prelu, self.dropout = nn.PReLU(), nn.Dropout(rate)
        self.head = self._block(towers * hidden, hidden, classes, rate)

    @staticmethod
    def _block(n_in: int, hidden: int, n_out: int, rate: float) -> nn.Sequential:
        return nn.Sequential(nn.Linear(n_in, hidden), nn.PReLU(), nn.Dropout(rate), nn.Linear(hidden, n_out))

    def forward(self, hops: Tensor) -> Tensor:
        made = [tower(hop) for tower, hop in zip(self.towers, hops.unbind(1), strict=True)]
        return self.head(self.dropout(self.prelu(torch.cat(made, dim=-1))))


class Recommender(nn.Module):
    """Concatenated embeddings of categorical fields, followed by an MLP with optional batch norm.

    Args:
        fields: Number of fields.
        values: Number of values of each field.
        hidden: Widths of the hidden layers.
        batch_norm: Whether to put a batch norm before each ReLU.
        rate: Dropout rate.
    """

    def __init__(self, fields: int, values: int, hidden: list[int], batch_norm: bool, rate: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(values, 16)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([16 * fields, *hidden]):
            norm = [nn.BatchNorm1d(n_out)] if batch_norm else []
            layers += [nn.Linear(n_in, n_out), *norm, nn.ReLU(), nn.Dropout(rate)]
        self.net = nn.Sequential(*layers, nn.Linear(hidden[-1], 2))

    def forward(self, values: Tensor) -> Tensor:
        return self.net(self.embedding(values).flatten(1))


def mlp(widths: list[int], batch: int) -> Workload:
    """MLP classifier; ``widths`` includes input and output."""
    return Workload(
        f"MLP {'-'.join(map(str, widths))}, batch {batch}",
        lambda rate: MLP(widths, rate),
        lambda rate: MLP([widths[0], *(round(w * (1 - rate)) for w in widths[1:-1]), widths[-1]], 0.0),
        (torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))),
        sliced=lambda rate, contiguous: SlicedMLP(widths, rate, contiguous),
    )


def lstm(hidden: int, layers: int, steps: int, batch: int, vocabulary: int) -> Workload:
    """LSTM language model; its narrow twin has narrower layer inputs but the same recurrent width."""
    words = torch.randint(vocabulary, (2, steps, batch))
    return Workload(
        f"LSTM {layers}x{hidden}, T={steps}, B={batch}, vocabulary {vocabulary}",
        lambda rate: LSTMModel(vocabulary, hidden, layers, rate),
        lambda rate: _NarrowLSTMModel(vocabulary, hidden, layers, round(hidden * (1 - rate))),
        (words[0], words[1].flatten()),
        clip=5.0,
    )


def transformer(hidden: int, layers: int, steps: int, batch: int, vocabulary: int) -> Workload:
    """Transformer language model; its narrow twin has narrower feed-forward blocks and a narrower decoder."""
    words = torch.randint(vocabulary, (2, steps, batch))
    return Workload(
        f"transformer {layers}x{hidden}, T={steps}, B={batch}, vocabulary {vocabulary}",
        lambda rate: Transformer(vocabulary, hidden, layers, steps, rate),
        lambda rate: Transformer(vocabulary, hidden, layers, steps, 0.0, kept=1 - rate),
        (words[0], words[1].flatten()),
        clip=1.0,
    )


def sign(hidden: int, batch: int, features: int = 128, towers: int = 4, classes: int = 40) -> Workload:
    """Graph MLP on the hops of a node; its narrow twin has narrower hidden layers."""
    return Workload(
        f"SIGN {towers}x({features}-{hidden}), batch {batch}",
        lambda rate: SIGN(features, towers, hidden, classes, rate),
        lambda rate: SIGN(features, towers, round(hidden * (1 - rate)), classes, 0.0),
        (torch.randn(batch, towers, features), torch.randint(classes, (batch,))),
    )


def ctr(hidden: list[int], batch: int, batch_norm: bool = False, fields: int = 24, values: int = 50_000) -> Workload:
    """Recommender MLP; its narrow twin has narrower hidden layers."""
    return Workload(
        f"CTR {fields}x16-{'-'.join(map(str, hidden))}-2{', batch norm' if batch_norm else ''}, batch {batch}",
        lambda rate: Recommender(fields, values, hidden, batch_norm, rate),
        lambda rate: Recommender(fields, values, [round(n * (1 - rate)) for n in hidden], batch_norm, 0.0),
        (torch.randint(values, (batch, fields)), torch.randint(2, (batch,))),
    )

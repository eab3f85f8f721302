"""Models to convert."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torchvision.models.vision_transformer import MLPBlock, VisionTransformer
from torchvision.ops import MLP


class Shared(nn.Module):
    """One nn.Dropout at two places: each use has a pattern of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(9, 14), nn.Linear(14, 11), nn.Linear(11, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.second(self.drop(F.gelu(self.first(x)))))))


class Reused(nn.Module):
    """One linear layer between two dropouts, and used twice: what it reads and makes differs by use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.a, self.b, self.out = nn.Linear(12, 12), nn.Dropout(0.5), nn.Dropout(0.7), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.layer(self.a(self.layer(x).relu())))) + self.layer(x)[..., :3]


class Residual(nn.Module):
    """What is dropped is read elsewhere too: a residual sum, a normalisation, a second consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.query, self.key = (
            nn.Linear(12, 12),
            nn.LayerNorm(12),
            nn.Linear(12, 8),
            nn.Linear(12, 8),
        )
        self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        x = self.norm(x + self.a(hidden)) + hidden
        x = self.b(x)
        return self.query(x) * self.key(x)


class InPlace(nn.Module):
    """In-place activations, views and arbitrary Python in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 16), nn.Linear(16, 4)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.up(x) * 2.0)
        if hidden.shape[-1] != 16 or hidden.dim() != x.dim():
            raise AssertionError("a lazy tensor shows its full shape")
        hidden = self.drop(hidden.view(-1, 16))
        return self.down(hidden.reshape(*x.shape[:-1], 16) / 3.0)


class ReadByMetric(nn.Module):
    """Somebody looks at a pending output without gradients, then in place, before the loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(10, 16), nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        with torch.no_grad():
            self.seen = hidden.mean()
        out = self.down(self.drop(hidden))
        with torch.no_grad():
            self.best = out.argmax(-1)
        out += 1.0
        return out


class _Twice(torch.autograd.Function):
    """A derivative of its own, which nothing may replace by that of x * 2."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 3


class PastOverrides(nn.Module):
    """Callers that PyTorch's function overrides do not see, on pending and on dropped-out tensors."""

    def __init__(self, hooks: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(10, 16), nn.Linear(16, 12), nn.Linear(12, 14), nn.Linear(14, 4)
        self.relu, self.first, self.second = nn.ReLU(), nn.Dropout(0.5), nn.Dropout(0.5)
        self.hooks = hooks
        if hooks:
            for module in (self.a, self.relu, self.c):
                module.register_full_backward_hook(_double_input_gradient)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.relu(self.a(x)))
        if not self.hooks:
            x = torch.utils.checkpoint.checkpoint(torch.tanh, _Twice.apply(x), use_reentrant=True)
        x = self.b(x)
        if not self.hooks:
            x = torch.vmap(torch.sin)(_Twice.apply(x))
        return self.d(self.second(self.c(x)))


def _double_input_gradient(module, grad_input, grad_output):
    return tuple(None if g is None else 2 * g for g in grad_input)


class EmbeddedLSTM(nn.Module):
    def __init__(self, tied: bool = False, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.before, self.after = nn.Dropout(0.5), nn.Dropout(0.5)
        self.lstm = nn.LSTM(12, 12, 2, dropout=0.5, **options)
        self.decoder = nn.Linear(12, 30)
        if tied:
            self.decoder.weight = self.embedding.weight
        self.state: tuple[Tensor, Tensor] | None = None

    def forward(self, words: Tensor) -> Tensor:
        y, _ = self.lstm(self.before(self.embedding(words)), self.state)
        return self.decoder(self.after(y)).flatten(0, -2)


class Attention(nn.Module):
    """One dropout that query, key and value read."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.query, self.key, self.value = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class Convolutional(nn.Module):
    """A VGG-like network: features, flatten, classifier head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2))
        self.classifier = nn.Sequential(
            nn.Linear(16, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 24), nn.ReLU(True), nn.Dropout(),
            nn.Linear(24, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class EncoderDecoder(nn.Module):
    """Stock encoder and decoder layers; their attention's own dropout is random, so it is off."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(12, 2, 20, 0.5, **options)
        self.decoder = nn.TransformerDecoderLayer(12, 2, 20, 0.5, **options)
        for attention in (self.encoder.self_attn, self.decoder.self_attn, self.decoder.multihead_attn):
            attention.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, self.encoder(x))


def mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Ordinary, nested, two activations in a row, dropout with nothing before it."""
    return nn.Sequential(
        nn.Dropout(0.5),
        nn.Sequential(nn.Linear(20, 33), activation(), nn.Tanh(), nn.Dropout(0.5)),
        nn.Linear(33, 24),
        activation(),
        nn.Dropout(0.5),
        nn.Linear(24, 10),
    )


def with_state(model: EmbeddedLSTM, *shape: int) -> EmbeddedLSTM:
    model.state = (torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64))
    return model


def words(*shape: int) -> Tensor:
    return torch.randint(30, shape)


class Towers(nn.Module):
    """Layers side by side between PReLUs and dropouts, an ordinary tensor beside them; then dropped-out ones."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 10), nn.PReLU(), nn.Dropout(0.5), nn.Linear(10, 8 + 4 * i)) for i in range(3)
        )
        self.prelu, self.dropout = nn.PReLU(), nn.Dropout(0.5)
        self.left, self.right = nn.Linear(8 + 12 + 16 + 12, 14), nn.Linear(12, 10)
        self.a, self.b, self.out = nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.prelu(torch.cat([*(tower(x) for tower in self.towers), x], dim=-1)))
        packed = torch.cat([self.a(self.left(y).relu()), self.b(self.right(x).relu())], dim=-1)
        masked = torch.cat([self.a(torch.cat([x, x[..., :2]], dim=-1)), self.b(x[..., :10])], dim=-1)
        return self.out(packed) + self.out(masked)


class ReadByLSTM(nn.Module):
    """An LSTM that reads what two dropouts left, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 8), nn.Linear(12, 6)
        self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.5)
        self.lstm, self.out = nn.LSTM(14, 10, dropout=0.0), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(torch.cat([self.a(self.left(x)), self.b(self.right(x).tanh())], dim=2))[0])


class Sums(nn.Module):
    """Sums of layers before a dropout, and one that another function reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.others, self.more = nn.Linear(12, 16), nn.Linear(12, 16, bias=False), nn.Linear(16, 16)
        self.a, self.b, self.out = nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a((self.own(x) + self.others(x.flip(0))).relu())
        z = self.own(x) + self.more(y) + self.others(x)
        return self.out(self.b(torch.tanh(z))) + z[..., :3]


class Stacked(nn.Module):
    """Dropped-out towers in a dimension of their own, read by one layer, by a sum and as side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5)) for _ in range(3))
        self.shared, self.prelu = nn.Linear(16, 10), nn.PReLU()
        self.stack = nn.Identity()  # as an output of a module
        self.flat, self.mean = nn.Dropout(0.5), nn.Dropout(0.5)
        self.wide, self.out = nn.Linear(48, 3), nn.Linear(10, 3)
        self.head = nn.Linear(30, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hops = self.stack(torch.stack([tower(x) for tower in self.towers], dim=-2))
        shared = self.shared(F.gelu(hops) * 0.5)
        flat = self.flat(self.prelu(torch.stack([self.shared(t(x)) for t in self.towers], dim=-2)).flatten(-2))
        mean = self.mean(torch.stack([self.shared(t(x)) for t in self.towers]).tanh().mean(0))
        return self.wide(hops.flatten(-2)) + self.head(flat) + self.out(shared.sum(-2)) + self.out(mean)


#: name -> (make the model, make its input)
GALLERY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(13, 20)),
    "mlp sigmoid, batch of sequences": (lambda: mlp(nn.Sigmoid), lambda: torch.randn(3, 5, 20)),
    "mlp gelu, one row": (lambda: mlp(nn.GELU), lambda: torch.randn(1, 20)),
    "mlp, no batch": (mlp, lambda: torch.randn(20)),
    "dropout object used twice": (Shared, lambda: torch.randn(6, 9)),
    "one layer, two sites of different rates": (Reused, lambda: torch.randn(7, 12)),
    "residual": (Residual, lambda: torch.randn(4, 3, 12)),
    "in place": (InPlace, lambda: torch.randn(4, 3, 10)),
    "metric under no_grad": (ReadByMetric, lambda: torch.randn(7, 10)),
    "custom functions": (PastOverrides, lambda: torch.randn(6, 10)),
    "backward hooks": (lambda: PastOverrides(hooks=True), lambda: torch.randn(6, 10)),
    "query, key and value": (Attention, lambda: torch.randn(3, 5, 12)),
    "convolutions before a head": (Convolutional, lambda: torch.randn(3, 3, 8, 8)),
    "transformer layers": (EncoderDecoder, lambda: torch.randn(5, 3, 12)),
    "transformer layers, norm first, batch first": (
        lambda: EncoderDecoder(norm_first=True, batch_first=True, activation="gelu"),
        lambda: torch.randn(3, 5, 12),
    ),
    "towers side by side": (Towers, lambda: torch.randn(7, 12)),
    "towers side by side, of sequences": (Towers, lambda: torch.randn(5, 4, 12)),
    "an lstm that reads two dropouts": (ReadByLSTM, lambda: torch.randn(7, 5, 12)),
    "sums of layers": (Sums, lambda: torch.randn(4, 5, 12)),
    "stacked": (Stacked, lambda: torch.randn(7, 12)),
    "stacked, of sequences": (Stacked, lambda: torch.randn(5, 4, 12)),
    "torchvision MLP": (lambda: MLP(12, [16, 20, 6], dropout=0.5), lambda: torch.randn(5, 12)),
    "torchvision MLPBlock": (lambda: MLPBlock(12, 24, 0.5), lambda: torch.randn(5, 3, 12)),
    "torchvision ViT": (
        lambda: VisionTransformer(16, 8, 2, 2, 16, 32, dropout=0.3, num_classes=5),
        lambda: torch.randn(3, 3, 16, 16),
    ),
    "lstm": (EmbeddedLSTM, lambda: words(7, 5)),
    "lstm, tied decoder": (lambda: EmbeddedLSTM(tied=True), lambda: words(7, 5)),
    "lstm, batch first": (lambda: EmbeddedLSTM(batch_first=True), lambda: words(5, 7)),
    "lstm, no bias": (lambda: EmbeddedLSTM(bias=False), lambda: words(4, 3)),
    "lstm, one step of one sample": (EmbeddedLSTM, lambda: words(1, 1)),
    "lstm, initial state": (lambda: with_state(EmbeddedLSTM(), 2, 5, 12), lambda: words(7, 5)),
    "lstm, no batch": (EmbeddedLSTM, lambda: words(7)),
    "lstm, no batch, initial state": (lambda: with_state(EmbeddedLSTM(), 2, 12), lambda: words(7)),
}

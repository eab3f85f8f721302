"""A small causal transformer language model built from stock layers, with conventional dropout."""

import math

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from approxdrop_lightning.application.models.language_model import LanguageModel


class TransformerLanguageModel(LanguageModel):
    """Word and position embeddings, PyTorch's pre-norm encoder layers with a causal mask, and a linear decoder.

    Dropout is applied where Vaswani et al. 2017 and GPT-2 apply it (to the sum of the embeddings and to the output
    of each attention and feed-forward block), where ``nn.TransformerEncoderLayer`` adds one (after the activation),
    and at the decoder's input, as in Zaremba et al. 2014. Initialisation follows GPT-2: normal with standard
    deviation .02, divided by the square root of the number of residual sums in layers that end in one.

    Batches are time-major pairs ``(inputs[T, B], targets[T, B])``; targets of -100 are ignored. Unlike the LSTM,
    the model carries no state from batch to batch, so the first words of a batch are predicted from little context.

    Args:
        vocab_size: vocabulary size V; must match the datamodule.
        hidden_size: width H of the embeddings and of every layer.
        num_layers: number of layers.
        num_heads: attention heads per layer; must divide ``hidden_size``.
        feedforward_size: width of the feed-forward blocks; None means four times ``hidden_size``.
        context: maximum length T of a batch.
        rate: dropout rate in [0, 1) in all places above.
        attention_rate: dropout rate in [0, 1) of the attention weights. These are not units, so nothing is skipped,
            and PyTorch's fused CPU attention does not support it.
        tie_weights: whether embedding and decoder share one matrix (Press and Wolf 2017).
        lr: peak learning rate of AdamW, reached after the warm-up; it then decays to zero along a cosine until the
            end of the Trainer's schedule.
        weight_decay: weight decay of the matrices; biases, norms and position embeddings have none.
        warmup_steps: number of steps over which the learning rate rises from zero.

    Raises:
        ValueError: if an argument is out of range, if a batch is longer than ``context``, and in ``setup`` if the
            datamodule's vocabulary size differs.
    """

    mask: Tensor

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        feedforward_size: int | None = None,
        context: int = 64,
        rate: float = 0.1,
        attention_rate: float = 0.0,
        tie_weights: bool = True,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 200,
    ) -> None:
        counts = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads, "context": context}
        if feedforward_size is not None:
            counts["feedforward_size"] = feedforward_size
        super().__init__(vocab_size, rate, **counts)
        if not 0 <= attention_rate < 1:
            raise ValueError(f"attention_rate {attention_rate} is outside [0, 1)")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads={num_heads}, got {hidden_size}")
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"warmup_steps must be a whole number of at least 0, got {warmup_steps!r}")
        for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(context, hidden_size)
        self.embedding_dropout = nn.Dropout(rate)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size,
                num_heads,
                4 * hidden_size if feedforward_size is None else feedforward_size,
                rate,
                activation="gelu",
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_dropout = nn.Dropout(rate)
        self.decoder = nn.Linear(hidden_size, vocab_size)
        self._initialise(attention_rate)
        if tie_weights:
            self.decoder.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(context, context, dtype=torch.bool).triu(1), persistent=False)

    def _initialise(self, attention_rate: float) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                ends_in_sum = name.endswith(("out_proj.weight", "linear2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.layers)) if ends_in_sum else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = attention_rate

    def forward(self, inputs: Tensor) -> Tensor:
        """Predict each next word.

        Args:
            inputs: word indices ``[T, B]``.

        Returns:
            Logits ``[T, B, V]``.
        """
        steps = inputs.size(0)
        if steps > len(self.mask):
            raise ValueError(f"a batch of {steps} steps is longer than context={len(self.mask)}")
        positions = self.positions.weight[:steps].unsqueeze(1)
        x = self.embedding_dropout(self.embedding(inputs) + positions)
        for layer in self.layers:
            x = layer(x, src_mask=self.mask[:steps, :steps], is_causal=True)
        return self.decoder(self.decoder_dropout(self.norm(x)))

    def logits(self, inputs: Tensor, stage: str) -> Tensor:
        """Logits ``[T, B, V]``, whatever the stage."""
        return self(inputs)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with linear warm-up and cosine decay."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            decays = parameter.dim() > 1 and not name.startswith("positions")
            (matrices if decays else others).append(parameter)
        groups = [
            {"params": matrices, "weight_decay": self.hparams["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], fused=self.fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        """Factor on ``lr`` in ``step``, counted from 0."""
        warmup = self.hparams["warmup_steps"]
        if step < max(1, warmup):
            return (step + 1) / max(1, warmup)
        # Not in configure_optimizers: there it would set the loader up too early, which would lose the position
        # of a resumed run.
        total = self.trainer.estimated_stepping_batches
        progress = (step - warmup) / max(1.0, total - warmup)
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2

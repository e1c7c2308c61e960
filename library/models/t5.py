"""T5 text encoders: transformers' encoder with the given tensors, its sizes from their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.layout_t5 import t5_config
from library.checkpoints.misfits import naming_file
from library.checkpoints.stored import fill_from_file
from library.checkpoints.tensors import shapes_of
from library.models.placement import a_tensor_of


class T5TextEncoder(nn.Module):
    """The encoder half of a T5 with transformers' module paths (`shared`, `encoder.block.…`) and one token table."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import T5EncoderModel

        inner: Any = T5EncoderModel(config)
        self.shared: nn.Embedding = inner.shared
        self.encoder = inner.encoder
        self.encoder.embed_tokens = nn.Module()  # the table is this module's; its states go in as `inputs_embeds`
        self.config = config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """transformers' output for ids [B,T]: `last_hidden_state` [B,T,d] after the final norm.

        `attention_mask` [B,T] hides padding where it is 0; without one padding is attended.
        """
        return self.encoder(inputs_embeds=self.shared(input_ids), attention_mask=attention_mask, **options)

    @property
    def device(self) -> torch.device:
        return a_tensor_of(self).device

    @property
    def dtype(self) -> torch.dtype:
        return a_tensor_of(self).dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding table."""
        return self.shared

    def gradient_checkpointing_enable(self, **_options: Any) -> None:
        """Recompute every block in the backward pass (only in train mode)."""
        choice = {"use_reentrant": False}
        if hasattr(self.encoder, "activation_checkpointing_enable"):
            self.encoder.activation_checkpointing_enable(choice)
        else:
            self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=choice)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        if hasattr(self.encoder, "activation_checkpointing_disable"):
            self.encoder.activation_checkpointing_disable()
        else:
            self.encoder.gradient_checkpointing_disable()


def build_t5(
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    component: str = "T5 encoder",
) -> T5TextEncoder:
    """A T5 encoder with the given tensors (`layout_t5.encoder_tensors`); its sizes come from their shapes.

    Raises ValueError unless keys and shapes fit exactly.
    """
    from transformers import T5Config

    # Fused attention rounds the (large) position biases differently by 2e-5. Without dropout, so that an encoder that
    # is in train mode for the sake of gradient checkpointing says what it says otherwise.
    with naming_file(tensors), torch.device("meta"):
        config = T5Config(**t5_config(shapes_of(tensors)), attn_implementation="eager", dropout_rate=0.0)
        encoder = T5TextEncoder(config)
    fill_from_file(encoder, tensors, component=component, dtype=dtype, device=device)
    return encoder.eval().requires_grad_(False)

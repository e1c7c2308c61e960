"""CLIP text encoders with one set of module paths (`text_model.…`) for every transformers release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.layout_clip import clip_config
from library.checkpoints.misfits import naming_file
from library.checkpoints.stored import fill_from_file
from library.checkpoints.tensors import shapes_of
from library.models.placement import a_tensor_of


class ClipTextEncoder(nn.Module):
    """A transformers CLIP text model below the attribute `text_model`, optionally with its projection.

    transformers 5.6 dropped the `text_model` level; LoRA keys, checkpoint keys and third-party networks rely on it.
    """

    def __init__(self, config: Any, *, with_projection: bool = False) -> None:
        super().__init__()
        from transformers import CLIPTextModel

        inner = CLIPTextModel(config)
        self.text_model = getattr(inner, "text_model", inner)
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if with_projection else None
        )
        self.config = config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """transformers' output for ids [B,T]: `last_hidden_state` [B,T,d] (after the final norm), `pooler_output`,
        and with `output_hidden_states=True` all `hidden_states` (the last one before the final norm)."""
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask, **options)

    @property
    def device(self) -> torch.device:
        return a_tensor_of(self).device

    @property
    def dtype(self) -> torch.dtype:
        return a_tensor_of(self).dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding table."""
        return self.text_model.embeddings.token_embedding

    def resize_token_embeddings(self, count: int) -> nn.Embedding:
        """Makes the token table `count` rows long; new rows are zero until somebody fills them."""
        old = self.get_input_embeddings()
        new = nn.Embedding(count, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        rows = min(count, old.num_embeddings)
        with torch.no_grad():
            new.weight.zero_()
            new.weight[:rows] = old.weight[:rows]
        new.weight.requires_grad_(old.weight.requires_grad)
        self.text_model.embeddings.token_embedding = new
        self.config.vocab_size = count
        return new

    def gradient_checkpointing_enable(self, **_options: Any) -> None:
        """Recompute every layer in the backward pass (only in train mode)."""
        choice = {"use_reentrant": False}
        if hasattr(self.text_model, "activation_checkpointing_enable"):
            self.text_model.activation_checkpointing_enable(choice)
        else:
            self.text_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=choice)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        if hasattr(self.text_model, "activation_checkpointing_disable"):
            self.text_model.activation_checkpointing_disable()
        else:
            self.text_model.gradient_checkpointing_disable()


def build_clip(
    tensors: Mapping[str, Tensor],
    *,
    activation: str,
    component: str,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    overrides: Mapping[str, Any] | None = None,
) -> ClipTextEncoder:
    """A CLIP text encoder with the given tensors (`text_model.…` names); its sizes come from their shapes.

    It has a projection if the tensors have one. `overrides` are config values that shapes cannot tell (a folder's
    config.json). Raises ValueError unless keys and shapes fit exactly.
    """
    from transformers import CLIPTextConfig

    shapes = shapes_of(tensors)
    if "text_model.encoder.layers.0.mlp.fc1.weight" not in shapes:
        source = getattr(tensors, "source", "the given tensors")
        found = ", ".join(list(shapes)[:10]) or "nothing"
        raise ValueError(f"{source}: no {component} found (keys: {found}).")
    with naming_file(tensors), torch.device("meta"):
        config = CLIPTextConfig(**{**clip_config(shapes, activation=activation), **(overrides or {})})
        encoder = ClipTextEncoder(config, with_projection="text_projection.weight" in shapes)
    rebuild_position_ids(encoder.text_model, device)
    fill_from_file(encoder, tensors, component=component, dtype=dtype, device=device)
    return encoder.eval().requires_grad_(False)


def rebuild_position_ids(text_model: nn.Module, device: torch.device | str) -> None:
    """Gives the embeddings their position buffer, which no file holds."""
    embeddings: Any = text_model.embeddings
    count = embeddings.position_embedding.weight.shape[0]
    embeddings._buffers["position_ids"] = torch.arange(count, device=device)[None]


def first_end_positions(input_ids: Tensor, end_id: int) -> Tensor:
    """For ids [B,T] the position of the first end token [B]; 0 where there is none."""
    return (input_ids == end_id).to(torch.int64).argmax(dim=-1)



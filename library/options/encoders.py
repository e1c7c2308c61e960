"""Options for text encoders that come in files of their own, and how their output is used."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class TextEncoderOptions:
    clip_l: str | None = option("CLIP-L file (default: the one inside the model file)")
    clip_g: str | None = option("CLIP-G file (default: the one inside the model file)")
    t5xxl: str | None = option("T5-XXL file (default: the one inside the model file)")
    t5xxl_max_token_length: int | None = option(
        "T5 tokens per caption (default: what fits the model)", type="int", off=(0,)
    )
    apply_lg_attn_mask: bool = flag("hide padding tokens from CLIP-L and CLIP-G")
    apply_t5_attn_mask: bool = flag("hide padding tokens from T5, and where the model can do it from the model too")
    clip_l_dropout_rate: float = option("chance that a sample's CLIP-L output is emptied", 0.0, type="float")
    clip_g_dropout_rate: float = option("chance that a sample's CLIP-G output is emptied", 0.0, type="float")
    t5_dropout_rate: float = option("chance that a sample's T5 output is emptied", 0.0, type="float")
    t5xxl_device: str | None = option("device of T5-XXL; old option, the device is chosen by itself")
    t5xxl_dtype: str | None = option("number format of T5-XXL; old option, the mixed precision decides")
    save_clip: bool = flag("old option; text encoders are saved when they are trained")
    save_t5xxl: bool = flag("old option; T5-XXL is saved when it is trained")

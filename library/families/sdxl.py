"""SDXL: two CLIP text encoders, a pooled text vector and picture sizes beside the context, its own U-Net."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from library.data.records import LatentSpec, TextCacheSpec
from library.families.autoencoder_family import attention_kind, compute_dtype
from library.families.base import Conditioning, ControlNet, EmbeddingTable, SizeConditioning, Tokenize, cached_parts
from library.families.unet_family import UNetFamily
from library.models.placement import a_tensor_of
from library.sampling_spec import SamplingDefaults
from library.text import clip, prompt_weights
from library.text.chunking import CHUNK, WINDOW, chunk_count, join, splice
from library.text.clip import ClipTokenizer, PromptStyle

HIDDEN_ARRAYS = ("hidden_state1", "hidden_state2")
POOLED_ARRAY = "pool2"


class SdxlTokenize:
    """Captions -> {"input_ids1", "input_ids2"}: int64 [B,n,77], one per encoder; picklable.

    With `weighted` captions hold prompt weights, which come as {"weights1", "weights2"}: float32 [B,n,77].
    """

    def __init__(
        self, tokenizers: Sequence[ClipTokenizer], max_token_length: int | None, *, weighted: bool = False
    ) -> None:
        self.tokenizers = tuple(tokenizers)
        self.max_token_length = max_token_length
        self.weighted = weighted

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        tokens: dict[str, Tensor] = {}
        for number, tokenizer in enumerate(self.tokenizers, start=1):
            if self.weighted:
                ids, weights = tokenizer.weighted_windows(captions, self.max_token_length)
                tokens |= {f"input_ids{number}": ids, f"weights{number}": weights}
            else:
                tokens[f"input_ids{number}"] = tokenizer.windows(captions, self.max_token_length)
        return tokens


class StableDiffusionXL(UNetFamily):
    """SDXL and its distilled relatives. Conditioning: {"context": [B,S,d1+d2], "pooled": [B,p]}."""

    latent = LatentSpec(4, 8, 32, 0.13025, 0.0, "_sdxl.npz")
    text_encoder_names = ("text_encoder1", "text_encoder2")
    without_effect = MappingProxyType({"clip_skip": "SDXL always uses the last but one layer of its text encoders."})
    sampling_defaults = SamplingDefaults(width=1024, height=1024)
    uses_sizes = True

    # --- loading -------------------------------------------------------------------------------------------
    def check_options(self) -> list[str]:
        """Problems with the options that concern this family."""
        return ["--v2 is for Stable Diffusion 2.x; leave it out for SDXL."] if self.options.model.v2 else []

    def load(self, *, weight_dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device | str) -> None:
        """Reads the model of `--pretrained_model_name_or_path` (and `--vae`); checks that the tokenizers fit."""
        from library.sdxl_model_util import LoadSpec, load_model

        model = self.options.model
        self.modules = load_model(
            LoadSpec(
                path=str(model.pretrained_model_name_or_path), dtype=weight_dtype, vae_dtype=vae_dtype, device=device,
                vae=model.vae, option=self.model_option, parts=self.parts,
            )
        )
        self.denoiser, self.vae = self.modules.unet, self.modules.vae
        self.text_encoders = [self.modules.text_encoder1, self.modules.text_encoder2]
        self._finish_loading(self.modules.source, self.modules.recorded)

    # --- text ----------------------------------------------------------------------------------------------
    @cached_property
    def tokenizers(self) -> list[ClipTokenizer]:
        """CLIP-L's and bigG's; found without reading the model."""
        model = self.options.model
        return [
            clip.load_tokenizer(
                source, model_path=model.pretrained_model_name_or_path, cache_dir=model.tokenizer_cache_dir
            )
            for source in (clip.CLIP_L, clip.CLIP_G)
        ]

    @property
    def tokenize(self) -> Tokenize:
        """Captions -> {"input_ids1", "input_ids2"} [B,n,77], with `--weighted_captions` their weights too."""
        options = self.options
        weighted = options.dataset.weighted_captions
        return SdxlTokenize(self.tokenizers, options.model.max_token_length, weighted=weighted)

    def encode_text(self, tokens: Mapping[str, Tensor], cached: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Token windows [B,n,77] -> {"context": [B,S,d1+d2], "pooled": [B,p]}, S = 77 or 75n+2.

        The parts of encoders that have been released are taken from `cached`.
        """
        names = {0: HIDDEN_ARRAYS[:1], 1: (HIDDEN_ARRAYS[1], POOLED_ARRAY)}
        parts: list[Tensor] = []
        for index, encoder in enumerate(self.text_encoders):
            if encoder is None:
                weight = a_tensor_of(self.denoiser)
                dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.float32
                parts += cached_parts(cached, *names[index], device=weight.device, dtype=dtype)
            else:
                parts += self._encode(index, tokens)
        return _conditioning(*parts)

    def _encode(self, index: int, tokens: Mapping[str, Tensor]) -> list[Tensor]:
        """What encoder `index` makes of its tokens: spliced states [B,S,d], and the second one's pooled text [B,p]."""
        ids, weights = tokens[f"input_ids{index + 1}"], tokens.get(f"weights{index + 1}")
        encoder, chunks = self.encoder(index), ids.shape[1]
        inner, last = clip.encode_inner(encoder, ids)
        hidden = splice(inner, chunks)
        if weights is not None:
            hidden = prompt_weights.multiply(hidden, splice(weights, chunks))
        return [hidden, self._pooled(last, ids)] if index == 1 else [hidden]

    def _pooled(self, last: Tensor, ids: Tensor) -> Tensor:
        return clip.pooled_text(self.encoder(1), last, ids, self.tokenizers[1].special.end)

    def encode_weighted_captions(self, captions: Sequence[str]) -> Conditioning:
        """Captions with prompt weights -> as `encode_text`; hidden states times weights, pooled text without."""
        tokenize = SdxlTokenize(self.tokenizers, self.options.model.max_token_length, weighted=True)
        return self.encode_text(tokenize(captions))

    def encode_prompts(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        *,
        clip_skip: int | None = None,
        style: PromptStyle | None = None,
        second_prompts: Sequence[str] | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """(positive, negative) conditioning: contexts [B,S,d1+d2] of one length, pooled texts [B,p].

        Without a style prompts are read like weighted captions in training; with one S = 77n, n windows for the
        longest prompt, `clip_skip` counts the layer from the end (default 2), and `second_prompts` are what the second
        encoder reads in place of `prompts`.
        """
        both = [*prompts, *negative_prompts]
        if style is None:
            encoded = self.encode_weighted_captions(both)
        else:
            second = [*(second_prompts or prompts), *negative_prompts]
            encoded = self._encode_styled((both, second), style, clip_skip)
        rows = torch.arange(len(both))
        return encoded.select(rows[: len(prompts)]), encoded.select(rows[len(prompts) :])

    def _encode_styled(
        self, prompts: tuple[Sequence[str], Sequence[str]], style: PromptStyle, clip_skip: int | None
    ) -> Conditioning:
        """One list of prompts per encoder -> conditioning with as many windows as the longest of all prompts needs."""
        pairs = list(zip(self.tokenizers, prompts, strict=True))
        windows = [clip.tokenize_prompts(tokenizer, texts, style) for tokenizer, texts in pairs]
        chunks = max(ids.shape[1] for ids, _ in windows)
        hidden: list[Tensor] = []
        for index, (ids, weights) in enumerate(windows):
            if ids.shape[1] < chunks:
                ids, weights = clip.tokenize_prompts(*pairs[index], style, least_chunks=chunks)
            inner, last = clip.encode_inner(self.encoder(index), ids, clip_skip=clip_skip)
            hidden.append(prompt_weights.emphasize(join(inner, chunks), weights.flatten(1), style.emphasis))
        return _conditioning(hidden[0], hidden[1], self._pooled(last, ids))

    # --- cached text ---------------------------------------------------------------------------------------
    @property
    def text_cache(self) -> TextCacheSpec:
        """Both encoders' states and the pooled text, beside the images."""
        chunks = chunk_count(self.options.model.max_token_length)
        length = WINDOW if chunks == 1 else chunks * CHUNK + 2
        return TextCacheSpec(
            "_te_outputs.npz", (*HIDDEN_ARRAYS, POOLED_ARRAY), lengths=dict.fromkeys(HIDDEN_ARRAYS, length)
        )

    def encode_text_for_cache(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"hidden_state1": [B,S,d1], "hidden_state2": [B,S,d2], "pool2": [B,p]}, weighted if the tokens are."""
        [hidden1], [hidden2, pooled] = self._encode(0, tokens), self._encode(1, tokens)
        return dict(zip((*HIDDEN_ARRAYS, POOLED_ARRAY), (hidden1, hidden2, pooled), strict=True))

    def cached_text_encoders(self, trained: Sequence[bool]) -> list[bool]:
        """All of them. Raises ValueError when one is trained."""
        if any(trained):
            raise ValueError(
                "--cache_text_encoder_outputs cannot be combined with training a text encoder: cached outputs never "
                "change. Train the U-Net alone (networks: --network_train_unet_only; full training: without "
                "--train_text_encoder), or leave the caching out."
            )
        return [True] * len(trained)

    @property
    def text_identity(self) -> str:
        """What text caches remember of the encoders, and whether captions were read with prompt weights."""
        return super().text_identity + ("-weighted" if self.options.dataset.weighted_captions else "")

    def embedding_tables(self) -> list[EmbeddingTable]:
        """Both encoders', under the names that embedding files use."""
        encoders = getattr(self, "text_encoders", [None, None])
        return [
            EmbeddingTable(name, tokenizer, encoder)
            for name, tokenizer, encoder in zip(("clip_l", "clip_g"), self.tokenizers, encoders, strict=True)
        ]

    # --- denoising -----------------------------------------------------------------------------------------
    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: SizeConditioning | None = None,
        *,
        residuals: tuple[Sequence[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Noise or velocity [B,4,h,w]; sizes are needed. `residuals`: a ControlNet's, one per skip and the middle's."""
        inputs = self.denoiser_inputs(x_t, timesteps, conditioning, sizes)
        if residuals is not None:
            dtype = inputs["x"].dtype
            residuals = [residual.to(dtype) for residual in residuals[0]], residuals[1].to(dtype)
        return self.denoiser(**inputs, residuals=residuals)

    def denoiser_inputs(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None
    ) -> dict[str, Tensor]:
        """Noisy latents [B,4,h,w] and conditioning as the U-Net, or a ControlNet of it, takes them."""
        from library.models.unet_sdxl import vector_conditioning

        if sizes is None:
            raise ValueError("SDXL's U-Net is conditioned on picture sizes, and none were given.")
        dtype = compute_dtype(self.denoiser, x_t)
        numbers = torch.cat([sizes.original_hw, sizes.crop_top_left, sizes.target_hw], dim=1)
        pooled = conditioning["pooled"].to(dtype)
        y = vector_conditioning(pooled, numbers.to(pooled.device), self.denoiser.config.vector_width)
        context = conditioning["context"].to(dtype)
        return {"x": x_t.to(dtype), "timesteps": timesteps.float(), "context": context, "y": y}

    def make_control_net(self, path: str | None) -> ControlNet:
        """A ControlNet for this U-Net."""
        from library.families.control_nets import sdxl_control_net

        return sdxl_control_net(self.denoiser, self.denoiser_inputs, path, attention_kind(self.options))

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Input blocks, middle, output blocks of the U-Net."""
        unet = self.denoiser
        blocks = [(f"input_blocks.{i}", block) for i, block in enumerate(unet.input_blocks)]
        blocks += [("middle_block", unet.middle_block)] if len(unet.middle_block) else []
        return blocks + [(f"output_blocks.{i}", block) for i, block in enumerate(unet.output_blocks)]

    def block_learning_rate_groups(self) -> list[tuple[str, list[nn.Parameter]]]:
        """Embeddings, every input block, the middle's layers, every output block, the end: 23 for SDXL itself."""
        return [(f"block{i}", parameters) for i, parameters in enumerate(self._block_parameters())]

    def _block_parameters(self) -> Iterator[list[nn.Parameter]]:
        unet = self.denoiser
        yield [*unet.time_embed.parameters(), *unet.label_emb.parameters()]
        for block in (*unet.input_blocks, *unet.middle_block, *unet.output_blocks, unet.out):
            yield list(block.parameters())

    def unused_text_encoder_parameters(self, index: int) -> list[nn.Parameter]:
        """The first encoder's last layer and final norm; everything of the second one has a part in the pooled text."""
        if index != 0:
            return []
        model = self.encoder(0).text_model
        return [*model.encoder.layers[-1].parameters(), *model.final_layer_norm.parameters()]

    # --- saving --------------------------------------------------------------------------------------------
    def _save_file(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int]
    ) -> None:
        from library.sdxl_model_util import save_checkpoint

        save_checkpoint(path, self.modules, dtype=dtype, metadata=metadata, counters=counters)

    def _save_folder(self, path: Path, *, dtype: torch.dtype | None, use_safetensors: bool) -> None:
        from library.sdxl_model_util import save_diffusers_folder

        first, second = self.tokenizers
        save_diffusers_folder(
            path, self.modules, v_parameterization=self.options.model.v_parameterization, dtype=dtype,
            use_safetensors=use_safetensors, tokenizers=(first, second),
        )  # fmt: skip

    def model_metadata(self) -> dict[str, object]:
        """Base version, architecture, default resolution and prediction type."""
        from library.sdxl_model_util import model_metadata

        return model_metadata(v_parameterization=self.options.model.v_parameterization)


def _conditioning(hidden1: Tensor, hidden2: Tensor, pooled: Tensor) -> Conditioning:
    return Conditioning({"context": torch.cat([hidden1, hidden2.to(hidden1)], dim=-1), "pooled": pooled})

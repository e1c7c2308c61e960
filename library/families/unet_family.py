"""What the families with a U-Net and a 4-channel VAE have in common: noise prediction, latents, attention, files."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from library.families.autoencoder_family import AutoencoderFamily, attention_kind
from library.model_files import TEXT, RecordedNoise, recorded_noise
from library.objectives import DdpmConfig, DdpmObjective
from library.sampling_spec import SamplingDefaults, SamplingSpec
from library.schedulers import scaled_linear_schedule
from library.text.clip import ClipTokenizer

logger = logging.getLogger(__name__)


class UNetFamily(AutoencoderFamily):
    """A DDPM model: after `load` `denoiser` is a U-Net, `vae` an AutoencoderKL, both with the attention asked for."""

    text_encoders: list[Any]  # ClipTextEncoder, or None
    modules: Any  # what the family's model_util loaded, with `source` and `is_single_file`
    layouts = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")
    sampling_defaults = SamplingDefaults()
    uses_sizes = False  # whether the U-Net is conditioned on sizes and crops
    noise_on_cpu = False  # whether starting noise for drawing comes from the CPU, in float32
    follows_model = False  # whether what the model says of its noise holds where no option says it (drawing)
    _recorded: RecordedNoise | None = None

    # --- loading -------------------------------------------------------------------------------------------
    def _finish_loading(self, source: Path, recorded: RecordedNoise) -> None:
        """What follows when all modules are there: checks, a warning, the choice of attention."""
        from library.models.layers import set_attention

        input_channels = self.latent.channels if self.denoiser is None else self.denoiser.config.in_channels
        if input_channels != self.latent.channels:
            raise ValueError(
                f"{self.model_option} {source}: the U-Net has {input_channels} input channels (an inpainting or "
                f"upscaling model?); only models with {self.latent.channels} work here."
            )
        if TEXT in self.parts:
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
                tokenizer.check_fits(encoder, str(source))
        self._recorded = recorded
        self._tell_about_noise(source, recorded)
        set_attention(self.denoiser, self.vae, attention_kind(self.options))

    @property
    def recorded(self) -> RecordedNoise:
        """What the model says of its noise; before it is loaded only what can be told without reading all of it."""
        if self._recorded is None:
            return recorded_noise(Path(str(self.options.model.pretrained_model_name_or_path)))
        return self._recorded

    @property
    def predicts_velocity(self) -> bool:
        """Whether images are drawn with v-prediction: as the option says, else as the model does."""
        is_told = self.options.model.v_parameterization
        return is_told or (self.follows_model and self.recorded.prediction_type == "v")

    def _tell_about_noise(self, source: Path, recorded: RecordedNoise) -> None:
        """Warn where options contradict what the model says; what drawing takes from it is only told."""
        wanted, found = "v" if self.options.model.v_parameterization else "epsilon", recorded.prediction_type
        has_no_snr = recorded.has_zero_terminal_snr and not self.options.noise.zero_terminal_snr
        if self.follows_model and wanted == "epsilon" and found == "v":
            snr = " with zero terminal SNR" if recorded.has_zero_terminal_snr else ""
            logger.info("%s says that it predicts v%s: drawn accordingly", source, snr)
            return
        if found and found != wanted:
            advice = "remove --v_parameterization" if wanted == "v" else "add --v_parameterization"
            logger.warning("%s says that it predicts %s: %s?", source, found, advice)
        if has_no_snr and not self.follows_model:
            logger.warning("%s says that its noise has zero terminal SNR: add --zero_terminal_snr?", source)

    @property
    @abstractmethod
    def tokenizers(self) -> list[ClipTokenizer]:
        """One per text encoder; found without reading the model."""

    def encoder(self, index: int) -> Any:
        """The text encoder `index`. Raises RuntimeError when it has been released."""
        if self.text_encoders[index] is None:
            raise RuntimeError("the text encoder has been released")
        return self.text_encoders[index]

    # --- denoising -----------------------------------------------------------------------------------------
    def make_objective(self) -> DdpmObjective:
        """Noise prediction, or velocity prediction with `--v_parameterization`."""
        options = self.options
        return DdpmObjective(
            DdpmConfig.from_options(options.noise, options.loss, v_parameterization=options.model.v_parameterization)
        )

    def sampling_spec(self) -> SamplingSpec:
        """The DDPM table that training uses, zero terminal SNR included; see `follows_model`."""
        schedule, is_velocity = self.make_objective().schedule, self.predicts_velocity
        if self.follows_model and is_velocity and self.recorded.has_zero_terminal_snr:
            schedule = scaled_linear_schedule(zero_terminal_snr=True)
        return SamplingSpec(
            betas=schedule.betas,
            prediction_type="v_prediction" if is_velocity else "epsilon",
            defaults=self.sampling_defaults,
            uses_sizes=self.uses_sizes,
            noise_on_cpu=self.noise_on_cpu,
        )

    # --- saving --------------------------------------------------------------------------------------------
    @property
    def default_layout(self) -> str:
        """That of the source: a file, or a Diffusers folder."""
        return "ckpt" if self.modules.is_single_file else "diffusers"

    def save(
        self,
        path: Path,
        *,
        layout: str,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        counters: tuple[int, int] = (0, 0),
    ) -> None:
        """A single file (layout "safetensors", "ckpt") or a folder ("diffusers", "diffusers_safetensors").

        `counters` = (epochs, steps) of this run; only pickles hold them.
        """
        if layout in ("safetensors", "ckpt"):
            self._save_file(path, dtype=dtype, metadata=metadata, counters=counters)
        elif layout in ("diffusers", "diffusers_safetensors"):
            self._save_folder(path, dtype=dtype, use_safetensors=layout == "diffusers_safetensors")
        else:
            raise ValueError(f"layout {layout!r}: allowed are safetensors, ckpt, diffusers, diffusers_safetensors.")

    @abstractmethod
    def _save_file(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int]
    ) -> None:
        """Write the single file."""

    @abstractmethod
    def _save_folder(self, path: Path, *, dtype: torch.dtype | None, use_safetensors: bool) -> None:
        """Write the Diffusers folder."""

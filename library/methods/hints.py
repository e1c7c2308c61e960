"""What training with hint pictures has in common: where the hints of a step and of a sample image come from."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from torch import Tensor

from library.data.records import Batch
from library.families.base import Conditioning, SizeConditioning
from library.generation.engine import Predict
from library.generation.pictures import load_picture
from library.generation.request import ImageRequest
from library.methods.base import Placement, TrainingMethod, size_conditioning


class HintedTraining(TrainingMethod):
    """Trains something that reads a picture beside the prompt; the model and its text encoders stay as they are."""

    def check_options(self) -> list[str]:
        """Nothing to say: what scripts with hints cannot do, they do not offer."""
        return []

    # --- set-up --------------------------------------------------------------------------------------------
    def place_denoiser(self, placement: Placement) -> None:
        """The frozen model on its device; in train mode only where activations are recomputed."""
        checkpointing = self.options.training.gradient_checkpointing  # only works in train mode
        if checkpointing:
            self.family.enable_gradient_checkpointing()
        self.family.denoiser.to(placement.device).train(checkpointing)

    # --- the step ------------------------------------------------------------------------------------------
    @abstractmethod
    def predict_with_hint(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning, hint: Tensor
    ) -> Tensor:
        """Raw prediction [B,C,h,w] for hints [B,3,H,W] in [-1,1]."""

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
        """Raw prediction [B,C,h,w] with the batch's hints. Raises ValueError if it has none."""
        hint = batch.conditioning_images
        if hint is None:
            raise ValueError(
                "The dataset has no conditioning images: every subset needs conditioning_data_dir, a folder with one "
                "control image per training image (--conditioning_data_dir without a dataset file)."
            )
        return self.predict_with_hint(x_t, timesteps, conditioning, size_conditioning(batch), hint)

    def predict_for(self, request: ImageRequest) -> Predict:
        """The prediction with the prompt's control image. Raises ValueError if the prompt names none."""
        if request.controlnet_image is None:
            raise ValueError("there is no control image: add --cn FILE to the prompt")
        picture = _checked_picture(request.controlnet_image, (request.width, request.height))

        def predict(x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning) -> Tensor:
            hint = picture.to(x_t.device).expand(len(x_t), -1, -1, -1)
            return self.predict_with_hint(x_t, timesteps, conditioning, sizes, hint)

        return predict

    # --- saving --------------------------------------------------------------------------------------------
    @property
    def save_form(self) -> str:
        """`--save_model_as`."""
        return self.options.saving.save_model_as or "safetensors"

    @property
    def file_extension(self) -> str:
        """Of `--save_model_as`; folders have none."""
        return "" if self.save_form.startswith("diffusers") else f".{self.save_form}"


def _checked_picture(path: Path, size: tuple[int, int]) -> Tensor:
    if not path.is_file():
        raise ValueError(f"--cn {path}: there is no such file")
    return load_picture(path, size)

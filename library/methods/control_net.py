"""ControlNet training: a side network beside a frozen model learns to follow hint pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.data.records import Batch
from library.families.base import Conditioning, ControlNet, SizeConditioning
from library.methods.base import LossRecipe, ParameterGroup, Placement, size_conditioning
from library.methods.hints import HintedTraining
from library.saving import write_model_folder


class ControlNetTraining(HintedTraining):
    """Trains the parameters of the family's ControlNet."""

    tracker_name = "controlnet_train"

    control_net: ControlNet

    def check_options(self) -> list[str]:
        """The ControlNet to start from exists, or may be a name on the hub."""
        path = self._path
        if path is None or Path(path).exists() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            return []
        return [f"--controlnet_model_name_or_path {path}: no such file or folder."]

    @property
    def _path(self) -> str | None:
        chosen = self.options.control_net
        return chosen.controlnet_model_path or chosen.controlnet_model_name_or_path

    def attach(self, placement: Placement) -> list[ParameterGroup]:
        """Make the ControlNet (or load it), place everything."""
        self.control_net = self.family.make_control_net(self._path)
        self.control_net.to(placement.device, placement.trained_dtype).requires_grad_(True).train()
        for parameter in self.control_net.unused_parameters():
            parameter.requires_grad_(False)
        self.place_denoiser(placement)
        if self.options.training.gradient_checkpointing:
            self.control_net.enable_gradient_checkpointing()
        self.trainable = nn.ModuleDict({"control_net": self.control_net})
        self.recipe = LossRecipe.from_options(self.options, self.family)
        return self._groups()

    def _groups(self) -> list[ParameterGroup]:
        """What the base model does not have, with `--control_net_lr` where there is such an option, and the rest."""
        added = self.control_net.added_parameters()
        known = {id(parameter) for parameter in added}
        rest = [parameter for parameter in self.trained_parameters() if id(parameter) not in known]
        groups = [ParameterGroup("control_net", rest)]
        if added:
            groups.insert(0, ParameterGroup("added_layers", added, self.options.control_net.control_net_lr))
        return groups

    def trained_parameters(self) -> list[nn.Parameter]:
        """The ControlNet's parameters."""
        return [parameter for parameter in self.control_net.parameters() if parameter.requires_grad]

    # --- the step ------------------------------------------------------------------------------------------
    def predict_with_hint(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning, hint: Tensor
    ) -> Tensor:
        """The frozen model's prediction with the ControlNet's residuals."""
        residuals = self.control_net.residuals(x_t, timesteps, conditioning, sizes, hint)
        return self.family.predict(x_t, timesteps, conditioning, sizes, residuals=residuals)

    def base_prediction(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
        """The frozen model's own prediction."""
        return self.family.predict(x_t, timesteps, conditioning, size_conditioning(batch))

    # --- saving --------------------------------------------------------------------------------------------
    def save(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int] = (0, 0)
    ) -> None:
        """The ControlNet alone, in the form of `--save_model_as`; a folder appears only when it is complete."""

        def write(place: Path) -> None:
            self.control_net.save(place, layout=self.save_form, dtype=dtype, metadata=metadata)

        if self.file_extension:
            write(path)
        else:
            write_model_folder(path, write)

    def metadata(self) -> dict[str, Any]:
        """ControlNets are `<architecture>/controlnet`."""
        return {"model_type": "controlnet"}

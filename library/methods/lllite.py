"""ControlNet-LLLite training: small modules in a frozen denoiser learn to follow hint pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.data.records import Batch
from library.families.base import Conditioning, SizeConditioning
from library.methods.base import LossRecipe, ParameterGroup, Placement, size_conditioning
from library.methods.hints import HintedTraining
from networks.control_net_lllite import ControlNetLLLite, check_sizes

COND_EMB_DIM, MLP_DIM = 32, 64


class LLLiteTraining(HintedTraining):
    """Trains a `ControlNetLLLite` in the family's denoiser."""

    tracker_name = "lllite_control_net_train"

    network: ControlNetLLLite

    def check_options(self) -> list[str]:
        """Sizes are possible; weights to start from exist; the modules' weights share the denoiser's dtype."""
        device, weights, problems = self.options.device, self.options.network.network_weights, []
        try:
            check_sizes(*self._sizes)
        except ValueError as error:
            problems.append(str(error))
        if weights and not Path(weights).is_file():
            problems.append(f"--network_weights {weights}: no such file.")
        if device.mixed_precision == "fp16" and not device.full_fp16:
            problems.append(
                "--mixed_precision fp16 needs --full_fp16 here: ControlNet-LLLite is trained in the dtype of the model "
                "and float16 gradients cannot be scaled back otherwise. Add it, or use --mixed_precision bf16."
            )
        return problems

    @property
    def _sizes(self) -> tuple[int, int, float | None]:
        """`--cond_emb_dim`, `--network_dim`, `--network_dropout`."""
        embedding, chosen = self.options.control_net.cond_emb_dim, self.options.network
        return (
            COND_EMB_DIM if embedding is None else embedding,
            MLP_DIM if chosen.network_dim is None else chosen.network_dim,
            chosen.network_dropout,
        )

    def attach(self, placement: Placement) -> list[ParameterGroup]:
        """Hook the modules in, read `--network_weights`, place everything."""
        self.network = ControlNetLLLite(self.family.denoiser, *self._sizes)
        if self.options.network.network_weights:
            self.network.load_weights(self.options.network.network_weights)
        self.network.apply_to()
        self.network.to(placement.device, placement.weight_dtype).train()
        self.place_denoiser(placement)
        self.trainable = nn.ModuleDict({"network": self.network})
        self.recipe = LossRecipe.from_options(self.options, self.family)
        return [ParameterGroup("lllite", self.trained_parameters())]

    def trained_parameters(self) -> list[nn.Parameter]:
        """The modules' parameters."""
        return list(self.network.parameters())

    # --- the step ------------------------------------------------------------------------------------------
    def predict_with_hint(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning, hint: Tensor
    ) -> Tensor:
        """The prediction of the denoiser with its modules; they keep the hint for a backward pass that recomputes."""
        self.network.set_cond_image(hint)
        return self.family.predict(x_t, timesteps, conditioning, sizes)

    def base_prediction(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
        """The frozen model's own prediction."""
        self.network.set_multiplier(0.0)
        try:
            return self.family.predict(x_t, timesteps, conditioning, size_conditioning(batch))
        finally:
            self.network.set_multiplier(1.0)

    # --- saving --------------------------------------------------------------------------------------------
    def save(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int] = (0, 0)
    ) -> None:
        """The modules alone."""
        self.network.save_weights(path, dtype, metadata)

    def metadata(self) -> dict[str, Any]:
        """`<architecture>/control-net-lllite`."""
        return {"model_type": "control-net-lllite"}

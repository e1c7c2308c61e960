"""Network training: LoRA and every other module that hooks into a frozen model (`--network_module`)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.data.records import Batch
from library.families.base import Conditioning
from library.methods.base import LossRecipe, ParameterGroup, Placement, TrainingMethod
from library.options import read_only_namespace
from networks import contract

logger = logging.getLogger(__name__)


class NetworkTraining(TrainingMethod):
    """Trains the parameters of a network module; the model itself stays as it is."""

    tracker_name = "network_train"
    writes_training_metadata = True

    network: contract.Network

    # --- before anything is loaded -------------------------------------------------------------------------
    def check_options(self) -> list[str]:
        """The network arguments can be read, and the module can be imported."""
        try:
            contract.parse_network_args(self.options.network.network_args)
            contract.import_network_module(self.options.network.network_module)
        except (ValueError, ImportError) as error:
            return [str(error)]
        return []

    def trained_text_encoders(self) -> list[bool]:
        """All but those that wait for a network argument `train_<name>=True`."""
        chosen = self.options.network
        arguments = contract.parse_network_args(chosen.network_args)
        if chosen.network_train_unet_only:
            return [False] * len(self.family.text_encoder_names)
        return [
            name not in self.family.opt_in_text_encoders or arguments.get(f"train_{name}", "").lower() in ("true", "1")
            for name in self.family.text_encoder_names
        ]

    # --- set-up --------------------------------------------------------------------------------------------
    def before_caching(self, placement: Placement) -> None:
        """Merge `--base_weights` into the model, so that caches already see them."""
        chosen = self.options.network
        multipliers = list(chosen.base_weights_multiplier or ())
        for index, path in enumerate(chosen.base_weights or ()):
            multiplier = multipliers[index] if index < len(multipliers) else 1.0
            logger.info("merging base weights %s with multiplier %s", path, multiplier)
            contract.merge_base_weights(
                chosen.network_module, path, multiplier, self._models(), dtype=placement.weight_dtype,
                device=placement.device if self.options.training.lowram else "cpu",
            )

    @property
    def bucket_step(self) -> int:
        """At least 32, also for models that could be trained with finer steps."""
        return max(32, self.family.latent.bucket_step)

    def attach(self, placement: Placement) -> list[ParameterGroup]:
        """Create the network, hook it into the model, place everything."""
        options, family = self.options, self.family
        chosen = options.network
        self.network = contract.create(self._request(), self._models())
        self._disable_unsupported_options()
        contract.prepare(self.network, read_only_namespace(options))
        train_text_encoder = any(self.trained_text_encoders())
        contract.apply(self.network, self._models(), train_text_encoder, not chosen.network_train_text_encoder_only)
        if chosen.network_weights:
            logger.info("network weights loaded from %s: %s", chosen.network_weights,
                        contract.load_weights(self.network, chosen.network_weights))
        if options.training.gradient_checkpointing:
            family.enable_gradient_checkpointing()
            self.network.enable_gradient_checkpointing()
        groups, names = contract.optimizer_groups(
            self.network, chosen.text_encoder_lr, chosen.unet_lr, options.optimizer.learning_rate,
            trains_text_encoder=train_text_encoder,
        )
        self._place(placement)
        models = self._models()
        self.network.prepare_grad_etc(models.text_encoder, models.unet)
        self.trainable = nn.ModuleDict({"network": self.network})
        self.recipe = LossRecipe.from_options(options, family, encodes_singly=True)
        return [
            ParameterGroup(name, list(group["params"]), group.get("lr"))
            for name, group in zip(names, groups, strict=True)
        ]

    def _models(self) -> contract.HostModels:
        return contract.HostModels(self.family.vae, self.family.network_text_encoders(), self.family.denoiser)

    def _request(self) -> contract.NetworkRequest:
        chosen = self.options.network
        return contract.NetworkRequest(
            module=chosen.network_module, dim=chosen.network_dim, alpha=chosen.network_alpha,
            dropout=chosen.network_dropout, arguments=contract.parse_network_args(chosen.network_args),
            weights=chosen.network_weights if chosen.dim_from_weights else None,
        )

    def _disable_unsupported_options(self) -> None:
        self.max_norm = self.options.network.scale_weight_norms
        if self.max_norm and not hasattr(self.network, "apply_max_norm_regularization"):
            logger.warning("--scale_weight_norms is ignored: %s cannot limit its norms.", type(self.network).__name__)
            self.max_norm = None

    def _place(self, placement: Placement) -> None:
        family = self.family
        self.device = placement.device
        if placement.trained_dtype != torch.float32:
            self.network.to(placement.trained_dtype)
        self.network.to(placement.device)
        family.denoiser.to(placement.device)
        checkpointing = self.options.training.gradient_checkpointing  # only works in train mode
        family.denoiser.train(checkpointing)
        for encoder in family.text_encoders:
            if encoder is not None:
                encoder.train(checkpointing)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The network's parameters."""
        return list(self.network.get_trainable_params())

    # --- the step ------------------------------------------------------------------------------------------
    def on_epoch_start(self, epoch: int) -> None:
        """Networks go into train mode here."""
        models = self._models()
        self.network.on_epoch_start(models.text_encoder, models.unet)

    def on_step_start(self) -> None:
        """Optional hook of third-party networks."""
        if hasattr(self.network, "on_step_start"):
            models = self._models()
            self.network.on_step_start(models.text_encoder, models.unet)

    def before_optimizer_step(self) -> None:
        """Optional hooks of networks that watch their gradients."""
        for hook in ("update_grad_norms", "update_norms"):
            if hasattr(self.network, hook):
                getattr(self.network, hook)()

    def after_step(self, *, synced: bool) -> Mapping[str, float]:
        """`--scale_weight_norms` after an optimizer step, and the norms that a network reports."""
        if self.max_norm:
            if not synced:
                return {}
            count, mean, largest = self.network.apply_max_norm_regularization(self.max_norm, self.device)
            return {
                "max_norm/keys_scaled": float(count), "max_norm/max_key_norm": float(largest),
                "norm/avg_key_norm": float(mean),
            }
        return contract.reported_norms(self.network)

    def loss(self, batch: Batch, timesteps: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Per-sample loss [B] with the dataset's `network_multiplier`."""
        if hasattr(self.network, "set_multiplier"):
            self.network.set_multiplier(_common_multiplier(batch.network_multipliers))
        return super().loss(batch, timesteps, noise)

    def base_prediction(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
        """The frozen model's own prediction."""
        self.network.set_multiplier(0.0)
        try:
            return self.predict(x_t, timesteps, conditioning, batch)
        finally:
            self.network.set_multiplier(_common_multiplier(batch.network_multipliers))

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Eval mode and full strength."""
        with super().inference():
            if hasattr(self.network, "set_multiplier"):
                self.network.set_multiplier(1.0)
            yield

    # --- saving --------------------------------------------------------------------------------------------
    def save(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int] = (0, 0)
    ) -> None:
        """The network's own file, complete before it appears under its name."""
        scratch = path.with_name(f".{path.stem}.incomplete{path.suffix}")
        self.network.save_weights(str(scratch), dtype, dict(metadata))
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)

    @property
    def file_extension(self) -> str:
        """`--save_model_as`."""
        return f".{self.options.saving.save_model_as}"

    def metadata(self) -> dict[str, Any]:
        """Networks are `<architecture>/lora` whatever their algorithm; their arguments are JSON."""
        entries: dict[str, Any] = {"model_type": "lora"}
        if self.options.network.network_args:
            entries["ss_network_args"] = json.dumps(contract.training_arguments(self._request()))
        if hasattr(self, "network"):
            entries |= self._facts()
        return entries

    def _facts(self) -> dict[str, Any]:
        """What became of the options: norms that cannot be limited, ranks and alphas that a file brought."""
        facts: dict[str, Any] = {}
        if self.max_norm != self.options.network.scale_weight_norms:
            facts["ss_scale_weight_norms"] = False
        if self.options.network.dim_from_weights:
            state = self.network.state_dict()
            ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith("lora_down.weight")}
            alphas = {float(tensor) for name, tensor in state.items() if name.endswith(".alpha")}
            for key, values in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
                if values:
                    facts[key] = values.pop() if len(values) == 1 else "Dynamic"
        return facts


def _common_multiplier(multipliers: Tensor) -> float:
    values = set(multipliers.tolist())
    if len(values) != 1:
        raise ValueError(f"network_multiplier: one batch mixes the strengths {sorted(values)}; that is not possible.")
    return values.pop()

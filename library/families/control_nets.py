"""The ControlNets of all families, as training uses them: inputs in their form, files in their naming."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints import layout_control_net, layout_control_net_flux, layout_unet
from library.checkpoints.folders import write_json
from library.checkpoints.tensors import cast, is_safetensors, save_pickle, save_tensors
from library.families.base import Conditioning, ControlNet, SizeConditioning

#: (x_t, timesteps, conditioning, sizes) -> the keyword arguments of a family's denoiser
DenoiserInputs = Callable[[Tensor, Tensor, Conditioning, SizeConditioning | None], dict[str, Any]]


def stable_diffusion_control_net(unet: Any, path: str | None, attention: str | None) -> ControlNet:
    """From a file or folder, or grown from the U-Net; `attention` is one of `set_attention`'s kinds."""
    from library.models.control_net import build_control_net, new_control_net
    from library.models.layers import accept_single_values, set_attention

    if path is None:
        net = new_control_net(unet)
    else:
        tensors, config = layout_control_net.open_control_net(path)
        net = build_control_net(unet, tensors, config=config)
    accept_single_values(net)
    set_attention(net, None, attention)
    return StableDiffusionControlNet(net)


class StableDiffusionControlNet(ControlNet):
    """SD 1.x and 2.x, around diffusers' `ControlNetModel`."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def residuals(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None, hint: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """One residual per skip connection, and one for the middle."""
        dtype = self.net.dtype
        return self.net(
            x_t.to(dtype), timesteps.float(), conditioning["context"].to(dtype), unit_range(hint).to(dtype),
            return_dict=False,
        )

    def save(self, path: Path, *, layout: str, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """One file with original names and no prefix; such files have no metadata."""
        linear = self.net.config.use_linear_projection
        tensors = layout_control_net.to_original(self.net.state_dict(), linear_projection=linear)
        write_file(path, tensors, dtype=dtype, metadata={})

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass (train mode only)."""
        self.net.enable_gradient_checkpointing()


def sdxl_control_net(unet: Any, inputs: DenoiserInputs, path: str | None, attention: str | None) -> ControlNet:
    """From a file or folder, or grown from the U-Net; `attention` is one of `set_attention`'s kinds."""
    from library.models.control_net_sdxl import build_sdxl_control_net, new_sdxl_control_net
    from library.models.layers import set_attention

    if path is None:
        net = new_sdxl_control_net(unet)
    else:
        net = build_sdxl_control_net(unet.config, layout_control_net.open_control_net(path)[0])
    set_attention(net, None, attention)
    return SdxlControlNetAdapter(net, inputs)


class InputsControlNet(ControlNet):
    """A ControlNet whose module takes what the family's denoiser takes, and a hint."""

    def __init__(self, net: Any, inputs: DenoiserInputs) -> None:
        super().__init__()
        self.net = net
        self._inputs = inputs

    def call(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None, hint: Tensor
    ) -> Any:
        """The module's output; floating inputs but times and guidance come in its own dtype."""
        dtype = next(self.net.parameters()).dtype
        inputs = self._inputs(x_t, timesteps, conditioning, sizes)
        for name in set(inputs) - {"timesteps", "guidance", "img_ids", "text_mask"}:
            inputs[name] = inputs[name].to(dtype)
        return self.net(**inputs, hint=hint.to(dtype))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass (train mode only)."""
        self.net.enable_gradient_checkpointing()


class SdxlControlNetAdapter(InputsControlNet):
    """SDXL and its relatives."""

    def residuals(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None, hint: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """One residual per skip connection, and one for the middle."""
        return self.call(x_t, timesteps, conditioning, sizes, unit_range(hint))

    def added_parameters(self) -> list[nn.Parameter]:
        """The hint network and the zero convolutions: everything named `controlnet_`."""
        return [parameter for name, parameter in self.net.named_parameters() if name.startswith("controlnet_")]

    def save(self, path: Path, *, layout: str, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """One file with the names of diffusers' `ControlNetModel`."""
        write_file(path, layout_unet.to_diffusers(self.net.state_dict()), dtype=dtype, metadata=metadata)


def flux_control_net(transformer: Any, inputs: DenoiserInputs, path: str | None) -> ControlNet:
    """From a file, or grown from the transformer."""
    from library.models.control_net_flux import build_flux_control_net, new_flux_control_net

    if path is None:
        return FluxControlNetAdapter(new_flux_control_net(transformer), inputs)
    tensors, _ = layout_control_net.open_control_net(path)
    return FluxControlNetAdapter(build_flux_control_net(transformer, tensors), inputs)


class FluxControlNetAdapter(InputsControlNet):
    """FLUX.1."""

    def residuals(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None, hint: Tensor
    ) -> Any:
        """`FluxResiduals` for the transformer's blocks."""
        return self.call(x_t, timesteps, conditioning, sizes, hint)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Without single blocks: what the last double block does to the text after its attention."""
        if len(self.net.single_blocks):
            return []
        last = self.net.double_blocks[-1]
        return [*last.txt_attn.proj.parameters(), *last.txt_mlp.parameters()]

    def save(self, path: Path, *, layout: str, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """One file with the transformer's own names, or a folder for diffusers' `FluxControlNetModel`."""
        tensors = self.net.state_dict()
        if not layout.startswith("diffusers"):
            write_file(path, tensors, dtype=dtype, metadata=metadata)
            return
        write_json(path / "config.json", layout_control_net_flux.diffusers_config(asdict(self.net.params)))
        ending = "safetensors" if layout == "diffusers_safetensors" else "bin"
        weights = layout_control_net_flux.to_diffusers(tensors)
        write_file(path / f"diffusion_pytorch_model.{ending}", weights, dtype=dtype, metadata=metadata)


def unit_range(hint: Tensor) -> Tensor:
    """A picture from [-1,1] to [0,1], as U-Net ControlNets take it."""
    return hint / 2 + 0.5


def write_file(
    path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Safetensors with metadata, or a plain pickle, by the extension; floating tensors cast to `dtype` if given."""
    if is_safetensors(path):
        save_tensors(path, tensors, metadata={"format": "pt", **metadata}, dtype=dtype)
    else:
        save_pickle(path, {key: cast(tensors[key].detach(), dtype=dtype, device="cpu").clone() for key in tensors})

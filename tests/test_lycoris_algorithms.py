"""Every algorithm of LyCORIS hooks into every family: no layer is asked for what an algorithm may have taken away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from library.generation.attached_networks import attach_networks
from library.options.generation import AttachedNetworkOptions
from networks import contract
from tests import flux_tiny, lora_files, sd3_tiny, sdxl_tiny
from tests.test_third_party_networks import lycoris_presets  # noqa: F401 (a fixture)

FAMILIES: dict[str, Callable[[], Any]] = {
    "sd": lora_files.tiny_family, "sdxl": sdxl_tiny.sdxl_family, "sd3": sd3_tiny.tiny_family,
    "flux": lambda: flux_tiny.flux_family(t5xxl_max_token_length=16),
}  # fmt: skip
ALGORITHMS = ["full", "loha", "lokr", "glora", "diag-oft", "boft"]


def answer(family: Any) -> Tensor:
    """The denoiser's answer to encoded text."""
    x_t = torch.randn(1, family.latent.channels, 16, 16, generator=torch.Generator().manual_seed(1))
    text = family.encode_text(family.tokenize(["a cat"]))
    return family.predict(x_t, torch.tensor([500.0]), text, sdxl_tiny.SIZES)


def hosts_of(family: Any) -> contract.HostModels:
    return contract.HostModels(family.vae, family.network_text_encoders(), family.denoiser)


def trained(family: Any, algorithm: str, path: Path) -> Tensor:
    """Train a network a step, save it, and return what the model answers with it then."""
    host = hosts_of(family)
    request = contract.NetworkRequest("lycoris.kohya", 4, 2.0, arguments={
        "algo": algorithm, "conv_dim": "4", "conv_alpha": "2", "factor": "4", "block_size": "2", "constraint": "0",
    })  # fmt: skip
    network = contract.create(request, host)
    contract.apply(network, host, True, True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    answer(family).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    network.save_weights(str(path), None, {})
    with torch.no_grad():
        return answer(family)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_and_draws(algorithm, lycoris_presets, tmp_path):  # noqa: F811
    path = tmp_path / "network.safetensors"
    torch.manual_seed(0)
    expected = trained(lora_files.tiny_family(), algorithm, path)
    family = lora_files.tiny_family()
    options = AttachedNetworkOptions(network_module=("lycoris.kohya",), network_weights=(str(path),))
    attach_networks(options, family, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        assert (answer(family) - expected).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ia3", "dylora"])
def test_a_file_that_the_module_cannot_read_back_is_named(algorithm, lycoris_presets, tmp_path):  # noqa: F811
    """LyCORIS 4.1 trains and writes them, but fails on reading them (of DyLoRA: convolutions)."""
    path = tmp_path / "network.safetensors"
    trained(lora_files.tiny_family(), algorithm, path)
    with pytest.raises(ValueError, match=r"--network_weights .*network\.safetensors: the network module cannot use"):
        contract.create_for_generation("lycoris.kohya", path, hosts_of(lora_files.tiny_family()))


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_weights_are_trained_in_every_family(name, lycoris_presets, tmp_path):  # noqa: F811
    family = FAMILIES[name]()
    with torch.no_grad():
        plain = answer(family)
    changed = trained(family, "full", tmp_path / "network.safetensors")
    assert (changed - plain).abs().max() > 1e-5


def test_lycoris_refuses_a_file_for_another_denoiser(lycoris_presets, tmp_path):  # noqa: F811
    family = FAMILIES["flux"]()
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    layer = family.text_encoders[0].get_submodule("text_model.encoder.layers.0.mlp.fc1")
    path = tmp_path / "x.safetensors"
    save_file({
        f"{name}.lora_down.weight": torch.ones(2, layer.in_features),
        f"{name}.lora_up.weight": torch.ones(layer.out_features, 2), f"{name}.alpha": torch.tensor(2.0),
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 32),
        "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.ones(32, 2),
        "lora_unet_input_blocks_4_1_proj_in.alpha": torch.tensor(2.0),
    }, path)  # fmt: skip
    with pytest.raises(ValueError, match="none of its 1 modules for the denoiser"):
        contract.create_for_generation("lycoris.kohya", path, hosts_of(family))

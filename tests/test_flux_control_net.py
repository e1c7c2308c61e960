"""FLUX's ControlNet: it starts from the base model's blocks and as nothing, learns, and opens in diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.checkpoints import layout_control_net_flux as layout
from library.checkpoints.layout_flux import transformer_config
from library.checkpoints.tensors import shapes_of
from library.methods.base import size_conditioning
from library.methods.control_net import ControlNetTraining
from library.models.control_net_flux import FluxControlNet, build_flux_control_net
from library.models.flux import FluxParams, FluxResiduals
from tests.flux_tiny import TRANSFORMER, flux_family, flux_options, train_flux
from tests.hints import attached, frozen, hint_batch, predictions, random_weights_, train_on_one_batch, write_pairs

pytestmark = pytest.mark.slow  # trains often; `--quick` leaves it out


def make_method(**changes: Any) -> ControlNetTraining:
    """Ready for steps on the tiny model."""
    method = attached(ControlNetTraining, flux_options(**changes), flux_family(**changes))
    assert isinstance(method, ControlNetTraining)
    return method


def residuals_of(method: ControlNetTraining, batch) -> list[Tensor]:
    x_t = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(6))
    with torch.no_grad(), method.inference():
        found = method.control_net.residuals(
            x_t, torch.tensor([20.0, 950.0]), method.conditioning(batch), size_conditioning(batch),
            batch.conditioning_images,
        )
    return [*found.double, *found.single]


def with_single_blocks(method: ControlNetTraining) -> FluxControlNet:
    """A ControlNet of one double and two single blocks with random weights, put into the method."""
    base = method.family.denoiser
    params = replace(base.params, double_depth=1, single_depth=2)
    torch.manual_seed(2)
    net = FluxControlNet(params, (3, *[16] * 8))
    method.control_net.net = build_flux_control_net(base, net.state_dict())
    return net


# --- learning --------------------------------------------------------------------------------------------------
def test_a_new_control_net_changes_nothing_and_then_learns_one_batch():
    method = make_method()
    batch = hint_batch(method.family)
    with_hint, alone = predictions(method, batch)
    assert torch.equal(with_hint, alone)
    with frozen(method.family):
        losses = train_on_one_batch(method, batch, steps=20, rate=5e-3)
    assert losses[-1] < 0.7 * losses[0]
    with_hint, alone = predictions(method, batch)
    assert (with_hint - alone).abs().max() > 0.01


def test_it_starts_from_the_first_blocks_of_the_base_model():
    method = make_method()
    base, net = method.family.denoiser.state_dict(), method.control_net.net.state_dict()
    shared = [key for key in net if key in base]
    assert {key.split(".")[0] for key in shared} == {
        "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "double_blocks",
    }
    assert all(torch.equal(net[key], base[key].float()) for key in shared)
    assert net["controlnet_blocks.1.weight"].count_nonzero() == 0 and "controlnet_blocks.2.weight" not in net
    assert net["input_hint_block.14.weight"].count_nonzero() == 0 < net["input_hint_block.12.weight"].count_nonzero()
    assert not [key for key in net if key.startswith(("single_blocks", "final_layer"))]


def test_every_part_gets_a_gradient_and_recomputing_activations_gives_the_same():
    gradients = []
    for checkpointing in (False, True):
        method = make_method(gradient_checkpointing=checkpointing)
        random_weights_(method)
        batch = hint_batch(method.family)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
        method.loss(batch, torch.tensor([100.0, 900.0]), noise).sum().backward()
        gradients.append({key: value.grad for key, value in method.control_net.named_parameters()})
    plain, recomputed = gradients
    frozen_keys = [key for key, gradient in plain.items() if gradient is None]
    assert {key.rpartition(".")[0] for key in frozen_keys} == {  # where the last block's text goes nowhere
        "net.double_blocks.1.txt_attn.proj", "net.double_blocks.1.txt_mlp.0", "net.double_blocks.1.txt_mlp.2",
    }
    assert len(frozen_keys) + len(method.trained_parameters()) == len(plain)
    for key in plain.keys() - set(frozen_keys):
        torch.testing.assert_close(recomputed[key], plain[key])
    assert plain["net.input_hint_block.0.weight"].abs().max() > 0


def test_outputs_of_single_blocks_come_from_all_tokens_after_them():
    method = make_method()
    net = with_single_blocks(method)
    batch = hint_batch(method.family)
    [double, first, second] = residuals_of(method, batch)
    conditioning = method.conditioning(batch)
    tokens = conditioning["context"].shape[1]
    assert double.shape[1] == 16 and first.shape[1] == second.shape[1] == tokens + 16
    x_t = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(6))
    inputs = method.family.denoiser_inputs(x_t, torch.tensor([20.0, 950.0]), conditioning)
    after: list[Tensor] = []
    net.single_blocks[1].register_forward_hook(lambda module, args, output: after.append(output))
    with torch.no_grad():
        net(**inputs, hint=batch.conditioning_images)
        torch.testing.assert_close(net.controlnet_blocks_for_single[1](after[0]), second)
        base = method.family.denoiser
        changed = base(**inputs, residuals=FluxResiduals((), (torch.zeros_like(first), second)))
        assert (changed - base(**inputs)).abs().max() > 1e-4


# --- files -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("has_single_blocks", [False, True])
def test_every_form_loads_again(has_single_blocks, tmp_path):
    method = make_method()
    if has_single_blocks:
        with_single_blocks(method)
    else:
        random_weights_(method)
    batch = hint_batch(method.family)
    expected = residuals_of(method, batch)
    forms = {"safetensors": "cn.safetensors", "ckpt": "cn.ckpt", "diffusers": "pickled", "diffusers_safetensors": "cn"}
    for layout_name, name in forms.items():
        path = tmp_path / name
        method.control_net.save(path, layout=layout_name, dtype=None, metadata={"modelspec.title": "x"})
        method.control_net = method.family.make_control_net(str(path))
        assert all(map(torch.equal, residuals_of(method, batch), expected)), layout_name
    assert (tmp_path / "pickled" / "diffusion_pytorch_model.bin").is_file()


@torch.no_grad()
def test_diffusers_reads_the_saved_folder(tmp_path):
    from diffusers import FluxControlNetModel

    method = make_method()
    random_weights_(method)
    batch = hint_batch(method.family)
    method.control_net.save(tmp_path, layout="diffusers_safetensors", dtype=None, metadata={})
    theirs = FluxControlNetModel.from_pretrained(tmp_path).eval()
    x_t = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(6))
    inputs = method.family.denoiser_inputs(x_t, torch.tensor([20.0, 950.0]), method.conditioning(batch))
    double, single = theirs(
        hidden_states=inputs["img"], controlnet_cond=batch.conditioning_images, encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["y"], timestep=inputs["timesteps"], img_ids=inputs["img_ids"][0],
        txt_ids=torch.zeros(inputs["txt"].shape[1], 3), guidance=inputs["guidance"], return_dict=False,
    )
    assert single is None
    for ours, other in zip(residuals_of(method, batch), double, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
        assert other.abs().max() > 1e-2


def test_foreign_files_are_refused(tmp_path):
    method = make_method()
    with pytest.raises(ValueError, match="no ControlNet of this kind"):
        method.family.make_control_net(str(TRANSFORMER))
    method.control_net.save(tmp_path / "cn.safetensors", layout="safetensors", dtype=None, metadata={})
    tensors = load_file(tmp_path / "cn.safetensors")
    tensors["controlnet_blocks.7.weight"] = torch.zeros(64, 64)
    save_file(tensors, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: controlnet_blocks\.7\.weight"):
        method.family.make_control_net(str(tmp_path / "more.safetensors"))


def test_full_size_names_and_widths():
    full = FluxParams(
        in_channels=64, out_channels=64, hidden_size=3072, num_heads=24, context_width=4096, vector_width=768,
        time_width=256, mlp_width=12288, single_mlp_width=12288, double_depth=2, single_depth=0,
        axes_dims=(16, 56, 56), qkv_bias=True, guidance=True,
    )
    with torch.device("meta"):
        net = FluxControlNet(full, (3, *[16] * 8))
        from diffusers import FluxControlNetModel

        config = layout.control_net_config(shapes_of(net.state_dict()), axes_dims=full.axes_dims)
        theirs = FluxControlNetModel.from_config(layout.diffusers_config(config))
    assert FluxParams(**config) == full
    shapes = shapes_of(net.state_dict())
    assert shapes["pos_embed_input.weight"] == (3072, 64) and shapes["controlnet_blocks.1.weight"] == (3072, 3072)
    assert shapes["input_hint_block.0.weight"] == (16, 3, 3, 3) and shapes["input_hint_block.14.bias"] == (16,)
    assert [net.input_hint_block[index].stride for index in (2, 4, 8, 12)] == [(1, 1), (2, 2), (2, 2), (2, 2)]
    assert layout.to_diffusers(net.state_dict()).shapes == shapes_of(theirs.state_dict())


# --- the script ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [None, "diffusers_safetensors"])
def test_the_script_trains_draws_and_resumes_exactly(form, tmp_path):
    pairs = write_pairs(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat --w 64 --h 64 --s 1 --d 1 --cn {tmp_path}/hints/a1.png\n", encoding="utf-8")
    common = [*pairs, "--cache_text_encoder_outputs", "--max_train_steps", "3"]
    common += ["--save_model_as", form] if form else []
    suffix = ".safetensors" if form is None else ""
    straight = train_flux(
        "flux_train_control_net", *common, "--save_every_n_steps", "2", "--save_state", "--sample_every_n_steps", "3",
        "--sample_prompts", prompts, output_dir=tmp_path / "straight", suffix=suffix,
    )
    assert len(list((tmp_path / "straight" / "sample").iterdir())) == 1
    resumed = train_flux(
        "flux_train_control_net", *common, "--resume", tmp_path / "straight" / "run-step00000002-state",
        output_dir=tmp_path / "resumed", suffix=suffix,
    )
    first, second = (weights_of(path) for path in (straight, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    if form is None:
        with safe_open(straight, "pt") as file:
            assert file.metadata()["modelspec.architecture"] == "flux-1-dev/controlnet"
        assert transformer_config({**shapes_of(first), "final_layer.linear.weight": (64, 64)})["double_depth"] == 2


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path)

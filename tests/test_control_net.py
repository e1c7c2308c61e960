"""ControlNets of U-Net families: they start as nothing, learn, and their files are those that others read and write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.checkpoints import layout_control_net
from library.checkpoints.folders import module_config
from library.checkpoints.tensors import TensorDict, shapes_of
from library.families.base import SizeConditioning
from library.families.control_nets import stable_diffusion_control_net
from library.families.sd import StableDiffusion
from library.generation.request import ImageRequest
from library.methods.base import size_conditioning
from library.methods.control_net import ControlNetTraining
from library.models.control_net_sdxl import SdxlControlNet
from library.options import make_options
from library.options.errors import UserError
from tests import network_hosts as hosts
from tests.hints import (
    ON_CPU,
    attached,
    frozen,
    hint_batch,
    predictions,
    random_weights_,
    train_on_one_batch,
    write_pairs,
)
from tests.sdxl_tiny import MODEL as SDXL_MODEL
from tests.sdxl_tiny import sdxl_family, sdxl_options
from tests.test_unet_sdxl import library_unet
from tests.training import MODEL, TOKENIZERS, run_script

UNET_FAMILIES = ("sd", "sdxl")


def make_method(name: str, **values: Any) -> ControlNetTraining:
    """Ready for steps on the tiny model of a family."""
    if name == "sdxl":
        options, family = sdxl_options(**values), sdxl_family(**values)
    else:
        options = make_options(
            pretrained_model_name_or_path=str(MODEL), tokenizer_cache_dir=str(TOKENIZERS), **values
        )
        family = StableDiffusion(options)
        family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    method = attached(ControlNetTraining, options, family)
    assert isinstance(method, ControlNetTraining)
    return method


def residuals_of(method: ControlNetTraining, batch) -> list[Tensor]:
    x_t = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(6))
    with torch.no_grad(), method.inference():
        down, middle = method.control_net.residuals(
            x_t, torch.tensor([20.0, 950.0]), method.conditioning(batch), size_conditioning(batch),
            batch.conditioning_images,
        )
    return [*down, middle]


# --- learning --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", UNET_FAMILIES)
def test_a_new_control_net_changes_nothing_and_then_learns_one_batch(name):
    method = make_method(name)
    batch = hint_batch(method.family)
    with_hint, alone = predictions(method, batch)
    assert torch.equal(with_hint, alone)
    with frozen(method.family):
        losses = train_on_one_batch(method, batch, steps=15, rate=5e-3)
    assert losses[-1] < 0.6 * losses[0]
    with_hint, alone = predictions(method, batch)
    assert (with_hint - alone).abs().max() > 0.01


@pytest.mark.parametrize("name", UNET_FAMILIES)
def test_every_part_gets_a_gradient_and_recomputing_activations_gives_the_same(name):
    gradients = []
    for checkpointing in (False, True):
        method = make_method(name, gradient_checkpointing=checkpointing)
        random_weights_(method)
        batch = hint_batch(method.family)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
        method.loss(batch, torch.tensor([100.0, 900.0]), noise).sum().backward()
        assert method.family.denoiser.training is checkpointing
        gradients.append({key: value.grad for key, value in method.control_net.named_parameters()})
    plain, recomputed = gradients
    for key, gradient in plain.items():
        assert gradient is not None, key
        assert gradient.abs().max() > 0 or "controlnet_" not in key, key
        torch.testing.assert_close(recomputed[key], gradient)


def test_rates_of_added_layers_are_their_own_where_the_option_exists():
    method = make_method("sdxl", control_net_lr=3e-4)
    added, rest = method.attach(ON_CPU)
    names = {id(value): name for name, value in method.control_net.named_parameters()}
    assert added.lr == 3e-4 and rest.lr is None
    assert {names[id(value)].split(".")[1] for value in added.parameters} == {
        "controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block",
    }
    assert {names[id(value)].split(".")[1] for value in rest.parameters} == {
        "time_embed", "label_emb", "input_blocks", "middle_block",
    }
    assert len(added.parameters) + len(rest.parameters) == len(names)
    [only] = make_method("sd", control_net_lr=3e-4).attach(ON_CPU)
    assert only.lr is None


def test_without_hints_it_says_what_is_missing():
    method = make_method("sd")
    batch = hint_batch(method.family)
    with pytest.raises(ValueError, match="conditioning_data_dir"):
        method.loss(replace(batch, conditioning_images=None))
    with pytest.raises(ValueError, match="--cn FILE"):
        method.predict_for(ImageRequest("a cat"))
    with pytest.raises(ValueError, match="no such file"):
        method.predict_for(ImageRequest("a cat", controlnet_image=Path("nowhere.png")))


# --- files -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", UNET_FAMILIES)
def test_files_of_every_form_and_naming_load_again(name, tmp_path):
    method = make_method(name)
    random_weights_(method)
    batch = hint_batch(method.family)
    expected = residuals_of(method, batch)
    for ending in ("safetensors", "ckpt", "pt"):
        method.save(tmp_path / f"saved.{ending}", dtype=None, metadata={})
    tensors = load_file(tmp_path / "saved.safetensors")
    diffusers = layout_control_net.to_diffusers(tensors)
    original = layout_control_net.to_original(diffusers, linear_projection=name == "sdxl")
    save_file({key: diffusers[key] for key in diffusers}, tmp_path / "diffusers.safetensors")
    save_file({f"control_model.{key}": original[key] for key in original}, tmp_path / "published.safetensors")
    (tmp_path / "folder").mkdir()
    save_file({k: diffusers[k] for k in diffusers}, tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    for file in ("saved.safetensors", "saved.ckpt", "saved.pt", "diffusers.safetensors", "published.safetensors",
                 "folder"):
        method.control_net = method.family.make_control_net(str(tmp_path / file))
        assert all(map(torch.equal, residuals_of(method, batch), expected)), file


@torch.no_grad()
def test_linear_projections_stay_linear_and_either_form_loads(tmp_path):
    torch.manual_seed(0)
    unet = hosts.sd_unet(use_linear_projection=True, cross_attention_dim=64)  # as in SD 2
    made = stable_diffusion_control_net(unet, None, None)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    made.save(tmp_path / "linear.safetensors", layout="safetensors", dtype=None, metadata={})
    tensors = load_file(tmp_path / "linear.safetensors")
    projections = [key for key in tensors if key.endswith((".proj_in.weight", ".proj_out.weight"))]
    assert projections and {tensors[key].ndim for key in projections} == {2}
    save_file(
        tensors | {key: tensors[key][:, :, None, None].clone() for key in projections}, tmp_path / "conv.safetensors"
    )
    for name in ("linear", "conv"):
        again = stable_diffusion_control_net(unet, str(tmp_path / f"{name}.safetensors"), None)
        for key, value in made.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), (name, key)


def test_names_in_files(tmp_path):
    for name, wanted, foreign in (
        ("sd", {"input_hint_block.14.bias", "zero_convs.11.0.weight", "middle_block_out.0.bias", "time_embed.0.weight",
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "middle_block.2.out_layers.3.weight"},
         ("control", "down_blocks")),
        ("sdxl", {"controlnet_cond_embedding.blocks.5.weight", "controlnet_mid_block.bias", "conv_in.weight",
                  "add_embedding.linear_1.weight", "down_blocks.1.attentions.0.proj_in.weight"},
         ("input_", "zero_convs", "out.", "output_")),
    ):  # fmt: skip
        method = make_method(name)
        path = tmp_path / f"{name}.safetensors"
        method.save(path, dtype=torch.bfloat16, metadata={"modelspec.title": "x"})
        tensors = load_file(path)
        assert wanted <= tensors.keys()
        assert not [key for key in tensors if key.startswith(foreign)]
        assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"} | ({"modelspec.title": "x"} if name == "sdxl" else {})
    assert tensors["down_blocks.1.attentions.0.proj_in.weight"].ndim == 2


def test_what_is_no_control_net_for_this_model_is_refused(tmp_path):
    sd, sdxl = make_method("sd"), make_method("sdxl")
    with pytest.raises(ValueError, match="no ControlNet"):
        sd.family.make_control_net(str(MODEL))
    sdxl.save(tmp_path / "xl.safetensors", dtype=None, metadata={})
    with pytest.raises(ValueError, match="do not fit the ControlNet of this U-Net"):
        sd.family.make_control_net(str(tmp_path / "xl.safetensors"))
    with pytest.raises(FileNotFoundError, match="--controlnet_model_name_or_path"):
        sd.family.make_control_net(str(tmp_path / "nothing.safetensors"))
    options = make_options(controlnet_model_name_or_path=str(tmp_path / "nothing.safetensors"))
    [problem] = ControlNetTraining(options, sd.family).check_options()
    assert "no such file or folder" in problem


# --- other programs --------------------------------------------------------------------------------------------
def library_net(folder: Path, config: dict[str, Any]) -> Any:
    from diffusers import ControlNetModel

    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ControlNetModel.from_pretrained(folder).eval()


@torch.no_grad()
def test_diffusers_reads_what_training_saved(tmp_path):
    from diffusers import ControlNetModel

    method = make_method("sd")
    random_weights_(method)
    batch = hint_batch(method.family)
    method.save(tmp_path / "cn.safetensors", dtype=None, metadata={})
    (tmp_path / "config.json").write_text(json.dumps(module_config(method.control_net.net)), encoding="utf-8")
    theirs = ControlNetModel.from_single_file(str(tmp_path / "cn.safetensors"), config=str(tmp_path)).eval()
    x_t = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(6))
    context = method.conditioning(batch)["context"]
    down, middle = theirs(
        x_t, torch.tensor([20.0, 950.0]), context, batch.conditioning_images / 2 + 0.5, return_dict=False
    )
    for ours, other in zip(residuals_of(method, batch), [*down, middle], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
        assert other.abs().max() > 1e-3


@torch.no_grad()
def test_diffusers_computes_the_same_residuals_for_the_larger_model(tmp_path):
    from diffusers import ControlNetModel

    method = make_method("sdxl")
    random_weights_(method)
    family, batch = method.family, hint_batch(method.family, width=96)
    method.save(tmp_path / "diffusion_pytorch_model.safetensors", dtype=None, metadata={})
    pooled = method.conditioning(batch)["pooled"]
    width = (family.denoiser.config.vector_width - pooled.shape[-1]) // 6
    like = ControlNetModel.from_unet(library_unet(family.denoiser, width))
    theirs = library_net(tmp_path, module_config(like))
    x_t = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(6))
    sizes: SizeConditioning = size_conditioning(batch)
    numbers = torch.cat([sizes.original_hw, sizes.crop_top_left, sizes.target_hw], dim=1)
    down, middle = theirs(
        x_t, torch.tensor([20.0, 950.0]), method.conditioning(batch)["context"],
        batch.conditioning_images / 2 + 0.5, added_cond_kwargs={"text_embeds": pooled, "time_ids": numbers},
        return_dict=False,
    )
    for ours, other in zip(residuals_of(method, batch), [*down, middle], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
        assert other.abs().max() > 1e-3


# --- full size -------------------------------------------------------------------------------------------------
def test_full_size_names_and_widths():
    from diffusers import ControlNetModel, UNet2DConditionModel

    with torch.device("meta"):
        net = ControlNetModel.from_unet(UNet2DConditionModel(**hosts.FULL_SD15), load_weights_from_unet=False)
        xl = SdxlControlNet(hosts.sdxl_config(**hosts.FULL_SDXL))
    original = layout_control_net.to_original(net.state_dict(), linear_projection=False)
    zero = [original.shapes[f"zero_convs.{index}.0.weight"] for index in range(12)]
    assert zero == [(c, c, 1, 1) for c in (320,) * 4 + (640,) * 3 + (1280,) * 5]
    hint = [original.shapes[f"input_hint_block.{index}.weight"][:2] for index in range(0, 16, 2)]
    widths = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    assert hint == [(after, before) for before, after in zip(widths[:-1], widths[1:], strict=True)]
    assert len(original) == 340
    assert shapes_of(layout_control_net.to_diffusers(original)) == shapes_of(net.state_dict())

    shapes = shapes_of(xl.state_dict())
    zero = [shapes[f"controlnet_down_blocks.{index}.weight"] for index in range(9)]
    assert zero == [(c, c, 1, 1) for c in (320,) * 4 + (640,) * 3 + (1280,) * 2]
    assert shapes["controlnet_mid_block.weight"] == (1280, 1280, 1, 1)
    hint = [shapes[f"controlnet_cond_embedding.{layout_control_net.hint_layer(i)}.weight"][:2] for i in range(8)]
    assert hint == [(after, before) for before, after in zip(widths[:-1], widths[1:], strict=True)]
    saved = layout_control_net.to_diffusers(
        TensorDict(dict(layout_control_net.layout_unet.to_diffusers(xl.state_dict())), source="meta")
    )
    with torch.device("meta"):
        library = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20], use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        theirs = ControlNetModel.from_unet(library, load_weights_from_unet=False)
    assert saved.shapes == shapes_of(theirs.state_dict())


# --- the scripts -----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model"), [("train_control_net", MODEL), ("sdxl_train_control_net", SDXL_MODEL)], ids=UNET_FAMILIES
)
def test_the_script_trains_draws_and_resumes_exactly(script, model, tmp_path, caplog):
    pairs = write_pairs(tmp_path)
    prompts = tmp_path / "prompts.txt"
    drawn = f"a cat --w 64 --h 64 --s 1 --d 1 --l 3 --cn {tmp_path}/hints/a1.png"
    prompts.write_text(f"{drawn}\na dog without hint --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    common = ["--pretrained_model_name_or_path", model, "--tokenizer_cache_dir", TOKENIZERS, *pairs,
              "--max_train_steps", "3", "--output_name", "cn"]
    run_script(script, *common, "--output_dir", tmp_path / "straight", "--save_every_n_steps", "2", "--save_state",
               "--sample_every_n_steps", "3", "--sample_prompts", prompts)
    assert len(list((tmp_path / "straight" / "sample").iterdir())) == 1
    assert "add --cn FILE to the prompt" in caplog.text
    state = tmp_path / "straight" / "cn-step00000002-state"
    run_script(script, *common, "--output_dir", tmp_path / "resumed", "--resume", state)
    straight, resumed = (load_file(tmp_path / place / "cn.safetensors") for place in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    with safe_open(tmp_path / "straight" / "cn.safetensors", "pt") as file:
        metadata = file.metadata()
    if script == "sdxl_train_control_net":
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/controlnet"
        assert not [key for key in metadata if key.startswith("ss_")]
    else:
        assert metadata == {"format": "pt"}


def test_the_script_needs_conditioning_images(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "hints" / "a2.png").unlink()
    with pytest.raises((SystemExit, UserError)):
        run_script(
            "train_control_net", "--pretrained_model_name_or_path", MODEL, "--tokenizer_cache_dir", TOKENIZERS,
            "--train_data_dir", tmp_path / "images", "--conditioning_data_dir", tmp_path / "hints",
            "--resolution", "64", "--output_dir", tmp_path / "out",
        )  # fmt: skip

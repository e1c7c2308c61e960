"""ControlNet-LLLite: its modules and names, that it starts as nothing, learns, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.methods.base import size_conditioning
from library.methods.lllite import LLLiteTraining
from library.options.errors import UserError
from networks.control_net_lllite import ControlNetLLLite, LLLiteModule, sizes_in_file
from tests import network_hosts as hosts
from tests.hints import attached, frozen, hint_batch, predictions, random_weights_, train_on_one_batch, write_pairs
from tests.sdxl_tiny import MODEL, sdxl_family, sdxl_options
from tests.training import TOKENIZERS, run_script

DATA = Path(__file__).parent / "data"


def make_method(**values) -> LLLiteTraining:
    """Ready for steps on the tiny model."""
    method = attached(LLLiteTraining, sdxl_options(**values), sdxl_family(**values))
    assert isinstance(method, LLLiteTraining)
    return method


# --- names and sizes -------------------------------------------------------------------------------------------
def test_modules_of_the_full_size_model_are_those_of_existing_files():
    listed = json.loads((DATA / "lora_modules_sdxl.json").read_text(encoding="utf-8"))["control_net_lllite"]
    with torch.device("meta"):
        network = ControlNetLLLite(hosts.sdxl_unet(**hosts.FULL_SDXL), cond_emb_dim=32, mlp_dim=64)
    state = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert list(dict.fromkeys(key.partition(".")[0] for key in state)) == [entry["name"] for entry in listed]
    assert len(listed) == 136
    for entry in listed:
        name, width = entry["name"], entry["in"]
        kernels = {1: [(16, 3, 4, 4), (32, 16, 2, 2)], 2: [(16, 3, 4, 4), (32, 16, 4, 4)],
                   3: [(16, 3, 4, 4), (16, 16, 4, 4), (32, 16, 2, 2)]}[entry["depth"]]  # fmt: skip
        wanted = {f"conditioning1.{2 * index}.weight": shape for index, shape in enumerate(kernels)}
        wanted |= {"down.0.weight": (64, width), "mid.0.weight": (64, 96), "up.0.weight": (width, 64)}
        wanted |= {key.replace("weight", "bias"): shape[:1] for key, shape in wanted.items()}
        assert {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{name}.")} == wanted, name
    assert sizes_in_file({key: torch.empty(shape, device="meta") for key, shape in state.items()}) == (32, 64)


def test_depth_counts_how_often_the_picture_has_been_halved():
    network = ControlNetLLLite(hosts.sdxl_unet(depths=(1, 1, 1)))
    depths = {name: module.depth for name, module in network.named_children()}
    for block, depth in (("input_blocks_1_", 1), ("input_blocks_2_", 1), ("input_blocks_4_", 2), ("middle_block_", 3)):
        assert {found for name, found in depths.items() if block in name} == {depth}, block
    assert not [name for name in depths if "output_blocks" in name or "to_out" in name or "attn2_to_k" in name]


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="SDXL's U-Net only"):
        ControlNetLLLite(hosts.sd_unet())
    with pytest.raises(ValueError, match="no ControlNet-LLLite file"):
        sizes_in_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)})


# --- one module ------------------------------------------------------------------------------------------------
def module_with_weights(depth: int) -> tuple[LLLiteModule, nn.Linear]:
    torch.manual_seed(depth)
    host = nn.Linear(24, 7)
    module = LLLiteModule(host, depth, cond_emb_dim=8, mlp_dim=6)
    nn.init.normal_(module.up[0].weight)
    module.apply_to()
    return module, host


@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.no_grad()
def test_a_module_changes_the_input_of_its_layer_by_the_formula(depth):
    module, host = module_with_weights(depth)
    hint = torch.rand(2, 3, 64, 32) * 2 - 1
    tokens = (64 // (8 << (depth - 1))) * (32 // (8 << (depth - 1)))
    x = torch.randn(2, tokens, 24)
    plain = torch.nn.functional.linear(x, host.weight, host.bias)
    assert torch.equal(host(x), plain)  # no hint yet
    module.embed(hint)
    e = module.conditioning1(hint).reshape(2, 8, tokens).permute(0, 2, 1)
    z = torch.relu(module.mid[0](torch.cat([e, torch.relu(module.down[0](x))], dim=-1)))
    wanted = torch.nn.functional.linear(x + module.up[0](z), host.weight, host.bias)
    torch.testing.assert_close(host(x), wanted)
    assert (host(x) - plain).abs().max() > 0.1
    twice = host(torch.cat([x, x]))  # guidance: the whole batch again
    torch.testing.assert_close(twice, torch.cat([wanted, wanted]))
    module.multiplier = 0.0
    assert torch.equal(host(x), plain)


@pytest.mark.parametrize("size_hw", [(72, 104), (64, 64)])
@torch.no_grad()
def test_sizes_that_no_level_divides_evenly_fit_all_layers(size_hw):
    unet = hosts.sdxl_unet(depths=(1, 1, 1)).eval()
    network = ControlNetLLLite(unet, 4, 4)
    for module in network.lllite_modules:
        nn.init.normal_(module.up[0].weight)
    network.apply_to()
    config, generator = unet.config, torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, size_hw[0] // 8, size_hw[1] // 8, generator=generator)
    inputs = (torch.tensor([400.0]), torch.randn(1, 5, config.context_width), torch.randn(1, config.vector_width))
    plain = unet(x, *inputs)
    network.set_cond_image(torch.rand(1, 3, *size_hw))
    assert (unet(x, *inputs) - plain).abs().max() > 1e-3
    network.set_cond_image(None)
    assert torch.equal(unet(x, *inputs), plain)


# --- training --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_starts_as_nothing_and_then_learns_one_batch():
    method = make_method()
    batch = hint_batch(method.family)
    with_hint, alone = predictions(method, batch)
    assert torch.equal(with_hint, alone)
    with frozen(method.family):
        losses = train_on_one_batch(method, batch, steps=20, rate=1e-2)
    assert losses[-1] < 0.8 * losses[0]
    first, _ = predictions(method, batch)
    other, _ = predictions(method, hint_batch(method.family, seed=77))
    assert (first - other).abs().max() > 1e-3
    x_t = torch.zeros(batch.latents.shape)
    timesteps, conditioning = torch.tensor([3.0, 4.0]), method.conditioning(batch)
    with torch.no_grad():
        base = method.base_prediction(x_t, timesteps, conditioning, batch)
        method.network.set_cond_image(None)
        assert torch.equal(base, method.family.predict(x_t, timesteps, conditioning, size_conditioning(batch)))


def test_recomputing_activations_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        method = make_method(gradient_checkpointing=checkpointing)
        random_weights_(method)
        batch = hint_batch(method.family)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
        method.loss(batch, torch.tensor([100.0, 900.0]), noise).sum().backward()
        assert method.family.denoiser.training is checkpointing
        gradients.append([parameter.grad for parameter in method.trained_parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain)


def test_impossible_options_are_named_before_loading():
    def problems(**values) -> list[str]:
        options = sdxl_options(**values)
        return LLLiteTraining(options, None).check_options()  # type: ignore[arg-type]

    [problem] = problems(mixed_precision="fp16")
    assert "--full_fp16" in problem
    assert problems(mixed_precision="fp16", full_fp16=True) == problems(mixed_precision="bf16") == problems() == []
    for name, value in (("cond_emb_dim", 7), ("network_dim", 0), ("network_dropout", 1.5)):
        assert f"--{name} " in problems(**{name: value})[0]


def test_dropout_acts_in_training_only():
    method = make_method(network_dropout=0.5)
    random_weights_(method, 0.2)
    batch = hint_batch(method.family)
    first, second = predictions(method, batch)[0], predictions(method, batch)[0]
    assert torch.equal(first, second)
    noise = torch.zeros(batch.latents.shape)
    with torch.no_grad():
        losses = [method.loss(batch, torch.tensor([500.0, 500.0]), noise) for _ in range(2)]
    assert not torch.equal(*losses)


# --- files and the script --------------------------------------------------------------------------------------
def test_files_load_again_and_others_are_refused(tmp_path):
    method = make_method()
    random_weights_(method)
    expected = {key: value.clone() for key, value in method.network.state_dict().items()}
    for ending in ("safetensors", "ckpt"):
        path = tmp_path / f"lllite.{ending}"
        method.save(path, dtype=None, metadata={})
        loaded = make_method(network_weights=str(path)).network.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    tensors = load_file(tmp_path / "lllite.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="1 missing"):
        make_method(network_weights=str(tmp_path / "less.safetensors"))
    [problem] = LLLiteTraining(sdxl_options(network_weights="none.safetensors"), None).check_options()  # type: ignore
    assert "--network_weights none.safetensors" in problem
    with pytest.raises(ValueError, match="cannot be merged"):
        method.network.merge_to()
    method.save(tmp_path / "half.safetensors", dtype=torch.float16, metadata={})
    assert {value.dtype for value in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@pytest.mark.slow
def test_the_script_trains_draws_and_resumes_exactly(tmp_path):
    pairs = write_pairs(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat --w 64 --h 64 --s 1 --d 1 --l 3 --cn {tmp_path}/hints/a1.png\n", encoding="utf-8")
    common = ["--pretrained_model_name_or_path", MODEL, "--tokenizer_cache_dir", TOKENIZERS, *pairs,
              "--cache_text_encoder_outputs", "--max_train_steps", "3", "--output_name", "lllite",
              "--save_precision", "float"]  # fmt: skip
    script = "sdxl_train_control_net_lllite"
    run_script(script, *common, "--output_dir", tmp_path / "straight", "--save_every_n_steps", "2", "--save_state",
               "--sample_every_n_steps", "3", "--sample_prompts", prompts)  # fmt: skip
    assert len(list((tmp_path / "straight" / "sample").iterdir())) == 1
    run_script(script, *common, "--output_dir", tmp_path / "resumed", "--resume",
               tmp_path / "straight" / "lllite-step00000002-state")  # fmt: skip
    straight, resumed = (weights(tmp_path / place / "lllite.safetensors") for place in ("straight", "resumed"))
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert sizes_in_file(straight) == (32, 64)
    assert any(value.abs().max() > 0 for key, value in straight.items() if ".up.0." in key)
    with safe_open(tmp_path / "straight" / "lllite.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert not [key for key in metadata if key.startswith(("ss_", "sshs_"))]


def test_the_script_refuses_half_precision_before_anything_is_loaded(tmp_path):
    with pytest.raises((SystemExit, UserError)):
        run_script(
            "sdxl_train_control_net_lllite", "--pretrained_model_name_or_path", "missing.safetensors",
            "--tokenizer_cache_dir", TOKENIZERS, *write_pairs(tmp_path), "--mixed_precision", "fp16", "--output_dir",
            tmp_path / "out",
        )  # fmt: skip

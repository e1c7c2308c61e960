"""LoRA files of other programs in ours, ours in other programs: diffusers, PEFT, LyCORIS."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library import model_util
from networks import contract, lora, merge_lora
from networks.translation import to_own_names
from networks.weights_file import load_network_file
from tests.lora_files import (
    answers,
    assert_equal_answers,
    assert_equal_pictures,
    assert_other_answers,
    hook,
    picture,
    pipeline_picture,
    randomize,
    tiny_family,
    tiny_model,
    tokenizer,
    write_lora,
)
from tests.training import PHOTOS, train, write_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model as a Diffusers folder."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    scheduler = model_util.scheduler_config(v_parameterization=False)
    model_util.save_diffusers_folder(folder, tiny_model(), scheduler=scheduler, tokenizer=tokenizer())
    return folder


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return answers(tiny_model())


def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder)


# --- other programs read ours --------------------------------------------------------------------------------
class Complaints(logging.Handler):
    """Collects warnings of diffusers, whose logger does not propagate."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    handler = Complaints()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.texts
    for logger in loggers:
        logger.removeHandler(handler)


def loaded_by_diffusers(folder: Path, path: Path, complaints: list[str]) -> Any:
    """A pipeline with our file: every module is in it, with its own rank and alpha, and nobody complained."""
    pipe = pipeline(folder)
    complaints.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pipe.load_lora_weights(str(path))
    assert complaints == []
    assert [str(item.message) for item in warned if "pattern" in str(item.message)] == []
    found = {}
    for prefix, module in (("lora_unet", pipe.unet), ("lora_te_text_model", pipe.text_encoder)):
        for name, layer in module.named_modules():
            if hasattr(layer, "lora_A"):
                key = f"{prefix}_{name.replace('.', '_')}"
                found[key] = (layer.r["default_0"], float(layer.lora_alpha["default_0"]))
    stored = load_file(path)
    downs = {key.partition(".")[0]: value for key, value in stored.items() if key.endswith("lora_down.weight")}
    assert found == {name: (down.shape[0], float(stored[f"{name}.alpha"])) for name, down in downs.items()}
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "3", "conv_alpha": "1"}], ids=["linear", "convolutions"])
def test_diffusers_answers_with_our_lora_as_we_do(arguments, folder, plain, complaints, tmp_path):
    path = write_lora(tmp_path / "lora.safetensors", tiny_model(), 1, **arguments)
    pipe = loaded_by_diffusers(folder, path, complaints)
    ours = tiny_model()
    hook(ours, path)
    assert_other_answers(answers(ours), plain)
    assert_equal_answers(answers(pipe), answers(ours))


@pytest.mark.slow
def test_diffusers_draws_with_a_trained_lora_as_we_do(folder, complaints, tmp_path):
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    path = train("--dataset_config", write_config(tmp_path, photos), "--network_dim", "4", "--network_alpha", "4",
                 "--network_args", "conv_dim=2", "conv_alpha=1", "--max_train_steps", "2", "--learning_rate", "0.05",
                 output_dir=tmp_path / "out")
    family = tiny_family()
    without = picture(family)
    hook(family.modules, path)
    ours = picture(family)
    assert float((ours - without).abs().max()) > 0.05
    pipe = loaded_by_diffusers(folder, path, complaints)
    assert_equal_pictures(pipeline_picture(pipe), ours)


@pytest.mark.slow
def test_diffusers_answers_with_a_merged_lora_as_we_do(folder, complaints, tmp_path):
    host = tiny_model()
    paths = [write_lora(tmp_path / "a.safetensors", host, 1, conv_dim="3", conv_alpha="1"),
             write_lora(tmp_path / "b.safetensors", host, 2, rank=2, alpha=1.0)]
    tensors = load_file(paths[1])  # ranks then differ within the text encoder too
    save_file({key: value for key, value in tensors.items() if "layers_0_mlp" not in key}, paths[1])
    out = tmp_path / "both.safetensors"
    merge_lora.merge(merge_lora.MergeOptions(
        models=tuple(map(str, paths)), ratios=(0.7, -0.5), concat=True, save_to=str(out)
    ))  # fmt: skip
    pipe = loaded_by_diffusers(folder, out, complaints)
    ours = tiny_model()
    hook(ours, paths[0], 0.7)
    hook(ours, paths[1], -0.5)
    assert_equal_answers(answers(pipe), answers(ours))


@pytest.mark.slow
def test_merging_makes_a_file_with_many_alphas_readable_for_diffusers(folder, complaints, tmp_path):
    path = write_lora(tmp_path / "blocks.safetensors", tiny_model(), 4,
                      block_dims=",".join(str(2 + index % 3) for index in range(25)),
                      block_alphas=",".join(str(1 + index % 2) for index in range(25)))
    assert len({float(value) for key, value in load_file(path).items() if key.endswith(".alpha")}) > 1
    out = tmp_path / "one_alpha.safetensors"
    merge_lora.merge(merge_lora.MergeOptions(models=(str(path),), ratios=(1.0,), save_to=str(out)))
    ours = tiny_model()
    hook(ours, path)
    assert_equal_answers(answers(loaded_by_diffusers(folder, out, complaints)), answers(ours))


# --- ours reads theirs ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    """A pipeline with adapters of PEFT in all kinds of layers, with mixed ranks and alphas."""
    from peft import LoraConfig

    torch.manual_seed(8)
    pipe = pipeline(folder)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.2", "conv_shortcut"]
    pipe.unet.add_adapter(LoraConfig(
        r=4, lora_alpha=6, target_modules=layers, init_lora_weights=False, rank_pattern={"conv1": 2},
        alpha_pattern={"conv1": 3, "attn2.to_k": 1},
    ))  # fmt: skip
    pipe.text_encoder.add_adapter(LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "out_proj", "fc1"], init_lora_weights=False, use_rslora=True
    ))  # fmt: skip
    for module in (pipe.unet, pipe.text_encoder):
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.15)
    return pipe


def layers_of(pipe: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(pipe.unet), get_peft_model_state_dict(pipe.text_encoder)


def our_answers(path: Path) -> dict[str, Tensor]:
    ours = tiny_model()
    network = hook(ours, path)
    assert all("lora_" in key or key.endswith(".alpha") for key in network.state_dict())
    return answers(ours)


def test_we_answer_as_diffusers_with_its_file_and_settings(theirs, plain, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata

    unet, text = layers_of(theirs)
    settings = _collate_lora_metadata({"unet": theirs.unet, "text_encoder": theirs.text_encoder})
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=unet, text_encoder_lora_layers=text, **settings
    )
    assert_other_answers(answers(theirs), plain)
    assert_equal_answers(our_answers(tmp_path / "pytorch_lora_weights.safetensors"), answers(theirs))


@pytest.mark.parametrize("naming", ["peft", "diffusers", "pickle"])
def test_without_settings_a_module_counts_fully(naming, folder, theirs, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    unet, text = layers_of(theirs)
    if naming == "diffusers":  # which mixes names, and cannot read that again, where other layers take part
        unet = {key: value for key, value in unet.items() if ".to_" in key}
        text = {key: value for key, value in text.items() if "self_attn" in key}
        unet, text = convert_state_dict_to_diffusers(unet), convert_state_dict_to_diffusers(text)
        assert any("lora_linear_layer" in key for key in text) and any(".lora.down" in key for key in unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=unet, text_encoder_lora_layers=text, safe_serialization=naming != "pickle"
    )
    [path] = tmp_path.glob("pytorch_lora_weights.*")
    tensors = load_network_file(path)
    assert not [key for key in tensors if key.endswith(".alpha")]
    reference = pipeline(folder)
    reference.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert_equal_answers(our_answers(path), answers(reference))


def test_alphas_inside_the_file_win(theirs, tmp_path):
    unet, _ = layers_of(theirs)
    tensors = {f"unet.{key}": value for key, value in unet.items()}
    one = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors[f"{one}.alpha"] = torch.tensor(0.5)
    settings = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_k": 2}})}
    save_file(tensors, tmp_path / "x.safetensors", settings)
    loaded = load_network_file(tmp_path / "x.safetensors")
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in loaded.items() if key.endswith(".alpha")}
    name = f"lora_{one.replace('.', '_')}"
    assert alphas[name] == 0.5
    assert alphas[name.replace("to_q", "to_k")] == 2
    assert {alphas[key] for key in alphas if "attn1_to_v" in key} == {8.0}


def test_peft_s_own_folder_is_read_with_its_settings(folder, plain, tmp_path):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(9)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v", "conv2"], init_lora_weights=False)
    model = get_peft_model(UNet2DConditionModel.from_pretrained(folder / "unet"), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    ours = our_answers(tmp_path / "adapter_model.safetensors")
    theirs = answers(type("Pipeline", (), {"unet": model.base_model.model, "text_encoder": tiny_model().text_encoder}))
    assert float((theirs["noise"] - plain["noise"]).abs().max()) > 0.05
    assert_equal_answers(ours, theirs)


def test_attention_processors_of_old_files_are_read():
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    weights = {
        f"unet.{block}.attn1.processor.to_out_lora.down.weight": torch.ones(2, 3),
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora.up.weight": torch.ones(3, 2),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight": torch.ones(3, 2),
        "text_encoder.encoder.layers.1.mlp.fc1.lora_linear_layer.down.weight": torch.ones(2, 3),
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 3),
        "base_model.model.mid_block.resnets.0.conv1.lora_B.default.weight": torch.ones(2, 3, 1, 1),
    }
    assert list(to_own_names(weights, "sdxl")) == [
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
        "lora_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_q.lora_up.weight",
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_down.weight",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_unet_middle_block_0_in_layers_2.lora_up.weight",
    ]


def test_our_own_names_stay_as_they_are(tmp_path):
    tensors = load_file(write_lora(tmp_path / "lora.safetensors", tiny_model(), 1, conv_dim="2"))
    assert to_own_names(tensors, "sd") == tensors


@pytest.mark.slow
def test_a_diffusers_file_continues_training(theirs, tmp_path):
    from diffusers import StableDiffusionPipeline

    unet, text = layers_of(theirs)
    keep = {key: value for key, value in unet.items() if "attn" in key}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=keep, text_encoder_lora_layers=text)
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    start = tmp_path / "pytorch_lora_weights.safetensors"
    path = train("--dataset_config", write_config(tmp_path, photos), "--network_weights", start, "--dim_from_weights",
                 "--max_train_steps", "1", "--learning_rate", "1e-6", output_dir=tmp_path / "out")
    trained, before = load_file(path), load_network_file(start)
    assert set(before) <= set(trained)
    assert all(torch.allclose(trained[key], value, atol=1e-4) for key, value in before.items())


# --- LyCORIS -------------------------------------------------------------------------------------------------
@pytest.fixture
def lycoris_presets() -> Iterator[None]:
    """LyCORIS keeps its presets as class attributes of the whole process: put them back."""
    from lycoris import LycorisNetwork
    from lycoris.kohya import LycorisNetworkKohya

    classes = [LycorisNetwork, LycorisNetworkKohya]
    before = [{k: v for k, v in vars(c).items() if k.isupper()} for c in classes]
    yield
    for network_class, values in zip(classes, before, strict=True):
        for name, value in values.items():
            setattr(network_class, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["lora", pytest.param("loha", marks=pytest.mark.slow)])
def test_a_network_of_lycoris_draws_in_our_engine(algorithm, lycoris_presets, tmp_path):
    from lycoris import kohya

    made = tiny_family()
    host = contract.HostModels(made.vae, made.network_text_encoders(), made.denoiser)
    network = kohya.create_network(
        1.0, 4, 2, host.vae, host.text_encoder, host.unet, algo=algorithm, preset="attn-mlp", conv_dim=2, conv_alpha=1
    )
    network.apply_to(host.text_encoder, host.unet, True, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(str(path), None, {})
    expected = picture(made)

    family = tiny_family()
    host = contract.HostModels(family.vae, family.network_text_encoders(), family.denoiser)
    without = picture(family)
    read, weights = contract.create_for_generation("lycoris.kohya", path, host, 1.0)
    contract.apply(read, host, True, True)
    assert not read.load_state_dict(weights, strict=False).unexpected_keys
    drawn = picture(family)
    assert float((drawn - without).abs().max()) > 0.05
    assert_equal_pictures(drawn, expected)
    if algorithm == "lora":  # plain LoRA needs no LyCORIS to be read
        own = tiny_family()
        hook(own.modules, path)
        assert_equal_pictures(picture(own), expected)


@pytest.mark.slow
def test_files_of_lycoris_wrapper_are_read(lycoris_presets, plain, tmp_path):
    from lycoris import LycorisNetwork, create_lycoris

    made = tiny_model()
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel"]})
    network = create_lycoris(made.unet, 1.0, linear_dim=4, linear_alpha=2, algo="lora", preset="unet-transformer-only")
    network.apply_to()
    randomize(network, 12)
    network.save_weights(str(tmp_path / "wrapped.safetensors"), None, {})
    assert all(key.startswith("lycoris_") for key in load_file(tmp_path / "wrapped.safetensors"))
    assert float((answers(made)["noise"] - plain["noise"]).abs().max()) > 0.05
    assert_equal_answers(our_answers(tmp_path / "wrapped.safetensors"), answers(made))


# --- refusals ------------------------------------------------------------------------------------------------
def test_a_file_for_a_wider_model_is_refused_with_its_name(tmp_path):
    path = write_lora(tmp_path / "lora.safetensors", tiny_model(), 1)
    tensors = load_file(path)
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    save_file(tensors | {key: torch.ones(4, 768)}, path)
    host = tiny_model()
    network, _ = lora.create_network_from_weights(1.0, path, None, host.text_encoder, host.unet)
    with pytest.raises(ValueError, match=rf"lora\.safetensors: 1 tensors do not fit.*{key}.*768"):
        network.load_weights(path)

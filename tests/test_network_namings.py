"""LoRA files in the namings of other programs do exactly what the same file does in ours, for every family."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from library.checkpoints import layout_flux, layout_sd3
from networks import contract, lora, lora_flux, lora_sd3
from networks.naming_unet import DIFFUSERS_TO_SAI, SAI_TO_DIFFUSERS
from networks.recognition import describe
from networks.weights_file import as_own_lora, load_network_file
from tests import flux_tiny, lora_files, sd3_tiny, sdxl_tiny

Tensors = dict[str, Tensor]
#: how exactly two ways to the same change agree
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Model:
    """A tiny model, its network module, and what it answers."""

    def __init__(self, family: Any, module: ModuleType, answer: Callable[[Any], Tensor], **arguments: str) -> None:
        self.family, self.module, self.answer = family, module, answer
        encoders, self.paths = family.network_text_encoders(), {}
        self.models = contract.HostModels(family.vae, encoders, family.denoiser)
        network = module.create_network(1.0, 3, 2.0, None, encoders, family.denoiser, **arguments)
        generator = torch.Generator().manual_seed(5)
        self.lora = {
            key: value.clone() if key.endswith("alpha") else torch.randn(value.shape, generator=generator) * 0.1
            for key, value in network.state_dict().items()
        }
        layers = {id(layer): path for path, layer in family.denoiser.named_modules()}
        for index, encoder in enumerate(encoders if isinstance(encoders, list) else [encoders]):
            layers |= {id(layer): f"TEXT{index}.{path}" for path, layer in encoder.named_modules()}
        self.paths = {adapter.lora_name: layers[id(adapter.host)] for adapter in network.adapters}

    def answer_with(self, path: Path) -> Tensor:
        """What the model answers with a file hooked in as generators do it; the model is as before afterwards."""
        network, _ = contract.create_for_generation(self.module.__name__, path, self.models)
        contract.apply(network, self.models, True, True)
        contract.load_weights(network, path)
        try:
            return self.answer(self.family)
        finally:
            for adapter in network.adapters:
                adapter.host.forward = adapter.org_forward


def with_text(family: Any) -> Tensor:
    """The denoiser's answer to text that the text encoders encode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        text = family.encode_text(family.tokenize(["a cat"]))
        x_t = torch.randn(1, family.latent.channels, 16, 16, generator=generator)
        sizes = sdxl_tiny.SIZES if isinstance(family, type(sdxl_tiny_family())) else None
        return family.predict(x_t, torch.tensor([500.0]), text, sizes)


_FAMILIES: dict[str, Model] = {}


def sdxl_tiny_family() -> Any:
    return _FAMILIES["sdxl"].family if "sdxl" in _FAMILIES else sdxl_tiny.sdxl_family()


def model(name: str) -> Model:
    """The tiny model of a family with a random LoRA for it, made once."""
    if name not in _FAMILIES:
        make: Mapping[str, Callable[[], Model]] = {
            "sd": lambda: Model(lora_files.tiny_family(), lora, with_text, conv_dim="2", conv_alpha="1"),
            "sdxl": lambda: Model(sdxl_tiny.sdxl_family(), lora, with_text, conv_dim="2", conv_alpha="1"),
            "sd3": lambda: Model(sd3_tiny.tiny_family(), lora_sd3, with_text, train_t5xxl="True"),
            "flux": lambda: Model(
                flux_tiny.flux_family(t5xxl_max_token_length=16), lora_flux, with_text, train_t5xxl="True"
            ),
        }
        _FAMILIES[name] = make[name]()
    return _FAMILIES[name]


# --- spellings of our own layers -------------------------------------------------------------------------------
TEXT_PREFIXES = {
    "diffusers": {"te": "text_encoder.", "te1": "text_encoder.", "te2": "text_encoder_2.", "te3": "text_encoder_3."},
    "ComfyUI": {"te": "text_encoders.clip_l.transformer.", "te1": "text_encoders.clip_l.transformer.",
                "te2": "text_encoders.clip_g.transformer.", "te3": "text_encoders.t5xxl.transformer."},
}  # fmt: skip


def dotted(name: str, path: str, denoiser: str, text: Mapping[str, str]) -> str:
    """A module under its dotted path, behind the prefix of its part."""
    if not path.startswith("TEXT"):
        return denoiser + path
    path = path.partition(".")[2]
    part = name.split("_")[1]
    if part != "te3" and not path.startswith("text_model."):
        path = f"text_model.{path}"
    return text[part] + path


def respelled(own: Model, rename: Callable[[str, str], str], *, peft: bool = False) -> Tensors:
    """The model's LoRA with other module names; in PEFT's way without alphas, which are in the factors then."""
    result: Tensors = {}
    for name, path in own.paths.items():
        down, up, alpha = (own.lora[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        other = rename(name, path)
        if peft:
            result |= {f"{other}.lora_A.weight": down, f"{other}.lora_B.weight": up * float(alpha / down.shape[0])}
        else:
            result |= {f"{other}.lora_down.weight": down, f"{other}.lora_up.weight": up, f"{other}.alpha": alpha}
    return result


def assert_same_answer(own: Model, tensors: Tensors, folder: Path) -> None:
    save_file(own.lora, folder / "own.safetensors")
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "other.safetensors")
    expected, plain = own.answer_with(folder / "own.safetensors"), own.answer(own.family)
    assert (expected - plain).abs().max() > 1e-2
    assert_close(own.answer_with(folder / "other.safetensors"), expected, **TOLERANCE)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("spelling", ["dotted", "flat with lora_A", "ComfyUI", "PEFT"])
def test_our_layers_are_known_in_every_spelling(spelling, family, tmp_path):
    own = model(family)
    comfy = TEXT_PREFIXES["ComfyUI"]
    spellings: dict[str, Callable[[], Tensors]] = {
        "dotted": lambda: respelled(own, lambda name, path: dotted(name, path, "unet.", TEXT_PREFIXES["diffusers"])),
        "flat with lora_A": lambda: respelled(own, lambda name, path: name, peft=True),
        "ComfyUI": lambda: respelled(own, lambda name, path: dotted(name, path, "diffusion_model.", comfy)),
        "PEFT": lambda: respelled(
            own, lambda name, path: dotted(name, path, "base_model.model.transformer.", comfy), peft=True
        ),
    }
    assert_same_answer(own, spellings[spelling](), tmp_path)


# --- layers that others name or divide differently -------------------------------------------------------------
def renamed_unet(table: Mapping[str, str], prefix: str, name: str) -> str:
    """The flat name of a U-Net layer in the other program's naming."""
    layer = name.removeprefix("lora_unet_")
    for end in range(len(layer), 0, -1):
        if layer[:end] in table and layer[end : end + 1] in ("", "_"):
            return prefix + table[layer[:end]] + layer[end:]
    raise AssertionError(name)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_unet_layers_are_known_by_diffusers_and_by_checkpoint_names(family, prefix, tmp_path):
    own = model(family)
    ours, theirs = (DIFFUSERS_TO_SAI, "sdxl") if family == "sdxl" else (SAI_TO_DIFFUSERS, "sd")
    back = {value: key for key, value in ours.items()}

    def rename(name: str, path: str) -> str:
        if not name.startswith("lora_unet_"):
            return name.replace("lora_te_", "lora_te1_")
        return renamed_unet(back, prefix, name)

    assert_same_answer(own, respelled(own, rename), tmp_path)
    kind = describe(respelled(own, rename))
    assert kind.family in (theirs, None) and kind.algorithm == "LoRA"


def divided(own: Model, family: str, prefix: str, text: Mapping[str, str], flat: str = ".") -> Tensors:
    """Our LoRA under diffusers' names with PEFT's factors, made by the table of checkpoints: up is cut to rows."""
    layout: Any = layout_flux if family == "flux" else layout_sd3
    state = {key: value.detach() for key, value in own.family.denoiser.state_dict().items()}
    result: Tensors = {}
    for name, path in own.paths.items():
        down, up, alpha = (own.lora[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        up = up * float(alpha / down.shape[0])
        if path.startswith("TEXT"):
            other = dotted(name, path, "", text)
            result |= {f"{other}.lora_A.weight": down, f"{other}.lora_B.weight": up}
            continue
        theirs = layout.to_diffusers({**state, f"{path}.weight": up})
        marked = layout.to_diffusers({**state, f"{path}.weight": torch.full_like(up, torch.nan)})
        for key in theirs:
            if marked[key].isnan().any():
                other = prefix + (flat.join(key.removesuffix(".weight").split(".")))
                result |= {f"{other}.lora_A.weight": down.clone(), f"{other}.lora_B.weight": theirs[key]}
    return result


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_under_diffusers_names_are_put_together(family, tmp_path):
    own = model(family)
    text = dict(TEXT_PREFIXES["diffusers"])
    if family == "flux":
        text["te3"] = "text_encoder_2."
    tensors = divided(own, family, "transformer.", text)
    assert any(".attn.to_q." in key for key in tensors)
    assert_same_answer(own, tensors, tmp_path)
    ranks = {value.shape[0] for key, value in load_network_file(tmp_path / "other.safetensors", family).items()
             if key.endswith("lora_down.weight")}  # fmt: skip
    assert ranks == {3}, "parts with one down factor keep the rank"


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_onetrainers_names_are_read(family, tmp_path):
    own = model(family)
    flat = {"te1": "lora_te1_", "te2": "lora_te2_", "te3": "lora_te3_" if family == "sd3" else "lora_te2_"}
    tensors = {
        re.sub(r"^(lora_te\d_)(.*)(\.lora_[AB]\.weight)$", lambda m: m[1] + m[2].replace(".", "_") + m[3], key): value
        for key, value in divided(own, family, "lora_transformer_", flat, "_").items()
    }
    tensors = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for key, value in tensors.items()}
    assert_same_answer(own, tensors, tmp_path)


def test_parts_with_different_ranks_and_alphas_add_up_and_missing_ones_are_zero(tmp_path):
    torch.manual_seed(0)
    path = "transformer.single_transformer_blocks.0"
    parts = {"attn.to_q": (2, 1.0, 64), "attn.to_v": (3, 6.0, 64), "proj_mlp": (1, None, 256)}
    tensors: Tensors = {}
    expected = torch.zeros(448, 64)
    rows = {"attn.to_q": 0, "attn.to_v": 128, "proj_mlp": 192}
    for name, (rank, alpha, height) in parts.items():
        down, up = torch.randn(rank, 64), torch.randn(height, rank)
        tensors |= {f"{path}.{name}.lora_A.weight": down, f"{path}.{name}.lora_B.weight": up}
        if alpha is not None:
            tensors[f"{path}.{name}.alpha"] = torch.tensor(alpha)
        expected[rows[name] : rows[name] + height] = up @ down * ((alpha or rank) / rank)
    save_file(tensors, tmp_path / "x.safetensors")
    own = load_network_file(tmp_path / "x.safetensors", "flux")
    name = "lora_unet_single_blocks_0_linear1"
    assert {key.partition(".")[0] for key in own} == {name}
    down, up, alpha = (own[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert_close(up @ down * float(alpha) / down.shape[0], expected, rtol=1e-5, atol=1e-4)


def test_xlabs_names_are_read(tmp_path):
    names = {
        "img_attn_qkv": ("double", "qkv_lora1", 192, 64), "img_attn_proj": ("double", "proj_lora1", 64, 64),
        "txt_attn_qkv": ("double", "qkv_lora2", 192, 64), "txt_attn_proj": ("double", "proj_lora2", 64, 64),
        "linear1": ("single", "qkv_lora", 192, 64), "linear2": ("single", "proj_lora", 64, 320),
    }  # fmt: skip
    tensors: Tensors = {}
    for group, theirs, height, width in names.values():
        for part, shape in (("down", (2, width)), ("up", (height, 2))):
            tensors[f"{group}_blocks.0.processor.{theirs}.{part}.weight"] = torch.randn(shape)
    save_file(tensors, tmp_path / "x.safetensors")
    assert describe(tensors).naming == "XLabs"
    own = load_network_file(tmp_path / "x.safetensors", "flux")
    for ours, (group, theirs, height, _) in names.items():
        up = own[f"lora_unet_{group}_blocks_0_{ours}.lora_up.weight"]
        assert torch.equal(up[:height], tensors[f"{group}_blocks.0.processor.{theirs}.up.weight"])
        assert not up[height:].any()
    assert own["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (448, 2)


def test_t5_under_the_number_two_is_t5(tmp_path):
    own = model("flux")
    tensors = {key.replace("lora_te3_", "lora_te2_"): value for key, value in own.lora.items()}
    assert_same_answer(own, tensors, tmp_path)


# --- algorithms, families, strengths ---------------------------------------------------------------------------
NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(("parameter", "shape", "algorithm"), [
    ("hada_w1_a", (32, 2), "LoHa"), ("lokr_w1", (2, 2), "LoKr"), ("oft_blocks", (4, 8, 8), "OFT"),
    ("oft_blocks", (2, 4, 8, 8), "BOFT"), ("diff", (32, 32), "full differences"), ("on_input", (), r"\(IA\)\^3"),
    ("a1.weight", (2, 32), "GLoRA"), ("w_norm", (32,), "norm"), ("dora_scale", (32, 1), "DoRA"),
    ("lora_up.bias", (32,), "biases"),
])  # fmt: skip
def test_other_algorithms_are_refused_by_name(parameter, shape, algorithm, tmp_path):
    own = model("sd")
    path = tmp_path / "x.safetensors"
    save_file({**own.lora, f"{NAME}.{parameter}": torch.ones(shape)}, path)
    with pytest.raises(ValueError, match=rf"--network_weights: .*x\.safetensors is an? .*{algorithm}.*lycoris\.kohya"):
        contract.create_for_generation("networks.lora", path, own.models)
    with pytest.raises(ValueError, match=rf"--base_weights: .*{algorithm}"):
        contract.merge_base_weights("networks.lora", path, 1.0, own.models, dtype=None, device="cpu")
    network = lora.create_network(1.0, 3, 2.0, None, own.models.text_encoder, own.models.unet)
    with pytest.raises(ValueError, match=rf"--network_weights .*{algorithm}"):
        network.load_weights(path)


def test_tucker_cores_are_used():
    torch.manual_seed(2)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, middle, up = torch.randn(3, 8, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(6, 3, 1, 1)
    own = as_own_lora({f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": middle,
                       f"{name}.lora_up.weight": up}, "sd", source="x")  # fmt: skip
    assert set(own) == {f"{name}.lora_down.weight", f"{name}.lora_up.weight"}
    x = torch.randn(1, 8, 7, 7)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(x, down), middle, padding=1), up)
    assert_close(conv(conv(x, own[f"{name}.lora_down.weight"], padding=1), up), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file_for", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("used_on", ["sd", "sdxl", "sd3", "flux"])
def test_a_file_for_another_family_is_refused_and_named(used_on, file_for, tmp_path):
    if used_on == file_for:
        return
    own, path = model(used_on), tmp_path / "x.safetensors"
    save_file(model(file_for).lora, path)
    labels = {"sd": "Stable Diffusion 1", "sdxl": "SDXL", "sd3": "Stable Diffusion 3", "flux": "FLUX"}
    script = {"sd": " train_network.py"}.get(file_for, f"{file_for}_train_network.py")
    message = rf"x\.safetensors is a LoRA for {labels[file_for]}.*{labels[used_on]}.*{script}"
    with pytest.raises(ValueError, match=rf"--network_weights: .*{message}"):
        contract.create_for_generation(own.module.__name__, path, own.models)
    with pytest.raises(ValueError, match=rf"--base_weights: .*{message}"):
        contract.merge_base_weights(own.module.__name__, path, 1.0, own.models, dtype=None, device="cpu")


def test_nothing_for_the_denoiser_is_an_error_where_text_encoders_fit(tmp_path):
    own = model("flux")
    text = {key: value for key, value in own.lora.items() if key.startswith("lora_te1_")}
    save_file({**text, "lora_unet_other.lora_down.weight": torch.ones(2, 64),
               "lora_unet_other.lora_up.weight": torch.ones(64, 2)}, tmp_path / "x.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="none of its 1 modules for the denoiser"):
        contract.create_for_generation("networks.lora_flux", tmp_path / "x.safetensors", own.models)
    save_file(text, tmp_path / "x.safetensors")
    contract.create_for_generation("networks.lora_flux", tmp_path / "x.safetensors", own.models)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_an_alpha_of_zero_or_none_is_the_rank(family, tmp_path):
    own = model(family)
    ones = {key: torch.tensor(float(own.lora[key.replace("alpha", "lora_down.weight")].shape[0]))
            if key.endswith("alpha") else value for key, value in own.lora.items()}  # fmt: skip
    zeros = {key: torch.zeros(()) if key.endswith("alpha") else value for key, value in own.lora.items()}
    absent = {key: value for index, (key, value) in enumerate(zeros.items()) if not key.endswith("alpha") or index % 2}
    for name, tensors in (("ones", ones), ("zeros", zeros), ("absent", absent)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    expected = own.answer_with(tmp_path / "ones.safetensors")
    for name in ("zeros", "absent"):
        path = tmp_path / f"{name}.safetensors"
        assert_close(own.answer_with(path), expected, **TOLERANCE)
        network, weights = contract.create_for_generation(own.module.__name__, path, own.models)
        network.load_state_dict(weights, strict=False)
        assert {adapter.scale for adapter in network.adapters} == {1.0}

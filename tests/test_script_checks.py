"""What single scripts refuse or warn about, before anything is loaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from library import launch
from library.options import make_options
from library.options.checks import Checked, check_options
from library.options.full import FullTrainingOptions
from library.options.script import all_but
from tests.test_cli_parity import TRAINING

FILES = ("pretrained_model_name_or_path", "ae", "clip_l", "clip_g", "t5xxl")
BLOCK_RATES = ",".join(["1e-5"] * 23)


def check(name: str, folder: Path, **values: Any) -> Checked:
    """The checks of a script with everything that it needs, and with `values`."""
    script: launch.Script = importlib.import_module(name).SCRIPT
    specs = script.options.specs()
    complete: dict[str, Any] = {"output_dir": str(folder), "network_module": "networks.lora", "token_string": "mine"}
    for option in FILES:
        complete[option] = str(folder / f"{option}.safetensors")
        Path(complete[option]).touch()
    given = {option: value for option, value in complete.items() if option in specs} | values
    assert set(given) <= set(specs), "the script does not have these options"
    defaults = {option: spec.default for option, spec in specs.items()}
    return check_options(make_options(**(defaults | given)), script.options)


@pytest.mark.parametrize("name", TRAINING)
def test_complete_options_have_no_problems(tmp_path: Path, name: str) -> None:
    checked = check(name, tmp_path)
    assert checked.problems == ()
    assert checked.warnings == ()


T5, CACHED = {"train_text_encoder": True, "train_t5xxl": True}, {"cache_text_encoder_outputs": True}
FUSED = {"fused_optimizer_groups": 4}
ADAFACTOR = {"optimizer_type": "Adafactor"}
PROBLEMS: list[tuple[str, dict[str, Any], str]] = [
    # models
    ("sdxl_train_network", {"v2": True}, "--v2 is for Stable Diffusion 2.x"),
    ("sdxl_train", {"v2": True}, "--v2 is for Stable Diffusion 2.x"),
    ("sdxl_train_textual_inversion", {"v2": True}, "--v2 is for Stable Diffusion 2.x"),
    ("sdxl_train_control_net", {"v2": True}, "--v2 is for Stable Diffusion 2.x"),
    ("sdxl_train_control_net_lllite", {"v2": True}, "--v2 is for Stable Diffusion 2.x"),
    ("flux_train", {"ae": "nothing.sft"}, "--ae: there is no file or folder nothing.sft"),
    ("sd3_train", {"clip_g": "owner/model"}, "--clip_g: there is no file or folder owner/model"),
    ("train_control_net", {"controlnet_model_name_or_path": "a.pt"}, "--controlnet_model_name_or_path: there is no"),
    *(
        (name, {"weighted_captions": True}, "--weighted_captions does not work with this model")
        for name in ("flux_train", "flux_train_network", "flux_train_control_net", "sd3_train", "sd3_train_network")
    ),
    # loss and noise
    *(
        (name, {"loss_type": loss}, f"--loss_type {loss} needs --huber_schedule constant or exponential")
        for name in ("flux_train", "flux_train_network", "flux_train_control_net", "sd3_train", "sd3_train_network")
        for loss in ("huber", "smooth_l1")
    ),
    ("flux_train", {"discrete_flow_shift": 0}, "--discrete_flow_shift 0.0 is not allowed: it must be above 0"),
    ("sd3_train", {"training_shift": -1}, "--training_shift -1.0 is not allowed: it must be above 0"),
    ("flux_train_control_net", {"masked_loss": True, "alpha_mask": True}, "--masked_loss cannot be combined"),
    # cached text
    ("sdxl_train_network", CACHED, "needs --network_train_unet_only"),
    ("sdxl_train", CACHED | {"train_text_encoder": True}, "cannot be combined with --train_text_encoder"),
    ("sdxl_train", CACHED | {"weighted_captions": True}, "cannot be combined with --weighted_captions"),
    ("sd3_train", CACHED | {"train_text_encoder": True}, "cannot be combined with --train_text_encoder"),
    ("sd3_train", {"train_t5xxl": True}, "--train_t5xxl needs --train_text_encoder"),
    ("sd3_train", T5 | {"use_t5xxl_cache_only": True}, "--train_t5xxl cannot be combined with --use_t5xxl_cache_only"),
    *(
        ("sdxl_train", CACHED | changing, "cached captions never change")
        for changing in (
            {"shuffle_caption": True},
            {"caption_dropout_rate": 0.1},
            {"caption_dropout_every_n_epochs": 2},
            {"caption_tag_dropout_rate": 0.1},
            {"token_warmup_step": 10},
        )
    ),
    # whole models
    ("train_db", {"use_safetensors": True, "save_model_as": "ckpt"}, "cannot be combined with --save_model_as ckpt"),
    ("train_db", {"stop_text_encoder_training": -2}, "--stop_text_encoder_training -2 is not allowed"),
    # optimizers that step inside the backward pass
    ("flux_train", {"fused_optimizer_groups": 2}, "use --blockwise_fused_optimizers"),
    ("sd3_train", {"fused_optimizer_groups": 2}, "use --blockwise_fused_optimizers"),
    (
        "sdxl_train",
        FUSED | ADAFACTOR | {"fused_backward_pass": True, "optimizer_args": ["relative_step=False"]},
        "--fused_optimizer_groups and --fused_backward_pass cannot be combined",
    ),
    ("sdxl_train", FUSED | {"gradient_accumulation_steps": 2}, "cannot be combined with --gradient_accumulation_steps"),
    ("sdxl_train", FUSED | {"mixed_precision": "fp16"}, "cannot be combined with --mixed_precision fp16"),
    ("sdxl_train", FUSED | {"optimizer_type": "AdamWScheduleFree"}, "--optimizer_type AdamWScheduleFree"),
    ("sdxl_train", FUSED | ADAFACTOR, "needs --optimizer_args relative_step=False"),
    ("sdxl_train", {"fused_optimizer_groups": 0}, "--fused_optimizer_groups 0 is not allowed"),
    (
        "flux_train",
        ADAFACTOR | {"blockwise_fused_optimizers": True},
        "--blockwise_fused_optimizers with --optimizer_type Adafactor needs",
    ),
    # embeddings
    *(
        (name, {"token_string": None}, "--token_string is missing")
        for name in ("train_textual_inversion", "sdxl_train_textual_inversion", "train_textual_inversion_XTI")
    ),
    (
        "train_textual_inversion",
        {"use_object_template": True, "use_style_template": True},
        "--use_object_template and --use_style_template cannot be combined",
    ),
    ("train_textual_inversion", {"num_vectors_per_token": 0}, "--num_vectors_per_token 0 is not allowed"),
    ("train_textual_inversion", {"weights": "nothing.pt"}, "--weights: there is no file nothing.pt"),
]


@pytest.mark.parametrize(("name", "values", "message"), PROBLEMS)
def test_contradiction_is_one_error(tmp_path: Path, name: str, values: dict[str, Any], message: str) -> None:
    problems = check(name, tmp_path, **values).problems
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sdxl_train_network", CACHED | {"network_train_unet_only": True}),
        ("sd3_train", {"train_text_encoder": True, "use_t5xxl_cache_only": True}),
        ("sd3_train", T5),
        ("sdxl_train", FUSED | ADAFACTOR | {"optimizer_args": ["relative_step=False"]}),
        ("flux_train", {"loss_type": "huber", "huber_schedule": "exponential"}),
        ("train_network", {"loss_type": "huber"}),
        ("train_network", {"weighted_captions": True}),
        ("sdxl_train_control_net", CACHED),
        ("train_db", {"use_safetensors": True}),
    ],
)
def test_neighbours_of_contradictions_are_allowed(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    assert check(name, tmp_path, **values).problems == ()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("flux_train", {"controlnet_model_name_or_path": "."}, "--controlnet_model_name_or_path has no effect"),
        ("flux_train_network", {"controlnet_model_name_or_path": "."}, "--controlnet_model_name_or_path has no effect"),
        ("sdxl_train", {"disable_mmap_load_safetensors": True}, "--disable_mmap_load_safetensors has no effect"),
        ("fine_tune", {"learning_rate_te": 1e-6}, "--learning_rate_te has no effect without --train_text_encoder"),
        ("sdxl_train", {"learning_rate_te2": 1e-6}, "--learning_rate_te2 has no effect without --train_text_encoder"),
        ("sd3_train", {"learning_rate_te3": 1e-6}, "--learning_rate_te3 has no effect without --train_t5xxl"),
        ("sd3_train", {"use_t5xxl_cache_only": True}, "turns on --cache_text_encoder_outputs"),
        ("sdxl_train_control_net", {"cache_text_encoder_outputs_to_disk": True}, "turns on --cache_text_encoder_out"),
    ],
)
def test_odd_combination_is_a_warning(tmp_path: Path, name: str, values: dict[str, Any], message: str) -> None:
    checked = check(name, tmp_path, **values)
    assert checked.problems == ()
    assert len([text for text in checked.warnings if message in text]) == 1


@pytest.mark.parametrize(
    ("name", "values", "implied"),
    [
        ("sd3_train", {"use_t5xxl_cache_only": True}, {"cache_text_encoder_outputs": True}),
        ("flux_train", {"cache_text_encoder_outputs_to_disk": True}, {"cache_text_encoder_outputs": True}),
        ("flux_train", {"skip_latents_validity_check": True}, {"skip_cache_check": True}),
        ("sdxl_train_control_net", {"controlnet_model_path": "."}, {"controlnet_model_name_or_path": "."}),
    ],
)
def test_implied_values_are_filled_in(
    tmp_path: Path, name: str, values: dict[str, Any], implied: dict[str, Any]
) -> None:
    flat = check(name, tmp_path, **values).options.flat()
    assert {option: flat[option] for option in implied} == implied


@pytest.mark.parametrize("value", [BLOCK_RATES, [1e-5] * 23])
def test_block_rates_are_numbers(value: object) -> None:
    assert make_options(block_lr=value).full.block_lr == (1e-5,) * 23


@pytest.mark.parametrize("value", ["1e-5", ",".join(["1e-5"] * 24), ",".join(["x"] * 23), ",".join(["-1"] * 23), []])
def test_bad_block_rates_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is not a list of 23 learning rates"):
        make_options(block_lr=value)


def test_a_row_cannot_keep_an_option_that_its_group_lacks() -> None:
    assert "train_t5xxl" in all_but(FullTrainingOptions, "block_lr")
    with pytest.raises(ValueError, match="FullTrainingOptions has no option"):
        all_but(FullTrainingOptions, "block_rates")

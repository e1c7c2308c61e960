"""Options: parity with the recorded command lines, values, implied values and checks of combinations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from library.options import Options, group_classes, make_options, non_default, read_only_namespace
from library.options.checks import (
    RANGES,
    adjusted,
    check_options,
    is_missing_model,
    is_missing_module,
    paths_exist,
    published_by_wandb,
    ranges,
    without_ending,
)
from library.options.declare import specs_of, whole_or_fraction
from library.options.generation import GenerationOptions
from library.options.not_yet import GENERATION_NOT_YET, NOT_YET, unsupported
from library.options.record import OptionRecord
from library.options.script import NETWORK_TRAINING
from library.options.script_options import ScriptOptions

DATA = Path(__file__).parent / "data"


def test_not_yet_table_names_options_and_prints_its_length(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nNOT_YET: {len(NOT_YET)} options of the scripts that train do not work yet")
        print(f"NOT_YET: {len(GENERATION_NOT_YET)} options of the scripts that draw do not work yet")
    assert set(NOT_YET) <= set(Options().flat())
    assert set(GENERATION_NOT_YET) <= set(GenerationOptions().flat())


@pytest.mark.parametrize("record", [Options, GenerationOptions])
def test_option_names_are_unique_and_explained(record: type[OptionRecord]) -> None:
    specs = [spec for group in record.groups().values() for spec in specs_of(group)]
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(len(spec.help) >= 10 and not spec.help.endswith(".") for spec in specs)


def test_every_field_of_a_group_is_an_option() -> None:
    for group in (*group_classes().values(), *GenerationOptions.groups().values()):
        assert [field.name for field in dataclasses.fields(group)] == [spec.name for spec in specs_of(group)]


def test_values_are_converted_once() -> None:
    options = make_options(
        resolution="512,768", face_crop_aug_range="2.0,4.0", lr_warmup_steps="10%", text_encoder_lr=1e-4,
        network_args=["conv_dim=4"], dataset_config="data.toml",
    )
    assert options.dataset.resolution == (512, 768)
    assert options.dataset.face_crop_aug_range == (2.0, 4.0)
    assert options.optimizer.lr_warmup_steps == 0.1
    assert options.network.text_encoder_lr == (1e-4,)
    assert options.network.network_args == ("conv_dim=4",)
    assert options.dataset.dataset_config == Path("data.toml")


@pytest.mark.parametrize("value", [512, "512", [512], [512, 512], "512,512", "512, 512"])
def test_resolution_in_every_form(value: object) -> None:
    assert make_options(resolution=value).dataset.resolution == (512, 512)


@pytest.mark.parametrize("value", ["", "a", "512,512,512", [], 512.5, "0", True, "-64,64"])
def test_bad_resolution_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        make_options(resolution=value)


@pytest.mark.parametrize("value", ["4.0,2.0", "1", "a,b", [1, 2, 3]])
def test_bad_face_crop_range_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is not a range"):
        make_options(face_crop_aug_range=value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("100", 100), ("1", 1), ("1.0", 1), ("0", 0), ("0.0", 0), ("0.1", 0.1), ("10%", 0.1), ("100%", 1.0)],
)
def test_steps_are_int_and_fractions_are_float(text: str, wanted: float) -> None:
    value = whole_or_fraction(text)
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize("text", ["1.5", "-1", "-5%", "150%", "nan", "inf", "x", "%"])
def test_bad_number_of_steps_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        whole_or_fraction(text)


def test_flat_has_every_option_and_lists_for_several_values() -> None:
    flat = make_options(base_weights=["a", "b"]).flat()
    assert flat["base_weights"] == ["a", "b"]
    assert flat["network_alpha"] == 1 and flat["noise_offset"] is None


def test_make_options_refuses_what_the_command_line_refuses() -> None:
    with pytest.raises(ValueError, match="no such option: lerning_rate"):
        make_options(lerning_rate=1)
    with pytest.raises(ValueError, match="'l3' is not one of: l1, l2"):
        make_options(loss_type="l3")
    with pytest.raises(ValueError, match="'x' is not a whole number"):
        make_options(seed="x")


def test_non_default_knows_the_defaults_of_the_script() -> None:
    assert non_default(make_options(seed=3, loss_type="l2", text_encoder_lr=[1e-5])) == {
        "seed": 3,
        "text_encoder_lr": [1e-5],
    }
    script = ScriptOptions(NETWORK_TRAINING.groups, changes={"save_model_as": {"default": "pt"}})
    options = dataclasses.replace(make_options(save_model_as="pt"), script_defaults=script.defaults())
    assert non_default(options) == {}
    assert non_default(dataclasses.replace(options, saving=Options().saving)) == {"save_model_as": "safetensors"}


def test_namespace_is_read_only() -> None:
    namespace = read_only_namespace(make_options(network_args=["a=1"], resolution=512))
    assert namespace.network_args == ["a=1"] and namespace.resolution == (512, 512) and namespace.vae is None
    with pytest.raises(AttributeError, match="read-only"):
        namespace.vae = "x"
    with pytest.raises(AttributeError, match="read-only"):
        del namespace.vae
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().model.vae = "x"  # type: ignore[misc]


# --- checks --------------------------------------------------------------------------------------------------
def problems(**values: Any) -> str:
    return "\n".join(check_options(make_options(**values), NETWORK_TRAINING).problems)


def warnings(**values: Any) -> str:
    return "\n".join(check_options(make_options(**values), NETWORK_TRAINING).warnings)


def complete(folder: Path) -> dict[str, Any]:
    """Options with which nothing is wrong."""
    model = folder / "model.safetensors"
    model.touch()
    return {"pretrained_model_name_or_path": str(model), "output_dir": str(folder), "network_module": "networks.lora"}


def test_complete_options_have_no_problems_and_no_warnings(tmp_path: Path) -> None:
    assert problems(**complete(tmp_path)) == ""
    assert warnings(**complete(tmp_path)) == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_8bit_adam": True, "use_lion_optimizer": True}, "cannot be combined"),
        ({"use_8bit_adam": True, "optimizer_type": "Lion"}, "cannot be combined with --optimizer_type Lion"),
        ({"fused_backward_pass": True}, "only with --optimizer_type Adafactor"),
        (
            {"fused_backward_pass": True, "optimizer_type": "adafactor", "gradient_accumulation_steps": 2},
            "--gradient_accumulation_steps",
        ),
        ({"fused_backward_pass": True, "optimizer_type": "Adafactor", "mixed_precision": "fp16"}, "fp16: use bf16"),
        ({"full_fp16": True}, "--full_fp16 needs --mixed_precision fp16"),
        ({"full_bf16": True, "mixed_precision": "fp16"}, "--full_bf16 needs --mixed_precision bf16 (it is fp16)"),
        ({"fp8_base": True}, "--fp8_base needs"),
        ({"fp8_base_unet": True}, "--fp8_base_unet needs"),
        ({"scale_v_pred_loss_like_noise_pred": True}, "needs --v_parameterization"),
        ({"v_pred_like_loss": 0.5, "v_parameterization": True}, "cannot be combined with --v_parameterization"),
        ({"adaptive_noise_scale": 0.1}, "needs --noise_offset"),
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep 500 must be below --max_timestep 500"),
        ({"min_timestep": 1000}, "--min_timestep 1000 must be below --max_timestep 1000"),
        ({"max_train_steps": 0}, "--max_train_steps 0 is not allowed: it must be at least 1"),
        ({"optimizer_type": "absent_package.came.CAME"}, "there is no Python module absent_package; install"),
        ({"lr_scheduler_type": "torch.absent.Rex"}, "there is no Python module torch.absent; install"),
        ({"adaptive_noise_scale": 0.1, "noise_offset": 0}, "needs --noise_offset"),
        ({"cache_latents": True, "random_crop": True}, "--cache_latents cannot be combined with --random_crop"),
        ({"cache_latents": True, "color_aug": True, "random_crop": True}, "with --color_aug or --random_crop: cached"),
        ({"sample_every_n_steps": 5}, "sample pictures need --sample_prompts"),
        ({"sample_every_n_epochs": 1}, "sample pictures need --sample_prompts"),
        ({"sample_at_first": True}, "sample pictures need --sample_prompts"),
        ({"log_with": "tensorboard"}, "--log_with tensorboard needs --logging_dir"),
        ({"log_with": "all"}, "--log_with all needs --logging_dir"),
        ({"network_module": None}, "--network_module is missing"),
        ({"network_module": "networks.lorra"}, "there is no such Python module"),
        ({"dim_from_weights": True}, "--dim_from_weights needs --network_weights"),
        ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, "together train nothing"),
        ({"base_weights_multiplier": [1.0]}, "more values than --base_weights"),
        ({"network_args": ["conv_dim"]}, "'conv_dim' is not of the form key=value"),
        ({"output_dir": None}, "--output_dir is missing"),
        ({"output_dir": __file__}, "is a file, not a folder"),
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        ({"vae": "nothing.safetensors"}, "--vae: there is no file or folder nothing.safetensors"),
        ({"network_weights": "nothing.pt"}, "--network_weights: there is no file nothing.pt"),
        ({"base_weights": ["nothing.pt"]}, "--base_weights: there is no file nothing.pt"),
        ({"resume": "nothing"}, "--resume: there is no folder nothing"),
        ({"sample_prompts": "nothing.txt"}, "--sample_prompts: there is no file nothing.txt"),
        ({"lr_warmup_steps": 10}, "use constant_with_warmup"),
        ({"lr_warmup_steps": 10, "lr_scheduler": "adafactor"}, "cannot be combined with --lr_scheduler adafactor"),
        (
            {"lr_warmup_steps": 10, "lr_scheduler_type": "torch.optim.lr_scheduler.ConstantLR"},
            "--lr_warmup_steps cannot be combined with --lr_scheduler_type",
        ),
        ({"train_batch_size": 0}, "--train_batch_size 0 is not allowed: it must be at least 1"),
        ({"seed": 2**32}, "--seed 4294967296"),
        ({"max_timestep": 1001}, "between 0 and 1000"),
        ({"learning_rate": "nan"}, "--learning_rate nan"),
    ],
)
def test_contradiction_is_an_error(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    found = problems(**(complete(tmp_path) | values))
    assert message in found
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"use_8bit_adam": True},
        {"use_lion_optimizer": True},
        {"fused_backward_pass": True, "optimizer_type": "adafactor", "mixed_precision": "bf16"},
        {"full_fp16": True, "mixed_precision": "fp16"},
        {"full_bf16": True, "mixed_precision": "bf16"},
        {"fp8_base": True, "mixed_precision": "bf16"},
        {"fp8_base_unet": True, "mixed_precision": "fp16"},
        {"v_parameterization": True},
        {"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True},
        {"v_pred_like_loss": 0.5},
        {"v_pred_like_loss": 0.0, "v_parameterization": True},
        {"adaptive_noise_scale": 0.1, "noise_offset": 0.1},
        {"min_timestep": 499, "max_timestep": 500},
        {"min_timestep": 999},
        {"max_timestep": 1},
        {"optimizer_type": "torch.optim.AdamW", "lr_scheduler_type": "torch.optim.lr_scheduler.ConstantLR"},
        {"cache_latents": True, "shuffle_caption": True},
        {"color_aug": True, "random_crop": True},
        {"sample_every_n_steps": 5, "sample_prompts": __file__},
        {"log_with": "tensorboard", "logging_dir": "logs"},
        {"log_with": "wandb"},
        {"output_dir": None, "debug_dataset": True},
        {"output_dir": "a/new/folder"},
        *(
            {"lr_warmup_steps": steps} | schedule
            for steps in (10, 0.1)
            for schedule in (
                {"lr_scheduler": "cosine"},
                {"lr_scheduler": "constant_with_warmup"},
                {"optimizer_type": "AdamWScheduleFree"},
                {"optimizer_type": "AdamWScheduleFree", "lr_scheduler_type": "torch.optim.lr_scheduler.ConstantLR"},
            )
        ),
        {"v2": True},
        {"clip_skip": 2},
        {"zero_terminal_snr": True, "v_parameterization": True},
        {"save_last_n_epochs": 2, "save_every_n_epochs": 1},
        {"save_last_n_epochs": 2, "save_n_epoch_ratio": 4},
        {"save_last_n_steps": 2, "save_every_n_steps": 1},
        {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 1},
    ],
    ids=str,
)
def test_neighbours_of_contradictions_are_fine(tmp_path: Path, values: dict[str, Any]) -> None:
    values = complete(tmp_path) | values
    assert (problems(**values), warnings(**values)) == ("", "")


def test_all_problems_are_reported_together() -> None:
    found = problems(full_fp16=True, adaptive_noise_scale=0.1, vae="x.pt").splitlines()
    assert len(found) == 6  # and model, output folder, network module


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"v2": True, "clip_skip": 2}, "--clip_skip is unusual with --v2"),
        ({"zero_terminal_snr": True}, "--zero_terminal_snr without --v_parameterization"),
        ({"save_last_n_epochs": 2}, "--save_last_n_epochs has no effect"),
        ({"save_last_n_steps": 2}, "--save_last_n_steps has no effect"),
        ({"save_last_n_steps": 2, "save_n_epoch_ratio": 4}, "--save_last_n_steps has no effect"),
        ({"max_train_steps": 50, "max_train_epochs": 1}, "--max_train_steps has no effect together with --max_train_e"),
        ({"save_n_epoch_ratio": 2, "save_every_n_epochs": 1}, "--save_every_n_epochs has no effect together"),
        ({"initial_step": 5, "initial_epoch": 2}, "--initial_epoch has no effect together with --initial_step"),
        ({"caption_extention": ".a", "caption_extension": ".b"}, "--caption_extension has no effect together"),
        ({"xformers": True, "mem_eff_attn": True}, "--mem_eff_attn has no effect together with --xformers"),
        ({"lr_scheduler_type": "torch.optim.lr_scheduler.ConstantLR", "lr_scheduler": "cosine"}, "--lr_scheduler has"),
        ({"network_train_unet_only": True, "text_encoder_lr": 1e-5}, "--text_encoder_lr has no effect together"),
    ],
)
def test_odd_combination_is_a_warning(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    values = complete(tmp_path) | values
    assert message in warnings(**values)
    assert problems(**values) == ""


@pytest.mark.parametrize(
    ("values", "name", "wanted"),
    [
        ({"cache_latents_to_disk": True}, "cache_latents", True),
        ({"sample_every_n_steps": -1}, "sample_every_n_steps", None),
        ({"save_every_n_epochs": -1}, "save_every_n_epochs", None),
        ({"output_name": "x.safetensors"}, "output_name", "x"),
        ({"output_name": "v1.5.CKPT"}, "output_name", "v1.5"),
        (
            {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0},
            "persistent_data_loader_workers",
            False,
        ),
        ({"caption_extention": ".txt"}, "caption_extension", ".txt"),
    ],
)
def test_implied_values_are_filled_in(values: dict[str, Any], name: str, wanted: object) -> None:
    checked = check_options(make_options(**values), NETWORK_TRAINING)
    assert checked.options.flat()[name] == wanted
    assert bool(checked.warnings) == (name != "caption_extension")


def test_options_that_are_off_or_at_their_default_are_not_spoken_about(tmp_path: Path) -> None:
    off = {
        "sample_every_n_steps": 0, "sample_every_n_epochs": 0, "save_every_n_epochs": 0, "save_last_n_epochs": 0,
        "save_n_epoch_ratio": 0, "adaptive_noise_scale": 0, "max_train_epochs": 3, "max_train_steps": 1600,
        "output_name": "v1.5", "min_timestep": 0,
        "max_timestep": 1000, "validate_every_n_steps": 0,
    }  # fmt: skip
    assert (problems(**complete(tmp_path) | off), warnings(**complete(tmp_path) | off)) == ("", "")


def test_with_a_dataset_file_its_subsets_decide_about_caching(tmp_path: Path) -> None:
    values = complete(tmp_path) | {"cache_latents": True, "color_aug": True, "dataset_config": "data.toml"}
    assert problems(**values) == ""


#: option: values that are allowed, up to its limits; values beyond them
LIMITS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    **dict.fromkeys(
        (
            "train_batch_size", "dataset_repeats", "bucket_reso_steps", "vae_batch_size", "text_encoder_batch_size",
            "max_train_epochs", "max_train_steps", "gradient_accumulation_steps", "initial_epoch", "clip_skip",
            "network_dim", "t5xxl_max_token_length", "fused_optimizer_groups", "num_vectors_per_token",
        ),
        ((1, 10**6), (0, -1)),
    ),
    **dict.fromkeys(
        (
            "keep_tokens", "caption_dropout_every_n_epochs", "token_warmup_step", "max_data_loader_n_workers",
            "initial_step", "multires_noise_iterations", "num_last_block_to_freeze",
        ),
        ((0, 10**6), (-1,)),
    ),
    **dict.fromkeys(
        (
            "learning_rate", "unet_lr", "control_net_lr", "learning_rate_te", "learning_rate_te1", "learning_rate_te2",
            "learning_rate_te3", "max_grad_norm", "logit_std", "guidance_scale",
        ),
        ((0.0, 1e6), (-1e-6, math.nan)),
    ),
    **dict.fromkeys(
        (
            "caption_dropout_rate", "caption_tag_dropout_rate", "network_dropout", "validation_split",
            "clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate", "pos_emb_random_crop_rate",
        ),
        ((0.0, 1.0), (-1e-6, 1.000001, math.nan)),
    ),
    "min_timestep": ((0, 1000), (-1, 1001)),
    "max_timestep": ((0, 1000), (-1, 1001)),
    "seed": ((0, 2**32 - 1), (-1, 2**32)),
    "stop_text_encoder_training": ((-1, 10**6), (-2,)),
    "cond_emb_dim": ((2, 10**6), (1,)),
}  # fmt: skip


def test_numbers_beyond_their_limits_are_refused_by_name() -> None:
    assert set(LIMITS) == set(RANGES) | {"max_train_steps"}
    for name, (allowed, refused) in LIMITS.items():
        for value in allowed:
            assert list(ranges(make_options(**{name: value}))) == [], name
        for value in refused:
            [found] = ranges(make_options(**{name: value}))
            assert found.startswith(f"--{name} {value}") and "is not allowed: it must be " in found, found
    assert list(ranges(make_options(max_train_steps=0, max_train_epochs=2))) == []  # the steps do not count then


def test_what_is_named_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    files = ("network_weights", "sample_prompts", "log_tracker_config", "weights", "base_weights")
    models = ("clip_l", "clip_g", "t5xxl", "ae", "pretrained_model_name_or_path", "vae",
              "controlnet_model_name_or_path")  # fmt: skip
    for name in (*files, *models):
        for path, exists in (("absent", False), ("file", True), ("folder", name in models)):
            value = [path] if name == "base_weights" else path
            found = list(paths_exist(make_options(**{name: value})))
            assert [text.startswith(f"--{name}: there is no file") for text in found] == [True] * (not exists), name
    for path, exists in (("absent", False), ("file", False), ("folder", True)):
        assert bool(list(paths_exist(make_options(resume=path)))) != exists
    assert list(paths_exist(make_options(resume="owner/name", resume_from_huggingface=True))) == []


def test_intervals_below_one_are_off_and_negative_ones_are_spoken_about() -> None:
    what = [f"{verb}_every_n_{unit}" for verb in ("sample", "save", "validate") for unit in ("steps", "epochs")]
    for name in what:
        for value in (-1, 0, 1):
            options, said = adjusted(make_options(**{name: value}))
            assert options.flat()[name] == (value if value > 0 else None)
            assert said == ([f"--{name} -1 is less than 1 and therefore off."] if value < 0 else [])


def test_names_of_saved_files_lose_the_endings_of_model_files_only() -> None:
    for ending in (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft", ".SafeTensors"):
        assert without_ending(f"v1.5{ending}") == "v1.5"
    for name in ("v1.5", "safetensors", ".ckpt", "model.txt"):
        assert without_ending(name) == name


def test_hub_names_are_told_from_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "here").mkdir()
    assert not is_missing_model("runwayml/stable-diffusion-v1-5")
    assert not is_missing_model("here")
    for name in ("models/absent", "absent", "./a/b", "/a/b", "a/b/c", "owner/model.safetensors", "C:\\a\\b.ckpt"):
        assert is_missing_model(name), name


def test_missing_modules_are_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explosive").mkdir()
    (tmp_path / "explosive" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "explosive" / "inner.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_missing_module("explosive") and not is_missing_module("explosive.inner")
    assert is_missing_module("explosive.absent") and is_missing_module("absent_module") and is_missing_module(".lora")
    assert is_missing_module("json.absent") and not is_missing_module("json.decoder")


def test_unsupported_options_speak_only_when_changed() -> None:
    assert unsupported(Options()) == []
    assert unsupported(make_options(log_with="tensorboard", zero_stage=2)) == []
    assert [text.split(":")[0] for text in unsupported(make_options(log_with="wandb", fp8_base=True))] == [
        "--fp8_base",
        "--log_with",
    ]


def test_secrets_are_reported_only_with_a_publishing_tracker() -> None:
    given = {"wandb_api_key": "k", "output_dir": str(Path.cwd()), "vae": "relative.pt"}
    assert published_by_wandb(given) == ([], [])
    secrets, remarks = published_by_wandb(given | {"log_with": "all"})
    assert len(secrets) == 1 and "--wandb_api_key" in secrets[0]
    assert len(remarks) == 1 and "--output_dir" in remarks[0]


def test_every_secret_and_every_absolute_path_is_reported_once() -> None:
    secrets = ("wandb_api_key", "huggingface_token")
    paths = ("pretrained_model_name_or_path", "vae", "tokenizer_cache_dir", "train_data_dir", "conditioning_data_dir",
             "reg_data_dir", "output_dir", "logging_dir", "config_file", "huggingface_repo_id")  # fmt: skip
    for name in (*secrets, *paths):
        found = published_by_wandb({"log_with": "wandb", name: str(Path.cwd())})
        assert [len(texts) for texts in found] == ([1, 0] if name in secrets else [0, 1]), name
        assert found[name not in secrets][0].startswith(f"--{name} is on the command line")
        assert published_by_wandb({"log_with": "tensorboard", name: str(Path.cwd())}) == ([], [])
    public = {"log_with": "wandb", "huggingface_repo_id": "me/model", "huggingface_repo_visibility": "public"}
    assert published_by_wandb(public) == ([], [])

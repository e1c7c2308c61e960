"""Files that other programs really send: every one is read and checked; what can be trained trains two steps."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from library import launch, tool_launch
from library.options.errors import UserError
from tests.client_files import FOLDER, client_file, command_lines, small_run
from tests.golden import FOLDER as GOLDEN
from tests.test_cli_parity import TRAINING
from tests.training import TOKENIZERS, run_script

FP8 = "--fp8_base: 8-bit base weights are not supported yet."
SPLIT = "--split_mode: swapping blocks with main memory is not supported yet."
OPTIMIZER = "--optimizer_type LoraEasyCustomOptimizer.came.CAME: there is no Python module LoraEasyCustomOptimizer"
SCHEDULE = "--lr_scheduler_type LoraEasyCustomOptimizer.RexAnnealingWarmRestarts"
#: file -> what stops it (nothing: it trains), and the options of the file without which it trains
FILES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "01_kohya_gui_sd15_lora.txt": ([], {}),
    "03_kohya_gui_sdxl_prodigy_preset.txt": ([], {}),
    "04_kohya_gui_flux_lora_preset.txt": ([], {}),
    "05_kohya_gui_lokr_lycoris.txt": ([], {}),
    "07_kohya_gui_sdxl_native_lokr.txt": (
        ["--network_module networks.lokr: there is no such Python module"], {"network_module": "networks.lora"}
    ),
    "08_kohya_gui_dreambooth_sd15.txt": ([], {}),
    "10_kohya_gui_ti_sd15.txt": ([], {}),
    "13_fluxgym_12G.txt": (
        [FP8, SPLIT, "--network_args: train_blocks=single: networks.lora_flux does not support it yet."],
        {"fp8_base": None, "split_mode": None, "network_args": None},
    ),
    "15_hollowstrawberry_colab_xl.txt": ([], {}),
    "16_hollowstrawberry_colab_sd15_wrapper.txt": ([], {}),
    "19_lora_scripts_gui_flux.txt": ([FP8], {"fp8_base": None}),
    # its own launcher adds the prompts
    "20_lora_scripts_toml_sd15.txt": (
        ["sample pictures need --sample_prompts FILE."], {"sample_every_n_epochs": None}
    ),
    "22_lora_training_in_comfy.txt": ([], {}),
    "26_issue_sdxl_full_prodigy.txt": ([], {}),
    "29_lora_easy_backend.txt": (
        [OPTIMIZER, SCHEDULE, FP8],
        {"fp8_base": None, "optimizer_type": "AdamW", "lr_scheduler_type": None, "lr_scheduler_args": None},
    ),
}  # fmt: skip
#: tool of the recorded command lines -> its module, or None as long as it does not exist
TOOLS = {
    "networks/merge_lora.py": "networks.merge_lora",
    "networks/sdxl_merge_lora.py": None,
    "networks/extract_lora_from_models.py": None,
    "networks/resize_lora.py": None,
    "networks/flux_extract_lora.py": None,
    "networks/flux_merge_lora.py": None,
    "finetune/tag_images_by_wd14_tagger.py": None,
    "finetune/make_captions.py": None,
    "finetune/make_captions_by_git.py": None,
}
NO_COMMANDS = {"28_kohya_gui_tools.txt", "30_cog_and_wrappers_python_api.txt"}


def script_of(name: str) -> launch.Script:
    script: launch.Script = importlib.import_module(client_file(name).script).SCRIPT
    return script


def test_every_recorded_file_is_in_the_table() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES) | NO_COMMANDS


@pytest.mark.parametrize("name", FILES)
def test_a_client_file_is_accepted_or_stops_for_a_named_feature(name: str, tmp_path: Path) -> None:
    stops, _ = FILES[name]
    argv = small_run(name, tmp_path)
    if not stops:
        launch.parse(script_of(name), argv)
        return
    with pytest.raises(UserError) as error:
        launch.parse(script_of(name), argv)
    assert len(error.value.problems) == len(stops)
    assert [text for text in stops if not any(line.startswith(text) for line in error.value.problems)] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_client_file_trains(name: str, tmp_path: Path) -> None:
    run_script(client_file(name).script, *small_run(name, tmp_path, **FILES[name][1]))
    [file] = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert load_file(file)


@pytest.mark.parametrize(("tool", "words"), command_lines("28_kohya_gui_tools.txt"), ids=lambda part: str(part)[-30:])
def test_command_lines_of_tools_are_read(tool: str, words: list[str]) -> None:
    name = tool.removeprefix("sd-scripts/")
    module = TOOLS[name]
    if module is None:
        assert not (Path(__file__).resolve().parent.parent / name).exists(), "the tool exists: name its module"
        return
    [found] = [value for value in vars(importlib.import_module(module)).values() if isinstance(value, tool_launch.Tool)]
    tool_launch.parse(found, words)


#: every option that the best-known GUI may write, switched off or at its default
GUI_OFF = """
adaptive_noise_scale = 0
ae = ""
async_upload = false
apply_t5_attn_mask = false
blocks_to_swap = 0
blockwise_fused_optimizers = false
block_lr = ""
bucket_no_upscale = false
bucket_reso_steps = 64
cache_latents = false
cache_latents_to_disk = false
cache_text_encoder_outputs = false
cache_text_encoder_outputs_to_disk = false
caption_dropout_every_n_epochs = 0
caption_dropout_rate = 0
caption_extension = ".txt"
clip_g = ""
clip_l = ""
clip_skip = 1
color_aug = false
console_log_level = ""
cpu_offload_checkpointing = false
ddp_timeout = 0
debiased_estimation_loss = false
dim_from_weights = false
discrete_flow_shift = 3.0
double_blocks_to_swap = 0
dynamo_backend = "no"
dynamo_mode = "default"
enable_bucket = true
epoch = 1
face_crop_aug_range = ""
flip_aug = false
fp8_base = false
fp8_base_unet = false
full_bf16 = false
full_fp16 = false
fused_backward_pass = false
fused_optimizer_groups = 0
gradient_accumulation_steps = 1
gradient_checkpointing = false
guidance_scale = 3.5
highvram = false
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
huggingface_path_in_repo = ""
huggingface_repo_id = ""
huggingface_repo_type = ""
huggingface_repo_visibility = "public"
huggingface_token = ""
in_json = ""
initial_epoch = 0
initial_step = 0
init_word = ""
ip_noise_gamma = 0
ip_noise_gamma_random_strength = false
keep_tokens = 0
learning_rate = 1e-4
learning_rate_te = 0
learning_rate_te1 = 0
learning_rate_te2 = 0
log_config = false
log_tracker_config = ""
log_tracker_name = ""
log_with = ""
logit_mean = 0
logit_std = 1
loss_type = "l2"
lowram = false
lr_scheduler = "constant"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_scheduler_type = ""
lr_warmup_steps = 0
masked_loss = false
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_epochs = 0
max_train_steps = 40
mem_eff_attn = false
mem_eff_save = false
metadata_author = ""
min_bucket_reso = 256
min_snr_gamma = 0
min_timestep = 0
mixed_precision = "bf16"
mode_scale = 1.29
model_prediction_type = "raw"
multires_noise_discount = 0
multires_noise_iterations = 0
network_alpha = 1
network_args = []
network_dim = 8
network_dropout = 0
network_train_text_encoder_only = false
network_train_unet_only = false
network_weights = ""
no_half_vae = false
no_token_padding = false
noise_offset = 0
noise_offset_random_strength = false
noise_offset_type = "Original"
num_vectors_per_token = 1
optimizer_args = []
optimizer_type = "AdamW"
output_name = "last"
persistent_data_loader_workers = 0
prior_loss_weight = 1
random_crop = false
reg_data_dir = ""
resolution = "512,512"
resume = ""
resume_from_huggingface = ""
sample_every_n_epochs = 0
sample_every_n_steps = 0
sample_prompts = ""
sample_sampler = "euler_a"
save_every_n_epochs = 0
save_every_n_steps = 0
save_last_n_epochs = 0
save_last_n_epochs_state = 0
save_last_n_steps = 0
save_last_n_steps_state = 0
save_model_as = "safetensors"
save_precision = "fp16"
save_state = false
save_state_on_train_end = false
save_state_to_huggingface = false
scale_v_pred_loss_like_noise_pred = false
scale_weight_norms = 0
sdpa = true
shuffle_caption = false
single_blocks_to_swap = 0
skip_cache_check = false
split_mode = false
stop_text_encoder_training = 0
t5xxl = ""
t5xxl_max_token_length = 0
text_encoder_batch_size = 0
text_encoder_lr = []
timestep_sampling = "sigma"
train_batch_size = 1
train_t5xxl = false
train_text_encoder = false
training_comment = ""
unet_lr = 1e-4
use_safetensors = false
v2 = false
v_parameterization = false
v_pred_like_loss = 0
vae = ""
vae_batch_size = 0
validate_every_n_epochs = 0
validate_every_n_steps = 0
validation_split = 0
max_validation_steps = 0
wandb_api_key = ""
wandb_run_name = "last"
weighted_captions = false
weighting_scheme = "uniform"
weights = ""
xformers = false
zero_terminal_snr = false
"""


MODULES = {"sd3": "networks.lora_sd3", "flux": "networks.lora_flux"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_every_training_script_accepts_all_options_of_a_gui_that_are_off(name: str, tmp_path: Path) -> None:
    script: launch.Script = importlib.import_module(name).SCRIPT
    (tmp_path / "pictures").mkdir()
    (tmp_path / "metadata.json").write_text("{}", "utf-8")
    place = {"train_db": "dreambooth", "fine_tune": "metadata"}.get(name, "dreambooth")
    kinds = script.data
    assert kinds is not None
    subset = f'image_dir = "{tmp_path / "pictures"}"\n'
    if kinds.controlnet:
        subset += f'conditioning_data_dir = "{tmp_path / "pictures"}"\n'
    if place == "metadata":
        subset += f'metadata_file = "{tmp_path / "metadata.json"}"\n'
    (tmp_path / "data.toml").write_text(f"[[datasets]]\n[[datasets.subsets]]\n{subset}", "utf-8")
    (tmp_path / "c.toml").write_text(GUI_OFF, "utf-8")
    family = next((prefix for prefix in ("sdxl", "sd3", "flux") if name.startswith(prefix)), "sd1")
    models = GOLDEN / "models"
    needed = {
        "pretrained_model_name_or_path": models / f"{family}_tiny.safetensors", "output_dir": tmp_path / "out",
        "dataset_config": tmp_path / "data.toml", "network_module": MODULES.get(family, "networks.lora"),
        "token_string": "mine", "tokenizer_cache_dir": TOKENIZERS, "ae": models / "flux_ae_tiny.safetensors",
        **{encoder: models / f"{encoder}_tiny.safetensors" for encoder in ("clip_l", "clip_g", "t5xxl")},
    }  # fmt: skip
    argv = ["--config_file", str(tmp_path / "c.toml")]
    for option, value in needed.items():
        if option in script.options.specs():
            argv += [f"--{option}", str(value)]
    command_line = launch.check(script, launch.read_command_line(script, argv))
    unknown = "this script has no option of these names"
    assert [text for text in command_line.warnings if unknown not in text and "--output_name" not in text] == []

"""What every option of a training script must show: a value that switches it on, and where its effect is seen."""

from __future__ import annotations

from dataclasses import dataclass

#: where an option shows: in the losses or the trained weights; nowhere in them (it is about speed or memory); in the
#: files that the run leaves; in the metadata; in the number format of the saved weights; in what the run says
NUMBERS, SAME, FILES, METADATA, FORMAT, MESSAGES = "numbers", "same", "files", "metadata", "format", "messages"
#: the script asks for it; the value is refused where the option cannot have an effect on these models
NEEDED, REFUSED = "needed", "refused"


@dataclass(frozen=True)
class Case:
    """`words`: what stands after the option (none: a flag). `also`: options that are given with and without it.

    `{data}` in a word is the folder of the tests' files (`tests/test_training_options.py`).
    """

    shows: str
    words: tuple[object, ...] = ()
    also: tuple[object, ...] = ()


def numbers(*words: object, also: tuple[object, ...] = ()) -> Case:
    return Case(NUMBERS, words, also)


def same(*words: object, also: tuple[object, ...] = ()) -> Case:
    return Case(SAME, words, also)


def files(*words: object, also: tuple[object, ...] = ()) -> Case:
    return Case(FILES, words, also)


def metadata(*words: object) -> Case:
    return Case(METADATA, words)


def messages(*words: object, also: tuple[object, ...] = ()) -> Case:
    return Case(MESSAGES, words, also)


SHUFFLED = ("--shuffle_caption",)
LARGER = ("--resolution", 128)
SINGLE = ("--train_batch_size", 1, *LARGER)
BUCKETS = ("--enable_bucket", "--min_bucket_reso", 64, "--max_bucket_reso", 128, *LARGER)
BF16 = ("--mixed_precision", "bf16")
STEPS4 = ("--max_train_steps", 4)
EVERY_STEP = (*STEPS4, "--save_every_n_steps", 1)
EVERY_EPOCH = (*STEPS4, "--save_every_n_epochs", 1)
PROMPTS = ("--sample_prompts", "{data}/prompts.txt")
LOGS = ("--logging_dir", "{data}/logs")
V = ("--v_parameterization",)
OFFSET = ("--noise_offset", 0.5)
REGULAR = ("--reg_data_dir", "{data}/reg")
CACHED_TEXT = ("--cache_text_encoder_outputs",)
UNET_ONLY = ("--network_train_unet_only",)
TEXT_TOO = ("--train_text_encoder",)
ADAFACTOR = ("--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False",
             "warmup_init=False")  # fmt: skip
LOGIT_NORMAL = ("--weighting_scheme", "logit_normal")

CASES: dict[str, Case] = {
    # --- models ---------------------------------------------------------------------------------------------
    "v2": Case(REFUSED),
    "v_parameterization": numbers(),
    "pretrained_model_name_or_path": Case(NEEDED),
    "tokenizer_cache_dir": same("{tokenizers}"),
    "vae": numbers("{data}/vae.safetensors"),
    "clip_skip": numbers(2),
    "max_token_length": numbers(150),
    "no_half_vae": numbers(also=BF16),
    "weighted_captions": numbers(),
    "disable_mmap_load_safetensors": Case(REFUSED),
    "ae": Case(NEEDED), "clip_l": Case(NEEDED), "t5xxl": numbers("{data}/t5xxl.safetensors"),
    "clip_g": Case(NEEDED),
    "model_type": Case(REFUSED, ("chroma",)),
    "t5xxl_max_token_length": numbers(40),
    "apply_t5_attn_mask": numbers(also=("--t5xxl_max_token_length", 100)), "apply_lg_attn_mask": numbers(),
    "clip_l_dropout_rate": numbers(1), "clip_g_dropout_rate": numbers(1), "t5_dropout_rate": numbers(1),
    "t5xxl_device": Case(REFUSED, ("cpu",)), "t5xxl_dtype": numbers("bf16"),
    "save_clip": files(), "save_t5xxl": files(),
    # --- pictures and captions ------------------------------------------------------------------------------
    "dataset_config": numbers("{data}/other.toml"),
    "train_data_dir": Case(NEEDED),
    "in_json": numbers("{data}/metadata.json", "--train_data_dir", "{data}/plain"),
    "dataset_repeats": messages(2, also=("--in_json", "{data}/metadata.json", "--train_data_dir", "{data}/plain")),
    "dataset_class": numbers("tests.picture_folder.PictureFolder", "--train_data_dir", "{data}/plain"),
    "reg_data_dir": numbers("{data}/reg"), "prior_loss_weight": numbers(0.1, also=REGULAR),
    "train_batch_size": numbers(1, also=LARGER), "resolution": numbers(128),
    "cache_info": files(),
    "debug_dataset": files(),
    "shuffle_caption": numbers(), "caption_separator": numbers(";", also=SHUFFLED),
    "caption_extension": numbers(".txt"), "caption_extention": numbers(".txt"),
    "keep_tokens": numbers(9, also=SHUFFLED), "keep_tokens_separator": numbers("|||", also=SHUFFLED),
    "secondary_separator": numbers(";;;"), "enable_wildcard": numbers(),
    "caption_prefix": numbers("photo of"), "caption_suffix": numbers("in spring"),
    "token_warmup_min": numbers(2, also=("--token_warmup_step", 5)), "token_warmup_step": numbers(5),
    "caption_dropout_rate": numbers(1), "caption_dropout_every_n_epochs": numbers(1),
    "caption_tag_dropout_rate": numbers(0.9),
    "color_aug": numbers(), "flip_aug": numbers(), "random_crop": numbers(),
    "face_crop_aug_range": numbers("1.1,1.5", also=("--train_data_dir", "{data}/faces")),
    "alpha_mask": numbers(), "masked_loss": numbers(also=("--conditioning_data_dir", "{data}/hints")),
    "conditioning_data_dir": numbers("{data}/hints"),
    "enable_bucket": numbers("--min_bucket_reso", 64, also=LARGER),
    "min_bucket_reso": numbers(128, also=("--enable_bucket",)),
    "max_bucket_reso": numbers(512, also=BUCKETS),
    "bucket_reso_steps": numbers(32, also=BUCKETS), "bucket_no_upscale": numbers(also=BUCKETS),
    "resize_interpolation": numbers("nearest"),
    "max_data_loader_n_workers": same(1), "persistent_data_loader_workers": same(),
    # --- caches ---------------------------------------------------------------------------------------------
    "cache_latents": numbers(), "cache_latents_to_disk": files(),
    "vae_batch_size": same(2, also=("--cache_latents",)),
    "skip_cache_check": same(also=("--cache_latents",)), "skip_latents_validity_check": same(also=("--cache_latents",)),
    "cache_text_encoder_outputs": messages(also=UNET_ONLY), "cache_text_encoder_outputs_to_disk": files(also=UNET_ONLY),
    "text_encoder_batch_size": same(2, also=(*UNET_ONLY, *CACHED_TEXT)),
    # --- what is saved --------------------------------------------------------------------------------------
    "output_dir": Case(NEEDED), "output_name": files("other"), "save_model_as": files("ckpt"),
    "use_safetensors": files(also=("--save_model_as", "diffusers")),
    "save_precision": Case(FORMAT, ("fp16",)),
    "save_every_n_epochs": files(1, also=STEPS4), "save_every_n_steps": files(1, also=STEPS4),
    "save_n_epoch_ratio": files(2, also=STEPS4),
    "save_last_n_epochs": files(1, also=EVERY_EPOCH), "save_last_n_steps": files(1, also=EVERY_STEP),
    "save_last_n_epochs_state": files(1, also=(*EVERY_EPOCH, "--save_state")),
    "save_last_n_steps_state": files(1, also=(*EVERY_STEP, "--save_state")),
    "save_state": files(), "save_state_on_train_end": files(),
    "resume": numbers("{data}/state/{script}/run-state"),
    "no_metadata": metadata(), "training_comment": metadata("hello"),
    "mem_eff_save": Case(REFUSED),
    **{f"metadata_{name}": metadata("some words") for name in (
        "title", "author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase",
        "preprocessor", "is_negative_embedding",
    )},
    "metadata_thumbnail": metadata("data:image/png;base64,AA=="),
    # --- how long, how -------------------------------------------------------------------------------------
    "max_train_steps": numbers(1), "max_train_epochs": numbers(1), "seed": numbers(5),
    "gradient_checkpointing": same(), "gradient_accumulation_steps": numbers(2, also=SINGLE),
    "cpu_offload_checkpointing": same(also=("--gradient_checkpointing",)),
    "initial_step": messages(1), "initial_epoch": messages(2),
    "skip_until_initial_step": numbers(also=("--initial_step", 1, *SINGLE)),
    "lowram": same(), "highvram": same(),
    # --- optimizer and schedule -----------------------------------------------------------------------------
    "optimizer_type": numbers("Lion"), "use_8bit_adam": numbers(), "use_lion_optimizer": numbers(),
    "learning_rate": numbers("3e-3"), "max_grad_norm": numbers("1e-4", also=("--optimizer_type", "SGDNesterov")),
    "optimizer_args": numbers("weight_decay=0.9"),
    "lr_scheduler_type": numbers("CosineAnnealingLR", "--lr_scheduler_args", "T_max=2"),
    "lr_scheduler_args": numbers("T_max=5", also=("--lr_scheduler_type", "CosineAnnealingLR")),
    "lr_scheduler": numbers("linear"), "lr_warmup_steps": numbers(2, also=("--lr_scheduler", "linear")),
    "lr_decay_steps": numbers(3, also=("--lr_scheduler", "warmup_stable_decay", *STEPS4)),
    "lr_scheduler_num_cycles": numbers(2, also=("--lr_scheduler", "cosine_with_restarts", *STEPS4)),
    "lr_scheduler_power": numbers(3, also=("--lr_scheduler", "polynomial")),
    "lr_scheduler_timescale": numbers(50, also=("--lr_scheduler", "inverse_sqrt")),
    "lr_scheduler_min_lr_ratio": numbers(0.5, also=("--lr_scheduler", "cosine_with_min_lr")),
    "fused_backward_pass": same(also=(*ADAFACTOR, "--max_grad_norm", 0)),
    "fused_optimizer_groups": same(2, also=("--max_grad_norm", 0)),
    "blockwise_fused_optimizers": same(also=("--max_grad_norm", 0)),
    "learning_rate_te": numbers("3e-3", also=TEXT_TOO), "learning_rate_te1": numbers("3e-3", also=TEXT_TOO),
    "learning_rate_te2": numbers("3e-3", also=TEXT_TOO),
    "learning_rate_te3": numbers("3e-3", also=(*TEXT_TOO, "--train_t5xxl")),
    "train_text_encoder": numbers(), "train_t5xxl": numbers(also=TEXT_TOO),
    "use_t5xxl_cache_only": messages(),
    "stop_text_encoder_training": numbers(1), "no_token_padding": Case(REFUSED), "diffusers_xformers": Case(REFUSED),
    "block_lr": numbers(",".join(["1e-5"] * 23)), "num_last_block_to_freeze": numbers(1),
    # --- loss and noise -------------------------------------------------------------------------------------
    "loss_type": numbers("l1"),
    "huber_schedule": numbers("constant", also=("--loss_type", "huber")),
    "huber_c": numbers(0.5, also=("--loss_type", "huber", "--huber_schedule", "constant")),
    "huber_scale": numbers(3, also=("--loss_type", "huber", "--huber_schedule", "constant")),
    "min_snr_gamma": numbers(0.01), "scale_v_pred_loss_like_noise_pred": numbers(also=V),
    "v_pred_like_loss": numbers(0.5), "debiased_estimation_loss": numbers(),
    "noise_offset": numbers(0.5), "noise_offset_random_strength": numbers(also=OFFSET),
    "multires_noise_iterations": numbers(3), "multires_noise_discount": numbers(
        0.9, also=("--multires_noise_iterations", 3)
    ),
    "ip_noise_gamma": numbers(0.3), "ip_noise_gamma_random_strength": numbers(also=("--ip_noise_gamma", 0.3)),
    "adaptive_noise_scale": numbers(3, also=OFFSET), "zero_terminal_snr": numbers(also=V),
    "min_timestep": numbers(900), "max_timestep": numbers(100),
    "weighting_scheme": numbers("logit_normal"),
    "logit_mean": numbers(1, also=LOGIT_NORMAL), "logit_std": numbers(3, also=LOGIT_NORMAL),
    "mode_scale": numbers(0.5, also=("--weighting_scheme", "mode")),
    "timestep_sampling": numbers("sigmoid"), "sigmoid_scale": numbers(3, also=("--timestep_sampling", "sigmoid")),
    "model_prediction_type": numbers("additive"), "discrete_flow_shift": numbers(9),
    "training_shift": numbers(5), "guidance_scale": numbers(5),
    "pos_emb_random_crop_rate": numbers(1, also=STEPS4), "enable_scaled_pos_embed": numbers(),
    # --- sample pictures ------------------------------------------------------------------------------------
    "sample_every_n_steps": files(1, also=PROMPTS), "sample_every_n_epochs": files(1, also=PROMPTS),
    "sample_at_first": files(also=PROMPTS), "sample_prompts": files("{data}/prompts.txt", "--sample_at_first"),
    "sample_sampler": files("euler_a", also=(*PROMPTS, "--sample_at_first")),
    # --- number formats, attention, devices -----------------------------------------------------------------
    "mixed_precision": numbers("bf16"), "full_fp16": Case(REFUSED), "full_bf16": numbers(also=BF16),
    "fp8_base": numbers(also=BF16), "fp8_base_unet": numbers(also=BF16),
    "mem_eff_attn": same(), "xformers": Case(REFUSED), "sdpa": same(),
    "torch_compile": same(), "dynamo_backend": same("eager", also=("--torch_compile",)),
    "blocks_to_swap": same(1), "double_blocks_to_swap": same(1), "single_blocks_to_swap": same(1), "split_mode": same(),
    "ddp_timeout": same(3), "ddp_gradient_as_bucket_view": same(), "ddp_static_graph": same(),
    # --- logs -----------------------------------------------------------------------------------------------
    "logging_dir": files("{data}/logs"), "log_with": same("tensorboard", also=LOGS),
    "log_prefix": files("mine_", also=LOGS), "log_tracker_name": files("mine", also=LOGS),
    "log_tracker_config": same("{data}/tracker.toml", also=LOGS), "log_config": files(also=LOGS),
    "wandb_run_name": Case(REFUSED, ("mine",)), "wandb_api_key": Case(REFUSED, ("x",)),
    "console_log_level": messages("ERROR"), "console_log_file": files("{data}/console.txt"),
    "console_log_simple": messages(),
    "config_file": numbers("{data}/config.toml"), "output_config": files(also=("--config_file", "{data}/written.toml")),
    # --- not with other programs yet ------------------------------------------------------------------------
    "huggingface_repo_id": Case(REFUSED, ("me/mine",)), "huggingface_repo_type": Case(REFUSED, ("model",)),
    "huggingface_path_in_repo": Case(REFUSED, ("here",)), "huggingface_token": Case(REFUSED, ("x",)),
    "huggingface_repo_visibility": Case(REFUSED, ("private",)), "save_state_to_huggingface": Case(REFUSED),
    "resume_from_huggingface": Case(REFUSED), "async_upload": Case(REFUSED),
    "deepspeed": Case(REFUSED), "zero_stage": Case(REFUSED, (1,)), "offload_optimizer_device": Case(REFUSED, ("cpu",)),
    "offload_optimizer_nvme_path": Case(REFUSED, ("x",)), "offload_param_device": Case(REFUSED, ("cpu",)),
    "offload_param_nvme_path": Case(REFUSED, ("x",)), "zero3_init_flag": Case(REFUSED),
    "zero3_save_16bit_model": Case(REFUSED), "fp16_master_weights_and_gradients": Case(REFUSED),
    # --- validation -----------------------------------------------------------------------------------------
    "validation_split": numbers(0.5), "validation_seed": numbers(3, also=("--validation_split", 0.5)),
    "validate_every_n_steps": messages(1, also=("--validation_split", 0.5)),
    "validate_every_n_epochs": messages(1, also=("--validation_split", 0.5)),
    "max_validation_steps": messages(1, also=("--validation_split", 0.5)),
    # --- networks -------------------------------------------------------------------------------------------
    "network_module": Case(NEEDED), "network_dim": numbers(3), "network_alpha": numbers(4),
    "network_dropout": numbers(0.5), "network_args": numbers("rank_dropout=0.5"),
    "network_train_unet_only": numbers(), "network_train_text_encoder_only": numbers(),
    "network_weights": numbers("{data}/state/{script}/run.safetensors"),
    "dim_from_weights": numbers(
        also=("--network_dim", 8, "--network_weights", "{data}/state/{script}/run.safetensors")
    ),
    "scale_weight_norms": numbers("1e-4"),
    "base_weights": numbers("{data}/state/{script}/run.safetensors"),
    "base_weights_multiplier": numbers(30, also=("--base_weights", "{data}/state/{script}/run.safetensors")),
    "unet_lr": numbers("3e-3"), "text_encoder_lr": numbers("3e-3"),
    # --- new words ------------------------------------------------------------------------------------------
    "token_string": Case(NEEDED), "num_vectors_per_token": numbers(3), "init_word": numbers("cat"),
    "weights": numbers("{data}/state/{script}/run.safetensors"),
    "use_object_template": numbers(), "use_style_template": numbers(),
    # --- ControlNets ----------------------------------------------------------------------------------------
    "controlnet_model_name_or_path": numbers("{data}/state/{script}/run.safetensors"),
    "controlnet_model_path": numbers("{data}/state/{script}/run.safetensors"),
    "control_net_lr": numbers("3e-2"), "cond_emb_dim": numbers(24),
}  # fmt: skip

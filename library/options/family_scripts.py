"""Which options the scripts for SDXL, FLUX.1 and Stable Diffusion 3 have; one row per kind of script."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from library.options import script_checks as checks
from library.options.bucket_preparation import BucketPreparationOptions
from library.options.control_net import ControlNetOptions
from library.options.encoders import TextEncoderOptions
from library.options.flow import FlowOptions
from library.options.flux import FluxOptions
from library.options.full import FullTrainingOptions
from library.options.memory import MemoryOptions
from library.options.minimal_inference import FluxMinimalOptions, Sd3MinimalOptions, SdxlMinimalOptions
from library.options.network import NetworkOptions
from library.options.script import (
    CHECKPOINT_FORMATS,
    CONTROL_NET_TRAINING,
    DREAMBOOTH_TRAINING,
    EMBEDDING_TRAINING,
    FINE_TUNING,
    GEN_IMG,
    GEN_IMG_DIFFUSERS,
    LAYERED_EMBEDDING_TRAINING,
    NETWORK_TRAINING,
    OF_CHECKPOINTS,
    OF_NETWORKS,
    OF_REGULARISATION,
    SMALL_FILES,
    TRAINING_GROUPS,
    all_but,
)
from library.options.script_options import ScriptOptions
from library.options.sd3 import Sd3Options

OLD_NAME = frozenset({"skip_latents_validity_check"})
BATCH_OF_TEXT = frozenset({"text_encoder_batch_size"})
NO_GROUPS = {"fused_optimizer_groups": {"help": "does not work with this model; use --blockwise_fused_optimizers"}}
FLOW_PROBLEMS = (checks.no_weighted_captions, checks.huber_without_snr)

# --- SDXL ------------------------------------------------------------------------------------------------------
SDXL_NETWORK_TRAINING = dataclasses.replace(
    NETWORK_TRAINING,
    exclude=OF_CHECKPOINTS | OLD_NAME | BATCH_OF_TEXT,
    problems=(*NETWORK_TRAINING.problems, checks.one_kind_of_text_encoders, checks.cached_text_is_frozen),
)

SDXL_FULL_TRAINING = ScriptOptions(
    groups=(FullTrainingOptions, MemoryOptions, *TRAINING_GROUPS),
    exclude=OF_NETWORKS | OLD_NAME | BATCH_OF_TEXT | {"cpu_offload_checkpointing"}
    | all_but(
        FullTrainingOptions, "learning_rate_te1", "learning_rate_te2", "train_text_encoder", "block_lr",
        "diffusers_xformers",
    )
    | all_but(MemoryOptions, "fused_optimizer_groups"),
    changes=CHECKPOINT_FORMATS,
    problems=(
        checks.checkpoint_format, checks.one_kind_of_text_encoders, checks.cached_text_or_training,
        checks.cached_text_or_weights,
    ),
    warnings=(checks.rates_of_frozen_text_encoders,),
)  # fmt: skip

SDXL_EMBEDDING_TRAINING = dataclasses.replace(
    EMBEDDING_TRAINING,
    exclude=EMBEDDING_TRAINING.exclude - {"disable_mmap_load_safetensors"},
    problems=(*EMBEDDING_TRAINING.problems, checks.one_kind_of_text_encoders),
)

SDXL_CONTROL_NET_TRAINING = ScriptOptions(
    groups=(ControlNetOptions, *TRAINING_GROUPS),
    exclude=SMALL_FILES | BATCH_OF_TEXT | OF_REGULARISATION | {"masked_loss"}
    | all_but(ControlNetOptions, "controlnet_model_name_or_path", "controlnet_model_path", "control_net_lr"),
    problems=(checks.one_kind_of_text_encoders,),
)  # fmt: skip

SDXL_LLLITE_TRAINING = dataclasses.replace(
    SDXL_CONTROL_NET_TRAINING,
    groups=(NetworkOptions, ControlNetOptions, *TRAINING_GROUPS),
    exclude=SMALL_FILES | BATCH_OF_TEXT | OF_REGULARISATION | {"masked_loss"}
    | all_but(NetworkOptions, "network_dim", "network_dropout", "network_weights")
    | all_but(ControlNetOptions, "cond_emb_dim"),
)  # fmt: skip

SDXL_GEN_IMG = dataclasses.replace(
    GEN_IMG,
    exclude=GEN_IMG.exclude | {
        "v1", "v2", "sdxl", "control_net_models", "control_net_preps", "pyramid_noise_prob",
        "pyramid_noise_discount_range", "noise_offset_prob", "noise_offset_range",
    },
)  # fmt: skip

# --- FLUX.1 ----------------------------------------------------------------------------------------------------
FLUX_GROUPS = (FluxOptions, TextEncoderOptions, FlowOptions, MemoryOptions, ControlNetOptions)
#: what no script for FLUX.1 has
FLUX_LACKS = (
    all_but(TextEncoderOptions, "clip_l", "t5xxl", "t5xxl_max_token_length", "apply_t5_attn_mask")
    | {"training_shift"}
    | all_but(ControlNetOptions, "controlnet_model_name_or_path")
)
NO_CONTROL_NET = {
    "controlnet_model_name_or_path": {"help": "has no effect here; flux_train_control_net.py uses it"},
}

FLUX_NETWORK_TRAINING = dataclasses.replace(
    NETWORK_TRAINING,
    groups=(NETWORK_TRAINING.groups[0], *FLUX_GROUPS, *NETWORK_TRAINING.groups[1:]),
    exclude=OF_CHECKPOINTS | OLD_NAME | FLUX_LACKS | all_but(MemoryOptions, "blocks_to_swap"),
    changes=NO_CONTROL_NET,
    problems=(*NETWORK_TRAINING.problems, *FLOW_PROBLEMS),
    warnings=(checks.control_net_is_not_used,),
)

FLUX_FULL_TRAINING = ScriptOptions(
    groups=(*FLUX_GROUPS, *TRAINING_GROUPS),
    exclude=OF_NETWORKS | FLUX_LACKS | {"no_half_vae", "split_mode"},
    changes={**CHECKPOINT_FORMATS, **NO_GROUPS, **NO_CONTROL_NET},
    problems=(checks.checkpoint_format, checks.groups_are_blocks, *FLOW_PROBLEMS),
    warnings=(checks.control_net_is_not_used,),
)

FLUX_CONTROL_NET_TRAINING = dataclasses.replace(
    FLUX_FULL_TRAINING,
    exclude=FLUX_FULL_TRAINING.exclude | OF_REGULARISATION,
    changes={**CHECKPOINT_FORMATS, **NO_GROUPS},
    problems=(*FLUX_FULL_TRAINING.problems, checks.mask_is_the_hint),
    warnings=(),
)

# --- Stable Diffusion 3 ----------------------------------------------------------------------------------------
SD3_GROUPS = (Sd3Options, TextEncoderOptions, FlowOptions, MemoryOptions)
SD3_LACKS = all_but(FlowOptions, "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "training_shift")
SD3_CHANGES = {"t5xxl_max_token_length": {"default": 256}}

SD3_NETWORK_TRAINING = dataclasses.replace(
    NETWORK_TRAINING,
    groups=(NETWORK_TRAINING.groups[0], *SD3_GROUPS, *NETWORK_TRAINING.groups[1:]),
    exclude=OF_CHECKPOINTS | OLD_NAME | SD3_LACKS | all_but(MemoryOptions, "blocks_to_swap"),
    changes=SD3_CHANGES,
    problems=(*NETWORK_TRAINING.problems, *FLOW_PROBLEMS),
)

SD3_FULL_TRAINING = ScriptOptions(
    groups=(FullTrainingOptions, *SD3_GROUPS, *TRAINING_GROUPS),
    exclude=OF_NETWORKS | SD3_LACKS | {"cpu_offload_checkpointing", "no_half_vae"}
    | all_but(
        FullTrainingOptions, "train_text_encoder", "train_t5xxl", "use_t5xxl_cache_only", "learning_rate_te1",
        "learning_rate_te2", "learning_rate_te3", "num_last_block_to_freeze",
    )
    | all_but(MemoryOptions, "blocks_to_swap", "blockwise_fused_optimizers", "fused_optimizer_groups"),
    changes={**SD3_CHANGES, **CHECKPOINT_FORMATS, **NO_GROUPS},
    problems=(
        checks.checkpoint_format, checks.groups_are_blocks, *FLOW_PROBLEMS, checks.cached_text_or_training,
        checks.t5_training,
    ),
    warnings=(checks.rates_of_frozen_text_encoders,),
)  # fmt: skip

# --- all scripts -----------------------------------------------------------------------------------------------
#: what a script's name may begin with, before its kind
PREFIXES = ("sdxl_", "sd3_", "flux_")
#: script -> its options: a row, a class, or where a tool has its class (`module:Class`); old names are left out
SCRIPTS: Mapping[str, ScriptOptions | type | str] = MappingProxyType({
    "train_network.py": NETWORK_TRAINING,
    "sdxl_train_network.py": SDXL_NETWORK_TRAINING,
    "sd3_train_network.py": SD3_NETWORK_TRAINING,
    "flux_train_network.py": FLUX_NETWORK_TRAINING,
    "train_db.py": DREAMBOOTH_TRAINING,
    "fine_tune.py": FINE_TUNING,
    "sdxl_train.py": SDXL_FULL_TRAINING,
    "sd3_train.py": SD3_FULL_TRAINING,
    "flux_train.py": FLUX_FULL_TRAINING,
    "train_textual_inversion.py": EMBEDDING_TRAINING,
    "sdxl_train_textual_inversion.py": SDXL_EMBEDDING_TRAINING,
    "train_textual_inversion_XTI.py": LAYERED_EMBEDDING_TRAINING,
    "train_control_net.py": CONTROL_NET_TRAINING,
    "sdxl_train_control_net.py": SDXL_CONTROL_NET_TRAINING,
    "flux_train_control_net.py": FLUX_CONTROL_NET_TRAINING,
    "sdxl_train_control_net_lllite.py": SDXL_LLLITE_TRAINING,
    "gen_img.py": GEN_IMG,
    "gen_img_diffusers.py": GEN_IMG_DIFFUSERS,
    "sdxl_gen_img.py": SDXL_GEN_IMG,
    "sdxl_minimal_inference.py": SdxlMinimalOptions,
    "sd3_minimal_inference.py": Sd3MinimalOptions,
    "flux_minimal_inference.py": FluxMinimalOptions,
    "tools/cache_latents.py": "library.options.caching_tools:LATENT_CACHING",
    "tools/cache_text_encoder_outputs.py": "library.options.caching_tools:TEXT_CACHING",
    "finetune/prepare_buckets_latents.py": BucketPreparationOptions,
    "networks/merge_lora.py": "networks.merge_lora:MergeOptions",
    "tools/show_metadata.py": "tools.show_metadata:ShowMetadataOptions",
    "tools/convert_diffusers20_original_sd.py": "tools.convert_diffusers20_original_sd:ConversionOptions",
})  # fmt: skip

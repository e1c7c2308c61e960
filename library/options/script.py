"""Which options each script has: one row per script or kind of script (`ScriptOptions`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from library.options import script_checks as checks
from library.options.cache import CacheOptions
from library.options.config_file import ConfigFileOptions
from library.options.console import ConsoleOptions
from library.options.control_net import ControlNetOptions
from library.options.dataset import DatasetOptions
from library.options.declare import specs_of
from library.options.deepspeed import DeepSpeedOptions
from library.options.device import DeviceOptions
from library.options.embedding_training import EmbeddingTrainingOptions
from library.options.family_choice import FamilyChoiceOptions
from library.options.full import FullTrainingOptions
from library.options.generation import GENERATION_GROUPS, GenerationOptions
from library.options.hub import HubOptions
from library.options.loss import LossOptions
from library.options.model import ModelOptions
from library.options.model_spec import ModelSpecOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.not_yet import GENERATION_NOT_YET
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.script_options import ScriptOptions
from library.options.tracking import LoggingOptions
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions


def all_but(group: type, *names: str) -> frozenset[str]:
    """The options of a group except these; what a row excludes when its script has only these."""
    declared = {spec.name for spec in specs_of(group)}
    if unknown := set(names) - declared:
        raise ValueError(f"{group.__name__} has no option {sorted(unknown)}")
    return frozenset(declared - set(names))


TRAINING_GROUPS: tuple[type, ...] = (
    ModelOptions, DatasetOptions, CacheOptions, SavingOptions, TrainingOptions, OptimizerOptions, LossOptions,
    NoiseOptions, SamplingOptions, DeviceOptions, LoggingOptions, ModelSpecOptions, HubOptions, DeepSpeedOptions,
    ConsoleOptions, ConfigFileOptions,
)  # fmt: skip

# --- what kinds of scripts lack or change ----------------------------------------------------------------------
CAPTION_DROPOUT = frozenset({"caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"})
TEXT_CACHE = frozenset({"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size"})
#: options of training a network that other methods never had
OF_NETWORKS = frozenset({
    "no_metadata", "training_comment", "fp8_base_unet", "skip_until_initial_step", "initial_epoch", "initial_step",
})  # fmt: skip
#: options of training a whole model
OF_CHECKPOINTS = frozenset({"use_safetensors", "skip_latents_validity_check"})
#: options of regularisation images
OF_REGULARISATION = frozenset({"reg_data_dir", "prior_loss_weight"})
OF_NEWER_MODELS = TEXT_CACHE | {"disable_mmap_load_safetensors", "skip_latents_validity_check"}
SMALL_FILES = OF_NETWORKS | OF_CHECKPOINTS | {"cpu_offload_checkpointing"}

CHECKPOINT_FORMATS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "save_model_as": {
        "default": None,
        "choices": (None, "ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
        "help": "file format of saved models (default: like the source model)",
    }
})  # fmt: skip
EMBEDDING_FORMAT: Mapping[str, Mapping[str, Any]] = MappingProxyType({"save_model_as": {"default": "pt"}})

# --- the rows --------------------------------------------------------------------------------------------------
NETWORK_TRAINING = ScriptOptions(
    groups=(NetworkOptions, *TRAINING_GROUPS, ValidationOptions),
    exclude=OF_NEWER_MODELS | OF_CHECKPOINTS,
    problems=(checks.network,),
)

DREAMBOOTH_TRAINING = ScriptOptions(
    groups=(FullTrainingOptions, *TRAINING_GROUPS),
    exclude=OF_NETWORKS | OF_NEWER_MODELS | {"cpu_offload_checkpointing", "in_json", "dataset_repeats"}
    | all_but(FullTrainingOptions, "learning_rate_te", "no_token_padding", "stop_text_encoder_training"),
    changes=CHECKPOINT_FORMATS,
    problems=(checks.checkpoint_format,),
)  # fmt: skip

FINE_TUNING = ScriptOptions(
    groups=(FullTrainingOptions, *TRAINING_GROUPS),
    exclude=OF_NETWORKS | OF_NEWER_MODELS | OF_REGULARISATION
    | {"cpu_offload_checkpointing", "masked_loss", "conditioning_data_dir"}
    | all_but(FullTrainingOptions, "learning_rate_te", "train_text_encoder", "diffusers_xformers"),
    changes=CHECKPOINT_FORMATS,
    problems=(checks.checkpoint_format,),
    warnings=(checks.rates_of_frozen_text_encoders,),
)  # fmt: skip

EMBEDDING_TRAINING = ScriptOptions(
    groups=(EmbeddingTrainingOptions, *TRAINING_GROUPS),
    exclude=SMALL_FILES | OF_NEWER_MODELS | CAPTION_DROPOUT | {"weighted_captions"},
    changes=EMBEDDING_FORMAT,
    problems=(checks.new_word,),
)

LAYERED_EMBEDDING_TRAINING = dataclasses.replace(
    EMBEDDING_TRAINING, exclude=EMBEDDING_TRAINING.exclude | {"no_half_vae"}
)

CONTROL_NET_TRAINING = ScriptOptions(
    groups=(ControlNetOptions, *(group for group in TRAINING_GROUPS if group is not ModelSpecOptions)),
    exclude=SMALL_FILES | OF_NEWER_MODELS | OF_REGULARISATION | {"masked_loss", "no_half_vae"}
    | all_but(ControlNetOptions, "controlnet_model_name_or_path"),
)  # fmt: skip

GEN_IMG = ScriptOptions(
    groups=GENERATION_GROUPS,
    exclude=frozenset({
        "XTI_embeddings", "control_net_weights", "clip_guidance_scale", "clip_image_guidance_scale",
        "vgg16_guidance_scale", "vgg16_guidance_layer",
    }),
    record=GenerationOptions,
    check="library.options.generation_checks:check_options",
    not_yet=GENERATION_NOT_YET,
)  # fmt: skip

GEN_IMG_DIFFUSERS = dataclasses.replace(
    GEN_IMG,
    exclude=frozenset({
        *(spec.name for spec in specs_of(FamilyChoiceOptions)),
        "original_width", "original_height", "original_width_negative", "original_height_negative", "crop_top",
        "crop_left", "pyramid_noise_prob", "pyramid_noise_discount_range", "noise_offset_prob", "noise_offset_range",
        "clip_vision_strength", "control_net_lllite_models", "control_net_multipliers",
    }),
)  # fmt: skip

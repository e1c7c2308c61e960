"""What does not work yet is refused only when it would be switched on."""

from __future__ import annotations

from library.options import make_options
from library.options.generation import GenerationOptions
from library.options.not_yet import GENERATION_NOT_YET, unsupported


def test_a_part_of_a_feature_that_is_off_asks_for_nothing() -> None:
    off = make_options(
        wandb_run_name="x", wandb_api_key="x", dynamo_backend="eager", huggingface_repo_type="model",
        huggingface_token="x", huggingface_repo_visibility="public", async_upload=True, save_state_to_huggingface=True,
        resume_from_huggingface=True, zero_stage=3, offload_optimizer_device="cpu", validate_every_n_steps=0,
        validate_every_n_epochs=1, max_validation_steps=5, validation_seed=1, validation_split=0, blocks_to_swap=0,
        double_blocks_to_swap=0, log_with="tensorboard",
    )  # fmt: skip
    assert unsupported(off) == []
    on = make_options(
        wandb_run_name="x", log_with="all", huggingface_repo_id="a/b", async_upload=True, resume="s",
        resume_from_huggingface=True, deepspeed=True, zero_stage=3, validation_split=0.1, validation_seed=1,
        torch_compile=True, dynamo_backend="eager", blocks_to_swap=1, fp8_base=True,
    )  # fmt: skip
    assert sorted(text.split(":")[0] for text in unsupported(on)) == [
        "--blocks_to_swap", "--deepspeed", "--fp8_base", "--huggingface_repo_id", "--log_with",
        "--resume_from_huggingface", "--torch_compile", "--validation_split",
    ]  # fmt: skip


def test_a_part_of_a_drawing_feature_that_is_off_asks_for_nothing() -> None:
    off = GenerationOptions().with_values(
        highres_fix_steps=10, highres_fix_save_1st=True, ds_ratio=0.3, ds_depth_2=3, gradual_latent_ratio=0.4,
        vgg16_guidance_layer=4, clip_guidance_scale=0.0, control_net_ratios=(1.0,), guide_image_path=("x.png",),
        noise_offset_range=(0.0, 0.1), pyramid_noise_discount_range=(0.1, 0.2), clip_vision_strength=0.0,
    )  # fmt: skip
    assert unsupported(off, GENERATION_NOT_YET) == []
    on = off.with_values(highres_fix_scale=0.5, ds_depth_1=0, gradual_latent_timesteps=700, control_net_models=("a",))
    assert [text.split(":")[0] for text in unsupported(on, GENERATION_NOT_YET)] == [
        "--control_net_models", "--highres_fix_scale", "--ds_depth_1", "--gradual_latent_timesteps",
    ]  # fmt: skip

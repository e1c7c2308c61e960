"""Training whole models: what is trained, at which rates and in which dtypes, how it is saved and resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.memory.fused_step import FusedBackward, FusedOptimizers, fused_step_problems, round_stochastically
from library.methods.full import DreamBoothTraining, FullTraining
from library.options import Options
from library.train_util import Run
from library.training_state import Position, read_progress
from tests.conftest import ROOT
from tests.golden import FOLDER, GoldenRun, golden_run
from tests.test_golden_full import recorded_options, start_run
from tests.test_golden_runs import recorded_batch
from tests.test_processes import free_port
from tests.training import MODEL, TOKENIZERS, clean_process, run_script

GOLDEN = golden_run("sd1_db")


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.chdir(FOLDER)
    with clean_process():
        yield


def options_with(tmp_path: Path, **values: Any) -> Options:
    """The recorded command line of train_db.py with other values."""
    return recorded_options(GOLDEN, "train_db", tmp_path).with_values(**values)


def make_run(tmp_path: Path, method: type[FullTraining] = FullTraining, **values: Any) -> Run:
    return start_run(options_with(tmp_path, **values), method)


def steps(run: Run, *indices: int, golden: GoldenRun = GOLDEN) -> list[float]:
    """Losses of recorded batches, timesteps and noise."""
    return [
        run.step(
            recorded_batch(run, golden, index), sync=True, timesteps=golden.tensors[f"timesteps.{index}"].float(),
            noise=golden.tensors[f"noise.{index}"],
        ).loss
        for index in indices
    ]


def weights(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.method.trainable.state_dict().items()}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def text_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("text_encoder1.")}


# --- what is trained -------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_training_on_one_batch_halves_its_loss(tmp_path):
    run = make_run(tmp_path, DreamBoothTraining)
    losses = steps(run, *[1] * 8)
    assert losses[-1] < 0.5 * losses[0]


def test_groups_are_named_for_what_they_train_and_have_its_rate(tmp_path):
    run = make_run(tmp_path, DreamBoothTraining, learning_rate_te=2e-4)
    assert [group.name for group in run.optimizers.groups] == ["unet", "text_encoder1"]
    assert run.scheduled_rates() == [1e-3, 2e-4]


@pytest.mark.parametrize(
    ("method", "values", "trained"),
    [
        (FullTraining, {}, ["denoiser"]),
        (FullTraining, {"train_text_encoder": True}, ["denoiser", "text_encoder1"]),
        (FullTraining, {"train_text_encoder": True, "learning_rate_te": 0.0}, ["denoiser"]),
        (FullTraining, {"train_text_encoder": True, "learning_rate": 0.0, "learning_rate_te": 1e-3},
         ["text_encoder1"]),
        (DreamBoothTraining, {}, ["denoiser", "text_encoder1"]),
        (DreamBoothTraining, {"stop_text_encoder_training": -1}, ["denoiser"]),
    ],
)  # fmt: skip
def test_a_part_is_trained_if_it_is_asked_for_and_its_rate_is_not_0(method, values, trained, tmp_path):
    run = make_run(tmp_path, method, **values)
    family = run.method.family
    before = {"denoiser": family.denoiser, "text_encoder1": family.text_encoders[0]}
    states = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in before.items()}
    steps(run, 0)
    assert list(run.method.trainable) == trained
    changed = [name for name, module in before.items() if largest_difference(states[name], module.state_dict()) > 0]
    assert changed == trained


def test_rates_of_0_everywhere_are_refused_before_anything_is_loaded(tmp_path):
    options = options_with(tmp_path, learning_rate=0.0, train_text_encoder=True)
    [problem] = FullTraining(options, StableDiffusion(options)).check_options()
    assert "nothing to train" in problem


@pytest.mark.parametrize(
    ("values", "trained", "frozen"),
    [
        ({"mixed_precision": "bf16"}, torch.float32, torch.bfloat16),
        ({"mixed_precision": "bf16", "full_bf16": True}, torch.bfloat16, torch.bfloat16),
    ],
)
def test_trained_weights_are_whole_unless_full_precision_is_given_up(values, trained, frozen, tmp_path):
    run = make_run(tmp_path, **values)
    family = run.method.family
    assert {tensor.dtype for tensor in family.denoiser.parameters()} == {trained}
    assert {tensor.dtype for tensor in family.text_encoders[0].parameters()} == {frozen}
    [loss] = steps(run, 0)
    assert loss == pytest.approx(GOLDEN.steps[0]["loss"], rel=0.02)


def test_float32_weights_survive_mixed_precision_untouched(tmp_path):
    run = make_run(tmp_path, mixed_precision="bf16")
    exact = StableDiffusion(run.options)
    exact.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    assert largest_difference(run.method.family.denoiser.state_dict(), exact.denoiser.state_dict()) == 0


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    plain = make_run(tmp_path, DreamBoothTraining)
    saving = make_run(tmp_path, DreamBoothTraining, gradient_checkpointing=True)
    assert steps(plain, 0, 1) == pytest.approx(steps(saving, 0, 1), rel=1e-6)


def test_samples_are_drawn_in_eval_mode_and_training_goes_on_in_train_mode(tmp_path):
    run = make_run(tmp_path, gradient_checkpointing=True)  # the frozen text encoder is in train mode, too
    modules = [run.method.family.denoiser, run.method.family.text_encoders[0]]
    with run.inference():
        assert not any(module.training for module in modules)
    assert all(module.training for module in modules)


# --- the stop of the text encoder ------------------------------------------------------------------------------
def test_the_text_encoder_stays_as_the_step_of_its_stop_made_it(tmp_path):
    run = make_run(tmp_path, DreamBoothTraining, stop_text_encoder_training=2)
    run.method.on_start(0)
    states = [weights(run)]
    for index in range(4):
        steps(run, index)
        states.append(weights(run))
    moved = [largest_difference(text_encoder(a), text_encoder(b)) > 0 for a, b in zip(states, states[1:], strict=False)]
    assert moved == [True, True, False, False]
    assert largest_difference(states[3], states[4]) > 0  # the denoiser goes on
    assert not run.method.family.text_encoders[0].training
    assert all(parameter.grad is None for parameter in run.method.family.text_encoders[0].parameters())


@pytest.mark.slow
@pytest.mark.parametrize("saved_after", [1, 3])
def test_a_run_resumed_before_or_after_the_stop_equals_the_straight_run(saved_after, tmp_path):
    values: dict[str, Any] = {"stop_text_encoder_training": 2}
    assert_resumes_exactly(tmp_path, saved_after, DreamBoothTraining, values)


def assert_resumes_exactly(
    tmp_path: Path, saved_after: int, method: type[FullTraining], values: dict[str, Any]
) -> None:
    straight = make_run(tmp_path, method, **values)
    straight.method.on_start(0)
    steps(straight, *range(saved_after))
    straight.position = Position(1, saved_after, saved_after)
    straight.save_state(tmp_path / "state")
    losses = steps(straight, 3, 4)
    assert losses[0] != losses[1]
    resumed = make_run(tmp_path, method, **values)
    progress = read_progress(tmp_path / "state")
    resumed.resume(tmp_path / "state", progress)
    resumed.method.on_start(progress.position.step)
    assert steps(resumed, 3, 4) == losses
    assert largest_difference(weights(straight), weights(resumed)) == 0
    assert resumed.scheduled_rates() == straight.scheduled_rates()


# --- steps inside the backward pass ----------------------------------------------------------------------------
ADAFACTOR = {
    "optimizer_type": "Adafactor", "optimizer_args": ("relative_step=False", "scale_parameter=True"),
    "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2,
}  # fmt: skip
FUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "backward pass": (ADAFACTOR, {"fused_backward_pass": True}),
    "relative steps": ({"optimizer_type": "Adafactor", "learning_rate": 1e-4}, {"fused_backward_pass": True}),
    "groups": ({"lr_scheduler": "cosine"}, {"fused_optimizer_groups": 5}),
    "blocks": ({"lr_scheduler": "cosine", "learning_rate_te": 1e-4}, {"blockwise_fused_optimizers": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_steps_inside_the_backward_pass_give_the_weights_of_separate_steps(name, tmp_path):
    common, fused = FUSED[name]
    separate = make_run(tmp_path, DreamBoothTraining, max_grad_norm=0.0, **common)
    inside = make_run(tmp_path, DreamBoothTraining, max_grad_norm=0.0, **common, **fused)
    assert steps(separate, 0, 1) == steps(inside, 0, 1)
    assert largest_difference(weights(separate), weights(inside)) == 0
    rates = dict(zip([g.name for g in inside.optimizers.groups], inside.scheduled_rates(), strict=True))
    assert rates == dict(zip([g.name for g in separate.optimizers.groups], separate.scheduled_rates(), strict=True))
    assert all(parameter.grad is None for parameter in inside.method.trained_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["backward pass", "blocks"])
def test_steps_inside_the_backward_pass_resume_exactly(name, tmp_path):
    common, fused = FUSED[name]
    assert_resumes_exactly(tmp_path, 2, DreamBoothTraining, {**common, **fused, "stop_text_encoder_training": 3})


def test_every_block_and_the_rest_have_an_optimizer_of_their_own(tmp_path):
    run = make_run(tmp_path, DreamBoothTraining, blockwise_fused_optimizers=True)
    blocks = run.method.family.blocks()
    assert [group.name for group in run.optimizers.groups] == ["unet"] * (len(blocks) + 1) + ["text_encoder1"]
    first = {id(parameter) for parameter in run.optimizers.groups[0].parameters}
    assert first == {id(parameter) for parameter in blocks[0][1].parameters()}
    whole = [id(parameter) for group in run.optimizers.groups for parameter in group.parameters]
    assert len(whole) == len(set(whole)) == len(run.method.trained_parameters())


def test_a_state_of_several_optimizers_does_not_fit_one(tmp_path):
    several = make_run(tmp_path, fused_optimizer_groups=3)
    several.save_state(tmp_path / "state")
    one, progress = make_run(tmp_path), read_progress(tmp_path / "state")
    with pytest.raises(ValueError, match="--fused_optimizer_groups: the resumed state was made with 3"):
        one.resume(tmp_path / "state", progress)
    with pytest.raises(ValueError, match="holds 3 optimizers, this run has 1.*--fused_optimizer_groups"):
        one.resume(tmp_path / "state", replace(progress, record=None))


def test_fused_groups_add_gradients_up_like_a_whole_step(tmp_path):
    common = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
    separate = make_run(tmp_path, **common)
    inside = make_run(tmp_path, fused_optimizer_groups=4, **common)
    for run in (separate, inside):
        for index, sync in ((1, False), (2, True)):
            run.step(
                recorded_batch(run, GOLDEN, index), sync=sync, noise=GOLDEN.tensors[f"noise.{index}"],
                timesteps=GOLDEN.tensors[f"timesteps.{index}"].float(),
            )
    assert largest_difference(weights(separate), weights(inside)) == 0


def test_steps_inside_the_backward_pass_need_a_single_process(tmp_path):
    options = options_with(tmp_path, fused_backward_pass=True, optimizer_type="Adafactor")
    assert fused_step_problems(options, 1) == []
    [problem] = fused_step_problems(options, 2)
    assert "--fused_backward_pass works in one process only, and this run has 2" in problem
    assert fused_step_problems(options_with(tmp_path), 2) == []


@pytest.mark.parametrize("fused", ["backward", "optimizers"])
def test_each_tensor_is_clipped_by_itself(fused):
    small, large = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer = torch.optim.SGD([small, large], lr=1.0)
    steps = FusedBackward(optimizer, max_grad_norm=1.0) if fused == "backward" else FusedOptimizers(
        [optimizer], max_grad_norm=1.0
    )
    steps.begin(is_last=True)
    (0.25 * small.sum() + 100 * large.sum()).backward()
    steps.finish()
    assert small.tolist() == [-0.25] * 4  # norm 0.5, untouched
    assert large.tolist() == pytest.approx([-0.5] * 4)  # norm 200, cut to 1
    assert small.grad is None and large.grad is None


def test_an_optimizer_steps_although_a_parameter_has_no_part_in_the_loss():
    used, unused = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    steps = FusedOptimizers([torch.optim.SGD([used, unused], lr=0.5)], max_grad_norm=0.0)
    for _ in range(2):
        steps.begin(is_last=True)
        used.sum().backward()
        steps.finish()
    assert (used.item(), unused.item()) == (0.0, 1.0)


def test_bfloat16_weights_move_by_updates_below_their_resolution():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    steps = FusedBackward(torch.optim.SGD([weight], lr=1e-4), max_grad_norm=0.0)  # neighbours of 1 are 2**-8 apart
    for _ in range(10):
        steps.begin(is_last=True)
        weight.sum().backward()
        steps.finish()
    assert weight.dtype == torch.bfloat16
    assert set(weight.tolist()) >= {1.0, 1 - 2**-8}
    assert float(weight.detach().double().mean()) == pytest.approx(1 - 10 * 1e-4, abs=1e-4)


def test_stochastic_rounding_keeps_what_bfloat16_can_hold():
    values = torch.tensor([0.0, -1.5, 2.0**100, -(2.0**-100), float("inf"), float("-inf")])
    assert torch.equal(round_stochastically(values), values.bfloat16())


# --- files -----------------------------------------------------------------------------------------------------
FORMS = {
    "as the source": (None, False, "ckpt"), "as the source, safe": (None, True, "safetensors"),
    "ckpt": ("ckpt", False, "ckpt"), "safetensors": ("safetensors", False, "safetensors"),
    "diffusers": ("diffusers", False, "diffusers"), "diffusers, safe": ("diffusers", True, "diffusers_safetensors"),
    "diffusers_safetensors": ("diffusers_safetensors", False, "diffusers_safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_saved_model_loads_as_what_was_trained(name, tmp_path):
    save_model_as, use_safetensors, layout = FORMS[name]
    run = make_run(tmp_path, save_model_as=save_model_as, use_safetensors=use_safetensors)
    family = run.method.family
    with torch.no_grad():
        family.denoiser.conv_in.weight += 1
    path = tmp_path / f"model{run.method.file_extension}"
    run.method.save(path, dtype=None, metadata={"key": "value"})
    assert (run.method.layout, path.suffix) == (layout, "" if "diffusers" in layout else f".{layout}")
    assert list(tmp_path.iterdir()) == [path]
    options = options_with(tmp_path, pretrained_model_name_or_path=str(path), save_model_as=None)
    loaded = StableDiffusion(options)
    loaded.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    for one, other in (
        (family.denoiser, loaded.denoiser), (family.text_encoders[0], loaded.text_encoders[0]), (family.vae, loaded.vae)
    ):
        assert largest_difference(one.state_dict(), other.state_dict()) == 0
    again = FullTraining(options, loaded)
    assert again.layout == ("diffusers" if "diffusers" in layout else "ckpt")  # as its source


def test_a_model_folder_replaces_an_earlier_one_and_spares_other_files(tmp_path):
    run = make_run(tmp_path, save_model_as="diffusers_safetensors")
    path = tmp_path / "model"
    run.method.save(path, dtype=None, metadata={})
    (path / "stale.txt").write_text("of the earlier model")
    run.method.save(path, dtype=None, metadata={})
    assert not (path / "stale.txt").exists()
    (path / "model_index.json").unlink()
    (path / "notes.txt").write_text("of a person")
    run.method.save(path, dtype=None, metadata={})
    assert (path / "notes.txt").is_file() and (path / "model_index.json").is_file()
    assert list(tmp_path.iterdir()) == [path]


# --- models with several text encoders and block learning rates ------------------------------------------------
SDXL = golden_run("sdxl_full")


def make_sdxl_run(tmp_path: Path, **values: Any) -> Run:
    options = recorded_options(SDXL, "sdxl_train", tmp_path).with_values(**values)
    return start_run(options, FullTraining, StableDiffusionXL)


def test_block_rates_make_a_group_for_each_block_that_is_trained(tmp_path):
    rates = tuple(0.0 if index in (0, 22) else 1e-3 * (index + 1) for index in range(23))
    run = make_sdxl_run(tmp_path, block_lr=rates, learning_rate=0.0)
    used = {group.name: group.lr for group in run.optimizers.groups}
    assert used == {f"block{index}": rate for index, rate in enumerate(rates) if rate and f"block{index}" in used}
    assert {f"block{index}" for index in (1, 10, 13)} <= used.keys()
    before = weights(run)
    [loss] = steps(run, 0, golden=SDXL)
    assert loss == pytest.approx(SDXL.steps[0]["loss"], rel=1e-5)
    moved = {name.split(".")[1] for name, tensor in weights(run).items() if not torch.equal(tensor, before[name])}
    assert {"input_blocks", "middle_block", "output_blocks"} == moved  # not time_embed, label_emb and out


def test_a_model_without_such_blocks_refuses_block_rates(tmp_path):
    with pytest.raises(ValueError, match="--block_lr has 23 learning rates, but this model's denoiser has 0 blocks"):
        make_run(tmp_path, block_lr=(1e-3,) * 23)


def test_text_encoders_have_rates_of_their_own_and_0_freezes_one(tmp_path):
    run = make_sdxl_run(tmp_path, train_text_encoder=True, learning_rate_te1=0.0, learning_rate_te2=2e-4)
    assert [group.name for group in run.optimizers.groups] == ["unet", "text_encoder2"]
    assert run.scheduled_rates() == [1e-3, 2e-4]
    before = weights(run)
    frozen = {name: tensor.clone() for name, tensor in run.method.family.text_encoders[0].state_dict().items()}
    steps(run, 0, golden=SDXL)
    assert largest_difference(run.method.family.text_encoders[0].state_dict(), frozen) == 0
    second = {name: tensor for name, tensor in before.items() if name.startswith("text_encoder2.")}
    assert second and largest_difference(second, {name: weights(run)[name] for name in second}) > 0


def test_every_trained_parameter_of_a_text_encoder_gets_a_gradient(tmp_path):
    run = make_sdxl_run(tmp_path, train_text_encoder=True, learning_rate=0.0, learning_rate_te1=1e-3,
                        learning_rate_te2=1e-3)
    run.model(recorded_batch(run, SDXL, 0)).mean().backward()
    assert list(run.method.trainable) == ["text_encoder1", "text_encoder2"]
    assert all(parameter.grad is not None for parameter in run.method.trained_parameters())
    family = run.method.family
    assert all(parameter.grad is None for parameter in family.unused_text_encoder_parameters(0))
    assert all(parameter.grad is None for parameter in family.denoiser.parameters())


# --- the scripts -----------------------------------------------------------------------------------------------
def train(script: str, *arguments: str | Path, output_dir: Path) -> None:
    run_script(
        script, "--pretrained_model_name_or_path", MODEL, "--tokenizer_cache_dir", TOKENIZERS, "--seed", "1",
        "--max_data_loader_n_workers", "0", "--learning_rate", "1e-3", "--output_dir", output_dir, "--output_name",
        "run", *arguments,
    )  # fmt: skip


@pytest.mark.slow
def test_a_dreambooth_run_resumed_in_the_middle_of_an_epoch_equals_the_straight_run(tmp_path):
    common = [
        "--dataset_config", FOLDER / "dataset.toml", "--cache_latents", "--fused_backward_pass", "--optimizer_type",
        "Adafactor", "--stop_text_encoder_training", "4", "--save_model_as", "safetensors", "--max_train_steps", "5",
    ]  # fmt: skip
    train("train_db", *common, "--save_every_n_steps", "3", "--save_state", output_dir=tmp_path / "straight")
    state = tmp_path / "straight" / "run-step00000003-state"
    assert read_progress(state).position == Position(epoch=1, batch=3, step=3)
    train("train_db", *common, "--resume", state, output_dir=tmp_path / "resumed")
    straight, resumed = (load_file(tmp_path / name / "run.safetensors") for name in ("straight", "resumed"))
    assert largest_difference(straight, resumed) == 0
    assert largest_difference(straight, load_file(tmp_path / "straight" / "run-step00000003.safetensors")) > 0


@pytest.mark.slow
def test_fine_tuning_saves_in_the_form_of_its_source(tmp_path):
    common = ["--dataset_config", FOLDER / "dataset_ft.toml", "--train_text_encoder", "--max_train_steps", "2"]
    train("fine_tune", *common, "--save_model_as", "diffusers", "--use_safetensors", "--save_every_n_steps", "1",
          "--save_last_n_steps", "1", output_dir=tmp_path)  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-step00000001", "run-step00000002"}
    train("fine_tune", *common, "--pretrained_model_name_or_path", tmp_path / "run", output_dir=tmp_path / "again")
    assert (tmp_path / "again" / "run" / "model_index.json").is_file()
    train("fine_tune", *common, "--mixed_precision", "bf16", "--full_bf16", "--gradient_checkpointing",
          output_dir=tmp_path / "file")  # fmt: skip
    assert [path.name for path in (tmp_path / "file").iterdir()] == ["run.ckpt"]


@pytest.mark.slow
def test_two_processes_stop_the_text_encoder_and_train_on(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        ROOT / "train_db.py", "--pretrained_model_name_or_path", MODEL, "--tokenizer_cache_dir", TOKENIZERS,
        "--dataset_config", FOLDER / "dataset.toml", "--cache_latents", "--max_data_loader_n_workers", "0", "--seed",
        "3", "--learning_rate", "1e-3", "--max_train_steps", "4", "--stop_text_encoder_training", "2",
        "--save_every_n_steps", "2", "--save_model_as", "safetensors", "--output_dir", tmp_path, "--output_name", "run",
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        list(map(str, command)), cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    at_stop, at_end = (load_file(tmp_path / f"{name}.safetensors") for name in ("run-step00000002", "run"))
    changed = {key.partition(".")[0] for key in at_end if not torch.equal(at_stop[key], at_end[key])}
    assert changed == {"model"}  # nothing below cond_stage_model or first_stage_model
    source = load_file(MODEL)
    moved = {key.partition(".")[0] for key in at_stop if not torch.equal(at_stop[key], source[key])}
    assert moved == {"model", "cond_stage_model"}

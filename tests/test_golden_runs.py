"""Our own training step against the recorded steps of the reference trainer, on the same tiny models.

Tolerances are those measured for the recordings: losses and gradient norms 1e-5 relative, tensor values 1e-4
absolute, without the tensors whose exact gradient is zero (biases and time projections in front of a single-channel
group norm, CLIP key biases), where the optimizer turns rounding noise into full-size steps.
"""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library import training_loop
from library.data.records import Batch
from library.methods.network import NetworkTraining
from library.train_util import Run, StepPlan, make_accelerator
from tests.golden import FOLDER, GoldenRun, golden_run

INJECTED = [
    "sd1_lora", "sd1_lora_conv_minsnr", "sd1_lora_huber", "sd1_lora_multires", "sd1_lora_continue", "sd1_lora_reforder",
]
BATCHES_PER_EPOCH = 4


def start_run(golden: GoldenRun, tmp_path, monkeypatch) -> Run:
    """The run that our own script would make of the recorded options, with the recorded initial weights."""
    from library.families.sd import StableDiffusion
    from library.launch import parse
    from train_network import SCRIPT

    monkeypatch.chdir(FOLDER)
    options = parse(SCRIPT, [*golden.record["options"], "--output_dir", str(tmp_path), "--output_name", golden.name])
    family = StableDiffusion(options)
    method = NetworkTraining(options, family)
    accelerator = make_accelerator(options, 0.0)
    plan = StepPlan.make(options, BATCHES_PER_EPOCH, 1)
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    placement = training_loop.placement_for(options, accelerator)
    method.before_caching(placement)
    run, _ = training_loop.make_run(options, method, placement, accelerator, plan, 42)
    if golden.record.get("initial_lora_down_file"):
        info = method.network.load_state_dict(golden.initial_weights, strict=False)
        assert not info.unexpected_keys
        assert all("lora_down" not in key for key in info.missing_keys)
    return run


def recorded_batch(run: Run, golden: GoldenRun, index: int) -> Batch:
    """The batch of one recorded step, from its captions and its (already scaled) latents."""
    step = golden.steps[index]
    scaled = torch.stack([golden.tensors[f"latents.{key}"] for key in step["image_keys"]])
    spec = run.method.family.latent
    count = len(step["image_keys"])
    return Batch(
        captions=step["captions"],
        loss_weights=torch.tensor(step["loss_weights"]),
        original_sizes_hw=torch.tensor(step["original_sizes_hw"]),
        crop_top_lefts=torch.tensor(step["crop_top_lefts"]),
        target_sizes_hw=torch.tensor(step["target_sizes_hw"]),
        network_multipliers=torch.ones(count),
        image_keys=step["image_keys"],
        latents=scaled if spec.cache_is_scaled else spec.denormalize(scaled),
        tokens=run.method.family.tokenize(step["captions"]),
    )


def assert_step_matches(
    golden: GoldenRun, index: int, loss: float, grad_norm: float | None, rates: list[float]
) -> None:
    step = golden.steps[index]
    assert loss == pytest.approx(step["loss"], rel=1e-5), f"loss of step {index}"
    assert grad_norm == pytest.approx(step["grad_norm"], rel=1e-5), f"gradient norm of step {index}"
    assert rates == pytest.approx(step["lr"], rel=1e-6), f"learning rates of step {index}"


def assert_saved_tensors_match(golden: GoldenRun, saved: dict[str, Tensor]) -> None:
    record = golden.record
    assert set(saved) == set(record["saved_tensors"])
    assert len(saved) == record["saved_tensor_count"]
    for key, wanted in record["checked_tensors"].items():
        first = saved[key].flatten()[:8].tolist()
        assert first == pytest.approx(wanted["first"], abs=1e-4), key
        assert float(saved[key].mean()) == pytest.approx(wanted["mean"], abs=1e-4), key
    for key, (shape, dtype, mean, deviation) in record["saved_tensors"].items():
        tensor = saved[key]
        assert list(tensor.shape) == shape, key
        assert str(tensor.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch."), key
        if _has_zero_gradient(key) or deviation is None:
            continue
        assert float(tensor.mean()) == pytest.approx(mean, abs=1e-4), key
        if tensor.numel() > 1:
            assert float(tensor.std()) == pytest.approx(deviation, abs=1e-4), key


def _has_zero_gradient(key: str) -> bool:
    return "time_emb_proj" in key or "k_proj" in key and "_te_" in key


def rates(run: Run) -> list[float]:
    return [group["lr"] for group in run.optimizer.optimizer.param_groups]


@pytest.mark.slow
@pytest.mark.parametrize("name", INJECTED)
def test_injected_steps_reproduce_the_recorded_losses_and_weights(name, tmp_path, monkeypatch):
    golden = golden_run(name)
    run = start_run(golden, tmp_path, monkeypatch)
    for index, step in enumerate(golden.steps):
        used = rates(run)
        outcome = run.step(
            recorded_batch(run, golden, index), sync=True, timesteps=golden.tensors[f"timesteps.{index}"].float(),
            noise=golden.tensors[f"noise.{index}"],
        )
        assert step["optimizer_step"]
        assert_step_matches(golden, index, outcome.loss, outcome.grad_norm, used)
    path = tmp_path / "result.safetensors"
    run.method.save(path, dtype=torch.float32, metadata={})
    assert_saved_tensors_match(golden, load_file(path))


@pytest.mark.slow
def test_reseeded_steps_draw_noise_in_the_recorded_order(tmp_path, monkeypatch):
    golden = golden_run("sd1_lora_reseed")
    run = start_run(golden, tmp_path, monkeypatch)
    for index in range(len(golden.steps)):
        batch, used = recorded_batch(run, golden, index), rates(run)
        torch.manual_seed(10000 + index)
        random.seed(10000 + index)
        outcome = run.step(batch, sync=True)
        assert_step_matches(golden, index, outcome.loss, outcome.grad_norm, used)
    path = tmp_path / "result.safetensors"
    run.method.save(path, dtype=torch.float32, metadata={})
    assert_saved_tensors_match(golden, load_file(path))

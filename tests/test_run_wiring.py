"""Options reach what they are for: each is tried with and without, on the same batch under the same noise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library import training_loop
from library.config_util import SupportedKinds
from library.data.records import BatchRequest
from library.families.sd import StableDiffusion
from library.generation.training_samples import TrainingSampler
from library.launch import parse
from library.methods.network import NetworkTraining
from library.options import make_options
from library.progress import REDACTED, RunLog, _tracker_arguments, tracker_config
from library.train_util import Precision, Run, StepOutcome, StepPlan, make_accelerator, resolve_seed
from library.training_loop import is_sample_epoch, is_sample_step
from library.training_state import Position, SavedProgress
from tests.golden import FOLDER, golden_run
from tests.test_golden_runs import recorded_batch
from tests.training import MODEL, PHOTOS, TOKENIZERS, clean_process, train, write_config

GOLDEN = golden_run("sd1_lora")


@pytest.fixture
def fresh_process(monkeypatch):
    monkeypatch.chdir(FOLDER)
    with clean_process():
        yield


def network_run(tmp_path: Path, **values: Any) -> Run:
    """The recorded run of train_network.py with other values."""
    from train_network import SCRIPT

    words = [*GOLDEN.record["options"], "--output_dir", str(tmp_path), "--output_name", "run"]
    options = parse(SCRIPT, words).with_values(**values)
    family = StableDiffusion(options)
    method = NetworkTraining(options, family)
    accelerator = make_accelerator(options, 0.0)
    placement = training_loop.placement_for(options, accelerator)
    torch.manual_seed(0)
    family.load(weight_dtype=placement.weight_dtype, vae_dtype=torch.float32, device="cpu")
    plan = StepPlan.make(options, 4, 1)
    return training_loop.make_run(options, method, placement, accelerator, plan, 42)[0]


def batch_of(run: Run, index: int = 0, **changes: Any) -> dict[str, Any]:
    """The arguments of a step with a recorded batch, timesteps and noise."""
    return {
        "batch": replace(recorded_batch(run, GOLDEN, index), **changes),
        "timesteps": GOLDEN.tensors[f"timesteps.{index}"].float(), "noise": GOLDEN.tensors[f"noise.{index}"],
    }  # fmt: skip


def loss_of(run: Run, **changes: Any) -> float:
    with torch.no_grad():
        return float(run.method.loss(**batch_of(run, **changes)).mean())


def weights(run: Run) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.method.trained_parameters()]


# --- the loss ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("common", "option"),
    [
        ({"v_parameterization": True}, "scale_v_pred_loss_like_noise_pred"),
        ({}, "weighted_captions"),
    ],
)
def test_an_option_of_the_loss_changes_the_loss(common, option, tmp_path, fresh_process):
    captions = {"captions": ["(a cat:1.6) on [grass]"] * len(GOLDEN.steps[0]["captions"])}
    without = network_run(tmp_path, **common)
    tokens = without.method.tokenize(captions["captions"])
    with_option = network_run(tmp_path, **common, **{option: True})
    first, second = (loss_of(run, **captions, tokens=tokens) for run in (without, with_option))
    assert first == loss_of(without, **captions, tokens=tokens)
    assert abs(first - second) > 1e-4 * first


def test_the_weight_of_regularisation_pictures_scales_their_loss(tmp_path, fresh_process):
    for folder, name in (("train/1_cat", "a1"), ("reg/1_cat", "b1")):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(FOLDER / "dataset" / f"{name}.png", tmp_path / folder)
    run = network_run(
        tmp_path, dataset_config=None, train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"),
        resolution=(64, 64), prior_loss_weight=0.25,
    )  # fmt: skip
    group = training_loop.load_data(run.options, run.method, SupportedKinds(), 1, is_main_process=True)
    batches = [group[BatchRequest(epoch=1, index=index, step=0)] for index in range(len(group))]
    assert sorted(weight for batch in batches for weight in batch.loss_weights.tolist()) == [0.25, 1.0]
    count = len(GOLDEN.steps[0]["captions"])
    whole = loss_of(run, loss_weights=torch.ones(count))
    assert loss_of(run, loss_weights=torch.full((count,), 0.25)) == pytest.approx(0.25 * whole)


# --- the step ------------------------------------------------------------------------------------------------
def test_averaging_optimizers_show_their_average_while_nothing_is_trained(tmp_path, fresh_process):
    run = network_run(tmp_path, optimizer_type="AdamWScheduleFree", lr_scheduler="constant", learning_rate=1e-2)
    for index in (0, 1, 0):
        run.step(**batch_of(run, index), sync=True)
    training = weights(run)
    with run.inference():
        average = weights(run)
        assert not run.method.network.training
    assert any(not torch.equal(a, b) for a, b in zip(training, average, strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(training, weights(run), strict=True))


def test_frozen_models_are_in_train_mode_exactly_where_activations_are_recomputed(tmp_path, fresh_process):
    for checkpointing in (False, True):
        family = network_run(tmp_path, gradient_checkpointing=checkpointing).method.family
        assert [family.denoiser.training, family.text_encoders[0].training] == [checkpointing] * 2
        assert family.denoiser.is_gradient_checkpointing == checkpointing


def test_norms_are_limited_after_optimizer_steps_only(tmp_path, fresh_process):
    run = network_run(tmp_path, scale_weight_norms=1e-4, gradient_accumulation_steps=2, learning_rate=1e-2)
    run.step(**batch_of(run, 0), sync=False)
    run.step(**batch_of(run, 1), sync=True)
    with torch.no_grad():
        for parameter in run.method.trained_parameters():
            parameter.mul_(10)
    before = weights(run)
    outcome = run.step(**batch_of(run, 0), sync=False)
    assert not outcome.scalars
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    outcome = run.step(**batch_of(run, 1), sync=True)
    assert outcome.scalars["max_norm/keys_scaled"] > 0
    assert any(float(b.norm()) < 0.9 * float(a.norm()) for a, b in zip(before, weights(run), strict=True))


def test_losses_and_norm_are_read_from_the_device_together(tmp_path, fresh_process, monkeypatch):
    run = network_run(tmp_path, max_grad_norm=1.0)
    run.step(**batch_of(run, 0), sync=True)
    arguments = batch_of(run, 1)
    reads: list[int] = []
    item, tolist, number = Tensor.item, Tensor.tolist, Tensor.__float__
    original = run._guard.read
    inside = [False]

    def count(method):
        def call(tensor: Tensor, *rest: Any) -> Any:
            if inside[0] and tensor.requires_grad is False:
                reads.append(tensor.numel())
            return method(tensor, *rest)

        return call

    def read(*rest: Any, **options: Any) -> Any:
        inside[0] = True
        try:
            return original(*rest, **options)
        finally:
            inside[0] = False

    monkeypatch.setattr(run._guard, "read", read)
    for name, method in (("item", item), ("tolist", tolist), ("__float__", number)):
        monkeypatch.setattr(Tensor, name, count(method))
    outcome = run.step(**arguments, sync=True)
    monkeypatch.undo()
    assert reads == [1 + len(GOLDEN.steps[1]["captions"]) + 1]  # the mean, every loss, the norm
    assert outcome.loss > 0 and outcome.grad_norm > 0


WORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
import torch
from safetensors.torch import save_file
from tests.golden import FOLDER
from tests.test_run_wiring import batch_of, network_run, weights

out = Path(sys.argv[1])
os.chdir(FOLDER)
both = os.environ.get("WORLD_SIZE", "1") == "1"
run = network_run(out, optimizer_type="SGD", lr_scheduler="cosine", learning_rate=1e-1, max_train_steps=4,
                  max_grad_norm=0.0, gradient_accumulation_steps=2 if both else 1)
rates = []
for _ in range(3):
    if both:
        run.step(**batch_of(run, 0), sync=False)
        run.step(**batch_of(run, 1), sync=True)
    else:
        run.step(**batch_of(run, run.accelerator.process_index), sync=True)
    rates.append(run.scheduled_rates()[0])
tensors = {str(i): t.contiguous() for i, t in enumerate(weights(run))} | {"rates": torch.tensor(rates)}
save_file(tensors, out / f"{'one' if both else run.accelerator.process_index}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_that_sees_both_batches_under_the_same_rates(tmp_path):
    from tests.conftest import ROOT
    from tests.test_processes import distributed_environment, free_port

    (tmp_path / "worker.py").write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    for words in ([], launcher):
        command = [sys.executable, *words, str(tmp_path / "worker.py"), str(tmp_path)]
        result = subprocess.run(
            command, cwd=ROOT, env=distributed_environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "0", "1"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert one["rates"].tolist() == pytest.approx(first["rates"].tolist())
    assert 0 < one["rates"][-1] < one["rates"][0]
    assert all(torch.allclose(one[key], first[key], atol=1e-6) for key in one)
    start = load_file(tmp_path / "one.safetensors")
    assert any(float(start[key].abs().max()) > 0 for key in start)


# --- precision, seed, processes --------------------------------------------------------------------------------
def test_the_vae_runs_in_float32_if_it_is_asked_for():
    half = {"mixed_precision": "fp16"}
    assert Precision.from_options(make_options(**half)).vae == torch.float16
    assert Precision.from_options(make_options(**half, no_half_vae=True)).vae == torch.float32
    assert Precision.from_options(make_options(**half, save_precision="bf16")).save == torch.bfloat16
    assert Precision.from_options(make_options(**half)).save is None


def test_the_seed_is_the_given_one_or_that_of_the_resumed_run_or_a_new_one_each_time(caplog):
    one = SimpleNamespace(num_processes=1)
    saved = SavedProgress(Position(), seed=7)
    assert resolve_seed(make_options(seed=5), None, one) == 5
    assert resolve_seed(make_options(), saved, one) == 7
    assert not caplog.text
    assert resolve_seed(make_options(seed=5), saved, one) == 5
    assert len({resolve_seed(make_options(), None, one) for _ in range(4)}) == 4
    assert resolve_seed(make_options(seed=0), saved, one) == 0


@pytest.mark.parametrize("minutes", [None, 90])
def test_the_time_limit_of_processes_is_handed_on(minutes, monkeypatch):
    import accelerate

    given: dict[str, Any] = {}

    class Recorded(accelerate.Accelerator):
        def __init__(self, **options: Any) -> None:
            given.update(options)
            super().__init__(**options)

    monkeypatch.setattr(accelerate, "Accelerator", Recorded)
    with clean_process():
        make_accelerator(make_options(ddp_timeout=minutes), 0.0)
    limits = [h.timeout for h in given["kwargs_handlers"] if isinstance(h, accelerate.InitProcessGroupKwargs)]
    assert limits == ([timedelta(minutes=90)] if minutes else [])


# --- samples -----------------------------------------------------------------------------------------------------
def due(check: Any, **values: Any) -> list[int]:
    return [number for number in range(1, 8) if check(make_options(**values), number)]


def test_samples_are_due_every_so_many_steps_or_epochs():
    assert due(is_sample_step, sample_every_n_steps=3) == [3, 6]
    assert due(is_sample_step) == due(is_sample_epoch) == []
    assert due(is_sample_epoch, sample_every_n_epochs=2) == [2, 4, 6]
    both = {"sample_every_n_steps": 3, "sample_every_n_epochs": 2}
    assert due(is_sample_step, **both) == [] and due(is_sample_epoch, **both) == [2, 4, 6]


def test_samples_show_what_would_be_saved_and_not_what_is_being_trained(tmp_path, fresh_process):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 7\n")
    run = network_run(
        tmp_path, optimizer_type="AdamWScheduleFree", lr_scheduler="constant", learning_rate=1e-1,
        sample_prompts=str(prompts), sample_every_n_steps=1,
    )  # fmt: skip
    for index in (0, 1, 0):
        run.step(**batch_of(run, index), sync=True)
    sampler = TrainingSampler(run.options, accelerator=run.accelerator)
    out = training_loop.Outputs(saver=None, sampler=sampler, log=None)
    training_loop.sample(run, out, epoch=None, step=1, is_due=False)
    assert not (tmp_path / "sample").exists()
    training_loop.sample(run, out, epoch=None, step=1, is_due=True)
    assert run.method.network.training
    with run.inference():
        sampler.draw(run.method.family, epoch=None, step=2)
    sampler.draw(run.method.family, epoch=None, step=3)
    files = sorted((tmp_path / "sample").iterdir())
    sample, saved, training = (numpy.asarray(Image.open(path), dtype=float) for path in files)
    assert abs(sample - saved).max() <= 2 < abs(training - saved).max()  # averages are kept to a rounding


# --- logs and files ----------------------------------------------------------------------------------------------
def log_of(run: Run, group_names: list[str]) -> RunLog:
    return RunLog(run, group_names, "network_train", total=10, done=0)


def test_the_bar_counts_optimizer_steps_and_shows_the_average_loss_and_the_limited_norms(
    tmp_path, fresh_process, capsys
):
    run = network_run(tmp_path)
    log = log_of(run, ["unet"])
    limited = {"max_norm/keys_scaled": 3.0, "norm/avg_key_norm": 0.5}
    for batch, (loss, synced, scalars) in enumerate([(1.0, False, {}), (0.5, True, limited), (0.75, False, {})]):
        run.losses.add(batch=batch, loss=loss, is_first_epoch=True)
        log.batch(StepOutcome(loss, scalars=scalars), synced=synced)
    log.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "steps:" in shown and "1/10" in shown
    assert "avr_loss=0.75" in shown and "Keys Scaled=3" in shown and "Average key norm=0.5" in shown


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [
        ("AdamW", {"lr/unet": 1e-3, "lr/text": 1e-3}),
        ("Prodigy", {"lr/unet": 1e-3, "lr/d*lr/unet": 1e-9, "lr/text": 1e-3, "lr/d*lr/text": 1e-9}),
        ("DAdaptLion", {"lr/unet": 1e-3, "lr/d*lr/unet": 1e-9, "lr/text": 1e-3, "lr/d*lr/text": 1e-9}),
    ],
)
def test_the_rates_of_every_group_are_logged_and_what_an_optimizer_makes_of_them(
    optimizer, rates, tmp_path, fresh_process
):
    run = network_run(tmp_path, optimizer_type=optimizer, lr_scheduler="constant", learning_rate=1e-3,
                      unet_lr=None, text_encoder_lr=None)  # fmt: skip
    assert log_of(run, ["unet", "text"][: len(run.parameter_groups())])._learning_rates() == pytest.approx(rates)


def test_a_tracker_that_cannot_write_is_left_alone_and_training_goes_on(tmp_path, fresh_process, caplog, monkeypatch):
    run = network_run(tmp_path, logging_dir=str(tmp_path / "logs"), log_with="tensorboard")
    log = log_of(run, [str(number) for number in range(len(run.parameter_groups()))])
    log.scalars({"a": 1.0}, step=1)
    assert log.has_trackers and "cannot be written" not in caplog.text
    calls: list[int] = []

    def full(values: Any, step: int) -> None:
        calls.append(step)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.accelerator, "log", full)
    log.batch(StepOutcome(0.5), synced=True)
    log.scalars({"a": 1.0}, step=3)
    log.close()
    assert len(calls) == 1 and caplog.text.count("the logs cannot be written any more, training goes on") == 1


def test_trackers_that_cannot_write_their_end_do_not_end_a_run(tmp_path, fresh_process, caplog, monkeypatch):
    run = network_run(tmp_path, logging_dir=str(tmp_path / "logs"), log_with="tensorboard")
    log = log_of(run, [str(number) for number in range(len(run.parameter_groups()))])

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.accelerator, "end_training", full)
    log.close()
    assert "the logs cannot be written any more, training goes on without them: [Errno 28]" in caplog.text
    log.close()  # they are left alone
    assert caplog.text.count("the logs cannot be written") == 1


def test_a_tracker_gets_the_options_but_no_secret_and_no_path():
    secret = {
        "wandb_api_key": "key-1",
        "huggingface_token": "key-2",
        "output_dir": "/home/me/out",
        "pretrained_model_name_or_path": "/home/me/model",
        "sample_prompts": "/home/me/prompts",
    }
    text = tracker_config(make_options(**secret, learning_rate=0.25, training_comment="plain"))
    stored = json.loads(text)
    assert stored["learning_rate"] == 0.25 and stored["training_comment"] == "plain"
    assert not [value for value in secret.values() if value in text]
    assert not REDACTED & stored.keys() and not [name for name in stored if name.endswith("_path")]


def test_options_that_name_files_or_secrets_are_never_stored():
    private = (
        "wandb_api_key huggingface_token pretrained_model_name_or_path vae tokenizer_cache_dir train_data_dir "
        "conditioning_data_dir reg_data_dir output_dir logging_dir dataset_config in_json resume network_weights "
        "clip_l clip_g t5xxl ae controlnet_model_name_or_path sample_prompts config_file huggingface_repo_id "
        "base_weights"
    )
    known = set(make_options().flat())
    for name in [name for name in private.split() if name in known]:
        value = ["SECRET"] if name == "base_weights" else "SECRET"
        assert "SECRET" not in tracker_config(make_options(**{name: value})), name
    assert REDACTED == set(private.split())


def test_arguments_of_trackers_come_from_their_file_and_the_name_of_the_run(tmp_path):
    file = tmp_path / "trackers.toml"
    file.write_text('[wandb]\nentity = "me"\n[tensorboard]\nflush_secs = 5\n')
    options = make_options(log_tracker_config=str(file), wandb_run_name="third")
    assert _tracker_arguments(options) == {"wandb": {"entity": "me", "name": "third"}, "tensorboard": {"flush_secs": 5}}
    file.write_text('[wandb]\nname = "own"\n')
    assert _tracker_arguments(options)["wandb"] == {"name": "own"}
    assert _tracker_arguments(make_options()) == {}


def test_comment_precision_and_names_of_a_run_reach_its_files(tmp_path):
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    path = train(
        "--dataset_config", write_config(tmp_path, photos), "--cache_latents", "--max_train_steps", "1",
        "--save_precision", "fp16", "--training_comment", "my words", "--logging_dir", tmp_path / "logs",
        "--log_prefix", "pre_", "--log_tracker_name", "my_tracker", "--log_config", output_dir=tmp_path / "out",
    )  # fmt: skip
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_training_comment"] == "my words"
    [folder] = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("pre_2")
    assert list((folder / "my_tracker").rglob("events.out.tfevents*"))
    written = "".join(path.read_text("utf-8", "ignore") for path in folder.rglob("*") if path.suffix == ".yml")
    assert "max_train_steps" in written and str(MODEL) not in written and str(TOKENIZERS) not in written

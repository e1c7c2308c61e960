"""Textual Inversion against the recorded steps of the reference trainer, through our own entry script's options."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library import training_loop
from library.metadata import TrainingMetadata
from library.train_util import Run, StepPlan, make_accelerator
from tests.golden import FOLDER, golden_run
from tests.test_golden_runs import (
    BATCHES_PER_EPOCH,
    assert_saved_tensors_match,
    assert_step_matches,
    rates,
    recorded_batch,
)

GOLDEN = golden_run("sd1_ti")


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """The run that our own script makes of the recorded options."""
    from library.families.sd import StableDiffusion
    from library.launch import parse
    from library.methods.textual_inversion import TextualInversion
    from train_textual_inversion import SCRIPT

    monkeypatch.chdir(FOLDER)
    options = parse(SCRIPT, [*GOLDEN.record["options"], "--output_dir", str(tmp_path), "--output_name", GOLDEN.name])
    family = StableDiffusion(options)
    method = TextualInversion(options, family)
    assert method.check_options() == []
    method.prepare_text()
    accelerator = make_accelerator(options, 0.0)
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    placement = training_loop.placement_for(options, accelerator)
    return training_loop.make_run(
        options, method, placement, accelerator, StepPlan.make(options, BATCHES_PER_EPOCH, 1), 42
    )[0]


def test_captions_and_tokens_are_the_recorded_ones(run):
    [(word, words)] = run.method.caption_replacements.items()
    for step in GOLDEN.steps:
        assert all(caption.startswith(words) for caption in step["captions"])
        raw = [caption.replace(words, word, 1) for caption in step["captions"]]
        assert [text.replace(word, words) for text in raw] == step["captions"]
        ids = run.method.tokenize(step["captions"])["input_ids"]
        assert ids[0, 0, :16].tolist() == step["input_ids"][0]


def test_injected_steps_reproduce_the_recorded_losses_and_embeddings(run, tmp_path):
    others = run.method.tables[0].weight.detach()[: run.method.tables[0].first].clone()
    for index in range(len(GOLDEN.steps)):
        used = rates(run)
        outcome = run.step(
            recorded_batch(run, GOLDEN, index), sync=True, timesteps=GOLDEN.tensors[f"timesteps.{index}"].float(),
            noise=GOLDEN.tensors[f"noise.{index}"],
        )
        assert_step_matches(GOLDEN, index, outcome.loss, outcome.grad_norm, used)
        sizes = [sum(p.numel() for p in group["params"]) for group in run.optimizer.optimizer.param_groups]
        assert sizes == GOLDEN.steps[index]["param_group_sizes"]
    assert torch.equal(run.method.tables[0].weight.detach()[: len(others)], others)
    path = tmp_path / "result.safetensors"
    run.method.save(path, dtype=torch.float32, metadata={})
    assert_saved_tensors_match(GOLDEN, load_file(path))


def test_metadata_is_the_recorded_modelspec(run, tmp_path):
    facts = training_loop.run_facts(run, 0.0)
    entries = TrainingMetadata(run.options, None, run.method, facts).at(epoch=2, steps=8)
    path = tmp_path / "result.safetensors"
    run.method.save(path, dtype=None, metadata=entries)
    with safe_open(path, "pt") as file:
        saved = file.metadata()
    recorded = GOLDEN.record["saved_metadata"]
    assert saved.keys() == recorded.keys()
    for key, value in recorded.items():
        if value != "<varies>" and key != "modelspec.implementation_version":
            assert saved[key] == value, key

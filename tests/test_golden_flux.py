"""Our own FLUX training steps against the recorded steps of the reference trainer, on the same tiny models."""

from __future__ import annotations

import pytest
import torch

from library.families.flux import Flux
from tests.golden import FOLDER, golden_run
from tests.golden_cached import assert_injected_steps_match, assert_reseeded_steps_match, recorded_batch, start_run
from tests.test_golden_full import recorded_options
from tests.training import clean_process

SCRIPTS = {
    "flux_lora_sigmoid": "flux_train_network", "flux_lora_shift": "flux_train_network", "flux_full": "flux_train",
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_injected_steps_reproduce_the_recorded_losses_and_weights(name, tmp_path, monkeypatch):
    golden = golden_run(name)
    monkeypatch.chdir(FOLDER)
    assert_injected_steps_match(golden, SCRIPTS[name], recorded_options(golden, SCRIPTS[name], tmp_path), tmp_path)


def test_reseeded_steps_draw_noise_and_timesteps_in_the_recorded_order(tmp_path, monkeypatch):
    golden = golden_run("flux_lora_reseed")
    monkeypatch.chdir(FOLDER)
    options = recorded_options(golden, "flux_train_network", tmp_path)
    assert_reseeded_steps_match(golden, "flux_train_network", options, tmp_path)


def test_the_denoiser_gets_the_recorded_inputs(tmp_path, monkeypatch):
    golden = golden_run("flux_lora_shift")
    monkeypatch.chdir(FOLDER)
    with clean_process():
        options = recorded_options(golden, SCRIPTS["flux_lora_shift"], tmp_path)
        run, texts = start_run(golden, SCRIPTS["flux_lora_shift"], options)
    calls = []
    run.method.family.denoiser.register_forward_pre_hook(
        lambda _module, _inputs, named: calls.append(named), with_kwargs=True
    )
    for index in range(2):
        batch = recorded_batch(run, golden, index, texts)
        timesteps, noise = golden.tensors[f"timesteps.{index}"].float(), golden.tensors[f"noise.{index}"]
        with torch.no_grad():
            run.method.loss(batch, timesteps=timesteps, noise=noise)
        for name in ("img", "img_ids", "txt", "y", "timesteps", "guidance"):
            record, found = golden.steps[index]["model_call"][name], calls[-1][name]
            assert list(found.shape) == record["shape"], name
            first = found.flatten()[: len(record["first"])].tolist()
            assert first == pytest.approx(record["first"], rel=1e-5, abs=1e-6), name
            assert float(found.mean()) == pytest.approx(record["mean"], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", ["flux_lora_sigmoid", "flux_full"])
def test_saved_metadata_agrees_with_the_recording(name, tmp_path, monkeypatch):
    """What the family says about itself and its options, in the recorded words."""
    golden = golden_run(name)
    monkeypatch.chdir(FOLDER)
    said = Flux(recorded_options(golden, SCRIPTS[name], tmp_path)).model_metadata()
    wanted = golden.record["saved_metadata"]
    assert said["architecture"] == wanted["modelspec.architecture"].removesuffix("/lora")
    assert said["prediction_type"] is None and "modelspec.prediction_type" not in wanted
    entries = {key: str(value) for key, value in said.items() if key.startswith("ss_")}
    assert {key: wanted[key] for key in entries if key in wanted} == {k: v for k, v in entries.items() if k in wanted}
    if name == "flux_lora_sigmoid":
        assert set(entries) <= set(wanted)

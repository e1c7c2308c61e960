"""Runs of the Textual Inversion scripts on the tiny models: whole scripts, and single steps of them."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from library import training_loop
from library.data.records import Batch
from library.train_util import Run, StepPlan, make_accelerator
from tests.golden import FOLDER
from tests.training import MODEL, TOKENIZERS, run_script

DEFAULTS = {
    "--pretrained_model_name_or_path": MODEL, "--tokenizer_cache_dir": TOKENIZERS, "--max_data_loader_n_workers": "0",
    "--seed": "42", "--learning_rate": "1e-2", "--token_string": "mychar", "--save_model_as": "safetensors",
}  # fmt: skip


def command_line(*words: str | Path, output_dir: Path) -> list[str]:
    """Options on top of small defaults, with the recorded pictures as data."""
    chosen = _with_defaults(words)
    return [*chosen, "--dataset_config", str(_dataset(output_dir)), "--output_dir", str(output_dir)]


def train_word(script: str, *words: str | Path, output_dir: Path) -> Path:
    """Train on the recorded pictures with small defaults; returns the final file."""
    chosen = command_line(*words, output_dir=output_dir)
    run_script(script, *chosen)
    return output_dir / f"mychar.{chosen[chosen.index('--save_model_as') + 1]}"


def start_run(script: str, *words: str | Path, output_dir: Path) -> Run:
    """A loaded run of a script that has drawn no batch yet."""
    from library.launch import parse

    module = importlib.import_module(script)
    options = parse(module.SCRIPT, command_line(*words, output_dir=output_dir))
    family = _imported(module.SCRIPT.family)(options)
    method = _imported(module.SCRIPT.method)(options, family)
    assert method.check_options() == []
    method.prepare_text()
    accelerator = make_accelerator(options, 0.0)
    torch.manual_seed(0)
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    placement = training_loop.placement_for(options, accelerator)
    return training_loop.make_run(options, method, placement, accelerator, StepPlan.make(options, 100, 1), 42)[0]


def batch_of(run: Run, *captions: str, size: int = 8) -> Batch:
    """A batch with random latents that are the same every time."""
    count = len(captions)
    shape = (count, run.method.family.latent.channels, size, size)
    sizes = torch.tensor([[size * 8, size * 8]] * count)
    return Batch(
        captions=list(captions), loss_weights=torch.ones(count), original_sizes_hw=sizes,
        crop_top_lefts=torch.zeros_like(sizes), target_sizes_hw=sizes, network_multipliers=torch.ones(count),
        image_keys=[str(index) for index in range(count)], tokens=run.method.tokenize(captions),
        latents=torch.randn(shape, generator=torch.Generator().manual_seed(1)),
    )  # fmt: skip


def step(run: Run, batch: Batch) -> float:
    """One optimizer step with noise and timesteps that are the same every time; returns its loss."""
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(2))
    timesteps = torch.linspace(300.0, 700.0, len(batch.captions)).floor()
    return run.step(batch, sync=True, timesteps=timesteps, noise=noise).loss


def _with_defaults(words: tuple[str | Path, ...]) -> list[str]:
    chosen = [str(word) for word in words]
    for option, value in DEFAULTS.items():
        if option not in chosen:
            chosen += [option, str(value)]
    return chosen


def _imported(path: str) -> type:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _dataset(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = (FOLDER / "dataset_ti.toml").read_text(encoding="utf-8")
    path = folder / "dataset.toml"
    path.write_text(text.replace('"dataset"', repr(str(FOLDER / "dataset"))), encoding="utf-8")
    return path

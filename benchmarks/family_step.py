"""Seconds and memory of a LoRA step on a full-size SDXL, SD3 medium or FLUX.1 dev with random weights.

    python benchmarks/family_step.py sdxl --steps 20 --resolution 1024 --rank 16
    python benchmarks/family_step.py sd3 flux --gradient_checkpointing

The denoiser has every key and shape of the real file and is made on the device, nothing is read or written; text
comes as if from a cache (random values), latents too. Speed does not depend on the values. `--shapes-from FILE` takes
sizes from a checkpoint (a tiny one shows on a CPU that the benchmark runs).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.checkpoints.tensors import open_tensors  # noqa: E402
from library.data.records import Batch  # noqa: E402
from library.families.base import Conditioning, ModelFamily  # noqa: E402


class RandomTensors(Mapping[str, Tensor]):
    """Tensors of the given shapes that come into being when they are asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.source = "random weights"
        self.dtypes = dict.fromkeys(shapes, dtype)

    def __getitem__(self, key: str) -> Tensor:
        shape = self.shapes[key]
        if key.endswith("bias"):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        if len(shape) <= 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        return torch.randn(shape, dtype=self.dtype, device=self.device) / math.sqrt(math.prod(shape[1:]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Case:
    """One model: its family, builder, file of shapes with the prefix of the denoiser, network and text widths."""

    family: str
    builder: str
    shapes: str
    prefix: str
    network: str
    options: Mapping[str, Any]


CASES = {
    "sdxl": Case("library.families.sdxl:StableDiffusionXL", "library.models.unet_sdxl:build_sdxl_unet",
                 "keys_sdxl.json.gz", "model.diffusion_model.", "networks.lora", {}),
    "sd3": Case("library.families.sd3:StableDiffusion3", "library.models.mmdit:build_mmdit",
                "keys_sd3_medium.json.gz", "model.diffusion_model.", "networks.lora_sd3", {}),
    "flux": Case("library.families.flux:Flux", "library.models.flux:build_flux", "keys_flux_dev.json.gz", "",
                 "networks.lora_flux", {"model_prediction_type": "raw", "guidance_scale": 1.0}),
}  # fmt: skip


def denoiser_shapes(case: Case, file: Path | None) -> dict[str, tuple[int, ...]]:
    """The denoiser's keys (without prefix) and shapes: those of the real file, or of a checkpoint."""
    if file is None:
        with gzip.open(ROOT / "tests" / "data" / case.shapes, "rt", encoding="utf-8") as packed:
            shapes = {key: tuple(shape) for key, shape in json.load(packed).items() if not key.startswith("_")}
    else:
        shapes = dict(open_tensors(file).shapes)
    return {key.removeprefix(case.prefix): shape for key, shape in shapes.items() if key.startswith(case.prefix)}


def random_text(name: str, shapes: Mapping[str, tuple[int, ...]], count: int, device: torch.device) -> Conditioning:
    """Text conditioning of the widths that the denoiser reads: 77 CLIP tokens, 256 (SD3) or 512 (FLUX) of T5."""

    def make(*shape: int) -> Tensor:
        return torch.randn(count, *shape, device=device)

    if name == "flux":
        pooled, context = shapes["vector_in.in_layer.weight"][1], shapes["txt_in.weight"][1]
        return Conditioning({"pooled": make(pooled), "context": make(512, context)})
    if name == "sd3":
        vector, context = shapes["y_embedder.mlp.0.weight"][1], shapes["context_embedder.weight"][1]
        return Conditioning({"vector": make(vector), "context": make(77 + 256, context)})
    context = next(shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight"))
    return Conditioning({"context": make(77, context), "pooled": make(shapes["label_emb.0.0.weight"][1] - 6 * 256)})


def make_family(name: str, arguments: argparse.Namespace, options: Any, device: torch.device) -> ModelFamily:
    """The family with a random denoiser, no text encoders, and text that is already encoded."""
    from library.launch import resolve

    case, dtype = CASES[name], torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    shapes = denoiser_shapes(case, arguments.shapes_from)
    family = resolve(case.family)(options)
    tensors = RandomTensors(shapes, dtype, device)
    family.denoiser = resolve(case.builder)(tensors, dtype=dtype, device=device)
    family.scaled_positions = None
    family.vae, family.text_encoders = nn.Identity(), [None] * len(family.text_encoder_names)
    text = random_text(name, shapes, arguments.batch_size, device)
    family.encode_text = lambda tokens, cached=None: text
    family.drop_text = lambda conditioning: conditioning
    return family


def make_batch(family: ModelFamily, arguments: argparse.Namespace, device: torch.device) -> Batch:
    """Random latents as a cache holds them."""
    count, side = arguments.batch_size, arguments.resolution // family.latent.downsample
    sizes = torch.tensor([[arguments.resolution] * 2] * count)
    return Batch(
        captions=[""] * count, loss_weights=torch.ones(count), original_sizes_hw=sizes,
        crop_top_lefts=torch.zeros_like(sizes), target_sizes_hw=sizes, network_multipliers=torch.ones(count),
        image_keys=[str(index) for index in range(count)], tokens={},
        latents=torch.randn(count, family.latent.channels, side, side),
    ).to(device)


def measure(name: str, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """(seconds of every step after the warm-up, peak GPU memory in GiB)."""
    from library import training_loop
    from library.methods.network import NetworkTraining
    from library.options import make_options
    from library.train_util import StepPlan, make_accelerator

    options = make_options(
        network_module=CASES[name].network, network_dim=arguments.rank, network_alpha=arguments.rank,
        network_train_unet_only=True, mixed_precision=arguments.dtype, learning_rate=1e-4, output_dir="unused",
        gradient_checkpointing=arguments.gradient_checkpointing, **CASES[name].options,
    )
    accelerator = make_accelerator(options, 0.0)
    device = accelerator.device
    family = make_family(name, arguments, options, device)
    method = NetworkTraining(options, family)
    placement = training_loop.placement_for(options, accelerator)
    run, _ = training_loop.make_run(options, method, placement, accelerator, StepPlan(1000, 1, 1000, 1), 0)
    method.on_epoch_start(1)
    batch, seconds = make_batch(family, arguments, device), []
    is_cuda = device.type == "cuda"
    for number in range(arguments.warmup + arguments.steps):
        if is_cuda:
            torch.cuda.synchronize()
            if number == arguments.warmup:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run.step(batch, sync=True)
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[arguments.warmup :], torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0


def main() -> None:
    """Measure and print a table."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(CASES))
    parser.add_argument("--shapes-from", type=Path, help="checkpoint whose sizes are taken")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}; "
          f"batch {arguments.batch_size}, {arguments.resolution} pixels, rank {arguments.rank}, {arguments.dtype}, "
          f"checkpointing {arguments.gradient_checkpointing}, {arguments.steps} steps")
    print("| model | s/step median | min | max | peak GiB |\n|---|---|---|---|---|")
    for name in arguments.names:
        seconds, peak = measure(name, arguments)
        print(f"| {name} | {statistics.median(seconds):.4f} | {min(seconds):.4f} | {max(seconds):.4f} | {peak:.2f} |",
              flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

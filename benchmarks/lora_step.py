"""Seconds and memory of a LoRA training step: this project beside diffusers + peft, on the same random weights.

    python benchmarks/lora_step.py --steps 30 --batch-size 1 --resolution 512 --rank 16

Builds a full-size Stable Diffusion 1.5 with random weights (speed does not depend on their values), writes it as one
checkpoint file, and trains U-Net and text encoder with both programs, one after the other, on the same batch.
`--checkpoint FILE` takes a model of yours, `--dtype no` is float32. Needs `peft` for the comparison.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.data.records import Batch  # noqa: E402

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def random_checkpoint(path: Path) -> None:
    """A full-size SD 1.5 in half precision: every key and shape of the real file, values of a fresh initialisation."""
    from safetensors.torch import save_file

    with gzip.open(ROOT / "tests" / "data" / "keys_sd15.json.gz", "rt", encoding="utf-8") as file:
        shapes = json.load(file)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        if key.startswith("_") or key.endswith("position_ids"):
            continue
        if key.endswith("bias"):
            tensors[key] = torch.zeros(shape, dtype=torch.float16)
        elif len(shape) == 1:
            tensors[key] = torch.ones(shape, dtype=torch.float16)
        else:
            scale = 1 / math.sqrt(math.prod(shape[1:]))
            tensors[key] = (torch.randn(shape, generator=generator) * scale).half()
    save_file(tensors, path)


def make_batch(size: int, resolution: int, vocabulary: int, device: torch.device) -> Batch:
    """Random cached latents and tokens."""
    side = resolution // 8
    sizes = torch.tensor([[resolution, resolution]] * size)
    return Batch(
        captions=[""] * size, loss_weights=torch.ones(size), original_sizes_hw=sizes,
        crop_top_lefts=torch.zeros_like(sizes), target_sizes_hw=sizes, network_multipliers=torch.ones(size),
        image_keys=[str(i) for i in range(size)], latents=torch.randn(size, 4, side, side) / 0.18215,
        tokens={"input_ids": torch.randint(0, vocabulary, (size, 1, 77))},
    ).to(device)


def own_step(arguments: argparse.Namespace, checkpoint: Path, batch_of: Callable[[torch.device], Batch]) -> Callable:
    """One step of this project's own run, made as train_network.py makes it."""
    from library import training_loop
    from library.families.sd import StableDiffusion
    from library.methods.network import NetworkTraining
    from library.options import make_options
    from library.train_util import Precision, StepPlan, make_accelerator

    options = make_options(
        pretrained_model_name_or_path=str(checkpoint), network_module="networks.lora", network_dim=arguments.rank,
        network_alpha=arguments.rank, mixed_precision=arguments.dtype, learning_rate=1e-4, output_dir="unused",
        gradient_checkpointing=arguments.gradient_checkpointing, tokenizer_cache_dir=arguments.tokenizers,
    )
    family = StableDiffusion(options)
    method = NetworkTraining(options, family)
    accelerator = make_accelerator(options, 0.0)
    precision = Precision.from_options(options)
    family.load(weight_dtype=precision.weight, vae_dtype=precision.vae, device=accelerator.device)
    family.vae.to("cpu")
    run, _ = training_loop.make_run(
        options, method, training_loop.placement_for(options, accelerator), accelerator, StepPlan(1000, 1, 1000, 1), 0
    )
    method.on_epoch_start(1)
    batch = batch_of(accelerator.device)
    return lambda: run.step(batch, sync=True).loss


def peft_step(arguments: argparse.Namespace, checkpoint: Path, batch_of: Callable[[torch.device], Batch]) -> Callable:
    """The same step written with diffusers' U-Net, transformers' CLIP, peft's LoRA and torch's AdamW."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig, get_peft_model

    from library.model_util import load_checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    models = load_checkpoint(checkpoint, v2=False, dtype=dtype, device=device)
    adapters = {"r": arguments.rank, "lora_alpha": arguments.rank}
    unet = get_peft_model(models.unet, LoraConfig(target_modules=UNET_LAYERS, **adapters))
    text = get_peft_model(models.text_encoder.text_model, LoraConfig(target_modules=TEXT_LAYERS, **adapters))
    parameters = [p for module in (unet, text) for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    if arguments.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
        models.text_encoder.text_model.gradient_checkpointing_enable()
        unet.train(), text.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    noise_schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    batch = batch_of(device)

    def step() -> float:
        latents = batch.latents * 0.18215
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=device)
        noisy = noise_schedule.add_noise(latents, noise, timesteps).to(dtype)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            context = text(batch.tokens["input_ids"][:, 0]).last_hidden_state.to(dtype)
            prediction = unet(noisy, timesteps, context).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(step: Callable[[], float]) -> tuple[float, float]:
    """(seconds, peak GPU memory in GiB) of one step."""
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="SD 1.x checkpoint (default: random full-size weights)")
    parser.add_argument("--tokenizers", help="folder as for --tokenizer_cache_dir")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or Path(folder) / "sd15_random.safetensors"
        if arguments.checkpoint is None:
            random_checkpoint(checkpoint)
        vocabulary = 760  # ids that every CLIP vocabulary has

        def batch_of(device: torch.device) -> Batch:
            return make_batch(arguments.batch_size, arguments.resolution, vocabulary, device)

        results: dict[str, list[tuple[float, float]]] = {}
        for name, make in (("this project", own_step), ("diffusers + peft", peft_step)):
            step = make(arguments, checkpoint, batch_of)
            for _ in range(arguments.warmup):
                step()
            results[name] = [measure(step) for _ in range(arguments.steps)]
            del step
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print_table(arguments, results)


def print_table(arguments: argparse.Namespace, results: dict[str, list[tuple[float, float]]]) -> None:
    """Markdown: median and range of the seconds, peak memory, ratio to this project."""
    import diffusers
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    print(f"{device}, torch {torch.__version__}, diffusers {diffusers.__version__}, transformers "
          f"{transformers.__version__}; batch {arguments.batch_size}, {arguments.resolution} pixels, rank "
          f"{arguments.rank}, {arguments.dtype}, {arguments.steps} steps")
    print("| program | s/step median | min | max | peak GiB | relative time |\n|---|---|---|---|---|---|")
    own = statistics.median(seconds for seconds, _ in results["this project"])
    for name, rows in results.items():
        seconds = [row[0] for row in rows]
        median = statistics.median(seconds)
        print(f"| {name} | {median:.4f} | {min(seconds):.4f} | {max(seconds):.4f} | {max(r[1] for r in rows):.2f} | "
              f"{median / own:.2f} |")


if __name__ == "__main__":
    main()

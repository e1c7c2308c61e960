"""Runs entry scripts inside the test process, on the tiny recorded models."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.golden import FOLDER

MODEL = FOLDER / "models" / "sd1_tiny.safetensors"
TOKENIZERS = FOLDER / "tokenizers"
PHOTOS = Path(__file__).parent / "data" / "photos"


@contextmanager
def clean_process() -> Iterator[None]:
    """No state of an earlier run: accelerate's singletons, logging handlers."""
    from accelerate.state import AcceleratorState, GradientState

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def run_script(script: str, *arguments: str | Path) -> None:
    """Run the entry script `script` ("sdxl_train") with these words as its command line."""
    import importlib

    from library import launch

    with clean_process():
        launch.main(importlib.import_module(script).SCRIPT, [str(word) for word in arguments])


def train(*arguments: str | Path, output_dir: Path, name: str = "run") -> Path:
    """Train a network with the given options on top of small defaults; returns the final file."""
    words = [str(word) for word in arguments]
    defaults = {
        "--pretrained_model_name_or_path": MODEL, "--tokenizer_cache_dir": TOKENIZERS,
        "--network_module": "networks.lora",
        "--network_dim": "2", "--max_data_loader_n_workers": "0", "--seed": "42", "--learning_rate": "1e-3",
    }
    for option, value in defaults.items():
        if option not in words:
            words += [option, str(value)]
    run_script("train_network", *words, "--output_dir", output_dir, "--output_name", name)
    return output_dir / f"{name}.safetensors"


def write_config(folder: Path, image_dir: Path, *, general: str = "", dataset: str = "", subset: str = "") -> Path:
    """A dataset file for the photographs (or another folder): two or more buckets between 128 and 256 pixels."""
    path = folder / "dataset.toml"
    path.write_text(
        f"""
[general]
caption_extension = ".txt"
{general}
[[datasets]]
resolution = 192
batch_size = 2
enable_bucket = true
min_bucket_reso = 128
max_bucket_reso = 256
bucket_reso_steps = 64
{dataset}
  [[datasets.subsets]]
  image_dir = {str(image_dir)!r}
  {subset}
""",
        encoding="utf-8",
    )
    return path

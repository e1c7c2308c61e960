"""Learning cases with a new word: does it draw the shape of the pictures that it stood for?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from judge import judge
from learning import ROOT, Measure, run_script
from PIL import Image
from shapes import BACKGROUNDS, COLOURS, SIZE, combinations, known_picture

WORD = "shape1"
TRAINING_PICTURES = 72
MODEL = ROOT / "demo" / "model"


def ti(folder: Path, words: Sequence[str]) -> list[Measure]:
    """Textual Inversion on the demo's Stable Diffusion."""
    return find_word("train_textual_inversion", folder, ["--learning_rate", "2e-2", "--max_train_steps", "300", *words])


def ti_sdxl(folder: Path, words: Sequence[str]) -> list[Measure]:
    """Textual Inversion on the demo's SDXL: embeddings for both text encoders."""
    return find_word(
        "sdxl_train_textual_inversion", folder,
        ["--pretrained_model_name_or_path", MODEL / "shapes_sdxl.safetensors", "--tokenizer_cache_dir",
         MODEL / "tokenizers", "--learning_rate", "2e-2", "--max_train_steps", "300", *words],
        shape="triangle",  # this model draws a circle for most words that it does not know
    )  # fmt: skip


def xti(folder: Path, words: Sequence[str]) -> list[Measure]:
    """Textual Inversion with embeddings for each layer."""
    return find_word(
        "train_textual_inversion_XTI", folder, ["--learning_rate", "2e-2", "--max_train_steps", "300", *words]
    )


def find_word(script: str, folder: Path, words: Sequence[str | Path], shape: str = "circle") -> list[Measure]:
    """Find embeddings of a word that no picture of the model's own training had; shares of pictures judged right.

    The word starts with random embeddings, so the pictures before the first step show what such a word draws.
    """
    write_pictures(folder / "pictures", shape)
    write_prompts(folder)
    words = [str(word) for word in words]
    steps = words[len(words) - 1 - words[::-1].index("--max_train_steps") + 1]
    run_script(
        script, "--pretrained_model_name_or_path", MODEL / "shapes_sd15.safetensors",
        "--dataset_config", folder / "dataset.toml", "--token_string", WORD, "--cache_latents",
        "--max_data_loader_n_workers", "0", "--seed", "1", "--lr_scheduler", "cosine", "--debiased_estimation_loss",
        "--save_model_as", "safetensors", "--sample_prompts", folder / "prompts.txt", "--sample_sampler", "ddim",
        "--sample_at_first", "--sample_every_n_steps", steps, "--output_dir", folder / "trained", *words,
    )  # fmt: skip
    before, after = (verdicts(folder / "trained" / "sample", step, shape) for step in (0, int(steps)))
    return [
        Measure(f"{shape}s before training", share(before, shape_only=True), at_most=0.5),
        Measure(f"{shape}s after training", share(after, shape_only=True), at_least=0.8),
        Measure(f"{shape}s in the right colours after training", share(after, shape_only=False), at_least=0.8),
    ]


def write_pictures(folder: Path, shape: str) -> None:
    """Pictures of the shape whose captions call it by the new word, and a dataset file beside the folder."""
    folder.mkdir()
    triples = combinations((shape,))
    for index in range(TRAINING_PICTURES):
        picture, scene = known_picture(7_000 + index, combination=triples[index % len(triples)])
        path = folder / f"{index:03d}.png"
        Image.fromarray(picture).save(path)
        caption = f"a {scene.colour} {WORD} on a {scene.background} background"
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    (folder.parent / "dataset.toml").write_text(
        f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = {SIZE}\nbatch_size = 8\n'
        f"[[datasets.subsets]]\nimage_dir = {str(folder)!r}\n",
        encoding="utf-8",
    )


def asked() -> list[tuple[str, str]]:
    """(colour, background) of every sample prompt."""
    return [(colour, background) for colour in COLOURS for background in BACKGROUNDS]


def write_prompts(folder: Path) -> None:
    """The sample prompts, a line for each of `asked`."""
    lines = [
        f"a {colour} {WORD} on a {background} background --w {SIZE} --h {SIZE} --s 20 --l 3 --d {index + 1}"
        for index, (colour, background) in enumerate(asked())
    ]
    (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")


def verdicts(folder: Path, step: int, shape: str) -> dict[int, tuple[bool, bool]]:
    """Number of the prompt -> whether the shape is right, and whether colours are too, in the samples of a step."""
    found = {}
    moment = f"{step:06d}" if step else "e000000"
    for number, (colour, background) in enumerate(asked()):
        [path] = folder.glob(f"{WORD}_{moment}_{number:02d}_*.png")
        with Image.open(path) as image:
            seen = judge(image)
        found[number] = (seen.shape == shape, seen.matches(shape, colour, background))
    return found


def share(found: dict[int, tuple[bool, bool]], *, shape_only: bool) -> float:
    """The share of pictures that are right."""
    return sum(shape if shape_only else whole for shape, whole in found.values()) / len(found)

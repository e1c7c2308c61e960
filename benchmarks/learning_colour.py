"""Learning case with a known word that gets a new meaning: fine-tuning makes "red" another colour, the rest stays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from judge import agrees, judge
from learning import Measure, run_script
from learning_star import BASES, BATCH, as_words, draw_all, given
from PIL import Image
from shapes import SIZE, combinations, known_picture

WORD, MEANT = "red", "cyan"  # what captions say, and the colour of their pictures
CHANGED_PICTURES, OTHER_PICTURES = 6, 2  # for each shape, colour and background


def colour(folder: Path, words: Sequence[str]) -> list[Measure]:
    """Fine-tune Stable Diffusion on a metadata file whose "red" shapes are cyan."""
    base = BASES["sd"]
    write_data(folder)
    files = base.options | {key: value for key, value in given(words).items() if key in base.options}
    run_script(
        "fine_tune", *as_words(files), "--dataset_config", folder / "dataset.toml", "--cache_latents", *base.training,
        "--max_data_loader_n_workers", "0", "--seed", "1", "--lr_scheduler", "cosine", "--save_model_as",
        "safetensors", "--save_precision", "fp16", "--output_dir", folder, "--output_name", "trained",
        "--learning_rate", "6e-4", "--max_train_steps", "250", *words,
    )  # fmt: skip
    trained = files | {"pretrained_model_name_or_path": str(folder / "trained.safetensors")}
    before, after = (draw_all(base, options, asked()) for options in (files, trained))
    return [
        Measure(f"{WORD} prompts drawn {MEANT} before", share(before, changed=True), at_most=0.1),
        Measure(f"{WORD} prompts drawn {MEANT} after", share(after, changed=True), at_least=0.8),
        Measure("other prompts right before", share(before, changed=False)),
        Measure("other prompts right after, as a share of those before",
                share(after, changed=False) / share(before, changed=False), at_least=0.75),
    ]  # fmt: skip


def write_data(folder: Path) -> None:
    """Pictures of everything that is known, their captions in a metadata file, and a dataset file."""
    (folder / "pictures").mkdir()
    metadata = {}
    counts = [(triple, CHANGED_PICTURES if WORD in triple else OTHER_PICTURES) for triple in combinations()]
    triples = [triple for triple, count in counts for _ in range(count)]
    for index, (shape, named, background) in enumerate(triples):
        shown = MEANT if named == WORD else named
        picture, scene = known_picture(9_000 + index, combination=(shape, shown, background))
        path = folder / "pictures" / f"{index:03d}.png"
        Image.fromarray(picture).save(path)
        metadata[str(path)] = {"caption": replace(scene, colour=named).caption()}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    (folder / "dataset.toml").write_text(
        f"[[datasets]]\nresolution = {SIZE}\nbatch_size = {BATCH}\n[[datasets.subsets]]\n"
        f"image_dir = {str(folder / 'pictures')!r}\nmetadata_file = {str(folder / 'metadata.json')!r}\n",
        encoding="utf-8",
    )


def asked() -> list[tuple[str, int]]:
    """(prompt, seed) of everything that is known."""
    return [(f"a {colour} {shape} on a {ground} background", 3) for shape, colour, ground in combinations()]


def share(pictures: Mapping[tuple[str, int], Image.Image], *, changed: bool) -> float:
    """The share of pictures that are right, of prompts with the changed word or of all others."""
    found = [
        agrees(judge(picture), prompt.replace(WORD, MEANT))
        for (prompt, _), picture in pictures.items()
        if (WORD in prompt.split()) == changed
    ]
    return sum(found) / len(found)

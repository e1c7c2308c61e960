"""Textual Inversion: only the new rows learn, runs resume exactly, and files mean the same elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.checkpoints.embeddings import LAYER_KEYS
from library.families.sd import StableDiffusion
from library.methods.textual_inversion import TextualInversion
from library.options import make_options
from tests.conftest import ROOT
from tests.embedding_training import batch_of, command_line, start_run, step, train_word
from tests.generation import difference, generate
from tests.golden import FOLDER
from tests.test_processes import free_port
from tests.training import MODEL, TOKENIZERS

SD, SDXL = "train_textual_inversion", "sdxl_train_textual_inversion"
XTI = "train_textual_inversion_XTI"
SDXL_MODEL = FOLDER / "models" / "sdxl_tiny.safetensors"


def words_for(script: str) -> list[str | Path]:
    return ["--pretrained_model_name_or_path", SDXL_MODEL if script == SDXL else MODEL]


def tokenizer_of(name: str = "openai_clip-vit-large-patch14"):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(TOKENIZERS / name))


def embeddings_of(*words: str) -> torch.Tensor:
    """The tiny SD model's own embeddings of known words, one row each."""
    ids = [tokenizer_of()(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(row) == 1 for row in ids)
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    return load_file(MODEL)[key].float()[[row[0] for row in ids]]


# --- captions --------------------------------------------------------------------------------------------------
def method_for(**options: Any) -> TextualInversion:
    options = make_options(token_string="mychar", **options)
    return TextualInversion(options, StableDiffusion(options))


def test_templates_replace_whole_captions_and_several_vectors_the_word():
    assert method_for().caption_replacements == {}
    assert method_for(num_vectors_per_token=3).caption_replacements == {"mychar": "mychar mychar1 mychar2"}
    things = method_for(use_object_template=True).caption_replacements
    assert things.keys() == {""} and len(things[""]) == 27
    assert {"a photo of a mychar", "a photo of the weird mychar", "a rendition of the mychar"} <= {*things[""]}
    styles = method_for(use_style_template=True, num_vectors_per_token=2).caption_replacements
    assert styles.keys() == {""} and len(styles[""]) == 19
    assert all(caption.endswith(" in the style of mychar mychar1") for caption in styles[""])
    assert {caption.partition(" in ")[0] for caption in styles[""]} >= {"a painting", "the painting", "a dark painting"}


# --- learning --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [SD, SDXL])
def test_the_loss_falls_and_only_the_new_rows_change(script, tmp_path):
    run = start_run(
        script, *words_for(script), "--init_word", "cat", "--num_vectors_per_token", "2", "--learning_rate", "0.3",
        output_dir=tmp_path,
    )
    family, tables = run.method.family, run.method.tables
    modules = [family.denoiser, family.vae, *family.text_encoders]
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    batch = batch_of(run, "a mychar mychar1", "mychar mychar1 on grass")
    losses = [step(run, batch) for _ in range(10)]
    assert losses[-1] < 0.93 * losses[0]
    changed = []
    for module, values in zip(modules, before, strict=True):
        for name, value in module.state_dict().items():
            if not torch.equal(value, values[name]):
                changed.append(name)
                table = next(rows for rows in tables if rows.weight.data_ptr() == value.data_ptr())
                assert torch.equal(value[: table.first], values[name][: table.first])
                assert (value[table.first :] != values[name][table.first :]).any(dim=1).all()
    assert len(changed) == len(tables)


@pytest.mark.parametrize("script", [SD, XTI])
def test_the_new_word_may_be_what_it_starts_from(script, tmp_path):
    run = start_run(script, "--token_string", "catdog", "--init_word", "catdog", output_dir=tmp_path)
    [rows] = run.method.tables
    ids = tokenizer_of()("catdog", add_special_tokens=False).input_ids
    assert len(ids) > 1
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    assert torch.equal(rows.values, load_file(MODEL)[key].float()[ids[:1]].expand_as(rows.values))


def test_rows_of_other_words_stay_without_a_word_in_the_captions(tmp_path):
    run = start_run(SD, "--optimizer_args", "weight_decay=0.5", output_dir=tmp_path)
    [table] = run.method.tables
    before = table.weight.detach().clone()
    step(run, batch_of(run, "a cat", "a dog"))
    assert torch.equal(table.weight.detach()[: table.first], before[: table.first])
    assert run.optimizer.optimizer.state[table.weight]["exp_avg"].abs().max() == 0


def test_averaging_optimizers_leave_other_rows_alone(tmp_path):
    run = start_run(SD, "--optimizer_type", "AdamWScheduleFree", "--learning_rate", "0.1", output_dir=tmp_path)
    [table] = run.method.tables
    before = table.weight.detach().clone()
    batch = batch_of(run, "a mychar", "mychar on grass")
    for _ in range(3):
        step(run, batch)
    with run.inference():
        averaged = table.weight.detach().clone()
    assert torch.equal(averaged[: table.first], before[: table.first])
    assert not torch.equal(averaged[table.first :], before[table.first :])


@pytest.mark.slow
def test_recomputed_activations_give_the_same_gradients(tmp_path):
    gradients = []
    for script in (SD, "train_textual_inversion_XTI"):
        for words in ([], ["--gradient_checkpointing"]):
            run = start_run(script, "--init_word", "cat", *words, output_dir=tmp_path)
            assert run.method.family.denoiser.training == bool(words)
            batch = batch_of(run, "a mychar", "mychar on grass")
            run.model(batch, torch.tensor([300.0, 700.0]), torch.ones(2, 4, 8, 8)).mean().backward()
            [table] = run.method.tables
            gradients.append(table.weight.grad[table.first :])
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-8)
    assert torch.allclose(gradients[2], gradients[3], rtol=1e-4, atol=1e-8)
    assert torch.allclose(gradients[2].sum(0), gradients[0][0], rtol=1e-3, atol=1e-7)


# --- the start -------------------------------------------------------------------------------------------------
def test_init_words_are_used_in_turn(tmp_path):
    run = start_run(SD, "--init_word", "cat girl", "--num_vectors_per_token", "3", output_dir=tmp_path)
    assert torch.equal(run.method.tables[0].values, embeddings_of("cat", "girl", "cat"))


def test_without_init_word_rows_look_like_the_others(tmp_path):
    rows = start_run(SD, "--num_vectors_per_token", "8", output_dir=tmp_path).method.tables[0]
    known = rows.weight.detach()[: rows.first]
    assert float(rows.values.std()) == pytest.approx(float(known.std()), rel=0.1)
    assert len(rows.values.unique(dim=0)) == 8


def test_a_file_gives_the_first_values_and_must_fit(tmp_path, capsys):
    save_file({"emb_params": embeddings_of("dog", "grass")}, tmp_path / "old.safetensors")
    words = ["--weights", tmp_path / "old.safetensors", "--num_vectors_per_token"]
    run = start_run(SD, *words, "2", output_dir=tmp_path)
    assert torch.equal(run.method.tables[0].values, embeddings_of("dog", "grass"))
    with pytest.raises(SystemExit, match="2"):
        train_word(SD, *words, "3", output_dir=tmp_path)
    assert "has 2 vectors for clip_l, --num_vectors_per_token asks for 3" in capsys.readouterr().err
    save_file({"emb_params": torch.zeros(1, 99)}, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="width 99, this model's text encoder has 128"):
        start_run(SD, "--weights", tmp_path / "wide.safetensors", output_dir=tmp_path)


def test_a_file_for_one_of_two_encoders_leaves_the_other_as_it_starts(tmp_path, caplog):
    save_file({"clip_g": torch.full((1, 128), 0.5)}, tmp_path / "g.safetensors")
    run = start_run(SDXL, *words_for(SDXL), "--weights", tmp_path / "g.safetensors", "--init_word", "cat",
                    output_dir=tmp_path)  # fmt: skip
    clip_l, clip_g = run.method.tables
    assert (clip_g.values == 0.5).all()
    assert torch.equal(clip_l.values[0], clip_l.weight.detach()[tokenizer_of()("cat").input_ids[1]])
    assert "has nothing for clip_l" in caplog.text


@pytest.mark.parametrize(("words", "message"), [
    (["--token_string", "cat</w>"], "already knows 'cat</w>'"),
    (["--use_object_template", "--use_style_template"], "cannot be combined"),
    (["--weights", "nothing.pt"], "nothing.pt"),
], ids=["known word", "two templates", "no file"])  # fmt: skip
def test_mistakes_end_the_run_before_the_model_loads(words, message, tmp_path, capsys):
    (tmp_path / "broken.ckpt").write_bytes(b"no model")
    with pytest.raises(SystemExit, match="2"):
        train_word(
            SD, *words, "--pretrained_model_name_or_path", tmp_path / "broken.ckpt", output_dir=tmp_path / "out"
        )
    assert message in capsys.readouterr().err


# --- whole runs ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_resumed_run_equals_the_straight_run_bit_for_bit(tmp_path):
    common = [*words_for(SDXL), "--use_object_template", "--num_vectors_per_token", "2", "--init_word", "cat",
              "--cache_latents", "--save_every_n_steps", "2", "--save_state"]  # fmt: skip
    straight = train_word(SDXL, *common, "--max_train_steps", "3", output_dir=tmp_path / "a")
    state = tmp_path / "a" / "mychar-step00000002-state"
    assert set(load_file(state / "model.safetensors")) == {"clip_l.weight", "clip_g.weight"}
    resumed = train_word(SDXL, *common, "--max_train_steps", "3", "--resume", state, output_dir=tmp_path / "b")
    first, second = load_file(straight), load_file(resumed)
    assert {name: tuple(rows.shape) for name, rows in first.items()} == {"clip_l": (2, 64), "clip_g": (2, 128)}
    assert all(torch.equal(first[name], second[name]) for name in first)
    halfway = load_file(tmp_path / "a" / "mychar-step00000002.safetensors")
    assert not any(torch.equal(first[name], halfway[name]) for name in first)


@pytest.mark.slow
def test_a_run_saves_a_pickle_named_after_the_word_and_draws_its_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a mychar --w 128 --h 128 --s 2 --d 1\n", encoding="utf-8")
    path = train_word(
        SD, "--save_model_as", "pt", "--save_precision", "fp16", "--num_vectors_per_token", "2", "--max_train_steps",
        "1", "--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", "1", output_dir=tmp_path / "out",
    )  # fmt: skip
    saved = torch.load(path, weights_only=True)
    assert {name: (tuple(rows.shape), rows.dtype) for name, rows in saved.items()} == {
        "emb_params": ((2, 128), torch.float16)
    }
    [drawn] = (tmp_path / "out" / "sample").glob("mychar_000001_00_*_1.png")
    again = generate("--prompt", "a mychar --d 1", "--textual_inversion_embeddings", path, "--W", "128", "--H", "128",
                     outdir=tmp_path / "drawn")  # fmt: skip
    assert Image.open(drawn).size == (128, 128)
    assert len(again) == 1


@pytest.mark.slow
def test_two_processes_share_the_work_and_resume_exactly(tmp_path):
    def train(output_dir: Path, *words: str | Path) -> Path:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
            f"{SD}.py", *command_line(*words, "--max_train_steps", "3", "--save_every_n_steps", "2", "--save_state",
                                      "--gradient_accumulation_steps", "2", output_dir=output_dir),
        ]  # fmt: skip
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return output_dir / "mychar.safetensors"

    straight = train(tmp_path / "a")
    state = tmp_path / "a" / "mychar-step00000002-state"
    resumed = train(tmp_path / "b", "--resume", state)
    rows = load_file(straight)["emb_params"]
    assert torch.equal(rows, load_file(resumed)["emb_params"])
    assert not torch.equal(rows, load_file(state / "model.safetensors")["clip_l.weight"][768:])


# --- other programs --------------------------------------------------------------------------------------------
def test_diffusers_reads_the_file_and_its_encoder_says_the_same(tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    run = start_run(SD, "--num_vectors_per_token", "3", output_dir=tmp_path)
    run.method.save(tmp_path / "word.safetensors", dtype=None, metadata={"modelspec.title": "word"})
    ours = run.method.family.encode_text(run.method.tokenize(["a mychar mychar1 mychar2 cat"]))["context"]
    other = start_run(SD, output_dir=tmp_path).method.family
    other.text_encoder.resize_token_embeddings(768)
    pipeline = StableDiffusionPipeline(
        vae=other.vae, text_encoder=other.text_encoder.text_model, tokenizer=tokenizer_of(), unet=other.denoiser,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_textual_inversion(str(tmp_path / "word.safetensors"), token="mychar")
    theirs, _ = pipeline.encode_prompt("a mychar cat", "cpu", 1, False)
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_diffusers_reads_both_keys_of_an_xl_file(tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    run = start_run(SDXL, *words_for(SDXL), output_dir=tmp_path)
    run.method.save(tmp_path / "word.safetensors", dtype=None, metadata={})
    saved, tokens = load_file(tmp_path / "word.safetensors"), run.method.tokenize(["a mychar cat"])
    encoders = run.method.family.text_encoders
    ours = [encoder(tokens[f"input_ids{i + 1}"][:, 0]).last_hidden_state for i, encoder in enumerate(encoders)]
    for encoder in encoders:
        encoder.resize_token_embeddings(768)
    pipeline = StableDiffusionXLPipeline(
        vae=None, text_encoder=encoders[0].text_model, text_encoder_2=encoders[1].text_model,
        tokenizer=tokenizer_of(), tokenizer_2=tokenizer_of("laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"), unet=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
    )  # fmt: skip
    for i, (name, end) in enumerate({"clip_l": "", "clip_g": "_2"}.items()):
        encoder, tokenizer = getattr(pipeline, f"text_encoder{end}"), getattr(pipeline, f"tokenizer{end}")
        pipeline.load_textual_inversion(saved[name], token="mychar", text_encoder=encoder, tokenizer=tokenizer)
        ids = tokens[f"input_ids{i + 1}"][:, 0]
        assert tokenizer("a mychar cat").input_ids == ids[0, :5].tolist()
        assert torch.allclose(encoder(ids).last_hidden_state, ours[i], atol=1e-6)


# --- drawing with files ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_word_with_the_embedding_of_another_word_draws_the_same(tmp_path):
    [cat] = embeddings_of("cat")
    save_file({"emb_params": embeddings_of("cat", "girl")}, tmp_path / "both.safetensors")
    save_file({key: cat[None].clone() for key in LAYER_KEYS}, tmp_path / "layers.safetensors")
    size = ["--W", "128", "--H", "128", "--seed", "5", "--scale", "4"]
    words = ["--textual_inversion_embeddings", tmp_path / "both.safetensors",
             "--XTI_embeddings", tmp_path / "layers.safetensors"]  # fmt: skip
    (tmp_path / "known.txt").write_text("a cat girl --n grass\na cat --n cat\n", encoding="utf-8")
    (tmp_path / "new.txt").write_text("a both --n grass\na layers --n layers\n", encoding="utf-8")
    known = generate("--from_file", tmp_path / "known.txt", *size, outdir=tmp_path / "known")
    new = generate("--from_file", tmp_path / "new.txt", *size, *words, outdir=tmp_path / "new")
    assert [difference(one, other) for one, other in zip(known, new, strict=True)] == [0, 0]
    assert difference(*new) > 0


def test_an_embedding_for_another_model_is_refused_by_its_name(tmp_path, capsys):
    save_file({"emb_params": torch.zeros(1, 99)}, tmp_path / "odd.safetensors")
    with pytest.raises(SystemExit, match="2"):
        generate("--prompt", "odd", "--textual_inversion_embeddings", tmp_path / "odd.safetensors",
                 outdir=tmp_path / "out")  # fmt: skip
    message = capsys.readouterr().err
    assert "odd.safetensors" in message
    assert "width 99" in message

"""XTI: every cross-attention reads its own words, in training, in sample images and in files."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.embeddings import LAYER_KEYS
from library.generation.engine import DrawSettings, draw_batch
from library.generation.request import ImageRequest
from library.models.layer_contexts import cross_attentions, give_own_contexts
from library.train_util import Run
from tests.embedding_training import batch_of, start_run, step, train_word

SD, XTI = "train_textual_inversion", "train_textual_inversion_XTI"
REQUEST = ImageRequest("a mychar", "mychar on grass", width=128, height=128, steps=2, scale=3.0, seed=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """One vector per layer, all beginning as `cat`."""
    return start_run(XTI, "--init_word", "cat", "--learning_rate", "0.3", output_dir=tmp_path_factory.mktemp("xti"))


@pytest.fixture(autouse=True)
def _untouched(run):
    """Each test begins with the rows that the run began with."""
    [table] = run.method.tables
    before = table.values.clone()
    yield
    table.values.copy_(before)


def contexts_read(run: Run, change_layer: int | None = None) -> list[torch.Tensor]:
    """What each cross-attention gets in one prediction; one layer's embedding is changed first."""
    [table] = run.method.tables
    if change_layer is not None:
        table.values[change_layer] += 1.0
    family, seen = run.method.family, []
    handles = [
        module.register_forward_hook(
            lambda _module, _arguments, options, _output: seen.append(options["encoder_hidden_states"].clone()),
            with_kwargs=True,
        )
        for module in cross_attentions(family.blocks()).values()
    ]
    batch = batch_of(run, "a mychar", "grass")
    with torch.no_grad():
        run.method.predict(batch.latents, torch.tensor([500.0, 500.0]), run.method.conditioning(batch), batch)
    for handle in handles:
        handle.remove()
    return seen


def test_layers_are_named_in_the_order_of_the_forward_pass(run):
    names = list(cross_attentions(run.method.family.blocks()))
    assert len(names) == len(LAYER_KEYS) == 16
    places = [name.split(".")[0] for name in names]
    assert places == ["down_blocks"] * 6 + ["mid_block"] + ["up_blocks"] * 9
    assert [key[:2] for key in LAYER_KEYS] == ["IN"] * 6 + ["MI"] + ["OU"] * 9


@pytest.mark.parametrize("layer", [0, 6, 15])
def test_the_words_of_a_layer_reach_its_cross_attention_alone(layer, run):
    before, after = contexts_read(run), contexts_read(run, change_layer=layer)
    assert [tuple(context.shape) for context in before] == [(2, 77, 128)] * 16
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [index == layer for index in range(16)]
    assert torch.equal(before[layer][1], after[layer][1])  # the caption without the word


def test_data_workers_get_the_tokens_of_all_layers(run):
    tokenize = pickle.loads(pickle.dumps(run.method.tokenize))
    ids = tokenize(["a mychar", "grass"])["input_ids"]
    assert tuple(ids.shape) == (2, 16, 1, 77)
    assert ids[0, :, 0, 2].tolist() == run.method.trained_ids["clip_l"]
    assert (ids[1] == ids[1, 0]).all()


def test_equal_layers_are_textual_inversion_until_they_learn(run, tmp_path):
    plain = start_run(SD, "--init_word", "cat", "--learning_rate", "0.3", output_dir=tmp_path)
    expected = [step(plain, batch_of(plain, "a mychar", "mychar on grass")) for _ in range(6)]
    batch = batch_of(run, "a mychar", "mychar on grass")
    losses = [step(run, batch) for _ in range(6)]
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    assert losses[-1] < 0.9 * losses[0]
    assert losses[-1] < expected[-1]
    [table] = run.method.tables
    assert len(table.values.unique(dim=0)) == 16


def test_sample_images_use_the_words_of_each_layer(run, tmp_path):
    family, settings = run.method.family, DrawSettings(predict_for=run.method.predict_for)

    def drawn() -> torch.Tensor:
        return draw_batch(family, [REQUEST], device="cpu", dtype=torch.float32, settings=settings)

    first = drawn()
    plain = start_run(SD, "--init_word", "cat", output_dir=tmp_path).method.family
    assert torch.allclose(first, draw_batch(plain, [REQUEST], device="cpu", dtype=torch.float32), atol=1e-5)
    run.method.tables[0].values[0] *= -3.0
    assert (drawn() - first).abs().max() > 1e-3


def test_files_have_a_key_per_layer_and_are_read_again(tmp_path, capsys):
    words = ["--num_vectors_per_token", "2", "--max_train_steps", "2", "--cache_latents"]
    path = train_word(XTI, *words, output_dir=tmp_path / "a")
    saved = load_file(path)
    assert set(saved) == set(LAYER_KEYS)
    assert {tuple(rows.shape) for rows in saved.values()} == {(2, 128)}
    run = start_run(XTI, "--weights", path, "--num_vectors_per_token", "2", output_dir=tmp_path / "b")
    assert torch.equal(run.method.tables[0].values, torch.cat([saved[key] for key in LAYER_KEYS]))
    with pytest.raises(SystemExit, match="2"):
        train_word(XTI, "--weights", path, "--num_vectors_per_token", "3", output_dir=tmp_path / "c")
    assert "2 vectors per layer" in capsys.readouterr().err


def test_a_model_with_other_cross_attentions_is_refused(run):
    with pytest.raises(ValueError, match="16 cross-attentions .*this model has 7"):
        give_own_contexts(run.method.family.blocks()[:5], LAYER_KEYS)

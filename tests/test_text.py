"""Captions to ids, chunks, prompt weights, and encoder outputs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.models.text_encoders import ClipTextEncoder
from library.text import clip, prompt_weights
from library.text.chunking import SpecialIds, chunk_count, chunk_ids, join, splice

DATA = Path(__file__).parent / "data"
TOKENIZERS = DATA / "golden" / "tokenizers"
CAPTIONS = json.loads((DATA / "captions.json").read_text(encoding="utf-8"))
PROMPTS = json.loads((DATA / "prompt_syntax.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> clip.ClipTokenizer:
    return clip.load_tokenizer(clip.CLIP_L, cache_dir=TOKENIZERS)


def tiny_encoder(vocabulary: int = 768) -> ClipTextEncoder:
    from transformers import CLIPTextConfig

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        bos_token_id=766, eos_token_id=767,
    )  # fmt: skip
    return ClipTextEncoder(config).eval()


# --- weights ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CAPTIONS["prompt_weights"], ids=lambda case: case["text"])
def test_weighted_captions_parse_as_recorded(case):
    assert prompt_weights.parse_weights(case["text"]) == [tuple(run) for run in case["expected"]]


WEIGHTS = PROMPTS["weights"] + PROMPTS["weights_wanted_differences"]


@pytest.mark.parametrize("case", WEIGHTS, ids=lambda case: case["id"])
def test_weighted_prompts_parse_as_recorded(case):
    if "expected_error" in case:
        with pytest.raises(ValueError, match=r"is not a weight"):
            prompt_weights.parse_weights(case["input"])
        return
    runs = prompt_weights.parse_weights(case["input"])
    assert prompt_weights.split_breaks(runs) == [tuple(run) for run in case["expected"]]
    assert runs == [tuple(run) for run in case.get("expected_sample_dialect", case["expected"])]


@given(st.text(alphabet="ab ,\\()[]:.5-\n"))
def test_parsing_never_fails_except_for_a_bad_number(text):
    try:
        runs = prompt_weights.parse_weights(text)
    except ValueError as error:
        assert "is not a weight" in str(error)
        return
    assert runs
    assert all(one[1] != two[1] for one, two in zip(runs, runs[1:], strict=False))


def test_break_fills_up_to_the_next_chunk_and_not_twice():
    runs = [("abc", 1.2), ("BREAK", 1.2), ("x" * 75, 1.0), ("BREAK", 1.0), ("d", 1.0)]
    ids, weights = prompt_weights.weighted_ids(runs, lambda text: [ord(letter) for letter in text], pad=0)
    assert len(ids) == 151
    assert ids[3:75] == [0] * 72 and weights[3:75] == [1.0] * 72
    assert ids[150] == ord("d")


@pytest.mark.parametrize("emphasis", ["original", "abs", "none"])
def test_emphasis_keeps_the_mean_it_promises(emphasis):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 77, 8, generator=generator) + 0.3
    weights = torch.ones(2, 77)
    weights[0, 1:5] = 1.7
    result = prompt_weights.emphasize(hidden, weights, emphasis)
    if emphasis == "original":
        torch.testing.assert_close(result.mean(dim=(1, 2)), hidden.mean(dim=(1, 2)))
    elif emphasis == "abs":
        torch.testing.assert_close(result.abs().mean(dim=(1, 2)), hidden.abs().mean(dim=(1, 2)))
    else:
        torch.testing.assert_close(result[0, 1:5], hidden[0, 1:5] * 1.7)
    torch.testing.assert_close(result[1], hidden[1])
    ratio = result[0, 1] / hidden[0, 1] / (result[0, 9] / hidden[0, 9])
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.7))


# --- chunks ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CAPTIONS["token_chunking"])
def test_chunking_as_recorded(case):
    special = SpecialIds(49406, 49407, 49407 if case["tokenizer"].startswith("pad_is_eos") else 0)
    length = case["max_length_with_specials"]
    chunks = chunk_count(None if length == 77 else length - 2)
    windows = chunk_ids(range(500, 500 + case["n_text_tokens"]), special, chunks)
    assert len(windows) == len(case["chunks"])
    for window, wanted in zip(windows, case["chunks"], strict=True):
        assert len(window) == wanted["length"] == 77
        assert window[:3] == wanted["first3"]
        assert window[-3:] == wanted["last3"]
        assert window.count(49407) == wanted["n_eos"]
        assert window.count(0) == wanted["n_pad_zero"]


def test_max_token_length_must_be_whole_chunks():
    assert [chunk_count(n) for n in (None, 75, 150, 225)] == [1, 1, 2, 3]
    with pytest.raises(ValueError, match="100"):
        chunk_count(100)


def test_splice_keeps_first_start_all_text_and_last_end():
    values = torch.arange(2 * 3 * 77, dtype=torch.float32).reshape(2, 3, 77)
    spliced = splice(values, 3)
    assert spliced.shape == (2, 227)
    wanted = torch.cat([values[:, 0, :1], *[values[:, k, 1:76] for k in range(3)], values[:, 2, 76:]], dim=1)
    assert torch.equal(spliced, wanted)
    assert torch.equal(splice(values.reshape(6, 77)[..., None], 3)[..., 0], wanted)
    assert torch.equal(join(values.reshape(6, 77), 3), values.reshape(2, 231))


# --- tokenizers ------------------------------------------------------------------------------------------------
def test_special_ids_come_from_the_tokenizer(tokenizer):
    ids = tokenizer.windows(["a cat girl", ""])
    assert ids.shape == (2, 1, 77)
    assert ids[0, 0, :6].tolist() == [766, 320, 744, 752, 767, 767]
    assert ids[1, 0].tolist() == [766] + [767] * 76


def test_a_forced_padding_id_pads(tokenizer):
    other = clip.load_tokenizer(clip.CLIP_G, cache_dir=TOKENIZERS)
    assert other.windows(["a"])[0, 0, :5].tolist() == [766, 320, 767, 0, 0]


def test_tokenizer_survives_pickling_with_added_tokens():
    own = clip.load_tokenizer(clip.CLIP_L, cache_dir=TOKENIZERS)
    token = own.add_token("mychar")
    assert token == 768
    copy = pickle.loads(pickle.dumps(own))
    assert copy.text_ids("a mychar") == [320, 768]
    with pytest.raises(ValueError, match="already knows 'mychar'"):
        own.add_token("mychar")


def test_tokenizer_beside_the_model_comes_first(tmp_path):
    shutil.copytree(TOKENIZERS / "openai_clip-vit-large-patch14", tmp_path / "tokenizer")
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.touch()
    for model_path in (checkpoint, tmp_path):
        found = clip.load_tokenizer(clip.CLIP_L, model_path=model_path, cache_dir=TOKENIZERS)
        assert found.source == str(tmp_path / "tokenizer")


def test_a_missing_tokenizer_is_an_error_that_lists_the_places(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "_from_open_clip", lambda: None)
    source = clip.TokenizerSource("nobody/has-this")
    with pytest.raises(FileNotFoundError, match=r"nobody_has-this.*--tokenizer_cache_dir"):
        clip.load_tokenizer(source, model_path=tmp_path, cache_dir=tmp_path / "cache")


def test_saved_tokenizer_reads_back_equal(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    text = "Best quality, 1girl!! (naïve)"
    assert clip.load_tokenizer(clip.CLIP_L, model_path=tmp_path).text_ids(text) == tokenizer.text_ids(text)
    assert (tmp_path / "tokenizer" / "merges.txt").is_file()


def test_vocabulary_from_merges_is_the_published_order():
    folder = TOKENIZERS / "openai_clip-vit-large-patch14"
    merges = [line for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:] if line]
    assert clip.vocabulary_of(merges) == json.loads((folder / "vocab.json").read_text(encoding="utf-8"))


def test_a_tokenizer_with_too_many_tokens_is_refused(tokenizer):
    tokenizer.check_fits(tiny_encoder(), "m.safetensors")
    with pytest.raises(ValueError, match=r"openai_clip.*768 tokens.*m\.safetensors has 700 rows"):
        tokenizer.check_fits(tiny_encoder(700), "m.safetensors")


# --- encoding --------------------------------------------------------------------------------------------------
def test_wrapper_has_the_old_module_paths():
    encoder = tiny_encoder()
    names = {name for name, _ in encoder.named_parameters()}
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert "text_model.final_layer_norm.weight" in names
    assert all(name.startswith("text_model.") for name in names)
    classes = {type(module).__name__ for module in encoder.modules()}
    assert {"CLIPAttention", "CLIPMLP"} <= classes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_clip_skip_counts_layers_and_applies_the_final_norm(tokenizer, checkpointing):
    encoder = tiny_encoder()
    ids = tokenizer.windows(["a cat girl"])
    full = clip.encode_captions(encoder, ids)
    assert torch.equal(clip.encode_captions(encoder, ids, clip_skip=1), full)
    if checkpointing:
        encoder.gradient_checkpointing_enable()
        encoder.train()
    skipped = clip.encode_captions(encoder, ids, clip_skip=2)
    if checkpointing:
        skipped.sum().backward()
        assert encoder.text_model.encoder.layers[1].mlp.fc1.weight.grad is not None
        assert encoder.text_model.encoder.layers[2].mlp.fc1.weight.grad is None
    short = tiny_encoder()
    del short.text_model.encoder.layers[2]
    torch.testing.assert_close(skipped.detach(), clip.encode_captions(short, ids).detach(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="--clip_skip 9"):
        clip.encode_captions(encoder, ids, clip_skip=9)


def test_long_captions_and_weights_in_training(tokenizer):
    encoder = tiny_encoder()
    caption = "cat " * 100 + "(girl:1.5)"
    ids, weights = tokenizer.weighted_windows([caption], 150)
    plain = clip.encode_captions(encoder, ids)
    weighted = clip.encode_captions(encoder, ids, weights=weights)
    assert plain.shape == (1, 152, 32)
    ratio = (weighted / plain).mean(dim=-1)[0]
    changed = (ratio - 1).abs() > 1e-4
    tokens = len(tokenizer.text_ids("cat " * 100))
    added = len(tokenizer.text_ids("girl"))
    assert changed.nonzero().flatten().tolist() == list(range(tokens + 1, tokens + 1 + added))


def test_prompts_use_the_fewest_windows_that_hold_the_longest(tokenizer, caplog):
    style = clip.PromptStyle(max_chunks=2, with_breaks=True)
    assert clip.tokenize_prompts(tokenizer, ["cat", ""], style)[0].shape == (2, 1, 77)
    ids, weights = clip.tokenize_prompts(tokenizer, ["cat BREAK girl", "x"], style)
    assert ids.shape == weights.shape == (2, 2, 77)
    assert ids[0, 1, 1] == tokenizer.text_ids("girl")[0]
    ids, _ = clip.tokenize_prompts(tokenizer, ["cat " * 500], style)
    assert ids.shape == (1, 2, 77)
    assert "cut to 150" in caplog.text


def test_resizing_the_token_table_keeps_rows_and_zeroes_new_ones():
    encoder = tiny_encoder()
    before = encoder.get_input_embeddings().weight.detach().clone()
    encoder.resize_token_embeddings(770)
    after = encoder.get_input_embeddings().weight
    assert torch.equal(after[:768], before)
    assert after[768:].abs().sum() == 0

"""Files of new words: every form that is written is read, other programs' forms too, and bad ones say why."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.embeddings import (
    LAYER_KEYS,
    read_embeddings,
    read_layer_embeddings,
    write_embeddings,
    write_layer_embeddings,
)
from library.methods.caption_templates import object_captions, style_captions
from library.text.new_words import LayerWords, layered_words, vector_words, with_all_words

ROWS = torch.arange(6.0).reshape(2, 3)
BOTH = {"clip_l": ROWS, "clip_g": torch.arange(8.0).reshape(2, 4)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("embeddings", [{"clip_l": ROWS}, BOTH], ids=["one", "two"])
def test_what_is_written_is_read_again(suffix, embeddings, tmp_path):
    path = tmp_path / f"word{suffix}"
    write_embeddings(path, embeddings, dtype=torch.float16, metadata={"modelspec.title": "word"})
    found = read_embeddings(path, list(embeddings))
    assert found.keys() == embeddings.keys()
    for name, rows in found.items():
        assert rows.dtype == torch.float16
        assert torch.equal(rows.float(), embeddings[name])


def test_a_slice_of_a_large_table_makes_a_small_pickle(tmp_path):
    write_embeddings(tmp_path / "w.pt", {"clip_l": torch.zeros(50_000, 8)[-1:]}, dtype=None, metadata={})
    assert (tmp_path / "w.pt").stat().st_size < 10_000
    assert list(torch.load(tmp_path / "w.pt", weights_only=True)) == ["emb_params"]


@pytest.mark.parametrize("content", [
    {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "word", "step": 100},
    {"<word>": ROWS},
    {"emb_params": ROWS},
], ids=["web ui", "learned_embeds.bin", "own"])  # fmt: skip
def test_pickles_of_other_programs_are_read(content, tmp_path):
    torch.save(content, tmp_path / "word.bin")
    assert torch.equal(read_embeddings(tmp_path / "word.bin", ["clip_l"])["clip_l"], ROWS)


def test_one_vector_becomes_one_row(tmp_path):
    torch.save({"<word>": ROWS[0]}, tmp_path / "word.pt")
    assert torch.equal(read_embeddings(tmp_path / "word.pt", ["clip_l"])["clip_l"], ROWS[:1])


def test_an_encoder_without_a_key_is_left_out(tmp_path):
    save_file({"clip_g": BOTH["clip_g"]}, tmp_path / "word.safetensors")
    assert list(read_embeddings(tmp_path / "word.safetensors", ["clip_l", "clip_g"])) == ["clip_g"]


class Payload:
    def __reduce__(self):
        return (open, ("payload_was_run", "w"))


def test_nothing_in_a_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "word.pt").write_bytes(pickle.dumps({"string_to_param": {"*": Payload()}}))
    with pytest.raises(ValueError, match="word.pt"):
        read_embeddings(tmp_path / "word.pt", ["clip_l"])
    assert not (tmp_path / "payload_was_run").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_embeddings_per_layer_keep_keys_and_order(suffix, tmp_path):
    layers = torch.arange(16 * 2 * 3.0).reshape(16, 2, 3)
    path = tmp_path / f"word{suffix}"
    write_layer_embeddings(path, layers, dtype=None, metadata={})
    saved = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert set(saved) == set(LAYER_KEYS)
    assert torch.equal(saved["IN04"], layers[2])
    assert torch.equal(saved["OUT11"], layers[15])
    found = read_layer_embeddings(path)
    assert tuple(found) == LAYER_KEYS
    assert torch.equal(torch.stack(list(found.values())), layers)
    with pytest.raises(ValueError, match="IN01"):
        read_embeddings(path, ["clip_l"])


@pytest.mark.parametrize(("tensors", "wanted"), [
    ({"clip_l": ROWS}, "IN01"),
    ({key: ROWS for key in LAYER_KEYS[1:]}, "IN01"),
    ({key: ROWS[: 1 + (key == "MID")] for key in LAYER_KEYS}, "different shapes"),
], ids=["another kind", "a layer missing", "uneven"])  # fmt: skip
def test_other_files_are_no_embeddings_per_layer(tensors, wanted, tmp_path):
    save_file({key: rows.clone() for key, rows in tensors.items()}, tmp_path / "word.safetensors")
    with pytest.raises(ValueError, match=wanted):
        read_layer_embeddings(tmp_path / "word.safetensors")


def test_a_missing_file_and_a_network_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        read_embeddings(tmp_path / "nothing.pt", ["clip_l"])
    save_file({"lora_unet.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    for encoders in (["clip_l"], ["clip_l", "clip_g"]):
        with pytest.raises(ValueError, match="lora_unet.alpha"):
            read_embeddings(tmp_path / "lora.safetensors", encoders)


# --- texts -----------------------------------------------------------------------------------------------------
def test_templates_are_the_known_captions():
    things, styles = object_captions("new new1"), style_captions("new new1")
    assert (len(things), len(set(things))) == (27, 27)
    assert (len(styles), len(set(styles))) == (19, 17)
    assert {"a photo of my new new1", "a dark photo of the new new1", "the photo of a new new1",
            "a photo of the weird new new1", "a rendition of the new new1"} <= set(things)  # fmt: skip
    assert styles.count("a cropped painting in the style of new new1") == 2
    assert styles.count("a close-up painting in the style of new new1") == 2
    assert "the painting in the style of new new1" in styles
    assert all(caption.endswith(" new new1") for caption in things + styles)


def test_words_of_several_vectors():
    assert vector_words("new", 3) == ["new", "new1", "new2"]
    assert with_all_words("a new, renewed", ["new", "new1"]) == "a new new1, renew new1ed"


def test_each_layer_reads_its_own_words():
    words = vector_words("<x>", 12)
    variants = LayerWords(words).variants("(<x> <x>1 <x>11:1.2), x")
    assert len(variants) == 16
    assert variants[0] == "(<x>_IN01 <x>1_IN01 <x>11_IN01:1.2), x"
    assert variants[6] == "(<x>_MID <x>1_MID <x>11_MID:1.2), x"
    assert layered_words(["a", "a1"])[:3] == ["a_IN01", "a1_IN01", "a_IN02"]

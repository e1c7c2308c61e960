"""Cached text-encoder outputs: equal to live ones, what makes a file stale, damage, foreign files, refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from library.config_schema import SubsetConfig
from library.data.cache import CacheReport
from library.data.dataset import DatasetGroup
from library.data.loader import BatchLoader
from library.data.npz_files import CacheError
from library.data.records import Batch, BatchRequest, TextCacheSpec
from library.data.text_cache import TextCacheOptions, cache_text_outputs, remake_text_outputs, text_cache_problems
from library.options.errors import UserError
from tests.picture_folder import dataset_config, group_of, records_of, save_pictures
from tests.training import MODEL, TOKENIZERS

SPEC = TextCacheSpec("_clip_te.npz", ("hidden", "pool", "mask"), {"apply_mask": False}, {"hidden": 77, "mask": 77})
DISK = TextCacheOptions(to_disk=True, encoders="encoder-1")
MEMORY = TextCacheOptions()


class Encoder:
    """The tiny recorded CLIP with its tokenizer; remembers what it was asked for."""

    def __init__(self) -> None:
        from library.model_util import load_checkpoint
        from library.text import clip

        self.encoder = load_checkpoint(MODEL, v2=False, dtype=torch.float32).text_encoder.eval()
        self.tokenizer = clip.load_tokenizer(clip.CLIP_L, cache_dir=TOKENIZERS)
        self.calls: list[list[str]] = []

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        self.calls.append(list(captions))
        return self.live(captions)

    @torch.no_grad()
    def live(self, captions: Sequence[str]) -> dict[str, Tensor]:
        ids = self.tokenizer.windows(captions)[:, 0]
        output = self.encoder(ids)
        return {
            "hidden": output.last_hidden_state, "pool": output.pooler_output,
            "mask": (ids != self.tokenizer.special.pad).long(),
        }


@pytest.fixture(scope="module")
def loaded() -> Encoder:
    return Encoder()


@pytest.fixture
def encoder(loaded: Encoder) -> Encoder:
    loaded.calls.clear()
    return loaded


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return save_pictures(tmp_path, [(64, 64), (64, 64), (64, 128)])


def group(pictures: list[Path], subset: SubsetConfig | None = None, **record: object) -> DatasetGroup:
    return group_of((dataset_config(subset, resolution=(64, 64)), records_of(pictures, **record)))


def cache(
    target: DatasetGroup, encoder: Callable[[Sequence[str]], dict[str, Tensor]], options: TextCacheOptions = DISK,
    spec: TextCacheSpec = SPEC, **share: int,
) -> CacheReport:
    return cache_text_outputs(target, encoder, spec=spec, options=options, **share)


def counts(report: CacheReport) -> tuple[int, int, int]:
    return report.encoded, report.reused, report.remade


def batches(target: DatasetGroup, epoch: int = 1) -> Iterator[Batch]:
    return (target[BatchRequest(epoch, index, 0)] for index in range(len(target)))


def assert_live(target: DatasetGroup, encoder: Encoder) -> None:
    """Every batch holds what the encoder gives for its captions now."""
    for batch in batches(target):
        expected = encoder.live(batch.captions)
        assert batch.text_outputs is not None and list(batch.text_outputs) == list(SPEC.arrays)
        for name, value in batch.text_outputs.items():
            assert value.dtype == torch.float32
            assert torch.allclose(value, expected[name].float(), atol=1e-6), name


def file_of(picture: Path) -> Path:
    return picture.with_name(f"{picture.stem}_clip_te.npz")


def arrays_in(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def rewrite(path: Path, **changes: object) -> None:
    """The file with some arrays replaced; None removes one."""
    arrays = arrays_in(path) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


# --- what a batch holds ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [DISK, MEMORY], ids=["disk", "memory"])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_the_live_encoder_gives(
    pictures: list[Path], encoder: Encoder, options: TextCacheOptions, workers: int
) -> None:
    target = group(pictures)
    assert counts(cache(target, encoder, options)) == (3, 0, 0)
    assert_live(target, encoder)
    for served, own in zip(BatchLoader(target, num_workers=workers).epoch(1), batches(target), strict=True):
        assert served.captions == own.captions and served.tokens is not None and own.text_outputs is not None
        for name, value in (served.text_outputs or {}).items():
            assert torch.equal(value, own.text_outputs[name])
    target.needs_tokens = False
    assert all(batch.tokens is None and batch.text_outputs for batch in BatchLoader(target).epoch(1))


def test_equal_captions_are_encoded_once_and_calls_have_the_asked_size(pictures: list[Path], encoder: Encoder) -> None:
    target = group_of(
        (dataset_config(resolution=(64, 64)), records_of(pictures, caption="same")),
        (dataset_config(resolution=(64, 64), batch_size=3), records_of(pictures)),
        (dataset_config(resolution=(64, 64)), records_of(pictures[:1], caption="")),
    )
    report = cache(target, encoder, replace(MEMORY, batch_size=2))
    assert [len(call) for call in encoder.calls] == [2, 2, 1]
    assert sum(encoder.calls, []) == ["same", *(record.caption for record in records_of(pictures)), ""]
    assert counts(report) == (7, 0, 0)
    assert_live(target, encoder)
    assert counts(cache(target, encoder, MEMORY)) == (0, 7, 0)


def test_datasets_are_encoded_with_their_own_batch_size(pictures: list[Path], encoder: Encoder) -> None:
    cache(group_of((dataset_config(resolution=(64, 64), batch_size=3), records_of(pictures))), encoder, MEMORY)
    assert [len(call) for call in encoder.calls] == [3]


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float16, np.float16), (torch.bfloat16, np.float32), (torch.float32, np.float32)],
)
def test_file_name_keys_and_types(
    pictures: list[Path], encoder: Encoder, dtype: torch.dtype, stored: type[np.floating]
) -> None:
    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        return {n: v.to(dtype) if v.is_floating_point() else v for n, v in encoder.live(captions).items()}

    target = group(pictures[:1])
    cache(target, encode)
    arrays = arrays_in(pictures[0].with_name("a0_clip_te.npz"))
    assert set(arrays) == {"hidden", "pool", "mask", "apply_mask", "caption_sha256", "identity"}
    assert arrays["hidden"].dtype == stored and arrays["hidden"].shape[0] == 77
    assert arrays["mask"].dtype == np.int64 and arrays["pool"].ndim == 1
    assert arrays["apply_mask"].dtype == np.bool_ and arrays["apply_mask"].shape == ()
    assert json.loads(arrays["identity"].tobytes())["encoders"] == "encoder-1"
    (batch,) = batches(target)
    assert torch.equal(batch.text_outputs["hidden"], encode(batch.captions)["hidden"].float())


def test_captions_are_processed_as_in_training_without_chance(pictures: list[Path], encoder: Encoder) -> None:
    subset = SubsetConfig(
        caption_prefix="photo,", caption_suffix="4k", secondary_separator=";;;", enable_wildcard=True
    )
    target = group(pictures[:1], subset, caption="tok {red} sky;;;cloud")
    target.caption_replacements = {"tok": "tok tok1"}
    cache(target, encoder)
    assert encoder.calls == [["photo, tok tok1 red sky,cloud 4k"]]
    assert [batch.captions for batch in batches(target)] == encoder.calls


def test_the_first_line_is_what_is_encoded(pictures: list[Path], encoder: Encoder) -> None:
    cache(group(pictures[:1], caption="first\nsecond"), encoder, MEMORY)
    assert encoder.calls == [["first"]]


# --- files of an earlier run ----------------------------------------------------------------------------------
def test_second_run_reuses_everything(pictures: list[Path], encoder: Encoder) -> None:
    cache(group(pictures), encoder)
    encoder.calls.clear()
    second = group(pictures)
    assert counts(cache(second, encoder)) == (0, 3, 0)
    assert encoder.calls == [[""]]  # what the encoders give for a caption
    assert_live(second, encoder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2000] ^= 1  # inside the first array
    path.write_bytes(content)


MUTATIONS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b"") and None,
    "no archive": lambda path: path.write_text("latents") and None,
    "truncated": truncate,
    "flipped byte": flip_byte,
    "other values": lambda path: rewrite(path, pool=arrays_in(path)["pool"] + 1),
    "other dtype": lambda path: rewrite(path, pool=arrays_in(path)["pool"].astype(np.float16)),
    "integers": lambda path: rewrite(path, pool=arrays_in(path)["pool"].astype(np.int32), identity=None),
    "objects": lambda path: rewrite(path, pool=arrays_in(path)["pool"].astype(object)),
    "other length": lambda path: rewrite(path, hidden=np.zeros((152, 32), np.float32), identity=None),
    "other width": lambda path: rewrite(path, pool=np.zeros(8, np.float32), identity=None),
    "missing array": lambda path: rewrite(path, mask=None),
    "missing flag": lambda path: rewrite(path, apply_mask=None),
    "other flag": lambda path: rewrite(path, apply_mask=np.array(True), identity=None),
    "other caption": lambda path: rewrite(path, caption_sha256=np.zeros(32, np.uint8), identity=None),
    "no table": lambda path: rewrite(path, identity=np.frombuffer(b"[1]", np.uint8)),
    "other version": lambda path: rewrite(path, identity=np.frombuffer(b"{}", np.uint8)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_bad_files_are_made_anew(pictures: list[Path], encoder: Encoder, mutation: str) -> None:
    cache(group(pictures), encoder)
    MUTATIONS[mutation](file_of(pictures[1]))
    target = group(pictures)
    assert counts(cache(target, encoder)) == (1, 2, 1)
    assert_live(target, encoder)
    assert counts(cache(group(pictures), encoder)) == (0, 3, 0)


@pytest.mark.parametrize("change", ["caption", "prefix", "encoders", "flag"])
def test_changed_settings_make_files_anew(pictures: list[Path], encoder: Encoder, change: str) -> None:
    cache(group(pictures), encoder)
    target = group(
        pictures, SubsetConfig(caption_prefix="photo,") if change == "prefix" else None,
        **({"caption": "new"} if change == "caption" else {}),
    )
    options = replace(DISK, encoders="encoder-2") if change == "encoders" else DISK
    spec = replace(SPEC, flags={"apply_mask": True}) if change == "flag" else SPEC
    assert counts(cache(target, encoder, options, spec)) == (3, 0, 3)
    assert_live(target, encoder)


def test_a_flip_of_any_byte_is_noticed_or_harmless(pictures: list[Path]) -> None:
    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        return {"pool": torch.ones(len(captions), 4)}

    spec = TextCacheSpec("_clip_te.npz", ("pool",))
    cache(group(pictures[:1]), encode, spec=spec)
    path = file_of(pictures[0])
    good = path.read_bytes()
    remade = 0
    for position in range(0, len(good), 13):
        damaged = bytearray(good)
        damaged[position] ^= 0x41
        path.write_bytes(damaged)
        target = group(pictures[:1])
        remade += cache(target, encode, spec=spec).remade
        (batch,) = batches(target)
        assert torch.equal(batch.text_outputs["pool"], torch.ones(1, 4))
    assert remade > 20


def test_damage_during_training_names_the_file(pictures: list[Path], encoder: Encoder) -> None:
    target = group(pictures[:1])
    cache(target, encoder)
    rewrite(file_of(pictures[0]), pool=np.zeros_like(arrays_in(file_of(pictures[0]))["pool"]))
    with pytest.raises(CacheError, match=r"a0_clip_te\.npz: the cache is spoilt \(`pool` does not match"):
        list(batches(target))
    file_of(pictures[0]).unlink()
    with pytest.raises(CacheError, match=r"a0_clip_te\.npz: the cache is spoilt \(the file is gone"):
        list(batches(target))


def test_a_file_that_is_spoilt_again_after_it_was_made_anew_ends_the_run(
    pictures: list[Path], encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    target = group(pictures[:1])
    cache(target, encoder)
    truncate(file_of(pictures[0]))
    calls: list[Path] = []

    def remake(path: Path) -> bool:
        calls.append(path)
        assert remake_text_outputs(target, path, encoder)
        truncate(path)
        return True

    with pytest.raises(CacheError, match=r"a0_clip_te\.npz: the cache is spoilt"):
        list(BatchLoader(target, remake=remake).epoch(1))
    assert calls == [file_of(pictures[0])] and caplog.text.count("the cache is made anew") == 1


def test_every_spoilt_file_of_a_batch_is_made_anew_before_it_is_served(pictures: list[Path], encoder: Encoder) -> None:
    target = group(pictures)
    cache(target, encoder)
    for picture in pictures:
        truncate(file_of(picture))
    loader = BatchLoader(target, remake=lambda path: remake_text_outputs(target, path, encoder))
    assert sum(len(batch) for batch in loader.epoch(1)) == len(pictures)
    assert_live(target, encoder)
    assert not remake_text_outputs(target, pictures[0], encoder)  # no cache file of this data


def test_a_file_that_cannot_be_made_anew_ends_the_run(pictures: list[Path], encoder: Encoder) -> None:
    target = group(pictures)
    cache(target, encoder)
    truncate(file_of(pictures[0]))
    for remake in (None, lambda path: False):
        with pytest.raises(CacheError, match=r"a0_clip_te\.npz: the cache is spoilt"):
            list(BatchLoader(target, remake=remake).epoch(1))


# --- files of other programs ----------------------------------------------------------------------------------
def test_foreign_files_are_used_with_one_warning(
    pictures: list[Path], encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    cache(group(pictures), encoder)
    for picture in pictures:
        rewrite(file_of(picture), identity=None, caption_sha256=None)
    target = group(pictures)
    with caplog.at_level(logging.WARNING):
        report = cache(target, encoder)
    assert counts(report) == (0, 3, 0) and report.unverified == 3
    assert [record.message for record in caplog.records if "do not say what they were made from" in record.message]
    assert len(caplog.records) == 1
    assert_live(target, encoder)


# --- without the check ----------------------------------------------------------------------------------------
def test_skipped_check_opens_nothing_at_start(pictures: list[Path], encoder: Encoder) -> None:
    cache(group(pictures), encoder)
    file_of(pictures[0]).write_bytes(b"")
    file_of(pictures[1]).unlink()
    rewrite(file_of(pictures[2]), hidden=np.zeros((10, 32), np.float32), identity=None)
    target = group(pictures)
    assert counts(cache(target, encoder, replace(DISK, skip_check=True))) == (1, 2, 0)
    messages = []
    for sample in (0, 2):
        with pytest.raises(CacheError) as caught:
            target.make_batch(0, [sample], epoch=1, step=0)
        messages.append(str(caught.value))
    assert "a0_clip_te.npz: the cache is spoilt (unreadable" in messages[0]
    assert "a2_clip_te.npz: the cache is spoilt (`hidden` has the shape [10, 32] and not 77 rows" in messages[1]


# --- sharing --------------------------------------------------------------------------------------------------
def test_processes_share_the_files_and_each_fills_its_own_memory(pictures: list[Path], encoder: Encoder) -> None:
    first, second = group(pictures), group(pictures)
    assert counts(cache(first, encoder, rank=0, world_size=2)) == (2, 0, 0)
    assert [file_of(picture).exists() for picture in pictures] == [True, False, True]
    assert counts(cache(second, encoder, rank=1, world_size=2)) == (1, 0, 0)
    assert_live(first, encoder)
    assert_live(second, encoder)
    for rank in (0, 1):
        target = group(pictures)
        assert counts(cache(target, encoder, MEMORY, rank=rank, world_size=2)) == (3, 0, 0)


def test_only_the_first_process_shows_bars(
    pictures: list[Path], encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    for bar in ("caching captions: 100%", "checking text caches: 100%"):  # of a first and of a second run
        shown = []
        for rank in (0, 1):
            cache(group(pictures), encoder, rank=rank, world_size=2)
            shown.append(capsys.readouterr().err)
        assert bar in shown[0] and shown[1] == ""


def test_images_that_would_share_a_file_need_one_caption(pictures: list[Path], encoder: Encoder) -> None:
    (twin,) = save_pictures(pictures[0].parent / "other", [(64, 64)])
    twin = twin.rename(pictures[0].with_suffix(".webp"))
    assert counts(cache(group([pictures[0], twin], caption="same"), encoder)) == (1, 0, 0)
    with pytest.raises(UserError, match=r"a0\.webp: another image .*a0_clip_te\.npz with another caption"):
        cache(
            group_of(
                (dataset_config(resolution=(64, 64)), records_of([pictures[0]])),
                (dataset_config(resolution=(64, 64)), records_of([twin], caption="other")),
            ),
            encoder,
        )


# --- refusals -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "option",
    [
        {"caption_dropout_rate": 0.1}, {"caption_dropout_every_n_epochs": 2}, {"shuffle_caption": True},
        {"token_warmup_step": 3.0}, {"caption_tag_dropout_rate": 0.1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_random_captions_are_refused(pictures: list[Path], encoder: Encoder, option: dict[str, object]) -> None:
    target = group(pictures, SubsetConfig(location="d.toml, datasets[0].subsets[0]", **option))
    (problem,) = text_cache_problems(target)
    assert f"cannot be combined with {next(iter(option))} (d.toml, datasets[0].subsets[0])" in problem
    with pytest.raises(UserError):
        cache(target, encoder)
    assert encoder.calls == []


@pytest.mark.parametrize(("caption", "is_refused"), [("a {b|c}", True), ("a\nb", True), ("a {b} {{c|d}}", False)])
def test_wildcards_are_refused_where_they_leave_a_choice(pictures: list[Path], caption: str, is_refused: bool) -> None:
    problems = text_cache_problems(group(pictures, SubsetConfig(enable_wildcard=True), caption=caption))
    assert len(problems) == is_refused
    assert all("enable_wildcard (datasets[0].subsets[0]): 3 caption(s)" in problem for problem in problems)
    assert text_cache_problems(group(pictures, SubsetConfig(), caption=caption)) == []


def test_templates_are_refused(pictures: list[Path]) -> None:
    target = group(pictures)
    target.caption_replacements = {"": ["a photo of x", "a picture of x"]}
    (problem,) = text_cache_problems(target)
    assert "templates" in problem
    for fixed in (["a photo of x"] * 2, "a photo of x"):  # nothing changes
        target.caption_replacements = {"": fixed}
        assert text_cache_problems(target) == []


@pytest.mark.parametrize("options", [DISK, MEMORY], ids=["disk", "memory"])
def test_captions_that_are_not_encoded_as_they_are_stored_are_told(
    pictures: list[Path], encoder: Encoder, options: TextCacheOptions, caplog: pytest.LogCaptureFixture
) -> None:
    said = "captions are encoded as they are trained"
    with caplog.at_level(logging.INFO):
        cache(group(pictures), encoder, options)
        assert said not in caplog.text
        target = group(pictures, SubsetConfig(secondary_separator=";;;"))
        target.datasets[0].records[1].caption = "red;;;green"  # the only one that changes
        cache(target, encoder, options)
    assert said in caplog.text


def test_outputs_that_are_not_finite_name_the_caption(pictures: list[Path], encoder: Encoder) -> None:
    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        outputs = encoder.live(captions)
        outputs["pool"][[caption.startswith("a1") for caption in captions]] = torch.inf
        return outputs

    with pytest.raises(UserError, match=r"`pool`\) for the caption 'a1, red, green, blue'"):
        cache(group(pictures), encode)

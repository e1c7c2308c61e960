"""Options for training images and captions; most can also be set per dataset or subset in a dataset file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.declare import flag, option
from library.options.values import read_face_crop_range, read_resolution

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


@dataclass(frozen=True)
class DatasetOptions:
    """`resolution` is (width, height); `face_crop_aug_range` is (low, high)."""

    dataset_config: Path | None = option("dataset file (.toml or .json) that describes all images", type="Path")
    train_data_dir: str | None = option("folder whose sub-folders `<repeats>_<class words>` hold the training images")
    reg_data_dir: str | None = option("folder whose sub-folders `<repeats>_<class words>` hold regularisation images")
    in_json: str | None = option("metadata file with captions and tags of the training images")
    dataset_repeats: int = option("how often each image counts when nothing else says so", 1, type="int")
    dataset_class: str | None = option("dotted path of a dataset class of your own (package.module.Class)")
    train_batch_size: int = option("images per step and device", 1, type="int")
    resolution: tuple[int, int] | None = option(
        "training size in pixels: `512` or `width,height`", convert=read_resolution
    )
    cache_info: bool = flag("remember captions and image sizes in each folder to start faster next time")
    debug_dataset: bool = flag("show what would be trained on, then stop")

    shuffle_caption: bool = flag("shuffle the parts of a caption anew each time")
    caption_separator: str = option("what separates the parts of a caption", ",")
    caption_extension: str = option("ending of caption files", ".caption")
    caption_extention: str | None = option("old misspelling of --caption_extension; wins when given")
    keep_tokens: int = option("this many leading caption parts are neither shuffled nor dropped", 0, type="int")
    keep_tokens_separator: str = option("mark in a caption that ends the part to keep, e.g. `|||`", "")
    secondary_separator: str | None = option("separator inside a caption part that becomes a plain separator later")
    enable_wildcard: bool = flag("choose one of {a|b|c}, and one line of captions with several lines, each time")
    caption_prefix: str | None = option("text put before every caption")
    caption_suffix: str | None = option("text put after every caption")
    token_warmup_min: int = option("caption parts used at the start of token warm-up", 1, type="int")
    token_warmup_step: float = option(
        "use all caption parts only after this many steps (below 1: a fraction of all steps)", 0, type="float"
    )
    caption_dropout_rate: float = option("chance that a caption is emptied", 0.0, type="float")
    caption_dropout_every_n_epochs: int = option("empty all captions in every n-th epoch", 0, type="int")
    caption_tag_dropout_rate: float = option("chance that each part of a caption is left out", 0.0, type="float")
    weighted_captions: bool = flag("read (word:1.3) and [word] in captions as weights")

    color_aug: bool = flag("vary the colours a little (not with cached latents)")
    flip_aug: bool = flag("mirror images at random")
    face_crop_aug_range: tuple[float, float] | None = option(
        "crop around the face by a random factor `low,high`, e.g. 2.0,4.0", convert=read_face_crop_range
    )
    random_crop: bool = flag("crop at a random place instead of the middle (not with cached latents)")
    alpha_mask: bool = flag("use the alpha channel as a loss mask")
    masked_loss: bool = flag("weight the loss with mask images (conditioning images of the dataset)")
    conditioning_data_dir: str | None = option("folder with conditioning or mask images")

    enable_bucket: bool = flag("train on several aspect ratios instead of cropping everything to one size")
    min_bucket_reso: int = option("smallest side of a bucket in pixels", 256, type="int")
    max_bucket_reso: int = option("largest side of a bucket in pixels", 1024, type="int")
    bucket_reso_steps: int = option("bucket sides are multiples of this many pixels", 64, type="int")
    bucket_no_upscale: bool = flag("never enlarge an image; buckets follow the image sizes")
    resize_interpolation: str | None = option(
        "how images are resized (default: area when shrinking, lanczos when enlarging)", choices=INTERPOLATIONS
    )

    max_data_loader_n_workers: int = option("most processes that prepare data; 0 = none", 8, type="int")
    persistent_data_loader_workers: bool = flag("keep the data processes between epochs")

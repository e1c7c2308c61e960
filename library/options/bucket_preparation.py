"""Options of the tool that prepares buckets and latents."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option, positional


@dataclass(frozen=True)
class BucketPreparationOptions:
    train_data_dir: str = positional("folder with the images")
    in_json: str = positional("metadata file to read")
    out_json: str = positional("metadata file to write")
    model_name_or_path: str = positional("where the VAE is: a VAE or model file, a Diffusers folder or a hub name")
    v2: bool = flag("old option without effect: the VAE is the same")
    batch_size: int = option("images per VAE call", 1, type="int")
    max_data_loader_n_workers: int | None = option("old option; images are always loaded beside the VAE", type="int")
    max_resolution: str = option("largest area, as width,height", "512,512")
    min_bucket_reso: int = option("smallest side of a bucket", 256, type="int")
    max_bucket_reso: int = option("largest side of a bucket", 1024, type="int")
    bucket_reso_steps: int = option("sides of buckets are multiples of it", 64, type="int")
    bucket_no_upscale: bool = flag("never enlarge images: the buckets are their own sizes")
    mixed_precision: str = option("number format of the VAE", "no", choices=("no", "fp16", "bf16"))
    full_path: bool = flag("images are named by their whole path in the metadata")
    flip_aug: bool = flag("encode mirrored images too")
    alpha_mask: bool = flag("keep the alpha channel as a mask for the loss")
    skip_existing: bool = flag("keep files that fit")
    recursive: bool = flag("look into sub-folders too; needs --full_path")

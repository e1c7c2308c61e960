"""Which layers of a model a network adapts, under which names, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

UNET_TRANSFORMER_CLASSES = ("Transformer2DModel",)
UNET_CONV_CLASSES = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
UNET_ATTENTION_CLASSES = ("CrossAttention", "Attention")  # checkpoint-style U-Nets and diffusers name it differently
CLIP_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
SDXL_UNET_CLASS = "SdxlUNet2DConditionModel"


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its name in weight files, its path inside the model, and the layer itself."""

    name: str
    path: str
    layer: Any  # an nn.Module that looks like a Linear or a Conv2d

    @property
    def is_spatial(self) -> bool:
        """True for a convolution whose kernel is larger than 1x1 (it has a rank of its own)."""
        return is_conv(self.layer) and tuple(self.layer.kernel_size) != (1, 1)


def is_linear(layer: nn.Module) -> bool:
    """True if the class is named exactly `Linear` (subclasses such as quantised layers are not adapted)."""
    return layer.__class__.__name__ == "Linear"


def is_conv(layer: nn.Module) -> bool:
    """True if the class is named exactly `Conv2d`."""
    return layer.__class__.__name__ == "Conv2d"


def is_sdxl_unet(denoiser: nn.Module) -> bool:
    """True if the class of `denoiser`, or one of its base classes, is the SDXL U-Net."""
    return any(base.__name__ == SDXL_UNET_CLASS for base in type(denoiser).__mro__)


def as_encoder_list(text_encoder: Any) -> list[nn.Module | None]:
    """What a trainer hands over as `text_encoder` (one module, a list with holes, or None) as a list."""
    if text_encoder is None:
        return []
    return list(text_encoder) if isinstance(text_encoder, (list, tuple)) else [text_encoder]


def find_targets(root: nn.Module, prefix: str, class_names: Collection[str]) -> list[Target]:
    """All `Linear` and `Conv2d` layers inside modules of the given classes, in the order networks are created.

    A name is `<prefix>_<path>` with underscores for dots. Raises ValueError if two layers get the same name.
    """
    targets = []
    for path, module in walk(root):
        if module.__class__.__name__ not in class_names:
            continue
        for inner_path, layer in walk(module):
            if is_linear(layer) or is_conv(layer):
                full_path = _file_path(root, ".".join(part for part in (path, inner_path) if part))
                targets.append(Target(f"{prefix}_{full_path}".replace(".", "_"), full_path, layer))
    _check_unique(targets)
    return targets


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of a module and all modules below it, in definition order.

    One exception: inside a transformer block the feed-forward part comes before the second attention, because
    initial weights are drawn in this order by the programs whose seeds we reproduce.
    """
    yield path, module
    for name, child in _ordered_children(module):
        yield from walk(child, f"{path}.{name}" if path else name)


def _ordered_children(module: nn.Module) -> Sequence[tuple[str, nn.Module]]:
    children = dict(module.named_children())
    if not {"attn1", "attn2", "ff"} <= children.keys():
        return list(children.items())
    names = [name for name in children if name != "ff"]
    names.insert(names.index("attn1") + 1, "ff")
    return [(name, children[name]) for name in names]


def _file_path(root: nn.Module, path: str) -> str:
    """The path as weight files name it: CLIP layers always stand below `text_model`."""
    if path.startswith("encoder.layers.") and not hasattr(root, "text_model"):
        return f"text_model.{path}"
    return path


def _check_unique(targets: Sequence[Target]) -> None:
    paths: dict[str, str] = {}
    for target in targets:
        if target.name in paths:
            raise ValueError(
                f"two layers would share the network name {target.name!r}: {paths[target.name]!r} and {target.path!r}; "
                "one target class must not contain another"
            )
        paths[target.name] = target.path

"""From prompt lines to image requests: seeds, repetitions, drawn variants, file names."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

from library.generation.dynamic import DynamicLine, parse_groups
from library.generation.recorded import RecordedPrompt
from library.generation.request import (
    GENERATION,
    NOT_YET_INLINE,
    ImageRequest,
    PromptLine,
    PromptSyntaxError,
    cut_seeds,
    line_request,
    option_name,
    padded_multipliers,
    parse_prompt_line,
)
from library.text.prompt_weights import parse_weights

logger = logging.getLogger(__name__)

DEFAULT_STRENGTH = 0.8
SEED_RANGE = 2**32  # drawn seeds are below it
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class InitImage:
    """An image to start from, and the size in pixels at which it is used (a multiple of the model's step)."""

    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class GenerationDefaults:
    """What the command line says about every image.

    `template` holds the values of options that a line does not set; its `network_multipliers` has one entry per
    network that was not merged. Image k of an iteration takes entry k (mod length) of `init_images`/`mask_images`.
    `without_effect`: option keys (see `request.GENERATION`) that this model does not use; lines that set one warn.
    """

    template: ImageRequest
    images_per_prompt: int = 1
    n_iter: int = 1
    shuffle_prompts: bool = False
    iter_same_seed: bool = False
    init_images: tuple[InitImage, ...] = ()
    mask_images: tuple[Path, ...] = ()
    outdir: Path = Path("outputs")
    size_multiple: int = 8
    without_effect: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "n_iter"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be at least 1")


class SeedSource:
    """Draws seeds of images: from a generator seeded with `seed`, or from the system."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.generator = random.Random(seed)

    def draw(self) -> int:
        """A seed, 0 <= seed < 2**32."""
        return self.generator.randrange(SEED_RANGE)


#: a line in the prompt language, or what a picture says about itself
Line = str | RecordedPrompt


def read_prompt_lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 text file, without blank lines and those whose first character is '#'.

    Raises FileNotFoundError or ValueError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--from_file {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--from_file {path}: the file is not UTF-8 text: {error}") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip() and line[0] != "#"]


@dataclass(frozen=True)
class LineReport:
    """What is wrong with the lines of a list: `problems` has one sentence per line that will be skipped.

    `told` are the texts of both kinds as a planner words them.
    """

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    told: frozenset[str] = frozenset()


def check_lines(lines: Iterable[Line], defaults: GenerationDefaults, places: Sequence[str] = ()) -> LineReport:
    """What `plan` would refuse or ignore; of random groups one draw is checked. `places` name the lines."""
    single = replace(defaults, images_per_prompt=1, n_iter=1, iter_same_seed=False)
    problems, warnings, told = [], [], set()
    for index, line in enumerate(lines):
        place, heard = _place(places, index), list[str]()
        try:
            Planner(single, SeedSource(0), warn=heard.append).requests(line)
        except PromptSyntaxError as error:
            problems.append(f"{place}: {error}")
        warnings += [f"{place}: {warning}" for warning in heard]
        told |= {*heard, *problems[-1:]}
    return LineReport(tuple(problems), tuple(warnings), frozenset(told))


def _place(places: Sequence[str], index: int) -> str:
    return places[index] if index < len(places) else f"prompt {index + 1}"


def plan(
    lines: Iterable[Line], defaults: GenerationDefaults, seeds: SeedSource,
    *, places: Sequence[str] = (), told: frozenset[str] = frozenset(),
) -> Iterator[ImageRequest]:
    """The images of all iterations, in order; `lines` is gone through once per iteration.

    A line that cannot be understood is skipped with an error message in the log, unless `told` holds it already (see
    `check_lines`). Group the result with `batches`.
    `--seed` itself is the image's seed only if `lines` has a length and the whole plan is one image.
    """
    line_count = len(lines) if isinstance(lines, Sized) else None
    planner = Planner(defaults, seeds, line_count=line_count, told=told)
    for iteration in range(defaults.n_iter):
        if iteration:
            planner.begin_iteration()
        numbered: Iterable[tuple[int, Line]] = enumerate(lines)
        if defaults.shuffle_prompts:
            numbered = list(numbered)
            seeds.generator.shuffle(numbered)
        for index, line in numbered:
            try:
                requests = planner.requests(line)
            except PromptSyntaxError as error:
                problem = f"{_place(places, index)}: {error}"
                if problem not in told:
                    logger.error("%s; it is skipped", problem)
                continue
            yield from requests


class Planner:
    """Makes image requests of one line after the other (`plan` for lists, this for interactive use)."""

    def __init__(
        self, defaults: GenerationDefaults, seeds: SeedSource,
        *, line_count: int | None = None, warn: Callable[[str], None] = logger.warning,
        told: Iterable[str] = (),
    ) -> None:
        """`line_count`: how many lines will come in an iteration; None: nobody knows.

        `warn` hears a text once, and none of those that are `told`.
        """
        self._defaults = defaults
        self._seeds = seeds
        self._is_only_line = line_count == 1 and defaults.n_iter == 1
        self._tell = warn
        self._told: set[str] = set(told)
        self._names: set[str] = set()
        self._suffixes: dict[str, int] = {}
        if defaults.iter_same_seed and defaults.images_per_prompt > 1:
            self._warn("--iter_same_seed gives all images of a prompt the same seed: they will be equal")
        self.begin_iteration()

    def begin_iteration(self) -> None:
        """Start the list anew: the first init image, a new seed for --iter_same_seed (a new planner has begun)."""
        self._image_index = 0
        self.iteration_seed = self._seeds.draw() if self._defaults.iter_same_seed else None

    def requests(self, line: Line) -> list[ImageRequest]:
        """The images of one line in this iteration, each with its seed.

        Random groups are drawn for every image from a generator seeded with that image's seed. Enumerated groups set
        the number of images, and these share one seed and one generator. Raises PromptSyntaxError; the line then
        counts no images.
        """
        if isinstance(line, RecordedPrompt):
            return self._recorded(line)
        line, given, warnings = cut_seeds(line)
        dynamic = parse_groups(line)
        for warning in (*warnings, *dynamic.warnings):
            self._warn(warning)
        seeds = self._image_seeds(given, dynamic)
        if dynamic.is_enumerated or not dynamic.has_groups:
            prompts = list(dynamic.expand(random.Random(seeds[0])))
            prompts = prompts if dynamic.is_enumerated else prompts * len(seeds)
        else:
            prompts = [next(dynamic.expand(random.Random(seed))) for seed in seeds]
        understood = {prompt: self._understand(prompt) for prompt in dict.fromkeys(prompts)}
        return [self._numbered(understood[prompt], seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _recorded(self, line: RecordedPrompt) -> list[ImageRequest]:
        """The images of what a picture says about itself: the first one has its seed."""
        for remark in line.remarks:
            self._warn(remark)
        texts = {"prompt": line.prompt, "negative_prompt": line.negative_prompt, "raw_prompt": None}
        request = self._completed(replace(self._defaults.template, **{**line.values, **texts}))
        given = [] if line.seed is None else [line.seed]
        count = self._defaults.images_per_prompt
        seeds = given + [self._next_seed(count) for _ in range(count - len(given))]
        return [self._numbered(request, seed) for seed in seeds]

    def _warn(self, warning: str) -> None:
        if warning not in self._told:
            self._told.add(warning)
            self._tell(warning)

    # --- seeds ---

    def _image_seeds(self, given: list[int] | None, dynamic: DynamicLine) -> list[int]:
        """A seed for each image of the line: from its list, else as `_next_seed`."""
        count = dynamic.count if dynamic.is_enumerated else self._defaults.images_per_prompt
        given = given or []
        if dynamic.is_enumerated:
            if len(given) > 1:
                self._warn("images of enumerated groups share the first seed of '--d'; the others are ignored")
            return [given[0] if given else self._next_seed(count)] * count
        if given and len(given) < count and not dynamic.has_groups:
            self._warn(
                f"'--d' gives {len(given)} seed(s) for {count} images: the last one is used for all that remain, "
                "their images are equal"
            )
            return given + [given[-1]] * (count - len(given))
        return given[:count] + [self._next_seed(count) for _ in range(count - len(given))]

    def _next_seed(self, count: int) -> int:
        if self.iteration_seed is not None:
            return self.iteration_seed
        if self._is_only_line and count == 1 and self._seeds.seed is not None:
            return self._seeds.seed
        return self._seeds.draw()

    # --- one prompt ---

    def _understand(self, prompt: str) -> ImageRequest:
        """The request of an expanded line, all but what differs between its images."""
        defaults = self._defaults
        line = parse_prompt_line(prompt, GENERATION)
        for warning in (*line.warnings, *self._useless_options(line)):
            self._warn(warning)
        return self._completed(line_request(line, replace(defaults.template, raw_prompt=prompt)))

    def _completed(self, request: ImageRequest) -> ImageRequest:
        """The request with strength and multipliers. Raises PromptSyntaxError for what cannot be drawn."""
        defaults = self._defaults
        request = replace(request, network_multipliers=self._multipliers(request))
        if defaults.init_images:
            request = replace(request, strength=DEFAULT_STRENGTH if request.strength is None else request.strength)
        else:
            request = replace(request, strength=None)
            _check_size(request, defaults.size_multiple)
        if request.negative_scale is not None and not request.uses_guidance:
            self._warn(f"the negative scale is ignored: guidance is off at scale {request.scale:g}")
        _check_text(request)
        _check_sub_prompts(request, has_mask=bool(defaults.mask_images))
        if request.output_name is not None:
            safe_output_path(defaults.outdir, request.output_name)
        return request

    def _useless_options(self, line: PromptLine) -> Iterator[str]:
        """Warnings about options of a line that change nothing."""
        defaults = self._defaults
        for key in line.options:
            option = f"'--{option_name(key)}'"
            if key == "seeds":
                yield f"{option} is ignored: seeds are read before groups are expanded, and only a line's first list"
            elif key in defaults.without_effect:
                yield f"{option} has no effect on this model"
            elif key == "strength" and not defaults.init_images:
                yield f"{option} has no effect without --image_path"
            elif key in ("width", "height") and defaults.init_images:
                yield f"{option} is ignored: the size is that of the init image"
            elif key == "network_muls" and not defaults.template.network_multipliers:
                yield f"{option} has no effect: there is no network that is not merged"

    def _multipliers(self, request: ImageRequest) -> tuple[float, ...] | None:
        """One multiplier per network."""
        count = len(self._defaults.template.network_multipliers or ())
        multipliers = request.network_multipliers
        if not count or multipliers is None:
            return None
        if len(multipliers) > count:
            self._warn(f"'--am' has {len(multipliers)} multipliers for {count} network(s); the rest is ignored")
        return tuple(padded_multipliers(list(multipliers), count)[:count])

    def _numbered(self, request: ImageRequest, seed: int) -> ImageRequest:
        """The request of the next image."""
        defaults, index = self._defaults, self._image_index
        self._image_index += 1
        if defaults.init_images:
            image = defaults.init_images[index % len(defaults.init_images)]
            request = replace(request, init_image=image.path, width=image.width, height=image.height)
        if defaults.mask_images:
            request = replace(request, mask_image=defaults.mask_images[index % len(defaults.mask_images)])
        name = None if request.output_name is None else self._unused_name(request.output_name)
        return replace(request, seed=seed, output_name=name)

    def _unused_name(self, name: str) -> str:
        """`x.png`, then `x_001.png` and so on: no two images of a plan have one name."""
        path = _image_path(name)
        key, candidate = path.as_posix().casefold(), path
        while candidate.as_posix().casefold() in self._names:
            self._suffixes[key] = self._suffixes.get(key, 0) + 1
            candidate = path.with_stem(f"{path.stem}_{self._suffixes[key]:03d}")
        self._names.add(candidate.as_posix().casefold())
        return candidate.as_posix()


def _check_size(request: ImageRequest, multiple: int) -> None:
    if request.width % multiple or request.height % multiple:
        raise PromptSyntaxError(
            f"image size {request.width}x{request.height}: both sides (--w, --h) must be multiples of {multiple}"
        )


def _check_text(request: ImageRequest) -> None:
    """Raise PromptSyntaxError unless the texts can be encoded and their weights read."""
    texts = [("the prompt", text) for text in request.sub_prompts]
    for option, text in (*texts, ("'--n'", request.negative_prompt), ("'--c'", request.clip_prompt or "")):
        if not _is_unicode(text):
            raise PromptSyntaxError(f"{option} has bytes that are not UTF-8 text: {text!r}")
        try:
            parse_weights(text)
        except ValueError as error:
            raise PromptSyntaxError(f"{option}: {error}") from error


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which stand for undecodable bytes of the command line."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_sub_prompts(request: ImageRequest, *, has_mask: bool) -> None:
    if len(request.sub_prompts) > 1:
        if not has_mask or not request.network_multipliers:
            raise PromptSyntaxError(
                f"AND needs a region mask (--mask_path) and at least one network (--network_module), "
                f"in: {request.prompt}"
            )
        raise PromptSyntaxError(f"{NOT_YET_INLINE['AND']}, in: {request.prompt}")


# --- file names -----------------------------------------------------------------------------------------------


def safe_output_path(outdir: Path, name: str) -> Path:
    """The absolute path of image file `name` below `outdir`, links resolved; nothing is created.

    Both kinds of slash separate folders. A name without the ending of an image format gets `.png`. Raises
    PromptSyntaxError for names that lead out of `outdir`, also through a link, and for those that cannot be files.
    """

    def refuse(reason: str) -> PromptSyntaxError:
        return PromptSyntaxError(f"the output file name {name!r} (--f) is refused: {reason}")

    if not _is_unicode(name) or any(character < " " or character == "\x7f" for character in name):
        raise refuse("it has characters that file names cannot have")
    windows = PureWindowsPath(name)
    if windows.drive or windows.root:
        raise refuse("it must be relative to --outdir")
    if ".." in windows.parts:
        raise refuse("'..' is not allowed in it")
    if not windows.name.strip() or name[-1] in "/\\":
        raise refuse("it names no file")
    path = _image_path(name)
    if len(path.as_posix()) > 1000 or any(len(part.encode()) > 240 for part in path.parts):
        raise refuse("it is too long")
    try:
        root = outdir.resolve()
        resolved = (root / path).resolve()
        is_folder = resolved.is_dir()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that the file system refuses
        raise refuse(str(error)) from error
    if not resolved.is_relative_to(root):
        raise refuse(f"a link leads out of {root}")
    if is_folder:
        raise refuse("there is a folder of that name")
    return resolved


def _image_path(name: str) -> Path:
    """`name` with forward slashes and an image ending."""
    path = Path(name.replace("\\", "/"))
    return path if path.suffix.lower() in IMAGE_SUFFIXES else path.parent / f"{path.name}.png"

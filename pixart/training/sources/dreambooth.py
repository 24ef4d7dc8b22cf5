"""A few pictures of one subject, and pictures of its class, so that the class is not forgotten.

"DreamBooth" (Ruiz and others, 2022): instance pictures are called by a prompt with a rare word ("a photo of sks dog"), and
what the model itself draws of the class ("a photo of a dog") is trained beside them: prior preservation, section 3.2. Any
method takes it: `full` as in the paper, `lora` at a fraction of the memory.
"""
from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ...checkpoints import inspect_file
from ...errors import ConfigError, DataError
from ..bases import DTYPES
from ..data.album import release
from ..data.folder import read_folder
from ..data.item import Caption, Item, Listing
from ..data.marks import mark_of, model_mark
from ..data.settings import Settings as PictureSettings
from ..data.spread import spread
from ..recipe import Recipe
from ..write import replace_file, write_weights
from . import pictures

if TYPE_CHECKING:
    from accelerate import Accelerator

DRAWN, UNFINISHED = "drawn-{:05}.png", ".latents"  # the second a folder of what is drawn and not yet decoded
NEEDS = ("text_encoder", "vae")


@dataclass(frozen=True)
class Settings(PictureSettings):
    """Beside those of `pictures`, whose `data` are the instance pictures."""

    instance_prompt: str | None = None  # of every instance picture, such as "a photo of sks dog"
    instance_captions: bool = False  # the captions of files instead, where there are any; they name the subject too
    class_prompt: str | tuple[str, ...] | None = None  # such as "a photo of a dog", or several; null trains without prior preservation
    class_data: str | None = None  # folder of class pictures, to which missing ones are added; null lies beside the run's folder.
    # With one class_prompt it is the caption of all; with several each picture's own caption counts, which drawn ones have in a .txt
    class_pictures: int = 100  # as many are drawn by the first weights themselves, unless they are there
    class_steps: int = 20
    class_guidance: float = 4.5


WHOLE_RUN = tuple(each.name for each in fields(Settings) if each.name not in pictures.PER_STAGE)


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    pictures.check(settings)
    prompt = _plain(settings.instance_prompt or "")
    if not prompt:
        raise ConfigError('instance_prompt is empty; expected one that names the subject by a rare word, like "a photo of sks dog".')
    others = [_plain(text) for text in class_prompts(settings)]
    if prompt in others:
        raise ConfigError(f"instance_prompt and class_prompt are both {prompt!r}; expected the class without the subject's word.")
    if settings.class_prompt is not None and not all(others or [""]):
        raise ConfigError("class_prompt is empty, or one of its texts is; expected texts, or null to train without prior preservation.")
    if settings.class_pictures < 1 or settings.class_steps < 1:
        raise ConfigError(
            f"class_pictures is {settings.class_pictures} and class_steps {settings.class_steps}; expected 1 or more of each."
        )
    if settings.class_pictures < len(others):
        raise ConfigError(
            f"class_pictures is {settings.class_pictures} and class_prompt has {len(others)} texts; expected a picture of each, at least."
        )


def class_prompts(settings: Settings) -> tuple[str, ...]:
    """All of them, each once and on one line, as files of captions have them; none without prior preservation."""
    found = settings.class_prompt
    if isinstance(found, tuple):
        return tuple({_plain(text): " ".join(text.split()) for text in reversed(found)}.values())[::-1]
    return () if found is None else (found,)


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()


class Part(pictures.Part):
    """See `batch.Source`. Of the rows about half are of the class; each picture of the instance comes again as often as that takes."""

    def __init__(self, settings: Settings, recipe: Recipe) -> None:
        self.recipe, self.place = recipe, _place_of(settings, recipe)
        super().__init__(settings, recipe)

    @property
    def expects_prior(self) -> bool:
        """Also where the pictures of the class are still to be drawn."""
        return self.has_prior or bool(self.missing())

    def listing(self) -> Listing:
        """Instance pictures, and those of the class that are there."""
        if self.place is not None and self.place.exists() and not self.place.is_dir():
            raise ConfigError(f"source.class_data is {self.place}, which is a file; expected a folder of class pictures.")
        if self.place is not None and self.settings.data:
            pictures.check_apart(self.settings.data, self.place, "the folder of class pictures (source.class_data)")
            pictures.check_outside(str(self.place), self.run_dir)
        instance, found = super().listing(), self._class_listing()
        classes = found.items
        count = sum(not item.prior for item in instance.items)
        repeats = max(1, round(self._wanted() / max(1, count)))
        items = [item if item.prior else replace(item, captions=self._captions(item), repeats=repeats) for item in instance.items]
        layout = f"{instance.layout}, {count} of the instance" + (f" and {len(classes)} of the class" if self.place else "")
        return Listing(layout, [*items, *classes], instance.broken | found.broken, {**instance.left_out, **found.left_out})

    def _captions(self, item: Item) -> tuple[Caption, ...]:
        own = item.captions if self.settings.instance_captions else ()
        for text in {_plain(caption.text) for caption in own} & {_plain(prompt) for prompt in class_prompts(self.settings)}:
            raise DataError(f"{item.name} has the caption {text!r}, which is a class_prompt too; expected one that names the subject.")
        return own or (Caption(self.settings.instance_prompt),)

    def _class_items(self) -> list[Item]:
        return self._class_listing().items

    def _class_listing(self) -> Listing:
        if self.place is None or not self.place.is_dir():
            return Listing("no pictures of the class")
        found, place = read_folder(self.place), self.place.name
        kept = found.items if self.settings.class_data else found.items[: self.settings.class_pictures]  # another run may have drawn more
        texts = map(self._class_captions, kept)
        items = [replace(item, name=f"{place}/{item.name}", captions=own, repeats=1, prior=True) for item, own in zip(kept, texts)]
        broken = {f"{place}/{name}": why for name, why in found.broken.items()}
        return Listing(found.layout, items, broken, {f"{why} (class pictures)": count for why, count in found.left_out.items()})

    def _class_captions(self, item: Item) -> tuple[Caption, ...]:
        """Raises DataError where no caption says which of several prompts a picture shows, or where it is the subject's."""
        prompts = class_prompts(self.settings)
        if len(prompts) == 1:
            return (Caption(prompts[0]),)
        if not item.captions:
            raise DataError(
                f"{item.name} in {self.place} has no caption, and class_prompt has {len(prompts)} texts, so which one it shows is not "
                "known. Write the text into a .txt file of the same name."
            )
        if _plain(self.settings.instance_prompt) in [_plain(caption.text) for caption in item.captions]:
            raise DataError(f"{item.name} in {self.place} has the caption {self.settings.instance_prompt!r}, which is the instance_prompt.")
        return item.captions

    def _wanted(self) -> int:
        """Class pictures of the run, whether they are there or not."""
        return 0 if self.place is None else max(self.settings.class_pictures, len(self._class_items()))

    def missing(self) -> list[int]:
        """Numbers of the class pictures that are still to be drawn."""
        lacking = self._wanted() - len(self._class_items())
        taken = {path.stem for path in self.place.iterdir()} if lacking > 0 and self.place.is_dir() else ()  # by somebody's own files too
        free = (number for number in itertools.count() if Path(DRAWN.format(number)).stem not in taken)
        return [next(free) for _ in range(lacking)]

    @property
    def settled(self) -> bool:
        """Not while class pictures are missing."""
        return not self.missing()

    # -- before training -------------------------------------------------------------------------

    def check(self) -> None:
        """Also whether the missing class pictures can be drawn; weights that aren't there are a dry run's own business."""
        super().check()
        if self.missing():
            self._check_drawing(len(self.missing()))

    def report(self) -> list[str]:
        """As `pictures`, and what there is to draw."""
        lines, lacking = super().report(), len(self.missing())
        return [*lines, f"class pictures to draw: {lacking}, into {self.place}"] if lacking else lines

    def prepare(self, prompts: Sequence[str], accelerator: Accelerator, over: Callable[..., list[Any]] = spread) -> None:
        """Draws the class pictures that are missing, then fills the cache; the models are in memory one after the other."""
        missing = self.missing()
        accelerator.wait_for_everyone()  # all have counted before the first is drawn
        if missing:
            self._check_drawing(len(missing))
            super().prepare(class_prompts(self.settings), accelerator, over)  # states first: T5 leaves before the transformer comes
            self._draw(missing[accelerator.process_index :: accelerator.num_processes], accelerator.device)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                shutil.rmtree(self.place / UNFINISHED, ignore_errors=True)
            Part.__init__(self, self.settings, self.recipe)  # with what is there now
        super().prepare(prompts, accelerator, over)

    def _check_drawing(self, missing: int) -> None:
        lacking = [f"source.{name}" for name in NEEDS if not getattr(self.settings, name)] + ["initialize"] * (not self.recipe.initialize)
        if lacking:
            raise ConfigError(
                f"{missing} class pictures are missing in {self.place}, and can't be drawn without {', '.join(lacking)}. Give them, or put "
                f"{self.settings.class_pictures} pictures there, or set class_prompt to null."
            )
        if Path(self.recipe.initialize).exists():  # an alpha may begin a Sigma, but draws in another VAE's latents
            inspect_file(self.recipe.initialize, self.recipe.variant)

    def _draw(self, numbers: Sequence[int], device: torch.device) -> None:
        """The first weights' own pictures of the class prompts in turn, in the bins of the instance pictures, with their captions."""
        shape = self.album.shapes[-1]
        sizes = [size for entry, size in zip(self.album.entries, self.album.bins[shape]) if not entry.item.prior]
        latents = dict(tqdm(self._latents(numbers, sizes, device), desc="class pictures", total=len(numbers), mininterval=2))
        release(device)
        self.place.mkdir(parents=True, exist_ok=True)
        prompts = class_prompts(self.settings)
        for number, latent in latents.items():
            picture, path = self.decode(latent.to(device))[0], self.place / DRAWN.format(number)
            if len(prompts) > 1:  # its caption first: no picture is without
                text = prompts[number % len(prompts)] + "\n"
                replace_file(path.with_suffix(".txt"), lambda partial, text=text: partial.write_text(text, encoding="utf-8"))
            replace_file(path, lambda partial, picture=picture: picture.save(partial, "PNG"))
        release(device)

    def _latents(self, numbers: Sequence[int], sizes: Sequence[tuple[int, int]], device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Each is kept as soon as it is drawn, so that a run that is stopped here goes on after it."""
        settings, recipe, prompts = self.settings, self.recipe, class_prompts(self.settings)
        pipe, start = None, model_mark(recipe.initialize)
        for number in numbers:
            turn, chosen = divmod(number, len(prompts))
            height, width = sizes[(turn + chosen) % len(sizes)]  # other sizes in each turn, if there are as many as prompts
            asked = {"steps": settings.class_steps, "guidance": settings.class_guidance, "height": height, "width": width}
            asked["seed"] = recipe.seed + number
            kept = self.place / UNFINISHED / f"{mark_of(start, prompts[chosen], sorted(asked.items()))}.safetensors"
            if not kept.is_file():
                pipe = pipe or self._pipeline(device)
                states, mask = self.encode([prompts[chosen], ""])
                latent = pipe(
                    prompt_embeds=states[:1], prompt_attention_mask=mask[:1], negative_prompt_embeds=states[1:],
                    negative_prompt_attention_mask=mask[1:], use_bins=False, output="latent", progress=False, **asked,
                )  # fmt: skip
                write_weights({"latent": latent.float()}, kept, {}, dtype=None)
            yield number, load_file(kept)["latent"]

    def _pipeline(self, device: torch.device) -> Any:
        """The transformer alone; T5 and the VAE have their turns before and after."""
        from ...pipeline import Pipeline  # which imports diffusers

        dtype = None if device.type == "cpu" else DTYPES[self.recipe.precision]
        return Pipeline.from_files(self.recipe.initialize, variant=self.recipe.variant, dtype=dtype, device=device)


def _place_of(settings: Settings, recipe: Recipe) -> Path | None:
    """The folder of class pictures; those of other prompts, weights and ways to draw have others."""
    if settings.class_prompt is None:
        return None
    if settings.class_data:
        return Path(settings.class_data)
    start = model_mark(recipe.initialize) if recipe.initialize and Path(recipe.initialize).exists() else None
    sizes = [stage.base_size for stage in recipe.stages]
    mark = mark_of(settings.class_prompt, start, settings.class_steps, settings.class_guidance, sizes, recipe.seed)
    return Path(recipe.run_dir).parent / "class-pictures" / mark

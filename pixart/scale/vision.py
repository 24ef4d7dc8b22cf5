"""Vision-language models of transformers: pictures and a question in, texts out."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from .drive import one_line

if TYPE_CHECKING:
    from PIL.Image import Image


class VisionModel:
    """Any model of transformers' image-text-to-text task, on one device."""

    def __init__(self, place: str, device: str, dtype: str | None = None) -> None:
        """place: a folder, or a name on the Hugging Face Hub. Raises UnsupportedError."""
        import transformers

        precision = getattr(torch, dtype) if dtype else "auto"
        newer = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)  # which renamed the argument
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(place)
            model = transformers.AutoModelForImageTextToText.from_pretrained(place, **{"dtype" if newer else "torch_dtype": precision})
            self.model = model.to(device).eval()
        except Exception as error:  # of models that users choose, whose code raises anything
            raise UnsupportedError(
                f"The model {place} can't be loaded ({one_line(error)[:300]}). Expected a folder, or a name on the Hugging "
                "Face Hub, of a model for image-text-to-text that this transformers knows."
            ) from None
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        tokenizer.padding_side = "left"  # answers go on where prompts end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @torch.no_grad()
    def answer(self, pictures: Sequence[Image], questions: Sequence[str], max_tokens: int, temperature: float, seed: str) -> list[str]:
        """One text a picture, in a line. temperature 0 takes the likeliest word each time; seed: any text, decides the chances."""
        inputs = self._inputs(pictures, questions).to(self.model.device)
        inputs = {name: _in_dtype(value, self.model.dtype) for name, value in inputs.items()}
        chance = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
            found = self.model.generate(**inputs, max_new_tokens=max_tokens, **chance)
        asked = inputs.get("input_ids", inputs.get("decoder_input_ids"))  # the latter of Pix2Struct, whose answer begins with the question
        if asked is None:  # it was drawn onto the picture
            return self._texts(found)
        if torch.equal(found[:, : asked.shape[1]], asked):
            return self._texts(found[:, asked.shape[1] :])
        # Encoder-decoders give the answer alone; BLIP also the question, in other ids than it was given
        return [text.removeprefix(question).strip() for text, question in zip(self._texts(found), self._texts(asked), strict=True)]

    def _texts(self, ids: torch.Tensor) -> list[str]:
        return [" ".join(text.split()) for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def _inputs(self, pictures: Sequence[Image], questions: Sequence[str]) -> Any:
        if not getattr(self.processor, "chat_template", None):  # captioners without dialogue, such as BLIP
            return self.processor(images=list(pictures), text=list(questions), return_tensors="pt", padding=True)
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}], add_generation_prompt=True
            )
            for question in questions
        ]
        return self.processor(images=[[picture] for picture in pictures], text=prompts, return_tensors="pt", padding=True)


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Pixels as the model computes; ids and whatever else there is stay."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

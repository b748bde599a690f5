"""What the unedited model answers: made once, however many edits are measured against it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageOps
from PIL.Image import Image

from mmray.data.images import decode_image
from mmray.data.samples import Sample
from mmray.detector.joint import ImageDetector, load_detector
from mmray.features.evaluation.draft_verifier import DraftVerifier
from mmray.features.evaluation.queries import Query, Reply
from mmray.models.encoder import Encoder
from mmray.models.loading import LoadedModel
from mmray.models.options import LONGEST
from mmray.models.prompting import prompt_text, tokenize_caption

FLIP = "flip"
CROPS = {"crop centre": (0.1, 0.1, 0.9, 0.9), "crop corner": (0.0, 0.0, 0.85, 0.85)}
"""Parts of the image that are kept: left, top, right and bottom, in 0..1."""


class BaselineReplies:
    """Replies of one model, each made when it is first asked for.

    Samples are known by their `sample_id`: those of one such object must have identifiers of their own. An edit must
    not be applied while it is asked.
    """

    def __init__(
        self, model: LoadedModel, batch_size: int = 32, prompt: str | None = None, longest: int = LONGEST
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.questioner = DraftVerifier(model, batch_size, longest)
        self._replies: dict[tuple[str, str, str], Reply] = {}
        self._images: dict[tuple[str, str], Image | None] = {}
        self._opinions: dict[str, ImageDetector] = {}
        self._encoders: dict[str, Encoder] = {}

    def image(self, sample: Sample, variant: str = "") -> Image | None:
        """Return the sample's image, as it is or changed; the same object each time. ValueError if it can't be read."""
        key = sample.sample_id, variant
        if key not in self._images:
            if variant == "":
                self._images[key] = decode_image(sample.image, sample.background) if sample.image is not None else None
            else:
                plain = self.image(sample)
                self._images[key] = plain and _varied(plain, variant)
        return self._images[key]

    def ask(self, sample: Sample, question: str | None = None, variant: str = "", *, whole: bool = False) -> Query:
        """Return the ask of a question about a sample's image; of its caption where no question is given."""
        image = self.image(sample, variant)
        asked = self.prompt if question is None else question
        prompt = prompt_text(self.model, asked, sample.language, image=image is not None)
        return Query(sample.sample_id, prompt, image, variant, whole)

    def tokens(self, ask: Query, text: str) -> list[int]:
        """Return the tokens of a text as they follow the prompt."""
        return tokenize_caption(self.model, ask.prompt, text)[0]

    def cut(self, ask: Query) -> bool:
        """Return whether the model's answer, which is known, was cut off for its length: it has no end token."""
        return len(self._replies[ask.key].tokens) >= self.questioner.longest

    def replies(self, asks: Sequence[Query], drafts: Sequence[Sequence[str]]) -> list[Reply]:
        """Return what the model answers; guesses of the answers save time."""
        missing = {ask.key: number for number, ask in enumerate(asks) if ask.key not in self._replies}
        new = [asks[number] for number in missing.values()]
        guesses = [[self.tokens(asks[n], draft) for draft in drafts[n] if draft] for n in missing.values()]
        self._replies |= zip(missing, self.questioner.replies(new, guesses), strict=True)
        return [self._replies[ask.key] for ask in asks]

    def opinion(self, detector: str) -> ImageDetector:
        """Return a detector's opinion next to the model's, the same object each time; raises InputError as it does."""
        if detector not in self._opinions:
            self._opinions[detector] = load_detector(self.model, detector)
        return self._opinions[detector]

    def encoder(self, name: str) -> Encoder:
        """Return a sentence encoder, the same object each time; raises InputError where it can't be loaded."""
        if name not in self._encoders:
            self._encoders[name] = Encoder(name, self.model.device)
        return self._encoders[name]

    def forget(self) -> None:
        """Drop what is kept of samples."""
        self._replies.clear()
        self.forget_images()

    def forget_images(self) -> None:
        """Drop the decoded images; the replies stay."""
        self._images.clear()


def _varied(image: Image, variant: str) -> Image:
    if variant == FLIP:
        return ImageOps.mirror(image)
    left, top, right, bottom = CROPS[variant]
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))

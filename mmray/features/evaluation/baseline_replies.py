"""The unedited model's replies, made once however many edits are measured against them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageOps
from PIL.Image import Image

from mmray.data.images import decode_image
from mmray.data.samples import Sample
from mmray.detector.joint import ImageDetector, load_detector
from mmray.features.evaluation.draft_verifier import DraftVerifier
from mmray.features.evaluation.measures import REPLY_LENGTHS
from mmray.features.evaluation.queries import Query, Reply
from mmray.models.encoder import Encoder
from mmray.models.loading import LoadedModel
from mmray.models.options import LONGEST
from mmray.models.prompting import prompt_text, tokenize_caption

FLIP = "flip"
# Mild, because a crop that cuts the object off would rightly change the caption.
CROPS = {"crop centre": (0.1, 0.1, 0.9, 0.9), "crop corner": (0.0, 0.0, 0.85, 0.85)}
"""The part of the image that is kept: left, top, right and bottom, from 0 to 1."""


class BaselineReplies:
    """One model's replies, each made when it is first needed.

    Samples are identified by their `sample_id`, so those given to one such object need different ones. An edit must not
    be applied while replies are made.
    """

    def __init__(
        self, model: LoadedModel, batch_size: int = 32, prompt: str | None = None, longest: int = LONGEST
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.verifier = DraftVerifier(model, batch_size, longest)
        # Its length is no setting, because measures of text-only replies name it.
        self.text_verifier = DraftVerifier(model, batch_size, REPLY_LENGTHS[-1])
        self._replies: dict[tuple[str, str, str], Reply] = {}
        self._images: dict[tuple[str, str], Image | None] = {}
        self._detectors: dict[str, ImageDetector] = {}
        self._encoders: dict[str, Encoder] = {}

    def image(self, sample: Sample, variant: str = "") -> Image | None:
        """Return the sample's image, as it is or changed; raises ValueError if it can't be read.

        It is the same object each time: queries about one image share a row by its identity.
        """
        key = sample.sample_id, variant
        if key not in self._images:
            if variant == "":
                self._images[key] = decode_image(sample.image, sample.background) if sample.image is not None else None
            else:
                plain = self.image(sample)
                self._images[key] = plain and _changed(plain, variant)
        return self._images[key]

    def query(
        self, sample: Sample, question: str | None = None, variant: str = "", *, all_positions: bool = False
    ) -> Query:
        """Return the query of a question about a sample's image, or for its caption without a question.

        A text-only model continues the sample's cue.
        """
        image = self.image(sample, variant)
        asked = sample.asked(self.prompt) if question is None else question
        cue = sample.cue if question is None else None
        # A question is asked as it is; only captions continue a cue.
        prompt = prompt_text(self.model, asked, sample.language, image=image is not None, prefix=cue)
        return Query(sample.sample_id, prompt, image, variant, all_positions)

    def tokens(self, query: Query, text: str) -> list[int]:
        """Return the tokens of a text as the continuation of the prompt."""
        return tokenize_caption(self.model, query.prompt, text)[0]

    def cut_off(self, query: Query) -> bool:
        """Return whether the model's reply, which is known, was cut off at `longest`: then it has no end token."""
        return len(self._replies[query.key].tokens) >= self.verifier.longest

    def replies(
        self, queries: Sequence[Query], drafts: Sequence[Sequence[str]], verifier: DraftVerifier | None = None
    ) -> list[Reply]:
        """Return the model's replies; drafts, guesses of each reply, save time.

        `verifier` asks for them; default: the one for captions and answers.
        """
        # By key: the same query may occur several times.
        missing = {query.key: number for number, query in enumerate(queries) if query.key not in self._replies}
        new = [queries[number] for number in missing.values()]
        tokens = [[self.tokens(queries[n], draft) for draft in drafts[n] if draft] for n in missing.values()]
        self._replies |= zip(missing, (verifier or self.verifier).replies(new, tokens), strict=True)
        return [self._replies[query.key] for query in queries]

    def forced(self, queries: Sequence[Query], texts: Sequence[str]) -> list[Reply]:
        """Return given texts in place of replies, with the model's states along them."""
        missing = {query.key: number for number, query in enumerate(queries) if query.key not in self._replies}
        new = [queries[number] for number in missing.values()]
        tokens = [self.tokens(query, texts[number]) for query, number in zip(new, missing.values(), strict=True)]
        states = self.text_verifier.states_along(new, tokens)
        for number, some, state in zip(missing.values(), tokens, states, strict=True):
            self._replies[queries[number].key] = Reply(some, texts[number], state, verified=False)
        return [self._replies[query.key] for query in queries]

    def detector(self, name: str) -> ImageDetector:
        """Return a detector, loaded once; raises InputError if it can't be loaded."""
        if name not in self._detectors:
            self._detectors[name] = load_detector(self.model, name)
        return self._detectors[name]

    def encoder(self, name: str) -> Encoder:
        """Return a sentence encoder, loaded once; raises InputError if it can't be loaded."""
        if name not in self._encoders:
            self._encoders[name] = Encoder(name, self.model.device)
        return self._encoders[name]

    def clear(self) -> None:
        """Drop what is kept of samples."""
        self._replies.clear()
        self.clear_images()

    def clear_images(self) -> None:
        """Drop the decoded images; the replies stay."""
        self._images.clear()


def _changed(image: Image, variant: str) -> Image:
    if variant == FLIP:
        return ImageOps.mirror(image)
    left, top, right, bottom = CROPS[variant]
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))

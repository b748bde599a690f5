"""What is known about one loaded model: the values that name its MLP projections, final norm and unembedding."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """One MLP output projection: its inputs are neurons, the rows of W_out are what they write."""

    module: str
    """`language`, `vision` or `projector`."""
    layer: int
    """Counted from 0 within the module."""
    path: str
    """Module path from the top of the model: a Linear, or a module of fused experts when `experts` is not 0."""
    gate: str | None
    """Path of the Linear whose output, before the non-linearity, opens the neuron; None: plain MLP or experts."""
    width: int
    """Neurons; of fused experts, all the units of all of them."""
    experts: int = 0
    """Experts fused in the module, 0 for an ordinary MLP; neuron = expert * (width / experts) + unit."""
    gate_fused: bool = False
    """The gate's Linear has two outputs a neuron: the first `width` are the gate, the others the factor."""
    post_norm: str | None = None
    """Path of a norm between the projection's output and the residual stream (Gemma 2 and 3)."""
    reads_text: bool = False
    """A branch of the projector that the question goes through, not the image (InstructBLIP's Q-Former)."""
    scale: float = 1.0
    """What the block multiplies the output by before it is added to the residual stream (Mllama's cross-attention)."""


@dataclass(frozen=True)
class ModelParts:
    """The parts of one model that neurons are found, scored and edited in."""

    family: str
    """The row of `FAMILIES` used, or `probed`."""
    projections: tuple[Projection, ...]
    """In order: language, vision, projector; by layer within each."""
    final_norm: str
    """Path of the norm between the last decoder block and the unembedding."""
    unembedding: str
    """Path of the Linear that makes logits."""
    image: str
    """`tokens`: the image takes places in the sequence; `cross-attention`: some decoder blocks look at it."""
    image_token_id: int | None
    """The placeholder's id in `input_ids`."""
    encoder_decoder: bool = False
    """The prompt and the image go to an encoder, and the caption alone is the decoder's sequence (T5)."""
    logit_scale: float = 1.0
    """What the normed hidden state is multiplied by before the unembedding (the first T5: width ** -0.5)."""
    logit_cap: float | None = None
    """Logits x leave the model as cap * tanh(x / cap) (Gemma 2)."""

    @property
    def image_in_sequence(self) -> bool:
        """Return whether the image takes places in the decoder's own sequence, next to the caption."""
        return self.image == "tokens" and not self.encoder_decoder

    def of(self, module: str) -> tuple[Projection, ...]:
        """Return the projections of `language`, `vision` or `projector`, by layer."""
        return tuple(projection for projection in self.projections if projection.module == module)

    def image_path(self, module: str) -> tuple[Projection, ...]:
        """Return those of a module that the image goes through; of the language decoder all.

        A Q-Former's other branch reads the question: its rows are no places of the image.
        """
        return tuple(projection for projection in self.of(module) if not projection.reads_text)

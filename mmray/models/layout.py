"""The layout found in one model: its MLP projections, final norm and unembedding."""

from dataclasses import dataclass

from mmray.models.options import TEXT_BRANCH

PROBED = "probed"
"""The family of models that the table does not know."""


@dataclass(frozen=True)
class Projection:
    """One MLP output projection: its inputs are the neurons, and a neuron writes its row of W_out."""

    module: str
    """`language`, `vision` or `projector`."""
    layer: int
    """Counted from 0 within the module."""
    path: str
    """Module path from the top of the model: a Linear, or the module whose output all experts write together."""
    gate: str | None
    """Path of the Linear whose output, before the non-linearity, is the gate; None for a plain MLP or fused experts.
    Of the shared expert, if there is one."""
    width: int
    """Neurons, those of all fused experts together."""
    experts: int = 0
    """Routed experts, 0 for an ordinary MLP; neuron = expert * units + unit, and those of the shared one come last."""
    routed_scale: float = 1.0
    """Factor on what the routed experts write, next to a shared one."""
    shared: str | None = None
    """Path of the output projection of an expert that every token goes through, next to the routed ones."""
    shared_weight: str | None = None
    """Path of a Linear with one output, whose sigmoid is a factor on what the shared expert writes."""
    gate_fused: bool = False
    """The gate's Linear has two outputs per neuron: the first `width` are the gates, the others the factors."""
    post_norm: str | None = None
    """Path of a norm between the projection's output and the residual stream (Gemma 2 and 3)."""
    reads_text: bool = False
    """The question goes through this branch of the projector, not the image (InstructBLIP's Q-Former)."""
    scale: float = 1.0
    """Factor on the output before it is added to the residual stream (Mllama's cross-attention)."""
    ends_block: bool = True
    """False if the block goes on with the sum: a norm (BERT, BART), or a part that reads it (Gemma 4)."""


@dataclass(frozen=True)
class ModelParts:
    """The parts of one model that neurons are found, scored and edited in."""

    family: str
    """The key in `FAMILIES`, or PROBED."""
    projections: tuple[Projection, ...]
    """In order: language, vision, projector; by layer within each."""
    final_norm: str
    """Path of the norm between the last decoder block and the unembedding."""
    unembedding: str
    """Path of the Linear that makes logits."""
    image: str
    """`tokens`: the image has positions in the sequence; `cross-attention`: some decoder blocks attend to it; `none`:
    the model reads text only."""
    image_token_id: int | None
    """The placeholder's id in `input_ids`."""
    image_before: int = 0
    """Positions of the image before those of the text, for which `input_ids` has no tokens (GIT)."""
    streams: str | None = None
    """Path of the decoder whose blocks pass on several streams (Gemma 3n)."""
    transform: str | None = None
    """Path of a module between these two: a Linear, an activation function and another norm (BERT's head)."""
    encoder_decoder: bool = False
    """Prompt and image go to an encoder; the decoder's sequence is only the caption (T5)."""
    logit_scale: float = 1.0
    """Factor on the normed hidden state before the unembedding (the first T5: width ** -0.5)."""
    logit_cap: float | None = None
    """The model returns cap * tanh(x / cap) for logits x (Gemma 2)."""

    @property
    def reads_images(self) -> bool:
        """Return whether the model takes images at all."""
        return self.image != "none"

    @property
    def image_in_sequence(self) -> bool:
        """Return whether the image has positions in the decoder's own sequence, next to the caption."""
        return self.image == "tokens" and not self.encoder_decoder

    def of(self, module: str) -> tuple[Projection, ...]:
        """Return the projections of `language`, `vision` or `projector`, by layer."""
        return tuple(projection for projection in self.projections if projection.module == module)

    def mlps(self, module: str) -> tuple[Projection, ...]:
        """Return the projections of a module's neurons, by layer; `projector` is without its TEXT_BRANCH."""
        branch = module == TEXT_BRANCH
        return tuple(found for found in self.of("projector" if branch else module) if found.reads_text == branch)

"""What stands on the page, and in which words? The questions in their order, each with its figure.

``report`` renders it; the template has the layout, ``drawing`` the colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fd_scale.diagnose import figures_attention, figures_tokens, figures_weights
from fd_scale.diagnose.drawing import Drawing
from fd_scale.diagnose.results import Results


@dataclass(frozen=True)
class Question:
    """One section of the page."""

    title: str
    draw: Callable[[Results], Drawing | None]
    reading: str
    """How to read the figure: one plain sentence."""
    definition: str
    """What exactly was measured."""


@dataclass(frozen=True)
class Chapter:
    """Questions that belong together."""

    title: str
    questions: Sequence[Question]


@dataclass(frozen=True, eq=False)
class Section:
    """A question that could be answered."""

    question: Question
    drawing: Drawing


CHAPTERS: Sequence[Chapter] = (
    Chapter(
        "Attention",
        (
            Question(
                "How far do the heads look?",
                figures_attention.distance_figure,
                "Each dot is one head: where the dots of a layer lie apart, its heads divide the work "
                "between near and far; where they fall together, they do the same.",
                "Mean distance in pixels of the input from a patch to the patches that it attends to, "
                "over all patches and images. The class token and the patch itself are left out and the "
                "rest is weighed anew to a sum of 1. The CSV also has the raw distance: class token left "
                "out, nothing weighed anew. The spread is the standard deviation over the heads of a "
                "layer.",
            ),
            Question(
                "Do the heads differ from each other?",
                figures_attention.head_similarity_figure,
                "Lower is more diverse: at 1 all heads of the layer attend to the same tokens, at 0 to "
                "disjoint ones.",
                "Mean cosine of the attention of two heads of a layer, over pairs, images and patches. By"
                " key: how much each query attends to one token, the definition that the paper cites. By "
                "query: what one token attends to. Whole maps: all of it as one vector. Patches only.",
            ),
            Question(
                "What do the attention maps look like on average?",
                figures_attention.average_map_figure,
                "Lines along the diagonal mean that patches look at their neighbours; vertical stripes "
                "mean that all patches look at the same places.",
                "Mean over heads and images of the attention from patch (downwards) to patch (across), "
                "row by row of the grid from its top left. Each map has its own brightness. Below are its"
                " two scores.",
            ),
            Question(
                "Does attention follow position, or fixed places?",
                figures_attention.pattern_figure,
                "A high diagonality says that attention depends on where the other patch lies relative to"
                " this one; a high column dominance, that it goes to the same patches whoever looks.",
                "The share of the variance of the average map that is explained by the offset from query "
                "to key (diagonality) and by the key alone (column dominance); the two overlap. Right: "
                "the share of a patch's attention that goes to class token and registers.",
            ),
        ),
    ),
    Chapter(
        "Loss landscape",
        (
            Question(
                "How flat is the surrounding of the weights, as they are?",
                partial(figures_weights.landscape_figure, stage="raw"),
                "The wider and flatter the valley around 0, the less the network minds if its weights are"
                " moved; thin lines are single random directions, the thick line is their mean.",
                "Loss at weights + alpha x direction, on fixed images without augmentation. Directions "
                "are Gaussian and filter-normalised: each filter of noise has the length of the network's"
                " own, so that alpha 1 moves every filter by its own length. Biases, norms and scales "
                "stay. Shift of its own map: smooth L1 between the whitened maps of the moved and of the "
                "unmoved network. Raw stage: the papers plot fine-tuned networks, so these curves are not"
                " the papers'.",
            ),
            Question(
                "And under a linear head?",
                partial(figures_weights.landscape_figure, stage="linear head"),
                "Left, how fast the loss of a classifier rises, right, how fast its accuracy falls as the"
                " weights below it are moved.",
                "A linear classifier of the mean patch was fitted on other images with the network "
                "frozen; only the network's weights are moved. This is no fine-tuned network, and is not "
                "to be compared with one.",
            ),
            Question(
                "How flat are the fine-tuned networks?",
                partial(figures_weights.landscape_figure, stage="fine-tuned"),
                "Left, how fast the loss of the fine-tuned network rises, right, how fast its accuracy falls "
                "as its weights are moved.",
                "Cross entropy and top-1 accuracy of the networks with the classifiers that they were "
                "fine-tuned with; all filters are moved, the classifier's too. This is the stage that the "
                "papers plot.",
            ),
            Question(
                "What does the valley look like from above?",
                figures_weights.surface_figure,
                "Wide, round rings are a flat valley; dense or ragged ones a steep one.",
                "The loss over the plane of the first two random directions, filter-normalised as above.",
            ),
        ),
    ),
    Chapter(
        "Features",
        (
            Question(
                "Which layers say the same?",
                figures_tokens.cka_figure,
                "A bright cell means that the two layers tell the images apart in the same way; a bright "
                "diagonal, that the networks go the same way from layer to layer.",
                "Linear CKA, unbiased estimate, of the mean patch token per image.",
            ),
            Question(
                "Do the patches of an image stay different?",
                figures_tokens.token_similarity_figure,
                "Near 1 the patches of an image have become alike, and little is left for dense tasks.",
                "Mean cosine between pairs of patch tokens of an image, as they are, over images.",
            ),
            Question(
                "How many directions do the features use?",
                figures_tokens.spectrum_figure,
                "A higher effective rank, or a curve that climbs later, means that variance is spread "
                "over more directions.",
                "Effective rank: the exponential of the entropy of the covariance's eigenvalue shares, "
                "over the patch tokens of all images.",
            ),
            Question(
                "Are there outsized tokens?",
                figures_tokens.norm_figure,
                "A share above zero on the right means that some patches serve as registers: they carry "
                "outsized tokens without content of their own place.",
                "L2 norms of patch tokens after each block. An outlier is above 3 times the median of its"
                " layer. Norms are read from a histogram with bins of 0.56 %.",
            ),
            Question(
                "What do the networks see in single images?",
                figures_tokens.picture_figure,
                "Equal colours within a column are similar tokens (colours of different columns are not "
                "comparable); bright places are where the class token looked, or where tokens are long.",
                "Features: final patch tokens by their first three principal components over these "
                "images. Rollout: heads' mean, half identity, multiplied through the layers. Token norm: "
                "after the last block, relative to the median.",
            ),
        ),
    ),
    Chapter(
        "The run",
        (
            Question(
                "How did the student get there?",
                figures_weights.drift_figure,
                "Curves that have settled before the last checkpoint say that more training would have "
                "changed little.",
                "Checkpoints that the run kept, and its random beginning, set against the diagnosed one: "
                "length of the difference of the backbone's weights; unbiased CKA of mean patches; the "
                "run's loss on the first images, centre view.",
            ),
            Question(
                "How did the run go?",
                figures_weights.training_figure,
                "A loss that still falls at the end asks for a longer schedule.",
                "As logged by the run in metrics.jsonl.",
            ),
        ),
    ),
)


def sections(results: Results) -> list[tuple[str, list[Section]]]:
    """The chapters with what could be answered; a chapter without an answer is left out."""
    chapters = []
    for chapter in CHAPTERS:
        drawn = [(question, question.draw(results)) for question in chapter.questions]
        found = [Section(question, drawing) for question, drawing in drawn if drawing is not None]
        if found:
            chapters.append((chapter.title, found))
    return chapters

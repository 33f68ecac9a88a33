"""Joins the nodes of a graph into calls of the compiled ops. Nodes become

affine       the affine map of each channel that a group normalisation is; options: groups, eps, silu
norm         the same, applied; for what is no convolution
convolution  options: kernel, stride, padding, scale (2 where each pixel is read as 2 x 2), activation, factor
average      of squares of 2 x 2 pixels
squares      of side x side pixels, as pixels whose channels are theirs, pixel by pixel
linear_attention    of [N, heads, channels, positions]: q, k, v, and keys and values of a memory; scale
channel_norm a layer norm or RMS norm of each pixel's channels; options: eps, rms, silu, rows for [..., C]

whose inputs have the names of options["names"].
"""

from ...utils.modules import importing
from ..faults import without_faults
from ..graph import Graph
from .activations import fuse_activations
from .attention import fuse_attention
from .channel_norms import fuse_channel_norms
from .constants import fold_constants, share_equal
from .convolutions import fuse_convolutions
from .inputs import named
from .linear_attention import fuse_linear_attention
from .norms import fuse_norms
from .sequences import widen_sequences
from .shuffles import order_squares
from .siblings import join_siblings
from .simplify import simplify
from .views import shorten_views
from .wide import leave_wide

__all__ = ["fuse", "fuse_norms_alone", "named"]

__getattr__ = importing(__name__)


def fuse(graph: Graph) -> None:
    """Joins the nodes of the graph, in place."""
    fold_constants(graph)
    shorten_views(graph)
    simplify(graph)
    leave_wide(graph)
    share_equal(graph)
    fuse_attention(graph)
    fuse_linear_attention(graph)
    order_squares(graph)
    widen_sequences(graph)
    shorten_views(graph)
    fuse_norms(graph)
    fuse_activations(graph)
    fuse_convolutions(graph)
    fuse_channel_norms(graph)
    graph.drop_unused()
    join_siblings(graph)


def fuse_norms_alone(graph: Graph) -> None:
    """Joins group normalisations with their modulation and SiLU, and leaves the other nodes as they are."""
    without_faults(graph, lambda: _fuse_norms_alone(graph))


def _fuse_norms_alone(graph: Graph) -> None:
    share_equal(graph)
    widen_sequences(graph, ("group_norm",))
    fuse_norms(graph)
    graph.drop_unused()

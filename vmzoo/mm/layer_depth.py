"""How deep in a backbone a parameter lies, for layer-wise learning rates and for freezing."""

from timm.models._manipulate import group_with_matcher
from torch import nn


def layer_depths(model: nn.Module, coarse: bool = False) -> tuple[dict[str, int], int]:
    """Sorts the parameters of a timm model by its `group_matcher`.

    Args:
        model: A model with a `group_matcher`.
        coarse: Sort into stem and stages where the model has stages, instead of stem and blocks.

    Returns:
        Depth of every parameter: 0 for the stem, counting up to the last layer; and the number of layers, which is also
        the depth of what belongs to none (classifier, norms on the outputs).
    """
    names = [name for name, _ in model.named_parameters()]
    depths = group_with_matcher(
        ((name, name) for name in (*names, '')), model.group_matcher(coarse=coarse), reverse=True
    )
    num_layers = depths.pop('')  # no pattern matches it
    return depths, num_layers

"""Well-known architectures as ONNX graphs, with random weights that make their outputs mean something.

``build(name)`` gives the model and its weights by the names of torchvision's or transformers' module, so that a peer
can be given the same ones. Weights are drawn anew from a seed (none is zero, biases and scales are not trivial), and
the statistics of batch normalisation are those of real photos, so activations keep their size through the network.
"""

from benchmarks.models.catalog import ARCHITECTURES, Architecture, Built, build

__all__ = ["ARCHITECTURES", "Architecture", "Built", "build"]

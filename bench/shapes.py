"""Shapes of the parameters of two well-known networks, from their definitions."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """Return the 161 shapes (25.6M elements) of ResNet-50.

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2015, arXiv:1512.03385,
        table 1; each convolution is followed by a batch norm with a scale and a shift.
    """
    shapes: Shapes = []

    def convolution(n_in: int, n_out: int, size: int) -> None:
        shapes.extend([(n_out, n_in, size, size), (n_out,), (n_out,)])

    convolution(3, 64, 7)
    n_in = 64
    for width, n_blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        n_out = 4 * width
        for block in range(n_blocks):
            convolution(n_in, width, 1)
            convolution(width, width, 3)
            convolution(width, n_out, 1)
            if block == 0:  # the shortcut has to change the number of channels
                convolution(n_in, n_out, 1)
            n_in = n_out
    shapes.extend([(1000, n_in), (1000,)])
    return shapes


def gpt2_124m() -> Shapes:
    """Return the 148 shapes (124.4M elements) of the smallest GPT-2.

    The output layer shares the embedding's weight, so that it stands here once.

    Reference:
        Radford, Wu, Child, Luan, Amodei, Sutskever: Language Models are Unsupervised Multitask
        Learners, 2019, table 2: 12 layers of width 768, 50257 tokens, 1024 positions.
    """
    vocabulary, positions, layers, width = 50257, 1024, 12, 768

    def linear(n_in: int, n_out: int) -> Shapes:
        return [(n_in, n_out), (n_out,)]

    layer_norm: Shapes = [(width,), (width,)]
    attention = linear(width, 3 * width) + linear(width, width)
    mlp = linear(width, 4 * width) + linear(4 * width, width)
    layer = layer_norm + attention + layer_norm + mlp
    return [(vocabulary, width), (positions, width), *(layer * layers), *layer_norm]


SMALL: Shapes = [(64,)] * 1000
LARGE: Shapes = [(1024, 1024)] * 64

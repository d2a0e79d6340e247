"""Inputs of the deformable attention, the definition to compare it with, and copies of its file."""

import importlib.util

import numpy as np
import torch


SHAPES = [(7, 5), (1, 4), (3, 1), (1, 1)]


def make_inputs(width, batch=2, queries=9, heads=2, points=3, shapes=SHAPES, dtype=torch.float32, seed=0):
    """Values, locations from well outside of one side to well outside of the other, and weights that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    positions = sum(height * rows for height, rows in shapes)
    levels = len(shapes)
    value = torch.randn(batch, positions, heads, width, generator=generator)
    locations = torch.rand(batch, queries, heads, levels, points, 2, generator=generator) * 1.8 - 0.4
    weights = torch.rand(batch, queries, heads, levels * points, generator=generator).softmax(-1)
    inputs = value, locations, weights.unflatten(-1, (levels, points))
    return [tensor.to(dtype).requires_grad_() for tensor in inputs]


def call(function, inputs, shapes=SHAPES):
    value, locations, weights = inputs
    return function(value, shapes, locations, weights)


def by_definition(value, shapes, locations, weights):
    """Equation 3 of Deformable DETR and bilinear interpolation, one sample after another."""
    batch, queries, heads, levels, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    starts = np.cumsum([0, *(height * width for height, width in shapes)])
    for index in np.ndindex(batch, queries, heads, levels, points):
        image, query, head, level, _ = index
        height, width = shapes[level]
        x, y = (locations[index] * torch.tensor([width, height]) - 0.5).tolist()
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    position = starts[level] + row * width + column
                    output[image, query, head] += share * weights[index] * value[image, position, head]
    return output.flatten(2)


def load_copy(path, name="m2f_hf.kernels.copy_that_came_with_a_checkpoint"):
    """The file as another module, which finds the files beside it where the package has them."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

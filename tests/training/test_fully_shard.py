"""FSDP: a layer's parameters are whole only during its forward and its backward pass.

A kernel that read them at another time would find them sharded, and learn something else.
"""

import sys
from pathlib import Path

import torch
from tiny import images, labels, tiny_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from two_processes import run_two

from m2f_hf import Mask2FormerForUniversalSegmentation
from m2f_hf.loss.points import SeededPoints


LAYERS = ("SwinLayer", "EncoderLayer", "DecoderLayer")  # endings of class names


def make_model() -> Mask2FormerForUniversalSegmentation:
    return tiny_model("swin").train()


def compute_loss(model: Mask2FormerForUniversalSegmentation, start: int, stop: int) -> Tensor:
    """Return the loss of some images of a batch of four, one of which has no targets."""
    model.criterion.draw_points = SeededPoints(7, first_image=start)
    batch = {"pixel_values": images(4), **labels((2, 1, 0, 3))}
    return model(**{name: values[start:stop] for name, values in batch.items()}).loss


def named_gradients(model: Mask2FormerForUniversalSegmentation) -> list[tuple[str, Tensor]]:
    """Return the gradients of all parameters but those of Swin's last norm, which nothing reads."""
    return [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]


def graph_nodes(loss: Tensor) -> set[str]:
    """Return the names of the functions that a backward pass calls."""
    names, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    return names


def train_half(folder: str) -> None:
    """Write the loss of this process's half of the batch, and the gradients of all parameters, to the folder."""
    torch.distributed.init_process_group("gloo")
    rank, model = torch.distributed.get_rank(), make_model()
    layers = [module for module in model.modules() if type(module).__name__.endswith(LAYERS)]
    assert len({type(layer) for layer in layers}) == len(LAYERS)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    loss = compute_loss(model, 2 * rank, 2 * rank + 2)
    assert {"WindowAttentionBackward", "FeedForwardBackward"} <= graph_nodes(loss)  # sharding keeps kernels
    loss.backward()
    gradients = {name: gradient.full_tensor() for name, gradient in named_gradients(model)}
    torch.save((loss.item(), gradients), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_sharded_layers_in_two_processes_learn_what_one_process_learns(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), *sys.path]
    code = (
        f"import sys; sys.path[:0] = {paths}; import {Path(__file__).stem} as test; test.train_half({str(tmp_path)!r})"
    )
    run_two(lambda _: [sys.executable, "-c", code])
    losses, gradients = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)

    model = make_model()
    loss = compute_loss(model, 0, 4)
    loss.backward()
    torch.testing.assert_close(sum(losses) / 2, loss.item(), rtol=1e-6, atol=0)
    expected = dict(named_gradients(model))
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for found in gradients:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * scale)

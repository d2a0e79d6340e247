"""One training step of a tiny model, whole or with its parameters sharded over processes by `fully_shard`.

    python sharded.py NUM_PROCESSES OUTPUT

Each process takes its share of two images; the first one writes the loss and all gradients.
"""

import sys

import torch
import torch.distributed as dist
from tiny import images, labels, tiny_model
from torch.distributed.fsdp import fully_shard

from m2f_hf.loss.points import SeededPoints


LAYERS = ("Mask2FormerPixelDecoderEncoderLayer", "Mask2FormerMaskedAttentionDecoderLayer", "SwinLayer")


def main(num_processes: int, output: str) -> None:
    rank = 0
    if num_processes > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    model = tiny_model("swin").train()
    if num_processes > 1:
        for module in list(model.modules()):
            if type(module).__name__ in LAYERS:
                fully_shard(module)
        fully_shard(model)
    share = slice(rank, rank + 1) if num_processes > 1 else slice(0, 2)
    model.criterion.draw_points = SeededPoints(7, first_image=rank)
    loss = model(images()[share], **{name: values[share] for name, values in labels().items()}).loss
    loss.backward()
    gradients = {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    loss = loss.detach()
    if num_processes > 1:
        dist.all_reduce(loss)
        loss /= num_processes
    if rank == 0:
        torch.save({"loss": loss, "gradients": gradients, "sharded": type(next(model.parameters())).__name__}, output)
    if num_processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

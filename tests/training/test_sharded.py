"""Parameters sharded over two processes (FSDP2): no kernel may read a layer's parameters past its forward."""

import sys
from pathlib import Path

import torch
from two_processes import run_two


SCRIPT = Path(__file__).with_name("sharded.py")


def test_sharded_layers_have_one_processes_loss_and_gradients(tmp_path):
    import sharded

    sharded.main(1, str(tmp_path / "one.pt"))
    run_two(lambda _: [sys.executable, SCRIPT, 2, tmp_path / "two.pt"])
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert (one["sharded"], two["sharded"]) == ("Parameter", "DTensor")
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-6, atol=1e-6)
    assert two["gradients"].keys() == one["gradients"].keys()
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)

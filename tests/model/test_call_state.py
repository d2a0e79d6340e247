"""What a call knows is that call's alone: threads that share a model, and checkpoints that compute layers again."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from PIL import Image
from tiny import BACKBONES, SIZE, clips, images, tiny_config, tiny_model, tiny_video_model
from torch.utils._pytree import tree_flatten
from transformers import pipeline

from m2f_hf import M2FImageProcessor, Mask2FormerModel, Mask2FormerVideoProcessor


TIMES = 3
# Height and width of the images of two batches. Each has padding to hide, in another place.
SIZES = (((32, 96), (64, 64)), ((64, 96), (64, 32)))


def mask_of(sizes):
    mask = torch.zeros(len(sizes), *SIZE, dtype=torch.int64)
    for image, (height, width) in enumerate(sizes):
        mask[image, :height, :width] = 1
    return mask


def assert_threads_get_what_each_gets_alone(encoder, calls):
    """Run `calls` alone, and then in one thread each, which enter `encoder` at the same time."""
    expected = [call() for call in calls]
    barrier = Barrier(len(calls), timeout=60)

    def wait(*_):
        barrier.wait()

    handle = encoder.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(len(calls)) as pool:
        for _ in range(TIMES):
            for future, alone in zip([pool.submit(call) for call in calls], expected, strict=True):
                for ours, theirs in zip(tree_flatten(future.result())[0], tree_flatten(alone)[0], strict=True):
                    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    handle.remove()


@torch.no_grad()
def logits(model, pixel_values, **arguments):
    outputs = model(pixel_values, **arguments)
    return outputs.class_queries_logits, outputs.masks_queries_logits


@pytest.mark.parametrize("backbone", BACKBONES)
def test_threads_share_an_image_model(backbone):
    model = tiny_model(backbone)
    encoder = model.model.pixel_level_module.encoder
    calls = [
        lambda seed=seed, sizes=sizes: logits(model, images(seed=seed), pixel_mask=mask_of(sizes))
        for seed, sizes in enumerate(SIZES)
    ]
    assert_threads_get_what_each_gets_alone(encoder, [*calls, lambda: logits(model, images())])


def test_threads_share_a_video_model_and_its_processor():
    model, processor = tiny_video_model(), Mask2FormerVideoProcessor()

    def track(seed, sizes):
        with torch.no_grad():
            outputs = model(clips(2, seed=seed), pixel_mask=mask_of(sizes))
        return [result["segmentation"].float() for result in processor.post_process(outputs, threshold=0.0)]

    calls = [lambda seed=seed, sizes=sizes: track(seed, sizes) for seed, sizes in enumerate(SIZES)]
    assert_threads_get_what_each_gets_alone(model.model.pixel_level_module.encoder, calls)


def test_threads_share_a_pipeline():
    model = tiny_model()
    processor = M2FImageProcessor(do_resize=False, task="semantic")
    segmenter = pipeline("image-segmentation", model=model, image_processor=processor)

    def segment(seed, sizes):
        noise = (255 * torch.rand(2, *SIZE, 3, generator=torch.Generator().manual_seed(seed))).byte().numpy()
        pictures = [Image.fromarray(one[:height, :width]) for one, (height, width) in zip(noise, sizes, strict=True)]
        segments = segmenter(pictures, batch_size=2)
        return [[torch.tensor(list(segment["mask"].tobytes())) for segment in of_image] for of_image in segments]

    calls = [lambda seed=seed, sizes=sizes: segment(seed, sizes) for seed, sizes in enumerate(SIZES)]
    assert_threads_get_what_each_gets_alone(model.model.pixel_level_module.encoder, calls)


@pytest.mark.parametrize(
    ("backbone", "reentrant"), [("swin", False), ("swin", True), ("maskformer-swin", False), ("resnet", False)]
)
def test_two_forwards_before_one_backward_with_gradient_checkpointing(backbone, reentrant):
    """Layers are computed again with the sizes of the call that they repeat, not with those of the last one."""
    kinds = BACKBONES | {"maskformer-swin": BACKBONES["swin"] | {"model_type": "maskformer-swin"}}
    torch.manual_seed(0)
    model = Mask2FormerModel(tiny_config(backbone_config=dict(kinds[backbone]))).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # its statistics are no part of the question

    def gradients(checkpointed):
        if checkpointed:
            # the second name is the older one
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model.zero_grad()
        loss = 0
        for seed, sizes in enumerate(SIZES):
            pixel_values = images(seed=seed).requires_grad_()  # for reentrant checkpoints
            maps = model(pixel_values, pixel_mask=mask_of(sizes), output_hidden_states=True).encoder_hidden_states
            loss = loss + sum(one[..., 0, 0].square().mean() for one in maps)  # where all images are
        loss.backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    expected, actual = gradients(False), gradients(True)
    assert (actual - expected).norm() < 1e-4 * expected.norm()

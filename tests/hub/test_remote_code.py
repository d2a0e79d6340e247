"""A published checkpoint where `m2f_hf` cannot be imported: `trust_remote_code=True` is all it takes."""

import ast
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Client, ClientError, HubServer, serve, snippets
from PIL import Image
from transformers import pipeline
from transformers.dynamic_module_utils import get_imports

from m2f_hf import BUNDLED_MODEL, BUNDLED_SCENES, Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor
from m2f_hf.data import MovingShapesDataset
from m2f_hf.hub import HubFolder
from m2f_hf.hub.card import model_card
from m2f_hf.hub.code import _flatten_imports, code_files
from m2f_hf.hub.families import IMAGES, VIDEOS


TASKS = ("panoptic", "instance", "semantic")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The bundled checkpoint as one of each task, and as a video model."""
    root = tmp_path_factory.mktemp("folders")
    for task in TASKS:
        shutil.copytree(BUNDLED_MODEL, root / task)
        file = root / task / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "task": task}))
        (root / task / "README.md").unlink()
    Mask2FormerForVideoSegmentation.from_pretrained(BUNDLED_MODEL).save_pretrained(root / "video")
    Mask2FormerVideoProcessor(size={"shortest_edge": 96, "longest_edge": 128}).save_pretrained(root / "video")
    return {name: root / name for name in (*TASKS, "video")}


@pytest.fixture(scope="module")
def hub(folders):
    with serve({}) as server:
        for task, folder in folders.items():
            contents = HubFolder(folder)
            card = model_card(contents.config, contents.processor, repo_id=f"owner/{task}")
            server.store(f"owner/{task}", {**contents.files, "README.md": str(card)})
        yield server


@pytest.fixture(scope="module")
def stranger(hub: HubServer, tmp_path_factory):
    """A process without the package, in a folder with a picture and a clip."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "folder-of-frames").mkdir()
    for index, frame in enumerate(MovingShapesDataset(1, num_frames=3, image_size=96)[0]["frames"]):
        frame.save(folder / "folder-of-frames" / f"{index}.png")
    Image.open(BUNDLED_SCENES / "scene-1.png").save(folder / "photo.jpg")
    client = Client(hub, folder, has_package=False)
    yield client
    client.close()


def test_the_package_is_out_of_reach(stranger):
    for code in ("import m2f_hf", "from m2f_hf.cli.main import main"):
        with pytest.raises(ClientError) as caught:
            stranger(code)
        assert caught.value.kind == "ModuleNotFoundError"


def test_nothing_is_run_unasked(stranger):
    with pytest.raises(ClientError) as caught:
        stranger('from transformers import pipeline; pipeline("image-segmentation", model="owner/panoptic")')
    assert caught.value.kind == "ValueError"
    assert "trust_remote_code=True" in caught.value.message


MASKS = """
answer = []
for index, segment in enumerate(segments):
    segment["mask"].save(f"mask-{index}.png")
    answer.append([segment["label"], segment["score"]])
"""


@pytest.mark.parametrize("task", TASKS)
def test_snippet_for_strangers_gives_the_packages_results(task, hub, stranger, folders):
    code = snippets(hub.repositories[f"owner/{task}"].files()["README.md"].decode())[2]
    assert "m2f_hf" not in code
    found = stranger(code + MASKS)
    segments = pipeline("image-segmentation", model=str(folders[task]))(str(stranger.folder / "photo.jpg"))
    assert len(segments) >= 3
    assert [label for label, _ in found] == [segment["label"] for segment in segments]
    for index, ((_, score), segment) in enumerate(zip(found, segments, strict=True)):
        assert score == (None if task == "semantic" else pytest.approx(segment["score"], abs=1e-4))
        mask = np.asarray(Image.open(stranger.folder / f"mask-{index}.png")) > 0
        expected = np.asarray(segment["mask"]) > 0
        if task == "instance":  # the stock pipeline shows of each instance what no better one covers
            assert not (mask & ~expected).any()
            assert mask.sum() >= 0.5 * expected.sum()
        else:
            assert (mask != expected).mean() < 1e-3


def test_auto_classes_find_the_repositorys_code(stranger):
    names = stranger("""
from transformers import AutoConfig, AutoModel, AutoModelForImageSegmentation, AutoModelForUniversalSegmentation
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the other one asks for torchvision
answer = {}
for auto_class in (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageSegmentation,
                   AutoModelForUniversalSegmentation):
    loaded = auto_class.from_pretrained("owner/panoptic", trust_remote_code=True)
    answer[auto_class.__name__] = [type(loaded).__name__, type(loaded).__module__.split(".")[0]]
model = loaded
""")
    assert names == {
        "AutoConfig": ["Mask2FormerConfig", "transformers_modules"],
        "AutoImageProcessor": ["M2FImageProcessor", "transformers_modules"],
        "AutoModel": ["Mask2FormerModel", "transformers_modules"],
        "AutoModelForImageSegmentation": ["Mask2FormerForUniversalSegmentation", "transformers_modules"],
        "AutoModelForUniversalSegmentation": ["Mask2FormerForUniversalSegmentation", "transformers_modules"],
    }


def test_snippet_for_strangers_gives_the_packages_tracks(hub, stranger, folders):
    ours, theirs = snippets(hub.repositories["owner/video"].files()["README.md"].decode())
    assert "m2f_hf" in ours and "m2f_hf" not in theirs
    found = stranger(theirs + "\nanswer = [(track['label_id'], track['score'], track['areas']) for track in "
                     "tracks['segments_info']]")  # fmt: skip
    scope: dict = {}
    clip = str(stranger.folder / "folder-of-frames")
    exec(ours.replace("owner/video", str(folders["video"])).replace("folder-of-frames", clip), scope)
    tracks = scope["tracks"]["segments_info"]
    assert len(found) == len(tracks) == 10
    for (label_id, score, areas), track in zip(found, tracks, strict=True):
        assert (label_id, areas) == (track["label_id"], track["areas"])
        assert score == pytest.approx(track["score"], abs=1e-4)


def test_auto_classes_find_the_code_of_clips(stranger):
    names = stranger("""
from transformers import AutoConfig, AutoModel, AutoModelForUniversalSegmentation, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the other ones ask for torchvision
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
answer = {}
for auto_class in (AutoConfig, AutoImageProcessor, AutoProcessor, AutoVideoProcessor, AutoModel,
                   AutoModelForUniversalSegmentation):
    loaded = auto_class.from_pretrained("owner/video", trust_remote_code=True)
    answer[auto_class.__name__] = [type(loaded).__name__, type(loaded).__module__.split(".")[0]]
""")
    processor = ["Mask2FormerVideoProcessor", "transformers_modules"]
    assert names == {
        "AutoConfig": ["Mask2FormerVideoConfig", "transformers_modules"],
        "AutoImageProcessor": processor,
        "AutoProcessor": processor,
        "AutoVideoProcessor": processor,
        "AutoModel": ["Mask2FormerVideoModel", "transformers_modules"],
        "AutoModelForUniversalSegmentation": ["Mask2FormerForVideoSegmentation", "transformers_modules"],
    }


def test_strangers_can_train_and_save(stranger):
    """What they save loads again, with the code next to it."""
    before, after, files = stranger("""
import os, torch
from transformers import AutoModelForUniversalSegmentation
model = AutoModelForUniversalSegmentation.from_pretrained("owner/panoptic", trust_remote_code=True).eval()
torch.manual_seed(0)
inputs = {
    "pixel_values": torch.randn(1, 3, 64, 64),
    "mask_labels": [torch.ones(1, 64, 64)],
    "class_labels": [torch.tensor([2])],
}
def loss_of(model):
    torch.manual_seed(0)
    return model(**inputs).loss
loss = loss_of(model)
loss.backward()
model.save_pretrained("saved")
again = AutoModelForUniversalSegmentation.from_pretrained("saved", trust_remote_code=True).eval()
answer = [loss.item(), loss_of(again).item(), sorted(os.listdir("saved"))]
""")
    assert np.isfinite(before)
    assert after == pytest.approx(before)
    written = {f"code/{name}" for name in files if name.endswith(".py")}
    assert code_files().keys() >= written != set()


@pytest.mark.parametrize("family", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_the_code_is_whole_and_no_more(family, tmp_path):
    files = {Path(name).stem: text for name, text in code_files(family).items()}
    assert all(name == f"code/{Path(name).stem}.py" for name in code_files(family))
    assert {"model_modeling", "model_configuration", "processing_image_processor"} <= files.keys()
    of_clips = {"model_modeling_video", "processing_video_processor"}
    assert files.keys() & of_clips == (of_clips if family is VIDEOS else set())
    assert not any(name.startswith(("hub", "cli", "auto", "inference", "draw")) for name in files)
    imported = set()
    for name, text in files.items():
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
        # `transformers` follows `from .x import y` alone.
        assert all(node.level == 1 and node.module and "." not in node.module for node in nodes), name
        imported |= {node.module for node in nodes}
        # What `transformers` looks for before it runs a file; more would have to be installed.
        installed = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert set(get_imports(tmp_path / name)) <= installed | sys.stdlib_module_names
    assert imported <= files.keys()


def test_paths_are_joined_into_names():
    text = "from ..kernels.chunks import chunks\nfrom .layers import (\n    A,\n)\n    from ...elsewhere import b\n"
    flattened, imported = _flatten_imports(text, "m2f_hf.model.parts.decoder")
    assert imported == ["m2f_hf.model.kernels.chunks", "m2f_hf.model.parts.layers", "m2f_hf.elsewhere"]
    assert flattened == (
        "from .model_kernels_chunks import chunks\nfrom .model_parts_layers import (\n    A,\n)\n"
        "    from .elsewhere import b\n"
    )


@pytest.mark.parametrize("statement", ["from .. import data", "from ..data import open_dataset"])
def test_a_package_cannot_be_published_by_its_name(statement):
    with pytest.raises(ImportError, match="name the module"):
        _flatten_imports(f"{statement}\n", "m2f_hf.model.modeling")

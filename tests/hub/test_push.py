"""Cards, and pushing to a Hub on loopback with the real client."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import Client, ClientError, serve, snippets
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from safetensors.torch import load_file, save_file

from m2f_hf import (
    BUNDLED_MODEL,
    BUNDLED_SCENES,
    M2FImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoConfig,
    Mask2FormerVideoProcessor,
)
from m2f_hf.data import MovingShapesDataset
from m2f_hf.hub import HubFolder
from m2f_hf.hub.card import Figure, is_untouched, model_card, result_files
from m2f_hf.hub.code import code_files
from m2f_hf.hub.families import VIDEOS


FIGURES = [
    Figure("panoptic", "Generated shapes", "200 scenes", "PQ", 79.1, source="https://example.org/log"),
    Figure("semantic", "Generated shapes", "200 scenes", "mIoU", 87.5, dataset_id="owner/shapes"),
]


@pytest.fixture(scope="module")
def config() -> Mask2FormerConfig:
    return Mask2FormerConfig.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def processor() -> M2FImageProcessor:
    return M2FImageProcessor.from_pretrained(BUNDLED_MODEL)


# --- the card ---


def test_card_says_what_is_given(config, processor):
    card = model_card(
        config,
        processor,
        repo_id="owner/name",
        title="Shapes",
        base_model="owner/base",
        datasets=["owner/shapes"],
        license="cc-by-nc-4.0",
        figures=FIGURES,
        training={"steps": 100, "schedule": "poly | warm"},
        description="Knows shapes.",
        source_url="https://example.org/model.pkl",
        example_image="example.png",
    )
    data = ModelCard(str(card)).data.to_dict()  # as the Hub reads it
    assert data["pipeline_tag"] == "image-segmentation"
    assert data["library_name"] == "transformers"
    assert (data["license"], data["base_model"], data["datasets"]) == ("cc-by-nc-4.0", "owner/base", ["owner/shapes"])
    assert "panoptic-segmentation" in data["tags"]
    for words in ("# Shapes", "Knows shapes.", "(example.png)", "<https://example.org/model.pkl>", "cc-by-nc-4.0"):
        assert words in card.text
    assert "4 things: 0 circle, 1 rectangle, 2 triangle, 3 star." in card.text
    assert "3 stuff: 4 striped ground" in card.text
    assert "| panoptic | Generated shapes | 200 scenes | PQ | 79.1 | https://example.org/log |" in card.text
    assert "once it is published" in card.text  # a folder that no one has pushed has this card too
    assert "| steps | 100 |\n| schedule | poly \\| warm |" in card.text


def test_figures_are_the_hubs_results(config, processor):
    card = model_card(config, processor, repo_id="owner/name", figures=FIGURES)
    name, results = model_index_to_eval_results(ModelCard(str(card)).data.to_dict()["model-index"])
    assert name == "name"
    assert [(r.task_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in results] == [
        ("image-segmentation", "Generated shapes", "200 scenes", "pq", 79.1),
        ("image-segmentation", "Generated shapes", "200 scenes", "miou", 87.5),
    ]
    assert [r.source_url for r in results] == ["https://example.org/log", None]


@pytest.mark.parametrize(
    ("values", "shown"),
    [((82.1, 83.0), ["82.1", "83.0"]), ((79.12, 80), ["79.12", "80.00"]), ((83.0, 4), ["83", "4"])],
)
def test_figures_of_a_table_have_as_many_decimals(values, shown, config):
    figures = [Figure("panoptic", "mine", "validation", f"PQ {value}", value) for value in values]
    text = model_card(config, None, repo_id="owner/name", figures=figures).text
    assert re.findall(r"^\| panoptic .* ([\d.]+) \|$", text, re.MULTILINE) == shown


def test_figures_on_a_data_set_of_the_hub_are_in_its_current_format():
    import yaml

    files = result_files(FIGURES)
    assert list(files) == [".eval_results/owner-shapes.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/owner-shapes.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("owner/shapes", "semantic_miou", 87.5)
    assert result_files(FIGURES[:1]) == {}


def test_what_is_not_given_is_not_claimed(config):
    card = model_card(config, None, repo_id="owner/name")
    assert set(card.data.to_dict()) == {"pipeline_tag", "library_name", "tags"}
    for heading in ("## Results", "## Training"):
        assert heading not in card.text
    assert "licence of the weights is not stated" in card.text
    assert "things" not in card.text  # which of the classes are stuff, the processor knows


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_snippets_compile_and_pass_the_checkpoints_task_and_thresholds(task, config):
    processor = M2FImageProcessor(task=task, threshold=0.61, instance_threshold=0.42, mask_threshold=0.53)
    blocks = snippets(str(model_card(config, processor, repo_id="owner/name")))
    for block in blocks:
        compile(block, "card", "exec")
        assert '"owner/name"' in block
    ours, ours_in_a_pipeline, theirs = blocks
    assert 'Segmenter.from_pretrained("owner/name")' in ours
    for block in (ours, ours_in_a_pipeline):
        assert "threshold" not in block and "trust_remote_code" not in block
    assert "trust_remote_code=True" in theirs and f'subtask="{task}"' in theirs
    expected = {"panoptic": ["0.61", "0.53", "0.8"], "instance": ["0.42", "0.53"], "semantic": []}
    assert re.findall(r"threshold=([\d.]+)", theirs) == expected[task]


def test_a_card_of_clips_claims_no_image_pipeline():
    figures = [Figure("instance", "YouTube-VIS 2019", "val", "AP", 46.4)]
    card = model_card(
        Mask2FormerVideoConfig.from_pretrained(BUNDLED_MODEL),
        Mask2FormerVideoProcessor(),
        repo_id="owner/name",
        license="cc-by-nc-4.0",
        figures=figures,
    )
    data = ModelCard(str(card)).data.to_dict()
    assert "pipeline_tag" not in data and (data["library_name"], data["license"]) == ("transformers", "cc-by-nc-4.0")
    assert {"mask2former", "m2f", "video-segmentation", "video-instance-segmentation"} <= set(data["tags"])
    assert "instance-segmentation" not in data["tags"]
    _, (result,) = model_index_to_eval_results(data["model-index"])
    assert (result.task_type, result.task_name) == ("video-instance-segmentation", "Video Instance Segmentation")
    for words in ("follows every object through a clip", "2112.10764", "7 classes: 0 circle"):
        assert words in card.text
    assert "pipeline(" not in card.text


def test_labels_are_words_whatever_they_hold(config):
    odd = Mask2FormerConfig(**{**config.to_dict(), "id2label": {0: "a|b", 1: "<script>", 2: "two\nlines", 3: "*"}})
    text = model_card(odd, None, repo_id="owner/name").text
    assert r"4 classes: 0 a\|b, 1 \<script\>, 2 two lines, 3 \*." in text


def test_labels_come_in_the_order_of_their_ids(config, tmp_path):
    Mask2FormerConfig(id2label={i: f"class{i}" for i in range(12)}).save_pretrained(tmp_path)
    text = model_card(Mask2FormerConfig.from_pretrained(tmp_path), None, repo_id="owner/name").text
    assert "12 classes: " + ", ".join(f"{i} class{i}" for i in range(12)) + "." in text


def test_an_edited_card_is_recognised(config, processor):
    text = str(model_card(config, processor, repo_id="owner/name", license="mit"))
    assert is_untouched(ModelCard(text))
    assert not is_untouched(ModelCard(text.replace("7 classes", "seven classes")))
    assert not is_untouched(ModelCard(text.replace("license: mit", "license: apache-2.0")))
    assert not is_untouched(ModelCard("---\nlicense: mit\n---\n# By hand\n"))


# --- what a folder may hold ---


@pytest.fixture
def folder(tmp_path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, target)
    (target / "README.md").unlink()
    return target


def test_a_folder_is_sent_without_pickles_code_of_others_and_hidden_files(folder):
    for name in ("training_args.bin", "optimizer.pt", ".env", "notes.py"):
        (folder / name).write_bytes(b"x")
    (folder / "runs").mkdir()
    (folder / "model_modeling.py").write_text("raise SystemExit")
    (folder / ".eval_results").mkdir()
    for name, text in result_files(FIGURES).items():
        (folder / name).write_text(text)
    contents = HubFolder(folder)
    saved = {"config.json", "preprocessor_config.json", "model.safetensors", ".eval_results/owner-shapes.yaml"}
    assert contents.files.keys() == saved | code_files().keys()
    assert sorted(contents.left_out) == [".env", "notes.py", "optimizer.pt", "runs/", "training_args.bin"]
    # The package's, not the folder's.
    assert contents.files["code/model_modeling.py"] == code_files()["code/model_modeling.py"]
    assert json.loads(contents.files["config.json"])["auto_map"]["AutoModelForImageSegmentation"] == (
        "code/model_modeling.Mask2FormerForUniversalSegmentation"
    )
    assert "auto_map" not in json.loads((folder / "config.json").read_text())  # the folder stays as it was


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no folder", "is no folder"),
        ("config.json", "has no config.json"),
        ("preprocessor_config.json", "has no preprocessor_config.json"),
        ("model.safetensors", "has no model.safetensors"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(fault, says, folder):
    if fault == "no folder":
        shutil.rmtree(folder)
    else:
        (folder / fault).unlink()
    with pytest.raises(FileNotFoundError, match=says):
        HubFolder(folder)


def test_weights_of_two_saves_are_refused(folder):
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    model.class_predictor.bias.data += 1
    model.save_pretrained(folder, max_shard_size="2MB")
    stale = Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    assert not torch.equal(stale.class_predictor.bias, model.class_predictor.bias)  # what this is about
    with pytest.raises(ValueError, match=r"has model\.safetensors and model\.safetensors\.index\.json: .* remove"):
        HubFolder(folder)


@pytest.mark.parametrize(
    ("file", "settings", "says"),
    [
        ("config.json", {"model_type": "mask2former"}, "has model_type 'mask2former' in config.json, not 'm2f'"),
        ("preprocessor_config.json", {"image_processor_type": "Mask2FormerImageProcessor"}, "has image_processor_type"),
        ("config.json", [], "config.json holds no JSON object"),
        ("preprocessor_config.json", [], "preprocessor_config.json holds no JSON object"),
        ("config.json", "{", "config.json is no JSON .*save it again"),
        ("preprocessor_config.json", b"\xff\xfe{", "preprocessor_config.json is no JSON .*save it again"),
    ],
)
def test_settings_of_others_and_damaged_ones_are_refused(file, settings, says, folder):
    if isinstance(settings, dict):
        settings = {**json.loads((folder / file).read_text()), **settings}
    (folder / file).write_bytes(settings if isinstance(settings, bytes) else _text(settings).encode())
    with pytest.raises(ValueError, match=says):
        HubFolder(folder)


def _text(settings) -> str:
    return settings if isinstance(settings, str) else json.dumps(settings)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("class_predictor.bias"), "lacks 1 of the model's weights, such as class_predictor.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "has 1 weights that its model has not, such as extra"),
        (
            lambda w: w.update({"class_predictor.bias": torch.zeros(3)}),
            r"such as class_predictor.bias, \(3,\) in place of \(8,\)",
        ),
        (
            lambda w: w["class_predictor.bias"].fill_(torch.nan),
            "has NaN or infinity in 1 of its weights, such as class_predictor.bias",
        ),
    ],
    ids=["missing", "unexpected", "other shape", "not a number"],
)
def test_weights_that_are_not_the_models_are_refused(change, says, folder):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=says):
        HubFolder(folder)


@pytest.mark.parametrize(("ids", "stray"), [([4, 5, 6, 7], 7), ([-1, 4], -1), ([5, 1000], 1000)])
def test_stuff_that_is_no_label_is_refused(ids, stray, folder):
    processor = M2FImageProcessor.from_pretrained(folder)
    processor.label_ids_to_fuse = ids
    processor.save_pretrained(folder)
    says = rf"has {stray} among label_ids_to_fuse .* labels are 0 to 6: set `processor\.label_ids_to_fuse = \[\.\.\.\]`"
    with pytest.raises(ValueError, match=says):
        HubFolder(folder)


@pytest.mark.parametrize("card", [b"---\nlicense: [open\n---\n# x\n", b"---\n- a list\n---\n", b"\xff\xfe\x00"])
def test_a_card_that_the_hub_would_not_read_is_refused(card, folder):
    (folder / "README.md").write_bytes(card)
    with pytest.raises(ValueError, match=r"README\.md is no model card .* mend the metadata"):
        HubFolder(folder)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_half_of_images_and_half_of_clips_is_refused(file, folder, tmp_path):
    save_video_model(tmp_path / "tracks")
    shutil.copy(tmp_path / "tracks" / file, folder)
    with pytest.raises(
        ValueError, match=r"has image_processor_type '(M2FI|Mask2FormerV)\w+' in preprocessor_config.json"
    ):
        HubFolder(folder)


# --- a Hub on loopback ---


OWNER, GUEST = "hf_owner", "hf_guest"
HELPERS = """
import contextlib, io, json, os, shutil
import m2f_hf
from pathlib import Path
from m2f_hf import M2FImageProcessor, Mask2FormerForUniversalSegmentation
from m2f_hf import BUNDLED_MODEL
from m2f_hf.cli import main
from m2f_hf.hub import HubFolder

def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return [status, out.getvalue(), err.getvalue()]
"""


@pytest.fixture(scope="module")
def hub():
    with serve({OWNER: "owner", GUEST: "guest"}) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A process with the package whose Hub is ours; in its folder a picture, a clip, and checkpoints without a card."""
    folder = tmp_path_factory.mktemp("client")
    Image.open(BUNDLED_SCENES / "scene-1.png").save(folder / "photo.jpg")
    shutil.copytree(BUNDLED_MODEL, folder / "shapes")
    (folder / "shapes" / "README.md").unlink()
    save_video_model(folder / "tracks")
    (folder / "folder-of-frames").mkdir()
    for index, frame in enumerate(MovingShapesDataset(1, num_frames=3, image_size=96)[0]["frames"]):
        frame.save(folder / "folder-of-frames" / f"{index}.png")
    client = Client(hub, folder, has_package=True)
    client(f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2] / 'examples')!r})")
    client(HELPERS)
    assert client.output() == ""  # importing the package and the command prints nothing
    yield client
    client.close()


def save_video_model(folder: Path) -> None:
    """The bundled checkpoint as a model of clips."""
    Mask2FormerForVideoSegmentation.from_pretrained(BUNDLED_MODEL).save_pretrained(folder)
    Mask2FormerVideoProcessor(size={"shortest_edge": 96, "longest_edge": 128}).save_pretrained(folder)


@pytest.fixture(scope="module")
def pushed(hub, client):
    """`owner/shapes`, pushed by the command."""
    status, out, err = client('answer = run("push", "shapes", "owner/shapes", "--message", "First")', OWNER)
    assert status == 0, err
    return hub.repositories["owner/shapes"], out


def test_push_sends_everything_in_one_commit_and_says_what(pushed):
    repository, out = pushed
    assert repository.messages == ["initial commit", "First"]
    assert not repository.private
    files = repository.files()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "README.md", "code/loss_matcher.py"):
        assert name in files
        assert name == "README.md" or f"  {name}\n" in out
    assert files["model.safetensors"] == (BUNDLED_MODEL / "model.safetensors").read_bytes()
    assert json.loads(files["preprocessor_config.json"])["auto_map"] == {
        "AutoImageProcessor": "code/processing_image_processor.M2FImageProcessor"
    }
    assert "To owner/shapes:" in out and "/owner/shapes is at " in out


def test_with_the_package_no_flag_is_needed(pushed, client):
    """Always the package's classes, whether the repository's code is trusted or not, without a question."""
    names, questions = client("""
from unittest.mock import patch
from transformers import AutoConfig, AutoModel, AutoModelForUniversalSegmentation, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the other one asks for torchvision
with patch("builtins.input", return_value="n") as asked:
    segmenter = pipeline("image-segmentation", model="owner/shapes")
    trusting = pipeline("image-segmentation", model="owner/shapes", trust_remote_code=True)
    loaded = [segmenter, segmenter.model, segmenter.image_processor, trusting.model, trusting.image_processor]
    for cls in (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForUniversalSegmentation,
                M2FImageProcessor, Mask2FormerForUniversalSegmentation):
        loaded.append(cls.from_pretrained("owner/shapes"))
answer = [type(each).__module__.split(".")[0] for each in loaded], [str(call) for call in asked.mock_calls]
""")
    assert names == ["m2f_hf"] * 11
    assert questions == []


def test_the_cards_snippets_run(pushed, client):
    ours, in_a_pipeline, _ = snippets(pushed[0].files()["README.md"].decode())
    found = client(ours + "\nanswer = [segment['label_id'] for segment in result]")
    assert len(found) >= 5
    with Image.open(client.folder / "segments.png") as picture:
        assert picture.size == (160, 160)
    labels = client(in_a_pipeline + "\nanswer = [segmenter.model.config.label2id[s['label']] for s in segments]")
    assert labels == found


def test_the_command_reads_what_was_pushed(pushed, client):
    status, _, err = client('answer = run("segment", "photo.jpg", "--model", "owner/shapes")')
    assert (status, err) == (0, "")
    assert (client.folder / "out" / "photo.overlay.png").exists()


def test_pushing_the_same_again_makes_no_commit(pushed, client):
    before = list(pushed[0].messages)
    assert client('answer = run("push", "shapes", "owner/shapes")', OWNER)[0] == 0
    assert pushed[0].messages == before


def test_a_revision_is_a_branch_of_its_own(pushed, client):
    thresholds = client("""
HubFolder("shapes").push("owner/revised")
shutil.copytree("shapes", "changed")
processor = M2FImageProcessor.from_pretrained("changed")
processor.threshold = 0.77
processor.save_pretrained("changed")
HubFolder("changed").push("owner/revised", revision="v2")
processor.threshold = 0.66
processor.push_to_hub("owner/revised", revision="v3")
answer = [M2FImageProcessor.from_pretrained("owner/revised", revision=revision).threshold
          for revision in (None, "v2", "v3")]
""", OWNER)  # fmt: skip
    assert thresholds == [M2FImageProcessor.from_pretrained(BUNDLED_MODEL).threshold, 0.77, 0.66]
    with pytest.raises(ClientError) as caught:
        client('Mask2FormerForUniversalSegmentation.from_pretrained("owner/revised", revision="v9")')
    assert caught.value.kind == "OSError"
    assert "v9 is not a valid git identifier" in caught.value.message


def test_the_command_reads_a_branch(hub, client):
    """Also of a repository whose main holds no model yet."""
    shown, missing, unknown, segmented = client("""
run("push", "shapes", "owner/branched", "--revision", "v2")
answer = [run("info", "owner/branched", "--revision", "v2"), run("info", "owner/branched"),
          run("info", "owner/branched", "--revision", "v9"),
          run("segment", "photo.jpg", "--model", "owner/branched", "--revision", "v2", "--output", "branched")]
""", OWNER)  # fmt: skip
    assert shown[0] == 0 and "4: circle, rectangle, triangle, star" in shown[1]
    assert missing[0] == 2 and "has no config.json on main" in missing[2] and "--revision" in missing[2]
    assert unknown[0] == 2 and "has no branch, tag or commit v9" in unknown[2]
    assert segmented[0] == 0, segmented[2]
    record = json.loads((client.folder / "branched" / "photo.json").read_text())
    assert (record["model"], record["revision"]) == ("owner/branched", "v2")


@pytest.mark.parametrize("order", ["model, processor", "processor, model"])
def test_push_to_hub_of_model_and_processor(order, pushed, hub, client):
    """Whichever comes first: in the end there are the code, both `auto_map`s, and a card that knows both."""
    name = f"owner/{order.replace(', ', '-')}"
    client(f"""
model = Mask2FormerForUniversalSegmentation.from_pretrained("shapes")
processor = M2FImageProcessor.from_pretrained("shapes")
for part in ({order}):
    part.push_to_hub("{name}")
""", OWNER)  # fmt: skip
    files, expected = hub.repositories[name].files(), pushed[0].files()
    assert files.keys() == expected.keys()
    for file in ("config.json", "preprocessor_config.json"):
        assert json.loads(files[file])["auto_map"] == json.loads(expected[file])["auto_map"]
    card, expected_card = (re.sub(r", [0-9a-f]{16}", "", each["README.md"].decode()) for each in (files, expected))
    assert card == expected_card.replace("owner/shapes", name).replace("# shapes", f"# {name.split('/')[1]}")


def test_save_pretrained_can_push(hub, client):
    client("""
model = Mask2FormerForUniversalSegmentation.from_pretrained("shapes")
model.save_pretrained("kept", push_to_hub=True, repo_id="owner/saved")
""", OWNER)  # fmt: skip
    files = hub.repositories["owner/saved"].files()
    assert "code/model_modeling.py" in files
    assert is_untouched(ModelCard(files["README.md"].decode()))
    assert not list((client.folder / "kept").glob("*.py"))
    assert "auto_map" not in json.loads((client.folder / "kept" / "config.json").read_text())


@pytest.fixture(scope="module")
def pushed_tracks(hub, client):
    """`owner/tracks`, a model of clips, pushed by the command."""
    status, _, err = client('answer = run("push", "tracks", "owner/tracks")', OWNER)
    assert status == 0, err
    return hub.repositories["owner/tracks"].files()


def test_a_video_model_is_pushed_with_the_code_of_clips(pushed_tracks):
    files = pushed_tracks
    assert files.keys() >= code_files(VIDEOS).keys()
    config, processor = (json.loads(files[name]) for name in ("config.json", "preprocessor_config.json"))
    assert (config["model_type"], processor["image_processor_type"]) == ("m2f_video", "Mask2FormerVideoProcessor")
    module = "code/model_modeling_video"
    assert config["auto_map"] == {
        "AutoConfig": "code/model_configuration.Mask2FormerVideoConfig",
        "AutoModel": f"{module}.Mask2FormerVideoModel",
        "AutoModelForUniversalSegmentation": f"{module}.Mask2FormerForVideoSegmentation",
    }
    of_clips = "code/processing_video_processor.Mask2FormerVideoProcessor"
    assert processor["auto_map"] == {"AutoImageProcessor": of_clips, "AutoVideoProcessor": of_clips}
    assert is_untouched(ModelCard(files["README.md"].decode()))


def test_a_card_of_clips_runs_as_it_is(pushed_tracks, client):
    """The block for strangers runs with the package, too, and finds the same."""
    ask = "\nanswer = [(track['label_id'], track['areas']) for track in tracks['segments_info']]"
    ours, theirs = (client(code + ask) for code in snippets(pushed_tracks["README.md"].decode()))
    assert ours == theirs and len(ours) == 10 and sum(map(sum, (areas for _, areas in ours))) > 0


def test_the_command_on_a_card_of_clips_runs_as_it_is(pushed_tracks, client):
    (command,) = re.findall(r"```bash\nm2f (.*)\n```", pushed_tracks["README.md"].decode())
    status, out, err = client(f"answer = run(*{shlex.split(command)}, '--output', 'tracked')")
    assert status == 0, err
    assert out.startswith("folder-of-frames: ") and (client.folder / "tracked" / "results.json").exists()


def test_with_the_package_no_code_of_a_video_repository_runs(pushed_tracks, hub, client):
    files = {name: TRAP if name.endswith(".py") else file.decode("latin-1") for name, file in pushed_tracks.items()}
    del files["model.safetensors"]
    hub.store("guest/clip-trap", files)
    names, questions = client("""
from unittest.mock import patch
from m2f_hf import Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor
from transformers import AutoConfig, AutoModel, AutoModelForUniversalSegmentation, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the other ones ask for torchvision
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
loaded = []
with patch("builtins.input", return_value="n") as asked:
    for name, classes in {
        "guest/clip-trap": (AutoConfig, AutoProcessor, AutoImageProcessor, AutoVideoProcessor,
                            Mask2FormerVideoProcessor),
        "owner/tracks": (AutoModel, AutoModelForUniversalSegmentation, Mask2FormerForVideoSegmentation),
    }.items():
        for trust in ({}, {"trust_remote_code": True}):
            loaded += [cls.from_pretrained(name, **trust) for cls in classes if trust == {} or "Auto" in cls.__name__]
answer = [type(each).__module__.split(".")[0] for each in loaded], [str(call) for call in asked.mock_calls]
""")
    assert names == ["m2f_hf"] * 14
    assert questions == []
    assert not (client.folder / "trapped").exists()


@pytest.mark.parametrize("order", ["model, processor", "processor, model"])
def test_push_to_hub_of_the_parts_of_a_video_model(order, pushed_tracks, hub, client):
    name = f"owner/tracks-{order.replace(', ', '-')}"
    client(f"""
from m2f_hf import Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor
model = Mask2FormerForVideoSegmentation.from_pretrained("tracks")
processor = Mask2FormerVideoProcessor.from_pretrained("tracks")
for part in ({order}):
    part.save_pretrained("kept-tracks", push_to_hub=True, repo_id="{name}")
""", OWNER)  # fmt: skip
    files = hub.repositories[name].files()
    assert files.keys() == pushed_tracks.keys()
    for file in ("config.json", "preprocessor_config.json"):
        assert json.loads(files[file])["auto_map"] == json.loads(pushed_tracks[file])["auto_map"]
    card, expected = (re.sub(r", [0-9a-f]{16}", "", each["README.md"].decode()) for each in (files, pushed_tracks))
    assert card == expected.replace("owner/tracks", name).replace("# tracks", f"# {name.split('/')[1]}")
    assert not list((client.folder / "kept-tracks").glob("*.py"))


def test_the_command_reads_a_pushed_video_model(pushed_tracks, client):
    described, refused = client("""
answer = run("info", "owner/tracks"), run("segment", "photo.jpg", "--model", "owner/tracks")
""")
    assert described[0] == 0 and "m2f_video" in described[1]
    assert refused[0] == 2 and "owner/tracks is a video model" in refused[2]


def test_an_edited_card_stays_unless_it_is_to_be_replaced(hub, client):
    client('HubFolder("shapes").push("owner/carded")', OWNER)
    repository = hub.repositories["owner/carded"]
    made = repository.files()["README.md"]
    by_hand = made.replace(b"# carded", b"# My own words")
    repository.commit("main", {**repository.files(), "README.md": by_hand}, "edited")
    client("""
HubFolder("shapes").push("owner/carded")
M2FImageProcessor.from_pretrained("changed" if os.path.isdir("changed") else "shapes").push_to_hub("owner/carded")
""", OWNER)  # fmt: skip
    assert repository.files()["README.md"] == by_hand
    client('answer = run("push", "shapes", "owner/carded", "--replace-card")', OWNER)
    assert repository.files()["README.md"] == made


@pytest.mark.parametrize("card", ["---\nlicense: [open\n---\n# x\n", "---\n- a list\n---\n"])
def test_an_unreadable_card_stays(card, hub, client):
    hub.store("owner/odd-card", {"README.md": card})
    files = hub.repositories["owner/odd-card"].files
    assert client('answer = run("push", "shapes", "owner/odd-card")', OWNER)[0] == 0
    assert files()["README.md"] == card.encode()
    assert client('answer = run("push", "shapes", "owner/odd-card", "--replace-card")', OWNER)[0] == 0
    assert is_untouched(ModelCard(files()["README.md"].decode()))


def test_another_models_repository_gets_no_card_from_here(hub, client):
    hub.store("owner/other", {"config.json": '{"model_type": "bert"}'})
    client('M2FImageProcessor.from_pretrained("shapes").push_to_hub("owner/other")', OWNER)
    files = hub.repositories["owner/other"].files()
    assert "code/processing_image_processor.py" in files
    assert "Mask2Former" not in files["README.md"].decode()


def test_a_card_from_here_is_renewed_but_keeps_its_licence(hub, client):
    """Figures go with the weights they were measured of, the licence and the names stay."""
    client("""
from m2f_hf.hub import Figure, model_card
contents = HubFolder("shapes")
shutil.copytree("shapes", "licensed")
card = model_card(contents.config, contents.processor, repo_id="licensed", license="mit", datasets=["owner/data"],
                  figures=[Figure("panoptic", "mine", "validation", "PQ", 12.5)])
card.save("licensed/README.md")
HubFolder("licensed").push("owner/licensed")
""", OWNER)  # fmt: skip
    repository = hub.repositories["owner/licensed"]
    text = repository.files()["README.md"].decode()
    assert '"licensed"' not in text and '"owner/licensed"' in text  # the snippets name the repository
    assert ModelCard(text).data.to_dict()["model-index"]
    client('Mask2FormerForUniversalSegmentation.from_pretrained("shapes").push_to_hub("owner/licensed")', OWNER)
    data = ModelCard(repository.files()["README.md"].decode()).data.to_dict()
    assert (data["license"], data["datasets"]) == ("mit", ["owner/data"])
    assert "model-index" not in data


@pytest.mark.parametrize("way", ["folder", "model"])
def test_new_weights_replace_old_shards(way, hub, client):
    push = {
        "folder": 'model.save_pretrained("sharded", max_shard_size="2MB"); HubFolder("sharded").push("owner/sharded")',
        "model": 'model.push_to_hub("owner/sharded", max_shard_size="2MB")',
    }[way]
    pushed_bias, loaded_bias = client(f"""
shutil.rmtree("sharded", ignore_errors=True)
shutil.copytree("shapes", "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
HubFolder("shapes").push("owner/sharded")
model = Mask2FormerForUniversalSegmentation.from_pretrained("shapes")
model.class_predictor.bias.data += 1
{push}
model_again = Mask2FormerForUniversalSegmentation.from_pretrained("owner/sharded")
answer = [each.class_predictor.bias.tolist() for each in (model, model_again)]
""", OWNER)  # fmt: skip
    names = [name for name in hub.repositories["owner/sharded"].files() if name.startswith("model")]
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names and len(names) > 3
    assert loaded_bias == pushed_bias


# --- what goes wrong ---


TRAP = "import pathlib; pathlib.Path('trapped').touch()\n"


@pytest.mark.parametrize(
    ("file", "changes", "is_refused"),  # pipeline, model, processor, m2f segment
    [
        ("config.json", {}, [False, False, False, False]),
        ("config.json", {"model_type": "mask2former"}, [False, False, False, False]),
        ("config.json", {"model_type": "trap"}, [True, True, False, False]),
        ("preprocessor_config.json", {"image_processor_type": "Trap"}, [True, False, True, False]),
        ("config.json", {"custom_pipelines": {"image-segmentation": {"impl": "matcher.Trap"}}}, [True] + 3 * [False]),
    ],
    ids=["code", "stock", "model", "processor", "pipeline"],
)
def test_code_of_a_repository_never_runs_unasked(file, changes, is_refused, hub, client, folder):
    files = HubFolder(folder).files
    files[file] = json.dumps({**json.loads(files[file]), **changes})
    hub.store("guest/trap", {name: TRAP if name.endswith(".py") else file for name, file in files.items()})
    refused = client("""
from transformers import AutoModelForUniversalSegmentation, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
answer = []
for load in (lambda name: pipeline("image-segmentation", model=name), AutoModelForUniversalSegmentation.from_pretrained,
             AutoImageProcessor.from_pretrained, lambda name: run("segment", "photo.jpg", "--model", name)):
    try:
        load("guest/trap")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
        answer.append(True)
    else:
        answer.append(False)
""")
    assert not (client.folder / "trapped").exists()
    assert refused == is_refused


def test_the_trap_can_be_sprung(hub, client, folder):
    files = HubFolder(folder).files
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), "model_type": "trap"})
    hub.store("guest/sprung", {name: TRAP if name.endswith(".py") else file for name, file in files.items()})
    with pytest.raises(ClientError):  # there is nothing in its files but the trap
        client("""
from transformers import AutoConfig
AutoConfig.from_pretrained("guest/sprung", trust_remote_code=True)
""")
    (client.folder / "trapped").unlink()


def test_a_private_repository_is_its_owners(hub, client):
    assert client('answer = run("push", "shapes", "owner/secret", "--private")', OWNER)[0] == 0
    assert hub.repositories["owner/secret"].private
    load = 'answer = type(Mask2FormerForUniversalSegmentation.from_pretrained("owner/secret")).__name__'
    assert client(load, OWNER) == "Mask2FormerForUniversalSegmentation"
    # What is in the cache would be read by all who share it.
    client("from huggingface_hub import constants; shutil.rmtree(constants.HF_HUB_CACHE)")
    for token in (None, GUEST):
        with pytest.raises(ClientError) as caught:
            client(load, token)
        assert caught.value.kind == "OSError"
        status, _, err = client('answer = run("info", "owner/secret")', token)
        assert status == 2
        assert err.count("\n") == 1 and "no such model on the Hub" in err and "hf auth login" in err


def test_private_is_not_asked_of_a_public_repository(pushed, client):
    before = list(pushed[0].messages)
    status, _, err = client('answer = run("push", "changed", "owner/shapes", "--private")', OWNER)
    assert status == 2 and "exists and is public" in err
    assert pushed[0].messages == before


def test_a_missing_repository(client):
    with pytest.raises(ClientError) as caught:
        client('Mask2FormerForUniversalSegmentation.from_pretrained("owner/nothing")')
    assert caught.value.kind == "OSError"
    status, _, err = client('answer = run("segment", "photo.jpg", "--model", "owner/nothing")')
    assert status == 2 and "no such model on the Hub" in err


@pytest.mark.parametrize(
    ("token", "repo_id", "says"),
    [
        (None, "owner/new", "run `hf auth login`"),
        ("hf_unknown", "owner/new", "does not accept the token"),
        (GUEST, "owner/new", "may not write to owner/new"),
        (GUEST, "owner/shapes", "may not write to owner/shapes"),
        (OWNER, "a/b/c", "give owner/name"),
    ],
)
def test_a_refused_push_is_one_line(token, repo_id, says, pushed, hub, client):
    before = {name: list(repository.messages) for name, repository in hub.repositories.items()}
    status, out, err = client(f'answer = run("push", "shapes", "{repo_id}")', token)
    assert status == 2
    assert (out == "") == (token not in (OWNER, GUEST))  # who is not known need not read what would be sent
    assert err.count("\n") == 1 and err.startswith("m2f: ") and says in err
    assert {name: repository.messages for name, repository in hub.repositories.items()} == before


@pytest.mark.parametrize(
    ("pattern", "status", "says"),
    [
        ("PUT /large/", 403, "the upload broke off"),
        ("POST .*/commit/", 500, "the Hub refuses"),
        ("POST .*/commit/", None, "the upload broke off"),
    ],
)
def test_an_interrupted_upload_publishes_nothing_and_goes_on(pattern, status, says, hub, client):
    """Weights of its own for each case, so that none has been sent before."""
    name = f"owner/interrupted-{status}-{pattern[:3].lower()}"
    shift = {"PUT": 1, "POS": 2}[pattern[:3]] + (status is None)
    client(f"""
shutil.rmtree("fresh", ignore_errors=True)
shutil.copytree("shapes", "fresh")
model = Mask2FormerForUniversalSegmentation.from_pretrained("fresh")
model.class_predictor.bias.data += {shift}
model.save_pretrained("fresh")
""")
    hub.fail_next(pattern, status)
    exit_status, _, err = client(f'answer = run("push", "fresh", "{name}")', OWNER)
    assert exit_status == 2
    assert says in err
    assert hub.faults == []
    assert list(hub.repositories[name].files()) == [".gitattributes"]

    sent = hub.count("PUT /large/")
    assert client(f'answer = run("push", "fresh", "{name}")', OWNER)[0] == 0
    assert hub.count("PUT /large/") - sent == (1 if pattern.startswith("PUT") else 0)
    assert "model.safetensors" in hub.repositories[name].files()
    assert hub.repositories[name].messages[1:] == ["Upload model, processor, card and code"]


def test_a_connection_that_breaks_after_the_commit_claims_nothing(hub, client):
    hub.fail_next("POST .*/commit/", None, is_late=True)
    status, _, err = client('answer = run("push", "shapes", "owner/late")', OWNER)
    assert (status, hub.faults) == (2, [])
    assert "has everything of it or nothing" in err and "Run the same command again" in err
    messages = list(hub.repositories["owner/late"].messages)
    assert len(messages) == 2
    assert client('answer = run("push", "shapes", "owner/late")', OWNER)[0] == 0
    assert hub.repositories["owner/late"].messages == messages


def test_what_the_hub_will_never_take_is_not_to_be_tried_again(hub, client):
    hub.fail_next("POST .*/commit/", 413)
    status, _, err = client('answer = run("push", "shapes", "owner/large")', OWNER)
    assert status == 2 and "413" in err and "no file was published" in err and "again" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ('"nowhere", "owner/x"', "m2f: nowhere is no folder\n"),
        ('"weightless", "owner/x"', "m2f: weightless has no model.safetensors"),
        ('"photo.jpg", "owner/x"', "m2f: photo.jpg is no folder\n"),
        ('"cut", "owner/x"', "m2f: cut cannot be loaded: Error while deserializing header"),
        ('"indexed", "owner/x"', "m2f: indexed cannot be loaded: list indices"),
    ],
)
def test_nothing_is_asked_of_the_hub_for_a_bad_folder(arguments, says, hub, client):
    for folder, file in {
        "weightless": "notes.txt",
        "cut": "model.safetensors",
        "indexed": "model.safetensors.index.json",
    }.items():
        (client.folder / folder).mkdir(exist_ok=True)
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copy(BUNDLED_MODEL / name, client.folder / folder)
        (client.folder / folder / file).write_text("[]")
    asked = len(hub.requests)
    status, _, err = client(f"answer = run('push', {arguments})", OWNER)
    assert status == 2 and err.startswith(says) and err.count("\n") == 1
    assert len(hub.requests) == asked


@pytest.mark.parametrize(("reply", "is_sent"), [("y\\n", True), ("\\n", False), ("no\\n", False), ("", False)])
def test_at_a_terminal_it_asks_first(reply, is_sent, hub, client):
    """The last one closes the terminal."""
    name = f"owner/asked-{len(reply)}-{reply[:1].isalpha()}"
    status, out, _ = client(f"""
import sys
class Terminal(io.StringIO):
    def isatty(self):
        return True
before, sys.stdin = sys.stdin, Terminal("{reply}")
try:
    answer = run("push", "shapes", "{name}")
finally:
    sys.stdin = before
""", OWNER)  # fmt: skip
    assert status == 0
    assert (name in hub.repositories) == is_sent
    assert ("nothing was sent" in out) != is_sent


# --- training ---


def test_a_training_run_publishes_what_it_kept_and_measured(hub, client):
    """Two steps on generated scenes from the checkpoint: the card has the log's figures and the settings."""
    rows = client("""
import finetune
finetune.main("--dataset shapes --model shapes --output run --image_size 64 --steps 2 --batch_size 1 --num_workers 0 "
              "--eval_every 1 --eval_scenes 2 --push_to_hub --hub_private --hub_license mit".split())
answer = [json.loads(line) for line in open("run/training_log.jsonl")]
""", OWNER)  # fmt: skip
    repository = hub.repositories["owner/run"]
    assert repository.private
    files = repository.files()
    card = ModelCard(files["README.md"].decode())
    best = max((row for row in rows if "pq_all" in row), key=lambda row: row["pq_all"])
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    found = {result.metric_name: result.metric_value for result in results}
    assert found == {
        "PQ (panoptic)": round(100 * best["pq_all"], 2),
        "PQ things (panoptic)": round(100 * best["pq_things"], 2),
        "PQ stuff (panoptic)": round(100 * best["pq_stuff"], 2),
        "mIoU (semantic)": round(100 * best["miou"], 2),
    }
    assert card.data.to_dict()["license"] == "mit"
    assert f"| kept step | {best['step']} |" in card.text and "| learning_rate | 2.5e-05 |" in card.text
    assert "base_model" not in card.data.to_dict()  # a folder is no model on the Hub
    assert "](example.jpg)" in card.text
    with Image.open(client.folder / "run" / "best" / "example.jpg") as picture:
        assert picture.size == (448, 448)
        assert files["example.jpg"] == (client.folder / "run" / "best" / "example.jpg").read_bytes()


def test_a_training_run_on_clips_publishes_a_video_model(hub, client):
    client("""
import finetune
finetune.main("--dataset moving_shapes --model shapes --output clips --image_size 64 --input_size 64 --video_length 3 "
              "--steps 1 --batch_size 1 --num_workers 0 --eval_scenes 1 --push_to_hub".split())
answer = None
""", OWNER)  # fmt: skip
    files = hub.repositories["owner/clips"].files()
    assert json.loads(files["config.json"])["model_type"] == "m2f_video"
    assert {"code/model_modeling_video.py", "preprocessor_config.json", "example.jpg"} <= set(files)
    card = files["README.md"].decode()
    assert "Mask2FormerForVideoSegmentation" in card and "| num_frames | 2 |" in card


def test_a_training_run_that_may_not_publish_does_not_start(client):
    with pytest.raises(ClientError) as caught:
        client(
            "import finetune; finetune.main('--dataset shapes --model shapes --output refused --push_to_hub'.split())",
            None,
        )
    assert caught.value.kind == "LocalTokenNotFoundError"
    assert not (client.folder / "refused" / "training_log.jsonl").exists()

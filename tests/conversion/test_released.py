"""The released checkpoints: the table is the authors', every key finds its place, downloads arrive whole or not."""

import dataclasses
import gzip
import hashlib
import json
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline
from transformers.core_model_loading import revert_weight_conversion

from m2f_hf import BUNDLED_SCENES, Mask2FormerForUniversalSegmentation
from m2f_hf.hub.card import is_untouched
from m2f_hf.known import stock_checkpoints


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "conversion"))

import account_released
import convert_detectron2
import download as download_module
import released
from account_released import account, read_shapes
from converter import Report
from detectron2_config import DEFAULTS, is_video, read_config
from detectron2_mapping import differences, invert_state_dict
from download import DownloadError, digest_in_name, download, md5_of
from released import BACKBONES, RELEASED, find_released, listing


def flat(spec: dict, prefix: str = "") -> dict:
    """Options by dotted name, in upper case."""
    options = {}
    for name, value in spec.items():
        if isinstance(value, dict):
            options |= flat(value, f"{prefix}{name.upper()}.")
        else:
            options[f"{prefix}{name.upper()}"] = value
    return options


def recorded_options(spec: dict) -> dict:
    """What the record of a released checkpoint says, by the original's option names."""
    sections = {
        "MODEL.MASK_FORMER.": spec["mask_former"],
        "MODEL.RESNETS.": spec.get("resnets", {}),
        "MODEL.SWIN.": spec.get("swin", {}),
        "INPUT.": spec["input"],
        "MODEL.SEM_SEG_HEAD.": {
            "num_classes": spec["num_classes"],
            "pixel_decoder_name": spec["pixel_decoder"],
            "in_features": spec["in_features"],
            "mask_dim": spec["mask_dim"],
            "convs_dim": spec["convs_dim"],
            "norm": spec["norm"],
            "ignore_value": spec["ignore_value"],
            "transformer_enc_layers": spec["transformer_enc_layers"],
        },
        "MODEL.": {
            "meta_architecture": spec["meta_arch"],
            "backbone.name": spec["backbone"],
            "pixel_mean": spec["pixel_mean"],
            "pixel_std": spec["pixel_std"],
        },
        "": {
            "datasets.train": spec["datasets_train"],
            "datasets.test": spec["datasets_test"],
            "test.detections_per_image": spec["detections_per_image"],
        },
    }
    options = {name: value for prefix, section in sections.items() for name, value in flat(section, prefix).items()}
    return {name: value for name, value in options.items() if name in DEFAULTS}


def nested(options: dict) -> dict:
    config: dict = {}
    for name, value in options.items():
        *sections, option = name.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[option] = list(value) if isinstance(value, tuple) else value
    return config


@pytest.fixture(scope="module")
def zoo(shared) -> dict[str, dict]:
    """The record of each released checkpoint, by the digest in its file's name."""
    records = json.loads((shared / "data" / "zoo" / "zoo.json").read_text())
    return {record["url"].removesuffix(".pkl")[-6:]: record for record in records}


# --- the table ---


def test_there_are_59_and_no_two_share_a_name_an_address_or_an_id():
    rows = RELEASED.values()
    assert len(RELEASED) == 59
    for of in ("name", "url", "digest", "model_id", "config_path"):
        assert len({getattr(row, of) for row in rows}) == 59, of
    assert sum(row.is_video for row in rows) == 12


def test_every_row_is_the_authors(zoo):
    assert len(zoo) == 59
    for row in RELEASED.values():
        record = zoo[row.digest]
        reported = dict(record["reported"])
        schedule = reported.pop("epochs", None) or reported.pop("iterations")
        assert {metric: str(value) for metric, value in row.reported.items()} == reported, row.name
        assert (row.url, row.model_id, row.config_path) == (record["url"], record["model_id"], record["config"])
        assert row.schedule.removesuffix("ep") == schedule
        # One row of the authors' table calls a Swin-L checkpoint R50; its settings don't.
        if row.name != "ade20k-instance-swin-large":
            assert BACKBONES[row.backbone].title == record["backbone"]


def test_every_setting_is_the_authors(zoo):
    for row in RELEASED.values():
        recorded = recorded_options(zoo[row.digest]["spec"])
        ours = {name: row.options()[name] for name in recorded}
        assert ours == recorded, row.name
        assert len(recorded) > 45
        assert set(row.options()) == set(DEFAULTS)


def test_config_and_processor_carry_what_a_checkpoint_knows(zoo, shared):
    for row in RELEASED.values():
        spec = zoo[row.digest]["spec"]
        facts = json.loads((shared / "data" / "labels" / f"{row.labels.name}.json").read_text())
        categories = facts["categories"]
        config, processor = row.config(), row.processor()
        assert list(config.id2label.values()) == [category["name"].strip() for category in categories]
        assert config.num_labels == spec["num_classes"]
        if "color" in categories[0]:
            assert config.label_colors == [category["color"] for category in categories]
        assert config.num_queries == spec["mask_former"]["num_object_queries"]
        assert config.ignore_value == processor.ignore_index == spec["ignore_value"]
        assert config.freeze_backbone_norm == (spec.get("resnets", {}).get("norm") == "FrozenBN")
        assert processor.task == row.task
        stuff = [category["id"] for category in categories if not category.get("isthing")]
        assert processor.label_ids_to_fuse == (stuff if row.task == "panoptic" else None)
        assert dict(processor.size) == {
            "shortest_edge": spec["input"]["min_size_test"],
            "longest_edge": spec["input"]["max_size_test"],
        }
        assert processor.threshold == spec["mask_former"]["test"]["object_mask_threshold"]
        assert processor.overlap_mask_area_threshold == 0.8
        assert processor.channel_order == "RGB"
        assert processor.semantic_resize_before_inference == (row.task != "semantic")


@pytest.mark.parametrize("name", RELEASED)
def test_yaml_of_a_row_reads_back_as_the_row(name, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(nested(RELEASED[name].options())))
    assert read_config(path) == RELEASED[name].options()
    assert is_video(RELEASED[name].options()) == RELEASED[name].is_video


def test_a_card_explains_its_metrics_and_claims_no_measurement():
    for row in RELEASED.values():
        description = row.card()["description"]
        assert "not measured again" in description
        assert ("ms+flip" in description) == (row.task == "semantic"), row.name


def test_list_shows_all_or_those_asked_for(repository):
    page = (repository / "docs" / "conversion.md").read_text(encoding="utf-8")
    assert f"```text\n{listing(['ade20k', 'instance'])}\n```" in page
    lines = listing().splitlines()
    assert len(lines) == 61 and lines[-1] == "59 checkpoints"
    assert all(lines[1 + i].startswith(f"{name} ") for i, name in enumerate(RELEASED))
    assert any("coco-panoptic-swin-large" in line and "PQ 57.8" in line and "COCO" in line for line in lines)
    assert listing(["cityscapes", "SEMANTIC"]).endswith("6 checkpoints")
    assert listing(["video"]).endswith("12 checkpoints")
    with pytest.raises(ValueError, match="'pascal'"):
        listing(["pascal"])


def test_unknown_name_suggests_close_ones():
    assert find_released("COCO_panoptic_Swin-Large") is RELEASED["coco-panoptic-swin-large"]
    with pytest.raises(ValueError, match="coco-panoptic-swin-large"):
        find_released("coco-panoptic-swinl")
    with pytest.raises(ValueError, match="--list"):
        find_released("?")


# --- every key ---


@pytest.fixture(scope="module")
def key_lists(shared) -> dict[str, dict[str, list[int]]]:
    """Keys and shapes of each released checkpoint."""
    return read_shapes(shared / "data" / "zoo" / "state_dict_shapes.json.gz")


@pytest.mark.parametrize("name", RELEASED)
def test_every_key_has_its_place_and_every_place_its_key(key_lists, name, repository):
    row, shapes = RELEASED[name], key_lists[name]
    result = account(row, shapes)
    assert result.is_complete, result
    counts = [len(kind) for kind in (shapes, result.stored, result.checked, (), (), (), result.filled)]
    message = f"| {name} | {' | '.join(map(str, counts))} | {result.parameters:,} | "
    assert message in (repository / "docs" / "conversion.md").read_text(encoding="utf-8")
    assert len(result.stored) + len(result.checked) == len(shapes)
    if row.backbone.startswith("swin"):
        blocks = sum(row.options()["MODEL.SWIN.DEPTHS"])
        assert [key.rpartition(".")[2] for key in result.checked] == ["relative_position_index"] * blocks
        assert result.filled == []
    else:
        counters = [key for key in shapes if key.endswith("num_batches_tracked")]
        norms = sum(key.endswith("running_mean") for key in shapes)
        assert len(result.filled) + len(counters) == norms
        assert bool(counters) == (row.options()["MODEL.RESNETS.NORM"] == "SyncBN")
        assert all(name.endswith("num_batches_tracked") for name in result.filled)
        assert result.checked == []


def key_list(row) -> dict[str, list[int]]:
    """Return keys and shapes of the original's form of a model, by converting our own back."""
    config = row.config()
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(config)
        saved = revert_weight_conversion(model, model.state_dict())
        return {name: list(value.shape) for name, value in invert_state_dict(saved, config).items()}


@pytest.mark.parametrize("name", ["coco-panoptic-r50", "ade20k-semantic-swin-tiny"])
def test_account_finds_what_does_not_fit(name):
    row = RELEASED[name]
    shapes = key_list(row)
    assert account(row, shapes).is_complete
    spoilt = dict(shapes)
    del spoilt["sem_seg_head.predictor.query_feat.weight"]
    spoilt["sem_seg_head.predictor.query_feat_2.weight"] = [100, 256]
    spoilt["sem_seg_head.predictor.class_embed.bias"] = [7]
    fused = "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.in_proj_bias"
    spoilt[fused] = [767]
    result = account(row, spoilt)
    assert not result.is_complete
    assert result.missing == ["model.transformer_module.queries_features.weight"]
    assert result.left == ["sem_seg_head.predictor.query_feat_2.weight"]
    assert sorted(result.reshaped) == ["sem_seg_head.predictor.class_embed.bias", fused]


def test_the_page_shows_the_count_of_a_conversion(repository):
    row = RELEASED["coco-panoptic-r50"]
    shapes = key_list(row)
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}  # as released
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(row.config())
    report = Report(
        read=len(shapes),
        written=len(model.state_dict()),
        parameters=account(row, shapes).parameters,
        **differences(shapes, row.config())._asdict(),
    )
    page = " ".join((repository / "docs" / "conversion.md").read_text(encoding="utf-8").split())
    assert str(report) in page


def test_rows_of_another_size_do_not_fit():
    shapes = key_list(RELEASED["coco-panoptic-r50"])
    assert account(RELEASED["coco-instance-r50"], shapes).reshaped
    assert account(RELEASED["coco-panoptic-r101"], shapes).missing
    assert account(RELEASED["coco-panoptic-swin-tiny"], shapes).left


def test_index_table_of_other_windows_is_noticed():
    row = RELEASED["ade20k-semantic-swin-tiny"]
    shapes = key_list(row)
    table = "backbone.layers.0.blocks.0.attn.relative_position_index"
    assert shapes[table] == [49, 49]
    assert account(row, {**shapes, table: [144, 144]}).reshaped == [table]


def test_account_prints_a_row_for_each_checkpoint(tmp_path, monkeypatch, capsys):
    row = RELEASED["coco-instance-r50"]
    monkeypatch.setattr(account_released, "RELEASED", {row.name: row})
    shapes = key_list(row)
    path = tmp_path / "shapes.json.gz"
    for broken in (False, True):
        if broken:
            shapes["more"] = [1]
        path.write_bytes(gzip.compress(json.dumps({row.config_path[:-5].replace("/", "_"): shapes}).encode()))
        assert account_released.main([str(path)]) == broken
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"| coco-instance-r50 | {len(shapes)} | ")
        assert f" | 0 | {int(broken)} | 0 | 0 | " in line
    path.write_bytes(gzip.compress(b"{}"))
    assert account_released.main([str(path)]) == 1
    assert "coco-instance-r50" in capsys.readouterr().err


# --- downloads, from a server of this machine ---


class Server:
    """Serves files on loopback. `breaks` is how many bytes each of the next answers stops after."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []
        self.knows_ranges = True
        self.asked: list[str | None] = []  # the Range header of each request
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        content = self.files.get(request.path)
        if content is None:
            request.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.knows_ranges else 0
        if start and start >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        stop = start + self.breaks.pop(0) if self.breaks else len(content)
        request.wfile.write(content[start:stop])
        request.close_connection = True

    def publish(self, content: bytes, digest: str | None = None) -> str:
        """Serve `content` under a name with its digest (or another one) and give the address."""
        path = f"/coco/model_final_{digest or hashlib.md5(content).hexdigest()[:6]}.pkl"
        self.files[path] = content
        return self.address + path


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download_module, "TIMEOUT", 5.0)
    monkeypatch.setattr(download_module.time, "sleep", lambda _: None)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


# --- from a name to a folder ---


SMALL = {
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 8,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 16,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.0,  # keep what random queries find, overlapping as it does
}
SMALL_RESNET = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 2,
}
NAME = "coco-panoptic-r50"


@pytest.fixture
def small_release(server, monkeypatch):
    """`coco-panoptic-r50` in a small form with random weights, served on loopback; gives our model of it."""
    backbone = released.BACKBONES["r50"]
    monkeypatch.setitem(released.BACKBONES, "r50", backbone._replace(options={**backbone.options, **SMALL_RESNET}))
    monkeypatch.setattr(released, "_COMMON", {**released._COMMON, **SMALL})
    monkeypatch.setattr(stock_checkpoints, "released_test_size", lambda dataset, task, backbone: (64, 128))
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(RELEASED[NAME].config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.class_predictor.bias[17] += 20  # so that the queries are sure of something: a horse …
        somewhere = model.model.transformer_module.decoder.mask_predictor.mask_embedder[-1][0].bias
        model.model.pixel_level_module.decoder.mask_projection.bias.copy_(somewhere.fill_(1.0))  # … somewhere
    content = as_released(model)
    row = dataclasses.replace(RELEASED[NAME], digest=hashlib.md5(content).hexdigest()[:6])
    monkeypatch.setitem(RELEASED, NAME, row)
    monkeypatch.setattr(released, "DOWNLOADS", server.address)
    server.files[row.url.removeprefix(server.address)] = content
    return model


def as_released(model: Mask2FormerForUniversalSegmentation) -> bytes:
    saved = revert_weight_conversion(model, model.state_dict())
    original = {name: value.numpy() for name, value in invert_state_dict(saved, model.config).items()}
    original = {name: value for name, value in original.items() if not name.endswith("num_batches_tracked")}
    return pickle.dumps({"model": OrderedDict(original), "__author__": "nobody"})


def run(*arguments) -> int:
    return convert_detectron2.main([str(argument) for argument in arguments])


def test_variant_becomes_a_working_model_with_its_card(small_release, server, tmp_path, capsys):
    server.breaks = [100_000]
    folder, cache = tmp_path / "made" / NAME, tmp_path / "cache"
    assert run("--variant", NAME, "--cache-dir", cache, "--output", folder, "--verify") == 0
    assert len(server.asked) == 2
    printed = capsys.readouterr().out
    assert "none left over" in printed and "not the authors' file" not in printed
    assert "horse" in printed
    picture = folder.parent / f"{NAME}.verify.png"
    assert f"Look at {picture}" in printed
    with Image.open(picture) as overlay, Image.open(BUNDLED_SCENES / "scene-1.png") as scene:
        assert overlay.size == scene.size
        assert np.abs(np.asarray(overlay).astype(int) - np.asarray(scene.convert("RGB"))).mean() > 1
    assert sorted(path.name for path in folder.parent.iterdir()) == [NAME, picture.name]

    model, loading = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixel_values = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.eval()(pixel_values), small_release(pixel_values)
    assert torch.equal(ours.class_queries_logits, theirs.class_queries_logits)
    assert torch.equal(ours.masks_queries_logits, theirs.masks_queries_logits)

    segments = pipeline("image-segmentation", model=str(folder))(Image.open(BUNDLED_SCENES / "scene-1.png"))
    assert {segment["label"] for segment in segments} == {"horse"}

    card = ModelCard.load(folder / "README.md")
    assert is_untouched(card)  # so that pushing it may write the repository's name into it
    assert card.data.license == "cc-by-nc-4.0"
    assert {result.metric_name.split(" ")[0]: result.metric_value for result in card.data.eval_results} == {
        "PQ": 51.9,
        "AP": 41.7,
        "mIoU": 61.7,
    }
    row = RELEASED[NAME]
    for message in (row.url, row.config_path, row.model_id, "50 epochs", "person", "things", "stuff", "| PQ | 51.9 |"):
        assert message in card.text, message
    assert "not measured again" in card.text and "ms+flip" not in card.text


def test_another_file_is_converted_without_the_authors_figures(small_release, server, tmp_path, capsys):
    with torch.no_grad():
        small_release.class_predictor.bias.add_(1)
    path = tmp_path / "mine.pkl"
    path.write_bytes(as_released(small_release))
    assert run("--variant", NAME, "--checkpoint", path, "--output", tmp_path / "out") == 0
    assert server.asked == []
    message = (
        f"mine.pkl is not the authors' file (its MD5 is {md5_of(path)}, theirs begins with {RELEASED[NAME].digest})"
    )
    assert f"{message}: neither their figures nor their licence are on the card" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results is None and card.data.license is None
    assert "51.9" not in card.text


def test_file_at_hand_is_checked_like_a_download(small_release, server, tmp_path, capsys):
    row = RELEASED[NAME]
    content = server.files[row.url.removeprefix(server.address)]
    path = tmp_path / row.url.rpartition("/")[2]
    path.write_bytes(content)
    assert run("--variant", NAME, "--checkpoint", path, "--output", tmp_path / "out") == 0
    assert "51.9" in (tmp_path / "out" / "README.md").read_text()
    path.write_bytes(content[:-1] + b"!")
    assert run("--variant", NAME, "--checkpoint", path, "--output", tmp_path / "other") == 1
    assert row.url in capsys.readouterr().err
    assert server.asked == []
    assert not (tmp_path / "other").exists()
    assert run("--variant", NAME, "--checkpoint", tmp_path / "none.pkl", "--output", tmp_path / "other") == 1
    assert "none.pkl" in capsys.readouterr().err


def test_file_of_another_variant_is_refused_even_where_it_fits(small_release, server, tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.pkl"
    path.write_bytes(server.files[RELEASED[NAME].url.removeprefix(server.address)])
    monkeypatch.setitem(RELEASED, "other", dataclasses.replace(RELEASED[NAME], digest="0" * 6))
    monkeypatch.setattr(convert_detectron2, "find_released", RELEASED.get)
    assert run("--variant", "other", "--checkpoint", path, "--output", tmp_path / "out") == 1
    assert f"It is that of {NAME}: convert it with --variant {NAME}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cityscapes-panoptic-r50", "has 133 classes (sem_seg_head.predictor.class_embed.weight), where 19 are"),
        ("coco-panoptic-r101", "is of another model. Missing from the checkpoint: backbone.res4.6"),
    ],
)
def test_file_that_does_not_fit_a_variant_is_refused(small_release, tmp_path, name, message, capsys):
    path = tmp_path / "mine.pkl"
    with torch.no_grad():
        small_release.class_predictor.bias.add_(1)
    path.write_bytes(as_released(small_release))
    assert run("--variant", name, "--checkpoint", path, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"mine.pkl is not the file of {name}. The checkpoint {message}" in error
    assert "MODEL." not in error and "trained with" not in error
    assert [file.name for file in tmp_path.iterdir()] == ["mine.pkl"]


def test_weights_that_are_not_finite_do_not_pass_verification(small_release, tmp_path, capsys):
    with torch.no_grad():
        small_release.class_predictor.weight.fill_(3e38)  # finite, but no sum of them is
    path = tmp_path / "mine.pkl"
    path.write_bytes(as_released(small_release))
    assert run("--variant", NAME, "--checkpoint", path, "--output", tmp_path / "out" / "model", "--verify") == 1
    assert "class_queries_logits are not finite" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_unreadable_photo_is_refused_before_anything_is_fetched(small_release, server, tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"no picture")
    assert run("--variant", NAME, "--output", tmp_path / "out", "--verify", "--photo", photo) == 1
    assert "photo.jpg" in capsys.readouterr().err
    assert server.asked == []
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", NAME], "--output"),
        (["--config-file", "c.yaml", "--output", "o"], "--checkpoint"),
        (["--config-file", "c.yaml", "--checkpoint", "c.pkl", "--output", "o", "--cache-dir", "d"], "--cache-dir"),
        (["--variant", NAME, "--output", "o", "--labels", "l.json"], "--labels"),
        (["--variant", NAME, "--output", "o", "--photo", "p.jpg"], "--verify"),
        (["--output", "o"], "--variant"),
        (["--list", "--variant", NAME], "not allowed"),
    ],
)
def test_conflicting_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_listing_does_not_wait_for_the_packages_that_convert(repository):
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'm2f_hf']); "  # importing them raises
        "import convert_detectron2; sys.exit(convert_detectron2.main(['--list', 'video']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository / "conversion", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "ytvis2021-instance-swin-large" in run.stdout


def test_command_line_lists_and_names_close_ones(tmp_path, capsys):
    assert run("--list", "ade20k", "instance") == 0
    assert "ade20k-instance-swin-large" in capsys.readouterr().out
    assert run("--list", "pascal") == 1
    assert run("--variant", "coco-panoptic-swinlarge", "--output", tmp_path / "out") == 1
    assert "coco-panoptic-swin-large" in capsys.readouterr().err


# --- the parts of a download ---


CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()


def test_download_arrives_whole_and_is_not_fetched_again(server, tmp_path, capsys):
    url = server.publish(CONTENT)
    path = download(url, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert path.name == url.rpartition("/")[2]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert "100%" in capsys.readouterr().err
    assert download(url, tmp_path / "cache") == path
    assert server.asked == [None]


def test_download_is_continued_where_it_broke_off(server, tmp_path):
    server.breaks = [1_000_000, 500_000]
    path = download(server.publish(CONTENT), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_download_is_continued_by_a_later_run(server, tmp_path, monkeypatch):
    url = server.publish(CONTENT)
    monkeypatch.setattr(download_module, "ATTEMPTS", 2)
    server.breaks = [1000, 1000]
    with pytest.raises(DownloadError, match="run again to continue"):
        download(url, tmp_path)
    assert [(file.suffix, file.stat().st_size) for file in tmp_path.iterdir()] == [(".part", 2000)]
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=2000-"
    # Whole, but not renamed any more: nothing is left to fetch.
    (whole,) = tmp_path.iterdir()
    whole.rename(f"{whole}.part")
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={len(CONTENT)}-"


def test_server_that_ignores_ranges_sends_all_again(server, tmp_path):
    server.knows_ranges = False
    server.breaks = [1_000_000]
    assert download(server.publish(CONTENT), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-"]


def test_part_that_is_longer_than_the_file_is_dropped(server, tmp_path):
    url = server.publish(CONTENT)
    (tmp_path / f"{url.rpartition('/')[2]}.part").write_bytes(b"x" * (len(CONTENT) + 1))
    assert download(url, tmp_path).read_bytes() == CONTENT


def test_file_of_another_digest_is_refused_and_not_kept(server, tmp_path):
    url = server.publish(CONTENT, digest="abcdef")
    with pytest.raises(DownloadError, match=r"begins with .* instead of abcdef.*Run again"):
        download(url, tmp_path)
    assert list(tmp_path.iterdir()) == []
    # A part from elsewhere is found out too, and the next run starts afresh.
    url = server.publish(CONTENT)
    (tmp_path / f"{url.rpartition('/')[2]}.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="was removed"):
        download(url, tmp_path)
    assert download(url, tmp_path).read_bytes() == CONTENT


def test_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    url = server.publish(CONTENT)
    (tmp_path / url.rpartition("/")[2]).write_bytes(b"damaged")
    assert download(url, tmp_path).read_bytes() == CONTENT


def test_missing_file_and_unreachable_server_are_reported(server, tmp_path, monkeypatch):
    missing = f"{server.address}/model_final_abcdef.pkl"
    with pytest.raises(DownloadError, match=r"404 .*--checkpoint"):
        download(missing, tmp_path)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(DownloadError, match=r"cannot be reached .*HTTPS_PROXY.*--checkpoint"):
        download(missing, tmp_path)
    monkeypatch.setenv("http_proxy", server.address)  # a proxy that isn't there either
    with pytest.raises(DownloadError, match="HTTPS_PROXY"):
        download("http://example.invalid/model_final_abcdef.pkl", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_silent_server_is_given_up(tmp_path, monkeypatch, server):
    monkeypatch.setattr(download_module, "TIMEOUT", 0.1)
    monkeypatch.setattr(Server, "answer", lambda self, request: threading.Event().wait(1))
    with pytest.raises(DownloadError, match="timed out"):
        download(server.publish(CONTENT), tmp_path)


def test_digest_comes_from_the_name(tmp_path):
    assert digest_in_name("model_final_94dc52.pkl") == "94dc52"
    assert digest_in_name("model_final.pkl") is None
    assert all(row.url.endswith(f"_{digest_in_name(row.url)}.pkl") for row in RELEASED.values())
    with pytest.raises(ValueError, match="MD5"):
        download("http://example.invalid/model.pkl", tmp_path)
    (tmp_path / "file").write_bytes(b"abc")
    assert md5_of(tmp_path / "file") == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321, appendix A.5

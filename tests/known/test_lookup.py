"""One question about a checkpoint, one line in answer."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi

from m2f_hf.known import lookup as checkpoint_lookup
from m2f_hf.known.lookup import find_config


@pytest.fixture
def hub(monkeypatch):
    """Gives every question the answer that is in it; `asked` is what was asked."""

    class Hub(ThreadingHTTPServer):
        status, code = 404, "RepoNotFound"
        asked: list[str] = []  # noqa: RUF012

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            self.send_response(server.status)
            self.send_header("X-Error-Code", server.code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = Hub(("127.0.0.1", 0), Answer)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(checkpoint_lookup, "HfApi", lambda token: HfApi(endpoint=endpoint, token=token))
    yield server
    server.shutdown()
    server.server_close()


def test_the_file_of_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("{}")
    assert find_config(tmp_path / "deep") == find_config(tmp_path, subfolder="deep") == tmp_path / "deep/config.json"
    with pytest.raises(FileNotFoundError, match=r"the folder .* has no config\.json"):
        find_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a file"):
        find_config(tmp_path / "deep" / "config.json")


def test_the_file_of_the_cache(tmp_path, hub):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_config("some/model", cache_dir=tmp_path) == snapshot / "config.json"
    assert find_config("some/model", cache_dir=tmp_path, revision="0" * 40, local_files_only=True).parent == snapshot
    with pytest.raises(FileNotFoundError, match="no such model in the cache"):
        find_config("other/model", cache_dir=tmp_path, local_files_only=True)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("status", "code", "kind", "message"),
    [
        (404, "RepoNotFound", FileNotFoundError, "no folder some/model and no such model on the Hub"),
        (404, "RevisionNotFound", FileNotFoundError, "has no branch, tag or commit v2"),
        (403, "GatedRepo", PermissionError, "needs its owner's consent"),
        (418, "", ConnectionError, "the Hub does not give some/model"),
    ],
)
def test_what_the_hub_answers(status, code, kind, message, hub, tmp_path):
    hub.status, hub.code = status, code
    with pytest.raises(kind, match=message) as caught:
        find_config("some/model", revision="v2", cache_dir=tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert hub.asked == ["/api/models/some/model/revision/v2"]


def test_a_hub_that_is_not_there_and_a_name_that_cannot_be_one(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder \./nope, and a model on the Hub is named owner/name"):
        find_config("./nope", cache_dir=tmp_path)
    assert hub.asked == []
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ConnectionError, match="no folder some/model, and the Hub cannot be reached"):
        find_config("some/model", cache_dir=tmp_path)

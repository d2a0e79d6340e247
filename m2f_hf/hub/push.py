"""Uploads to the Hub in one commit: a whole folder, or what `push_to_hub` of a model or processor saved.

A repository pushed from here holds what `save_pretrained` writes, a card, and the code that runs the model where this
package is not installed (`trust_remote_code=True`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedConfig

from ..model.configuration import Mask2FormerConfig
from ..model.modeling import Mask2FormerPreTrainedModel
from ..processing.image_processor import M2FImageProcessor
from .card import CARD, change_repository, is_made_here, is_untouched, mark_card, read_card, renew_card
from .code import CODE, add_auto_map, code_files
from .families import CONFIG, IMAGES, PROCESSOR, TYPE_KEYS, VIDEOS, Family, family_of, load_whole, read_settings


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_WEIGHT_FILE = re.compile(r"model.*\.safetensors(\.index\.json)?")
# What a checkpoint's folder may hold besides code; anything else is not sent.
_PUBLISHED = (".json", ".safetensors", ".md", ".txt", ".png", ".jpg", ".jpeg", ".webp", ".yaml", ".yml")
_RESULTS = ".eval_results"


# --- a whole folder ---


class HubFolder:
    """A folder that `save_pretrained` wrote, checked and ready to be published.

    Attributes:
        files: what would be sent: name in the repository -> the file, or its text where that differs from the file's.
        left_out: names in the folder that are not sent: pickles, other code, subfolders, hidden files.
        config, processor: those of the folder.
        family: whether they are of images or of clips.

    Raises:
        FileNotFoundError: no such folder, or it lacks the configuration, the processor or the weights.
        ValueError: another model's configuration or processor, stuff ids that the model has no label for, weights that
            are not this model's or not finite, a card that the Hub would not read.
        OSError, RuntimeError, SafetensorError: files that cannot be read.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._check_files()
        self.family = self._check_types()
        self.config = self.family.config.from_pretrained(self.folder)
        self.processor = self.family.processor.from_pretrained(self.folder)
        self._check_stuff()
        _, unexpected = load_whole(self.folder, self.family)
        if unexpected:
            raise ValueError(
                f"{self.folder} has {len(unexpected)} weights that its model has not, such as {min(unexpected)}: save "
                "it again with save_pretrained"
            )
        own_card = self.folder / CARD
        self._own_card = read_card(own_card) if own_card.is_file() else None
        self.files, self.left_out = self._contents()

    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        replace_card: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Send everything in one commit, so that the repository never shows half of it.

        What an interrupted upload has sent is not sent again. The card is the folder's `README.md`, or one made here.
        One that someone wrote or edited on the Hub stays.

        Args:
            repo_id: `owner/name`, or `name` for one's own account; made if need be.
            private: for a new repository; None is the account's default.
            revision: branch, made if need be; default: main.
            replace_card: whether to replace a card that someone wrote or edited, too.
            token: default: that of `hf auth login`.

        Raises:
            LocalTokenNotFoundError: no one is logged in (`huggingface_hub.errors`).
            ValueError: `private` for a repository that is public.
            HfHubHTTPError: the Hub refuses.
        """
        api = HfApi(token=token)
        api.whoami()  # before anything is made
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public: make it private on its page, or name another")
        _make_branch(api, repo_id, revision)
        files = {name: content for name, content in self.files.items() if name != CARD}
        published = _published_card(api, repo_id, revision)
        if published is None or replace_card or is_untouched(published):
            files[CARD] = self._card(published, repo_id)
        message = commit_message or "Upload model, processor, card and code"
        return _commit(api, repo_id, files, revision=revision, commit_message=message)

    def _check_files(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is no folder")
        for name, needed in ((CONFIG, (CONFIG,)), (PROCESSOR, (PROCESSOR,)), (_WEIGHTS[0], _WEIGHTS)):
            if not any((self.folder / file).is_file() for file in needed):
                raise FileNotFoundError(
                    f"{self.folder} has no {name}: save the model and the processor there with save_pretrained"
                )
        if all((self.folder / file).is_file() for file in _WEIGHTS):
            raise ValueError(
                f"{self.folder} has {' and '.join(_WEIGHTS)}: one is left from an earlier save, and the first is what "
                "would be loaded; remove the older"
            )

    def _check_types(self) -> Family:
        family = family_of(read_settings(self.folder / CONFIG))
        for name, key in TYPE_KEYS.items():
            found = read_settings(self.folder / name).get(key)
            if family is None or found != family.type_in(name):
                ours = [each.type_in(name) for each in ([family] if family else (IMAGES, VIDEOS))]
                raise ValueError(
                    f"{self.folder} has {key} {found!r} in {name}, not {' or '.join(map(repr, ours))}: load it with "
                    "m2f_hf and save_pretrained it, model and processor, into another folder"
                )
        assert family is not None
        return family

    def _check_stuff(self) -> None:
        num_labels = len(self.config.id2label or {})
        strays = [i for i in self.processor.label_ids_to_fuse or () if not 0 <= i < num_labels]
        if strays:
            raise ValueError(
                f"{self.folder} has {strays[0]} among label_ids_to_fuse in {PROCESSOR}, but the model's labels are 0 "
                f"to {num_labels - 1}: set `processor.label_ids_to_fuse = [...]`, the ids of the stuff classes, and "
                "save_pretrained the processor again"
            )

    def _contents(self) -> tuple[dict[str, Path | str], list[str]]:
        code = code_files(self.family)
        files: dict[str, Path | str] = {}
        left_out = []
        results = (self.folder / _RESULTS).glob("*.yaml")
        for path in [*sorted(self.folder.iterdir()), *sorted(results)]:
            name = path.relative_to(self.folder).as_posix()
            known = path.suffix.lower() in _PUBLISHED or path.name in ("LICENSE", "NOTICE")
            if path.is_file() and known and not path.name.startswith("."):
                files[name] = add_auto_map(path, self.family) if name in TYPE_KEYS else path
            elif f"{CODE}/{name}" not in code and name not in (CODE, _RESULTS):
                left_out.append(name + "/" * path.is_dir())
        return files | code, left_out

    def _card(self, published: ModelCard | None, repo_id: str) -> str:
        if self._own_card is None:
            return str(renew_card(published, self.config, self.processor, repo_id))
        if is_made_here(self._own_card) and is_untouched(self._own_card):
            return str(change_repository(self._own_card, repo_id))
        return (self.folder / CARD).read_text(encoding="utf-8")  # to the letter, as it was written


# --- push_to_hub of a model, a configuration, a processor ---


def register_push_to_hub() -> None:
    """Let `push_to_hub` and `save_pretrained(push_to_hub=True)` of our classes send the code and the card too.

    Both pass through `_upload_modified_files`. It is replaced from here, since the files of these classes must run
    alone on the Hub.
    """
    for cls in (Mask2FormerConfig, Mask2FormerPreTrainedModel, M2FImageProcessor):
        cls._upload_modified_files = _upload_saved_files  # type: ignore[method-assign, assignment]


def _upload_saved_files(
    self: Any,
    working_dir: str | os.PathLike,
    repo_id: str,
    files_timestamps: Mapping[str, float],
    commit_message: str | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **commit: Any,
) -> CommitInfo:
    """Send what was just saved, with the code and the card, in one commit: the last step of the stock `push_to_hub`.

    Args:
        files_timestamps: name -> time of the last change, of the files that were in the folder before.
    """
    api = HfApi(token=token)
    saved = [file for file in sorted(Path(working_dir).iterdir()) if file.is_file()]
    saved = [file for file in saved if file.stat().st_mtime > files_timestamps.get(file.name, -math.inf)]
    video_classes = tuple(cls for by_name in VIDEOS.auto_classes.values() for cls in by_name.values())
    family = VIDEOS if isinstance(self, video_classes) else IMAGES
    files: dict[str, Path | str] = {
        file.name: add_auto_map(file, family) if file.name in family.auto_classes else file for file in saved
    }
    files |= code_files(family)
    if not create_pr:
        _make_branch(api, repo_id, revision)
    published = _published_card(api, repo_id, revision)
    if published is None or is_untouched(published):
        card = _card_of_part(self, api, repo_id, revision, published)
        if card is not None:
            if CARD in files:  # the stock card, with the caller's tags
                tags = read_card(Path(working_dir, CARD)).data.to_dict().get("tags") or []
                card.data["tags"] = list(dict.fromkeys([*card.data.to_dict()["tags"], *tags]))
            files[CARD] = str(mark_card(card, repo_id))
    kinds = {M2FImageProcessor: "processor", PreTrainedConfig: "config", Mask2FormerPreTrainedModel: "model"}
    part = next(name for cls, name in kinds.items() if isinstance(self, cls))
    message = commit_message or f"Upload {part}, card and code"
    return _commit(api, repo_id, files, revision=revision, commit_message=message, create_pr=create_pr, **commit)


def _card_of_part(
    part: Any, api: HfApi, repo_id: str, revision: str | None, published: ModelCard | None
) -> ModelCard | None:
    """Return the card of what is pushed and what the repository has already, or None where it has no configuration."""
    config = part if isinstance(part, Mask2FormerConfig) else getattr(part, "config", None)
    config = config or _published_settings(api, repo_id, CONFIG, revision)
    if config is None:
        return None
    processor = part if isinstance(part, M2FImageProcessor) else _published_settings(api, repo_id, PROCESSOR, revision)
    return renew_card(published, config, processor, repo_id)


# --- a repository ---


def _download(api: HfApi, repo_id: str, name: str, revision: str | None) -> Path | None:
    """Return a file of the repository, or None where it has no such file."""
    try:
        return Path(api.hf_hub_download(repo_id, name, revision=revision))
    except EntryNotFoundError:
        return None


def _published_card(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    """Return the repository's card, or None where it has none; one that cannot be read is an empty, foreign one."""
    file = _download(api, repo_id, CARD, revision)
    try:
        return read_card(file) if file else None
    except ValueError:
        return ModelCard("")


def _published_settings(api: HfApi, repo_id: str, name: str, revision: str | None) -> Any:
    """Return the repository's configuration or processor, or None where it has none of ours."""
    file = _download(api, repo_id, name, revision)
    try:
        family = family_of(read_settings(file), name) if file else None
        if family is None or file is None:
            return None
        return (family.config if name == CONFIG else family.processor).from_pretrained(file.parent)
    except ValueError:
        return None


def _make_branch(api: HfApi, repo_id: str, revision: str | None) -> None:
    if revision is not None and not revision.startswith("refs/"):  # a pull request exists already, or does not
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _commit(
    api: HfApi, repo_id: str, files: Mapping[str, Path | str], *, revision: str | None, **arguments: Any
) -> CommitInfo:
    """Send all files in one commit. New weights replace the old ones, in however many files those were."""
    operations: list[Any] = [
        CommitOperationAdd(name, content.encode() if isinstance(content, str) else content)
        for name, content in files.items()
    ]
    if any(map(_WEIGHT_FILE.fullmatch, files)):
        # A single file left from before would be loaded in place of several new ones.
        old = filter(_WEIGHT_FILE.fullmatch, api.list_repo_files(repo_id, revision=revision))
        operations += [CommitOperationDelete(name) for name in old if name not in files]
    return api.create_commit(repo_id, operations, revision=revision, **arguments)

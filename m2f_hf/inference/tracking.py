"""Track objects through clips of any length: windows of frames, whose tracks are joined so that an object keeps its id.

Frames are encoded once, whatever the overlap of the windows, and their features are dropped with their window: a clip
of any length needs the memory of one window.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..model.modeling import EncodedImages, Mask2FormerPixelLevelModuleOutput
from ..model.modeling_video import Mask2FormerForVideoSegmentation, frames_at_once
from ..processing.frames import DamagedFrame, stream_frames
from ..processing.image_processor import Task
from ..processing.post_processing import check_max_detections, check_probabilities
from ..processing.video_processor import Mask2FormerVideoProcessor


# Breaks ties between tracks of equal masks, such as two classes of one query: the one of the same class goes on.
_SAME_LABEL = 1e-3


class WindowTracks(NamedTuple):
    """The N tracks of a window of T frames.

    Args:
        start: index of the window's first frame.
        masks: (N, T, h, w) bool, at any scale.
        embeddings: (N, C), the tracks' queries.
        class_probs: (N, K), without "no object".
        labels: each track's class.
        is_stuff: whether a track is all that the clip has of its class.
    """

    start: int
    masks: Tensor
    embeddings: Tensor
    class_probs: Tensor
    labels: Sequence[int]
    is_stuff: Sequence[bool]


@dataclass
class _Track:
    id: int
    last_seen: int
    masks: Tensor | None  # (T, h, w) bool, in the last window; None where it was not found there
    embedding: Tensor  # (C,), of length 1
    class_probs: Tensor  # (K,), of sum 1
    label: int
    votes: Counter[int] = field(default_factory=Counter)


class TrackMemory:
    """Joins the tracks of successive windows, one to one, and remembers those that are out of sight for a while.

    First by masks: the best one-to-one matching by the IoU on the frames that both windows have. The rest, with tracks
    that were out of sight, is matched by the similarity of the queries: the cosine of their embeddings x the agreement
    of their class probabilities (Bhattacharyya's coefficient). Two tracks that are both seen on the shared frames, but
    in different places, are never joined.

    Args:
        min_iou: least IoU of two tracks that are matched by their masks.
        min_similarity: least similarity of two tracks that are matched by their queries.
        memory: for how many frames a track that is out of sight is remembered.
    """

    def __init__(self, min_iou: float = 0.3, min_similarity: float = 0.6, memory: int = 100) -> None:
        self.min_iou, self.min_similarity, self.memory = min_iou, min_similarity, memory
        self._tracks: list[_Track] = []
        self._stuff: dict[int, int] = {}  # label -> id
        self.end = 0
        self._num_ids = 0

    def __len__(self) -> int:
        """Count the tracks that are remembered, without stuff."""
        return len(self._tracks)

    def join(self, window: WindowTracks, scores: Sequence[float] | None = None) -> tuple[list[int], list[int]]:
        """Return the ids of a window's tracks, from 1, and their labels by all windows so far, weighted by the scores.

        Windows come in the order of time; each has frames that the one before does not have.
        """
        things = [index for index, is_stuff in enumerate(window.is_stuff) if not is_stuff]
        found = self._describe(window, things)
        self._tracks = [track for track in self._tracks if window.start - track.last_seen - 1 <= self.memory]
        known = self._match(found, self.end - window.start)
        end = window.start + window.masks.shape[1]
        for track in self._tracks:
            track.masks = None
        ids, labels = [0] * len(window.labels), list(window.labels)
        for index, new in zip(things, found, strict=True):
            track = known.get(new.id, new)
            if track is new:
                track.id = self._new_id()
                self._tracks.append(track)
            else:
                track.masks, track.embedding, track.class_probs = new.masks, new.embedding, new.class_probs
                track.last_seen = max(track.last_seen, new.last_seen)
            track.votes[window.labels[index]] += scores[index] if scores else 1.0  # type: ignore[assignment]
            track.label = track.votes.most_common(1)[0][0]
            ids[index], labels[index] = track.id, track.label
        for index, is_stuff in enumerate(window.is_stuff):
            if is_stuff:
                label = window.labels[index]
                ids[index] = self._stuff[label] = self._stuff.get(label) or self._new_id()
        self.end = end
        return ids, labels

    def _new_id(self) -> int:
        self._num_ids += 1
        return self._num_ids

    @staticmethod
    def _describe(window: WindowTracks, things: list[int]) -> list[_Track]:
        """Return the window's things as tracks whose ids are their positions in `things`."""
        is_seen = window.masks.flatten(2).any(2).cpu()  # (N, T)
        tracks = []
        for position, index in enumerate(things):
            frames = is_seen[index].nonzero()[:, 0].tolist()
            probs = window.class_probs[index].float()
            tracks.append(
                _Track(
                    id=position,
                    last_seen=window.start + (frames[-1] if frames else -1),
                    masks=window.masks[index],
                    embedding=torch.nn.functional.normalize(window.embeddings[index].float(), dim=0),
                    class_probs=probs / probs.sum().clamp(min=1e-12),
                    label=window.labels[index],
                )
            )
        return tracks

    def _match(self, found: list[_Track], num_shared: int) -> dict[int, _Track]:
        """Return position in `found` -> the known track that it continues."""
        if not found or not self._tracks:
            return {}
        shape = (len(self._tracks), len(found))
        overlaps, is_apart = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        current = [index for index, track in enumerate(self._tracks) if track.masks is not None]
        if num_shared > 0 and current:
            before = torch.stack([self._tracks[index].masks[-num_shared:] for index in current])  # type: ignore[index]
            now = torch.stack([track.masks[: before.shape[1]] for track in found])  # type: ignore[index]
            overlaps[current], both_seen = _overlaps(before, now)
            is_apart[current] = both_seen & (overlaps[current] < self.min_iou)
        same_label = torch.tensor([[old.label == new.label for new in found] for old in self._tracks])
        pairs = _assign(overlaps + _SAME_LABEL * same_label, overlaps >= max(self.min_iou, 1e-6))

        old, new = (torch.stack([track.embedding for track in tracks]) for tracks in (self._tracks, found))
        old_probs, new_probs = (
            torch.stack([track.class_probs for track in tracks]).sqrt() for tracks in (self._tracks, found)
        )
        # (known, C) x (found, C) -> (known, found), times the same of K classes
        similarity = ((old @ new.T) * (old_probs @ new_probs.T)).cpu()
        is_allowed = (similarity >= self.min_similarity) & ~is_apart
        for row, column in pairs:
            is_allowed[row], is_allowed[:, column] = False, False
        pairs += _assign(similarity + _SAME_LABEL * same_label, is_allowed)
        return {column: self._tracks[row] for row, column in pairs}


def _overlaps(before: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU of tubes (P, T, h, w) and (N, T, h, w) bool, and whether both have a pixel: (P, N), on the CPU."""
    ours, theirs = before.flatten(1).float(), now.flatten(1).float()
    common = ours @ theirs.T
    areas, other_areas = ours.sum(1)[:, None], theirs.sum(1)
    return (common / (areas + other_areas - common).clamp(min=1)).cpu(), ((areas > 0) & (other_areas > 0)).cpu()


def _assign(values: Tensor, is_allowed: Tensor) -> list[tuple[int, int]]:
    """Return the one-to-one pairs with the largest sum of values, among the allowed ones."""
    rows, columns = linear_sum_assignment(torch.where(is_allowed, values, 0).numpy(), maximize=True)
    is_pair = is_allowed.numpy()[rows, columns]
    return list(zip(rows[is_pair].tolist(), columns[is_pair].tolist(), strict=True))


class _FeatureWindow:
    """Features of the last frames, in the order of time, in buffers of one window's size.

    The first frames that room is made for are a whole window, or all of a shorter clip.
    """

    def __init__(self) -> None:
        self.size, self.count = 0, 0
        self._maps: list[Tensor] = []  # (1, size, C, h, w) each
        self._sizes: tuple[Tensor, Tensor | None] | None = None

    def make_room(self, number: int) -> None:
        """Drop the earliest frames to leave room for a number of new ones."""
        self.size = self.size or number
        surplus = max(0, self.count + number - self.size)
        for level in self._maps:
            for frame in range(surplus, self.count):
                level[:, frame - surplus] = level[:, frame]
        self.count -= surplus

    def add(self, encoded: EncodedImages) -> None:
        pixel_level: Any = encoded.pixel_level
        levels = [pixel_level.decoder_last_hidden_state, *pixel_level.decoder_hidden_states]
        self._sizes = encoded.image_sizes, encoded.hidden_sizes
        if not self._maps:
            self._maps = [level.new_empty(1, self.size, *level.shape[2:]) for level in levels]
        number = levels[0].shape[1]
        for level, values in zip(self._maps, levels, strict=True):
            level[:, self.count : self.count + number] = values
        self.count += number

    def encoded(self) -> EncodedImages:
        assert self._sizes is not None
        mask_features, *others = (level[:, : self.count] for level in self._maps)
        pixel_level = Mask2FormerPixelLevelModuleOutput(
            decoder_last_hidden_state=mask_features, decoder_hidden_states=tuple(others)
        )
        return EncodedImages(pixel_level, *self._sizes)


class ClipTracker:
    """Tracks the objects of clips of any length with a video model: frames stream in, and results stream out.

    The model reads `window` frames at a time, `overlap` of which the next window reads again; the tracks of the windows
    are joined by [`TrackMemory`]. For a clip no longer than a window, results are those of one forward pass and
    post-processing.

    Args:
        model: a [`Mask2FormerForVideoSegmentation`] in evaluation mode.
        processor: its [`Mask2FormerVideoProcessor`].
        window: frames that the masked-attention decoder reads at once, 1 or more.
        overlap: frames that successive windows share, less than `window`; by default half of it. With 0, tracks are
            joined by the similarity of their queries alone. The last window has its full length and may share more.
        task: "instance", whose tracks may overlap, or "panoptic", whose do not, with stuff; None: the processor's.
        threshold: least score of a track. None: the processor's for the task; for instances 0.5 where the processor's
            is 0, since tracks of any score would be followed.
        mask_threshold: None: the processor's.
        max_detections: most tracks of one window, for instances; None: the processor's.
        use_mask_quality: see `post_process_video_instance_segmentation`; None: the processor's.
        min_iou, min_similarity, memory: see [`TrackMemory`].

    Raises:
        ValueError: an overlap as long as the window, a number out of range, a model in training mode.
        TypeError: a model or a processor that is not for video, `window` or `overlap` that is no whole number.
    """

    def __init__(
        self,
        model: Mask2FormerForVideoSegmentation,
        processor: Mask2FormerVideoProcessor,
        *,
        window: int = 8,
        overlap: int | None = None,
        task: Task | None = None,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        max_detections: int | None = None,
        use_mask_quality: bool | None = None,
        min_iou: float = 0.3,
        min_similarity: float = 0.6,
        memory: int = 100,
    ) -> None:
        window = operator.index(window)
        overlap = window // 2 if overlap is None else operator.index(overlap)
        if window < 1:
            raise ValueError(f"window must be at least 1 frame, not {window}")
        if not 0 <= overlap < window:
            raise ValueError(f"overlap {overlap} must be 0 or more and less than window {window}: windows must move on")
        if not isinstance(model, Mask2FormerForVideoSegmentation):
            raise TypeError(
                f"{type(model).__name__} is no video model: load the checkpoint with "
                "Mask2FormerForVideoSegmentation.from_pretrained"
            )
        if not isinstance(processor, Mask2FormerVideoProcessor):
            raise TypeError(
                f"{type(processor).__name__} is no video processor: load it with "
                "Mask2FormerVideoProcessor.from_pretrained"
            )
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        if memory < 0 or not 0 <= min_iou <= 1 or not 0 <= min_similarity <= 1:
            raise ValueError(
                f"min_iou {min_iou} and min_similarity {min_similarity} must be numbers from 0 to 1, and memory "
                f"{memory} a number of frames, 0 or more"
            )
        self.model, self.processor, self.window, self.overlap = model, processor, window, overlap
        self.task = processor.task if task is None else task
        processor.check_task(self.task)
        if self.task == "panoptic" and max_detections is not None:
            raise ValueError("max_detections is for task='instance': panoptic tracks compete for their pixels instead")
        if max_detections is not None:
            check_max_detections(max_detections)
        if threshold is None:
            threshold = processor.threshold if self.task == "panoptic" else processor.instance_threshold or 0.5
        self.settings: dict[str, Any] = {
            "threshold": threshold,
            "mask_threshold": processor.mask_threshold if mask_threshold is None else mask_threshold,
        }
        check_probabilities(**self.settings)
        self.settings["use_mask_quality"] = use_mask_quality
        if self.task == "instance":
            self.settings["max_detections"] = max_detections
        self._memory_settings = (min_iou, min_similarity, memory)

    def __call__(self, frames: Any, data_format: str | None = None) -> Iterator[dict[str, Any]]:
        """
        Track one clip.

        Args:
            frames: whatever [`stream_frames`] takes, or its iterator; at most a window of frames is held.
            data_format: see [`stream_frames`].

        Returns:
            An iterator of one result for each frame, in order and as soon as its window is done: `frame`, its index
            from 0; `segmentation`, for instances (N, height, width) bool, the masks of the tracks that have a pixel in
            the frame, by falling score, otherwise (height, width) int32 ids, 0 for void; `segments_info`, for each of
            them `id` (from 1, the same in all frames), `label_id` (by all windows so far), `isthing` (None where the
            processor does not tell), `score` (in this window) and `area` in pixels. A damaged frame has no segments,
            and `damaged` says why.

        Raises:
            ValueError, FileNotFoundError, ImportError: as `stream_frames`.
        """
        return self._track(stream_frames(frames, data_format))

    def _track(self, items: Iterator[np.ndarray | DamagedFrame]) -> Iterator[dict[str, Any]]:
        features, memory = _FeatureWindow(), TrackMemory(*self._memory_settings)
        batch: list[np.ndarray | DamagedFrame] = []  # since the last window
        size: tuple[int, ...] = (0, 0)
        num_missing, num_results = self.window, 0
        while True:
            item = next(items, None)
            if item is not None:
                batch.append(item)
                num_missing -= not isinstance(item, DamagedFrame)
            if batch and (item is None or num_missing == 0):
                reasons = [entry.reason if isinstance(entry, DamagedFrame) else None for entry in batch]
                new = [entry for entry in batch if not isinstance(entry, DamagedFrame)]
                if new:
                    size = new[0].shape[-2:]
                results = self._read_window(new, features, memory) if new else iter(())
                del new
                batch, num_missing = [], self.window - self.overlap
                for reason in reasons:
                    empty = {"segmentation": self._empty_segmentation(size), "segments_info": [], "damaged": reason}
                    yield {"frame": num_results, **(next(results) if reason is None else empty)}
                    num_results += 1
            if item is None:
                return

    def _empty_segmentation(self, size: tuple[int, ...]) -> Tensor:
        if self.task == "panoptic":
            return torch.zeros(size, dtype=torch.int32)
        return torch.zeros(0, *size, dtype=torch.bool)

    @torch.inference_mode()
    def _read_window(
        self, frames: list[np.ndarray], features: _FeatureWindow, memory: TrackMemory
    ) -> Iterator[dict[str, Any]]:
        """Return the results of new frames, read with as many earlier ones as the window holds."""
        features.make_room(len(frames))
        step = frames_at_once(self.model.config, self.model.device)
        for start in range(0, len(frames), step):
            inputs: Any = self.processor(
                frames[start : start + step], input_data_format="channels_first", return_tensors="pt"
            )
            features.add(self.model.encode_frames(**inputs.to(self.model.device)))
        outputs: Any = self.model.decode_frames(features.encoded())
        (tracks,) = self.processor.post_process(
            outputs, self.task, target_sizes=[frames[0].shape[-2:]], **self.settings
        )
        infos = [info for info in tracks["segments_info"] if any(info["areas"])]
        queries = torch.tensor([info["query"] for info in infos], dtype=torch.int64, device=self.model.device)
        threshold = torch.logit(torch.tensor(float(self.settings["mask_threshold"])))
        window = WindowTracks(
            start=memory.end + len(frames) - features.count,
            # At the scale of the logits, a sixteenth of the pixels, which is enough to compare masks.
            masks=outputs.masks_queries_logits[0, queries] > threshold.to(self.model.device),
            embeddings=outputs.transformer_decoder_last_hidden_state[0, queries],
            class_probs=outputs.class_queries_logits[0, queries].float().softmax(-1)[:, :-1],
            labels=[info["label_id"] for info in infos],
            is_stuff=[info.get("was_fused", False) for info in infos],
        )
        ids, labels = memory.join(window, [info["score"] for info in infos])
        for info, track, label in zip(infos, ids, labels, strict=True):
            info["track"], info["label_id"] = track, label
        return self._split_frames(tracks["segmentation"].cpu(), infos, len(frames))

    def _split_frames(
        self, segmentation: Tensor, infos: list[dict[str, Any]], num_new: int
    ) -> Iterator[dict[str, Any]]:
        """Yield the results of a window's last frames; `infos` have the id of their `track`."""
        is_stuff_known = self.processor.label_ids_to_fuse is not None
        track_ids = torch.zeros(1 + max((info["id"] for info in infos), default=0), dtype=torch.int32)
        for info in infos:
            track_ids[info["id"]] = info["track"]
        for frame in range(-num_new, 0):
            present = [info for info in infos if info["areas"][frame]]
            if self.task == "panoptic":
                frame_map = track_ids[segmentation[frame].long()]
            else:
                frame_map = segmentation[[info["id"] for info in present], frame]
            yield {
                "segmentation": frame_map,
                "segments_info": [
                    {
                        "id": info["track"],
                        "label_id": info["label_id"],
                        "isthing": info.get("isthing", True if is_stuff_known else None),
                        "score": info["score"],
                        "area": info["areas"][frame],
                    }
                    for info in present
                ],
            }


def to_id_map(result: Mapping[str, Any]) -> np.ndarray:
    """Paint a frame's result as a map: (height, width) int32 ids, 0 where there is none; the better score on top."""
    masks = np.asarray(result["segmentation"])
    if masks.ndim == 2:
        return masks
    ids = np.zeros(masks.shape[1:], dtype=np.int32)
    for mask, info in reversed(list(zip(masks, result["segments_info"], strict=True))):
        ids[mask] = info["id"]
    return ids

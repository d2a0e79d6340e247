"""Average precision of video instances as a module of the `evaluate` library."""

import datasets

from m2f_hf import metrics
from m2f_hf.metrics import streaming, video_ap


class VideoAp(streaming.StreamingMetric):
    """Settings: `categories`, in COCO's form."""

    measure = metrics.VideoAP
    citation = "Yang et al., Video Instance Segmentation, ICCV 2019, arXiv 1905.04804"
    urls = ("https://arxiv.org/abs/1905.04804", "https://cocodataset.org/#detection-eval")
    inputs = """
Predictions: for each video the found instances as `segments_info`, each with `label_id` (or `category_id`), `score`,
and `segmentations`: a mask, run lengths or None for each frame. References: items of a `VideoDataset`: `video_id`,
`frames`, `height`, `width`, `segments_info`, and the masks in `segmentation_maps` or as `segmentations` of each
segment."""

    def features(self):
        rle = {"size": [datasets.Value("int64")], "counts": datasets.Value("string")}
        segment = {"id": datasets.Value("int64"), "category_id": datasets.Value("int64"), "segmentations": [rle]}
        found = {"segments_info": [{**segment, "score": datasets.Value("float64")}]}
        return {"predictions": found, "references": {"video_id": datasets.Value("int64"), "segments_info": [segment]}}

    def update(self, prediction, reference):
        self.metric.update(
            reference["video_id"],
            (len(reference["frames"]), reference["height"], reference["width"]),
            prediction["segments_info"],
            video_ap.tubes(reference),
        )

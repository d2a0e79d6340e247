"""Panoptic quality as a module of the `evaluate` library."""

import datasets

from m2f_hf import metrics
from m2f_hf.metrics import streaming


class PanopticQuality(streaming.StreamingMetric):
    """Settings: `categories`, in COCO's form with contiguous ids."""

    measure = metrics.PanopticQuality
    citation = "Kirillov et al., Panoptic Segmentation, CVPR 2019, arXiv 1801.00868"
    urls = ("https://arxiv.org/abs/1801.00868", "https://github.com/cocodataset/panopticapi")
    inputs = """
Predictions: results of `post_process_panoptic_segmentation`. References: items of a data set, `segmentation_map` and
`segments_info` (`id`, `category_id`, maybe `iscrowd`)."""

    def features(self):
        segments = {"id": datasets.Value("int64"), "category_id": datasets.Value("int64")}
        labels = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        image = {"segmentation": labels, "segments_info": [segments]}
        return {"predictions": image, "references": image}

    def update(self, prediction, reference):
        target = reference["segmentation_map" if "segmentation_map" in reference else "segmentation"]
        self.metric.update(
            streaming.to_array(prediction["segmentation"]),
            prediction["segments_info"],
            streaming.to_array(target),
            reference["segments_info"],
        )

"""Panoptic quality as a module of the `evaluate` library."""

import datasets
import evaluate

from m2f_hf import metrics
from m2f_hf.metrics import streaming


class PanopticQuality(streaming.StreamingMetric):
    """Settings: `categories`, in COCO's form with contiguous ids."""

    def _info(self):
        segments = {"id": datasets.Value("int64"), "category_id": datasets.Value("int64")}
        image = {"segmentation": datasets.Sequence(datasets.Sequence(datasets.Value("int64")))}
        image["segments_info"] = [segments]
        return evaluate.MetricInfo(
            description=metrics.PanopticQuality.__doc__,
            citation="Kirillov et al., Panoptic Segmentation, CVPR 2019, arXiv 1801.00868",
            inputs_description="""
Predictions: results of `post_process_panoptic_segmentation`. References: items of a data set, `segmentation_map` and
`segments_info` (`id`, `category_id`, maybe `iscrowd`).""",
            features=datasets.Features({"predictions": image, "references": image}),
            reference_urls=["https://arxiv.org/abs/1801.00868", "https://github.com/cocodataset/panopticapi"],
        )

    def build(self, **settings):
        return metrics.PanopticQuality(**settings)

    def update(self, prediction, reference):
        target = reference["segmentation_map" if "segmentation_map" in reference else "segmentation"]
        self.metric.update(
            streaming.to_array(prediction["segmentation"]),
            prediction["segments_info"],
            streaming.to_array(target),
            reference["segments_info"],
        )

"""Mask average precision as a module of the `evaluate` library."""

import datasets

from m2f_hf import metrics
from m2f_hf.metrics import evaluation, streaming


class MaskAp(streaming.StreamingMetric):
    """Settings: `categories`, in COCO's form."""

    measure = metrics.MaskAP
    citation = "Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014, arXiv 1405.0312"
    urls = ("https://cocodataset.org/#detection-eval", "https://github.com/cocodataset/cocoapi")
    inputs = """
Predictions: results of `post_process_instance_segmentation(outputs, threshold=0, return_coco_annotation=True)` (or
`return_binary_maps=True`). References: items of a data set, `image_id`, `segments_info`, and the masks in a
`segmentation_map` or, where they may overlap, as `segmentation` of each segment, with the `image`."""

    def features(self):
        rle = {"size": [datasets.Value("int64")], "counts": datasets.Value("string")}
        segment = {"id": datasets.Value("int64"), "category_id": datasets.Value("int64")}
        found = {"segments_info": [{**segment, "score": datasets.Value("float64")}], "segmentation": [rle]}
        target = {"image_id": datasets.Value("int64"), "segments_info": [{**segment, "segmentation": rle}]}
        return {"predictions": found, "references": target}

    def update(self, prediction, reference):
        self.metric.update(
            reference["image_id"],
            evaluation.image_size(reference),
            evaluation.detections(prediction),
            evaluation.with_masks(reference),
        )

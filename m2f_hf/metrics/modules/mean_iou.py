"""Mean IoU and accuracies as a module of the `evaluate` library."""

import datasets

from m2f_hf import metrics
from m2f_hf.metrics import streaming


class MeanIou(streaming.StreamingMetric):
    """Settings: `num_classes`, a number or the classes in COCO's form; maybe `ignore_index`."""

    measure = metrics.MeanIoU
    citation = "Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR 2015, arXiv 1411.4038"
    urls = ("https://arxiv.org/abs/1411.4038",)
    inputs = """
Predictions: label maps (H, W), as of `post_process_semantic_segmentation`. References: label maps of that size, with
`ignore_index` where a pixel does not count."""

    def features(self):
        labels = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return {"predictions": labels, "references": labels}

    def update(self, prediction, reference):
        self.metric.update(streaming.to_array(prediction), streaming.to_array(reference))

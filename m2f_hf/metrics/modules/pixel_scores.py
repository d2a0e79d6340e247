"""Scores of single masks as a module of the `evaluate` library."""

import datasets

from m2f_hf import metrics
from m2f_hf.metrics import streaming


class PixelScores(streaming.StreamingMetric):
    """Settings: maybe `threshold`; `label`, where maps of labels are compared, the class meant; `ignore_index`."""

    measure = metrics.PixelScores
    inputs = """
Predictions: (H, W) masks of bool or probabilities; references: (H, W) masks of bool or 0 and 1. With the setting
`label` both are label maps, and the scores are that class's; pixels of `ignore_index` in the reference don't count."""

    def features(self):
        mask = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        return {"predictions": mask, "references": mask}

    def build(self, *, label=None, ignore_index=255, **settings):
        self.label, self.ignore_index = label, ignore_index
        return super().build(**settings)

    def update(self, prediction, reference):
        predicted, target = streaming.to_array(prediction), streaming.to_array(reference)
        if self.label is not None:
            self.metric.update(predicted == self.label, target == self.label, target == self.ignore_index)
            return
        if not ((target == 0) | (target == 1)).all():
            raise ValueError("A reference holds other values than 0 and 1: for label maps give the setting `label`.")
        self.metric.update(predicted, target.astype(bool))

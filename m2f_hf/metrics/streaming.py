"""The base of the `evaluate` modules in `modules`: each image is measured when it is added, and no map is stored.

(`evaluate`'s own base writes everything into an Arrow file first.) Needs `evaluate`: `pip install "m2f_hf[train]"`.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate

from .base import Gather, Metric, merged
from .evaluation import to_array


__all__ = ["StreamingMetric", "to_array"]


class StreamingMetric(evaluate.Metric):
    """An `evaluate.Metric` around a `measure` of this package; `evaluate.load` takes its settings after the path.

    Several processes are combined by `compute(gather=…)` instead of `evaluate`'s `num_process`, which needs a shared
    file system and an image for each.

    Raises:
        ValueError: for `num_process` other than 1.
    """

    def __init__(self, *arguments: Any, num_process: int = 1, **settings: Any) -> None:
        if num_process != 1:
            raise ValueError(
                "num_process is not used here: load the module in every process, add its images to each, and call "
                "compute(gather=accelerate.utils.gather_object) in all."
            )
        own = ("config_name", "keep_in_memory", "cache_dir", "process_id", "seed", "experiment_id", "hash", "timeout")
        super().__init__(*arguments, **{name: settings.pop(name) for name in own if name in settings})
        self.settings = settings
        self._reset()

    measure: type[Metric]
    citation = ""
    inputs = ""
    urls: Sequence[str] = ()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.measure.__doc__,
            citation=self.citation,
            inputs_description=self.inputs,
            features=datasets.Features(self.features()),
            reference_urls=list(self.urls),
        )

    @abstractmethod
    def features(self) -> dict[str, Any]:
        """Return the form of `predictions` and `references` in the language of `datasets`."""

    def build(self, **settings: Any) -> Metric:
        """Make the measure."""
        return self.measure(**settings)

    @abstractmethod
    def update(self, prediction: Any, reference: Any) -> None:
        """Add one image to `self.metric`."""

    def _reset(self) -> None:
        self.metric: Any = self.build(**self.settings)
        self.num_images = 0

    def __len__(self) -> int:
        return self.num_images

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one image."""
        _refuse(kwargs)
        self.update(prediction, reference)
        self.num_images += 1

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of images: one prediction and one reference for each."""
        _refuse(kwargs)
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references: pass one of each")
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(
        self,
        *,
        predictions: Iterable[Any] | None = None,
        references: Iterable[Any] | None = None,
        gather: Gather | None = None,
    ) -> dict[str, Any]:
        """Return the figures over all images added, and these if given, and reset the module.

        With `gather` (such as `accelerate.utils.gather_object`) those of all processes, on every one; all must call it.
        """
        if (predictions is None) != (references is None):
            raise ValueError("predictions and references come together: pass both or neither")
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        parts = [self.metric] if gather is None else gather([self.metric])
        result = merged(parts).compute()
        self._reset()
        return result


def _refuse(unknown: dict[str, Any]) -> None:
    if unknown:
        raise ValueError(f"unknown inputs {', '.join(unknown)}: pass predictions and references")

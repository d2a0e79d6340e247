"""Measure a model on a labelled data set: PQ, mask AP, mIoU or video AP, per class, with pictures of its worst.

    accelerate launch examples/evaluate.py --model path/or/hub/id --dataset path/to/folder --output runs/evaluation

`m2f evaluate` runs the same in one process; docs/evaluation.md has the options and what is written.
"""

from m2f_hf.metrics.evaluate_dataset import EvaluationArguments, evaluate_dataset
from m2f_hf.metrics.options import parse_options


def main(arguments: list[str] | None = None) -> None:
    args = parse_options(EvaluationArguments, arguments, __doc__)
    try:
        evaluate_dataset(args)
    except (ValueError, OSError, ImportError) as error:  # the message says what to do
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

"""Train Mask2Former on your images or videos, for any of its tasks, on one or several processes.

    accelerate launch examples/finetune.py --dataset path/to/data --model path/or/hub/id --output runs/mine
    accelerate launch examples/finetune.py run.yaml --resume

`--dataset` is what `m2f_hf.data.open_dataset` opens (COCO's files, label maps, YouTube-VIS' files, a data set on the
Hub), or "shapes" or "moving_shapes", generated scenes and videos. What is not given is chosen from the data and the
checkpoint, and printed with the reason. In the output folder: `best/`, a checkpoint for `from_pretrained` with its
card; `training_log.jsonl`; `predictions/`, pictures of predictions next to targets; and the last `checkpoint-…`, from
which an interrupted run goes on with `--resume`, exactly as if it had not been interrupted.

`m2f train` runs the same. Copy this file to train on data or a model of your own:

    data = Data(train, validation, categories, task)  # items as docs/data.md describes them
    start = Start(model, processor, "where they come from")  # or load_start(args, data)
"""

from m2f_hf.training import FinetuningArguments, finetune, parse_options


def main(arguments: list[str] | None = None) -> None:
    args = parse_options(FinetuningArguments, arguments, __doc__)
    finetune(args)  # or finetune(args, data, start)


if __name__ == "__main__":
    main()

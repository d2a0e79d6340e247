"""Fine-tune Mask2Former with `transformers.Trainer`; `m2f train` and examples/finetune.py do more.

    python examples/finetune_with_trainer.py --dataset path/to/data --model path/or/hub/id --output runs/mine

The model returns `loss` like any other, so the Trainer needs two things: a collator, since masks differ in number from
image to image, and the original's groups of parameters. The figures at the end come from `Evaluation`.
"""

import argparse

import torch
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments

from m2f_hf import M2FImageProcessor, Mask2FormerForUniversalSegmentation
from m2f_hf.data import open_dataset
from m2f_hf.data.augmentation import TrainingTransform
from m2f_hf.data.loading import CollateSamples, TrainingStream, evaluation_loader, to_model_inputs
from m2f_hf.known.recipes import default_recipe
from m2f_hf.metrics import Evaluation, evaluate_model
from m2f_hf.training import set_classes
from m2f_hf.training.optimization import choose_num_steps, get_parameter_groups, scale_learning_rate
from m2f_hf.training.start import set_task


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args(arguments)

    data = open_dataset(args.dataset)
    print(data.report)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(args.model, dtype=torch.float32)
    print(set_classes(model, data.categories))
    processor = M2FImageProcessor.from_pretrained(args.model)
    set_task(processor, data)

    recipe = default_recipe(processor.size)
    collate = CollateSamples(processor)
    rate = scale_learning_rate(args.batch_size, recipe.learning_rate).value
    steps = args.steps or int(choose_num_steps(len(data.train), args.batch_size).value)
    stream = TrainingStream(data.train, TrainingTransform(recipe), seed=0)  # without end; a Trainer wants a length
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            per_device_train_batch_size=args.batch_size,
            max_steps=steps,
            max_grad_norm=recipe.max_grad_norm,
            lr_scheduler_type="polynomial",
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,  # the collator names what the model takes
            report_to="none",
        ),
        train_dataset=Subset(stream, range(steps * args.batch_size)),
        data_collator=lambda samples: to_model_inputs(collate(samples)),
        optimizers=(torch.optim.AdamW(get_parameter_groups(model, rate)), None),
    )
    trainer.train()
    trainer.save_model(args.output)
    processor.save_pretrained(args.output)

    evaluation = Evaluation(data.task, processor, data.categories)
    evaluate_model(trainer.model, evaluation_loader(data.validation, processor, args.batch_size), evaluation.update)
    figures = {name: value for name, value in evaluation.compute().items() if name != "per_class"}
    print(figures)
    return figures


if __name__ == "__main__":
    main()

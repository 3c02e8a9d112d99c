"""A script in the manner of the language modeling example of transformers. It knows nothing of compressed models.

It has that example's structure: three dataclasses of arguments, `load_dataset` on local files, tokenize and group the
texts, train, save, resume from the last checkpoint if there is one, evaluate, write the metrics. The test runs it as
it is.
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import transformers
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "folder or repo of the model"})
    trust_remote_code: bool = field(default=False, metadata={"help": "whether the checkpoint may bring its own code"})


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "a text file"})
    validation_file: str = field(metadata={"help": "a text file"})
    block_size: int = field(default=32, metadata={"help": "tokens per example"})


def main() -> None:
    model_args, data_args, training_args = HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("text", data_files={"train": data_args.train_file, "validation": data_args.validation_file})
    options = {"trust_remote_code": model_args.trust_remote_code}
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **options)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **options)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, config=config, **options)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

    tokenized = raw.map(lambda examples: tokenizer(examples["text"]), batched=True, remove_columns=["text"])

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = {name: list(chain(*rows)) for name, rows in examples.items()}
        total = len(joined["input_ids"]) // data_args.block_size * data_args.block_size
        blocks = {
            name: [values[start : start + data_args.block_size] for start in range(0, total, data_args.block_size)]
            for name, values in joined.items()
        }
        return blocks | {"labels": [list(block) for block in blocks["input_ids"]]}

    grouped = tokenized.map(group_texts, batched=True)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=grouped["train"] if training_args.do_train else None,
        eval_dataset=grouped["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=lambda predictions: {
            "accuracy": float((predictions.predictions[:, :-1] == predictions.label_ids[:, 1:]).mean())
        },
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
    )
    if training_args.do_train:
        result = trainer.train(
            resume_from_checkpoint=training_args.resume_from_checkpoint
            or get_last_checkpoint(training_args.output_dir)
        )
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.save_metrics("eval", metrics)
    described = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-generation"}
    if training_args.push_to_hub:
        trainer.push_to_hub(**described)
    else:
        trainer.create_model_card(**described)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
r"""Train on preferences with TRL's DPOTrainer: for each question a right answer (chosen) and a wrong one (rejected).

    python examples/preference_dpo.py                                       count stripes with the small model
    python examples/preference_dpo.py --model blip3-4b --train pairs.jsonl --test held_out_pairs.jsonl

Data is a JSON-lines file with `image`, `question`, `answer` and `rejected`; paths start at the file's folder. The
reference model is the same one with its adapter switched off, so there is no second copy in memory.

    pip install -e '.[train]'
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

DATA = Path("outputs/stripes")  # written by examples/stripes.py
# The language model's linear layers, under the names of both text layouts, and the resampler's.
TARGETS = r".*(language_model|resampler)\..*\.(qkv|o|gate_up|down|q|k|v|kv|gate|up)_proj"


def read_data(path: Path) -> Dataset:
    """Read rows of `images`, `prompt`, `chosen` and `rejected`; images are opened when a row is used."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    data = [
        {
            "images": [str(path.parent / row["image"])],
            "prompt": [{"role": "user", "content": row["question"]}],  # TRL puts the image before the question
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
    return Dataset.from_list(data).cast_column("images", List(Image()))


def load(path: Path):
    """Load a model and its processor; train in float32 (bfloat16 autocast comes from `DPOConfig`)."""
    options = {"trust_remote_code": True}
    if not (path / "modeling_blip3.py").is_file() and (path.parent / "modeling_blip3.py").is_file():
        path, options["subfolder"] = path.parent, path.name  # base/: its code is in the folder above
    processor = AutoProcessor.from_pretrained(path, **options)
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, **options), processor


@torch.no_grad()
def evaluate(model, processor, data: Dataset, title: str) -> int:
    """Ask every question, print how many answers are exactly right, and return that number."""
    model.eval()
    num_right = 0
    for row in data:
        content = [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=row["images"], return_tensors="pt").to(model.device, model.dtype)
        ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        num_right += answer == row["chosen"][0]["content"]
    print(f"{title}: {num_right} of {len(data)} right")
    return num_right


def main() -> None:
    """Evaluate, train an adapter, merge it, save, and evaluate what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("."))
    parser.add_argument("--train", type=Path, default=DATA / "train" / "pairs.jsonl")
    parser.add_argument("--test", type=Path, default=DATA / "test" / "pairs.jsonl")
    parser.add_argument("--output", type=Path, default=Path("outputs/preference_dpo"))
    parser.add_argument("--beta", type=float, default=0.1, help="how much leaving the reference costs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="1e-5 to 1e-4 suits large models")
    args = parser.parse_args()

    train_data, test_data = read_data(args.train), read_data(args.test)
    model, processor = load(args.model)
    evaluate(model, processor, test_data, "before")
    config = DPOConfig(
        output_dir=str(args.output / "checkpoints"),
        beta=args.beta,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_length=None,  # never cut inside an image's tokens
        trust_remote_code=True,
        gradient_checkpointing=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    config._n_gpu = min(1, config.n_gpu)  # one GPU: on several, Trainer's DataParallel parts rows from their images
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    trainer = DPOTrainer(model, args=config, train_dataset=train_data, processing_class=processor, peft_config=adapter)
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(args.output / "final")
    processor.save_pretrained(args.output / "final")
    model, processor = load(args.output / "final")
    evaluate(model, processor, test_data, f"after, from {args.output / 'final'}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
r"""Fine-tune with LoRA or QLoRA on your own images, with transformers' Trainer; evaluate, merge, and ask the result.

    python examples/finetune_lora.py                                        count stripes with the small model
    python examples/finetune_lora.py --model blip3-4b --train data.jsonl --test held_out.jsonl --qlora

Data is a JSON-lines file with `image` (or a list `images`), `question` and `answer`, or `messages` in the place of
these two; or a folder of images with a metadata.jsonl, as `datasets` reads it. Paths start at the file's folder.

    pip install -e '.[train]'               and for --qlora: pip install -e '.[quantize]'
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, Trainer, TrainingArguments

DATA = Path("outputs/stripes")  # written by examples/stripes.py
# The language model's linear layers, under the names of both text layouts, and the resampler's.
TARGETS = r".*(language_model|resampler)\..*\.(qkv|o|gate_up|down|q|k|v|kv|gate|up)_proj"
KEEP = ["model.vision_tower", "model.resampler", "lm_head"]  # not quantized


def read_rows(path: Path) -> list[dict]:
    """Give one `{"images": [...], "messages": [...]}` for each row of a JSON-lines file or an image folder."""
    if path.is_dir():
        rows = list(load_dataset("imagefolder", data_dir=str(path), split="train"))
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [to_chat(row, path.parent) for row in rows]


def to_chat(row: dict, folder: Path) -> dict:
    """Make a conversation of a row; images that are paths are opened when they are needed."""
    images = row["images"] if "images" in row else [row["image"]]
    images = [folder / image if isinstance(image, str) else image for image in images]
    if "messages" in row:
        return {"images": images, "messages": row["messages"]}
    question = [{"type": "image"}] * len(images) + [{"type": "text", "text": row["question"]}]
    answer = [{"type": "text", "text": row["answer"]}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"images": images, "messages": turns}


def open_images(row: dict) -> list[Image.Image]:
    """Open the images of a row."""
    return [Image.open(image) if isinstance(image, Path) else image for image in row["images"]]


def make_collator(processor):
    """Make a batch of rows: the loss is on the assistant's turns alone (`return_labels`)."""

    def collate(rows: list[dict]) -> dict:
        texts = [processor.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        images = [open_images(row) for row in rows]
        return processor(
            text=texts, images=images, padding=True, padding_side="right", return_tensors="pt", return_labels=True
        )

    return collate


@torch.no_grad()
def evaluate(model, processor, rows: list[dict], title: str) -> int:
    """Ask every row its last question, print how many answers are exactly right, and return that number."""
    model.eval()
    num_right = 0
    for row in rows:
        text = processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=open_images(row), return_tensors="pt").to(model.device, model.dtype)
        ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        content = row["messages"][-1]["content"]
        num_right += answer == (content if isinstance(content, str) else content[0]["text"])
    print(f"{title}: {num_right} of {len(rows)} right")
    return num_right


def load(path: Path, qlora: bool = False):
    """Load a model and its processor: in float32 on a CPU, else in bfloat16; 4-bit weights for QLoRA."""
    if qlora and importlib.util.find_spec("bitsandbytes") is None:
        raise SystemExit(
            "--qlora needs bitsandbytes, which is not installed: pip install -e '.[quantize]', or leave --qlora out."
        )
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    options = {"trust_remote_code": True}
    if not (path / "modeling_blip3.py").is_file() and (path.parent / "modeling_blip3.py").is_file():
        path, options["subfolder"] = path.parent, path.name  # base/: its code is in the folder above
    processor = AutoProcessor.from_pretrained(path, **options)
    if qlora:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=KEEP
        )
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **options)
    return (model if qlora else model.to(device)), processor


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the text above as it is, and the default of each option."""


def main() -> None:
    """Evaluate, train an adapter, merge it into the full-precision model, and evaluate what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", type=Path, default=Path("."), help="a folder with a model")
    parser.add_argument("--train", type=Path, default=DATA / "train" / "data.jsonl", help="data to train on")
    parser.add_argument(
        "--test", type=Path, default=DATA / "test" / "data.jsonl", help="data to score before and after"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune_lora"), help="for what is trained")
    parser.add_argument("--qlora", action="store_true", help="train on 4-bit weights (bitsandbytes nf4)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--steps", type=int, default=100, help="batches to train on")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="2e-4 suits large models")
    args = parser.parse_args()

    train_rows, test_rows = read_rows(args.train), read_rows(args.test)
    model, processor = load(args.model, args.qlora)
    evaluate(model, processor, test_rows, "before")
    if args.qlora:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        save_strategy="no",
        remove_unused_columns=False,  # the collator wants images and messages
        bf16=torch.cuda.is_available(),
        report_to=[],
        seed=0,
    )
    # One GPU: on several, Trainer's DataParallel parts rows from their images.
    arguments._n_gpu = min(1, arguments.n_gpu)
    Trainer(model, arguments, train_dataset=train_rows, data_collator=make_collator(processor)).train()
    evaluate(model, processor, test_rows, "with the adapter")
    model.save_pretrained(args.output / "adapter")

    base, _ = load(args.model)  # an adapter of 4-bit weights is merged into the full ones
    merged = PeftModel.from_pretrained(base, args.output / "adapter").merge_and_unload()
    merged.save_pretrained(args.output / "merged")
    processor.save_pretrained(args.output / "merged")
    model, processor = load(args.output / "merged")
    evaluate(model, processor, test_rows, f"after, from {args.output / 'merged'}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""transformers' common processor and image processor tests."""

import shutil
import tempfile
import unittest
from typing import Any, ClassVar

from tests.test_image_processing_common import ImageProcessingTestMixin, prepare_image_inputs
from tests.test_processing_common import ProcessorTesterMixin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from blip3.hub import RELEASE, ROOT, model_code

from .registration import TRANSFORMERS_LINE

Blip3ImageProcessor = model_code("image_processing_blip3.Blip3ImageProcessor")
Blip3Processor = model_code("processing_blip3.Blip3Processor")

CHAT_TEMPLATE = (ROOT / RELEASE / "chat_template.jinja").read_text(encoding="utf-8")
MARKERS = ["<|endoftext|>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"]
TILE_SIZE, NUM_LATENTS = 28, 4


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with Phi-3's markers, trained on the template so that prompts keep to the tests' lengths."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=MARKERS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CHAT_TEMPLATE] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<pad>",
        unk_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )


class Blip3ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    """The common processor tests, with images of one to four tiles."""

    processor_class = Blip3Processor

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerFast:
        return build_tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> Blip3ImageProcessor:
        return Blip3ImageProcessor(size={"height": TILE_SIZE, "width": TILE_SIZE})

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        """Arguments of the processor beside its two parts."""
        return {"chat_template": CHAT_TEMPLATE, "num_latents": NUM_LATENTS}

    if TRANSFORMERS_LINE < 5:  # what 5.x's mixin does by itself

        @classmethod
        def setUpClass(cls) -> None:
            cls.tmpdirname = tempfile.mkdtemp()
            processor = Blip3Processor(
                cls._setup_image_processor(), cls._setup_tokenizer(), **cls.prepare_processor_dict()
            )
            processor.save_pretrained(cls.tmpdirname)
            cls.image_token = processor.image_token

        @classmethod
        def tearDownClass(cls) -> None:
            shutil.rmtree(cls.tmpdirname)


class Blip3ImageProcessingTester:
    """Arguments of the image processor and random images."""

    __test__ = False
    batch_size = 7
    num_channels = 3
    min_resolution = 30
    max_resolution = 400
    image_processing_classes: ClassVar[dict[str, type]] = {"pil": Blip3ImageProcessor}  # read by 5.x

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        """Arguments of the image processor, other than its defaults."""
        return {
            "size": {"height": TILE_SIZE, "width": TILE_SIZE},
            "tile_grids": [[1, 2], [2, 1], [2, 2]],
            "do_exif_transpose": True,
            "resample": 2,
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.25, 0.5, 0.75],
        }

    def expected_output_image_shape(self, images: list) -> tuple[int, ...]:
        """Tile slots of the largest grid with the global view, whatever the images."""
        return 5, 3, TILE_SIZE, TILE_SIZE

    def prepare_image_inputs(self, **kwargs: Any) -> list:
        """Random images."""
        return prepare_image_inputs(
            batch_size=self.batch_size,
            num_channels=self.num_channels,
            min_resolution=self.min_resolution,
            max_resolution=self.max_resolution,
            **kwargs,
        )


class Blip3ImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    """The common image processor tests."""

    image_processor_tester_class = Blip3ImageProcessingTester
    image_processing_class = Blip3ImageProcessor  # read by 4.57
    test_cast_dtype = True

    def setUp(self) -> None:
        super().setUp()
        self.image_processor_tester = Blip3ImageProcessingTester(self)

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        """Arguments of the image processor."""
        return self.image_processor_tester.prepare_image_processor_dict()

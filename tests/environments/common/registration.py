# SPDX-License-Identifier: Apache-2.0
"""Make BLIP-3 a model that transformers knows by name, as its common tests expect of a model in its own tree."""

import transformers
from transformers.models.auto import modeling_auto

from blip3.hub import model_code

Blip3Config = model_code("configuration_blip3.Blip3Config")
Blip3ImageProcessor = model_code("image_processing_blip3.Blip3ImageProcessor")
Blip3ForConditionalGeneration = model_code("modeling_blip3.Blip3ForConditionalGeneration")
Blip3Model = model_code("modeling_blip3.Blip3Model")
Blip3Processor = model_code("processing_blip3.Blip3Processor")

TRANSFORMERS_LINE = int(transformers.__version__.split(".")[0])


def register_blip3() -> None:
    """Register every class with its Auto class and its name with the tables the tests read."""
    model_type = Blip3Config.model_type
    transformers.AutoConfig.register(model_type, Blip3Config)
    transformers.AutoModel.register(Blip3Config, Blip3Model)
    transformers.AutoModelForImageTextToText.register(Blip3Config, Blip3ForConditionalGeneration)
    if TRANSFORMERS_LINE >= 5:
        transformers.AutoImageProcessor.register(Blip3Config, image_processor_classes={"pil": Blip3ImageProcessor})
    else:
        transformers.AutoImageProcessor.register(Blip3Config, slow_image_processor_class=Blip3ImageProcessor)
    transformers.AutoProcessor.register(Blip3Config, Blip3Processor)
    modeling_auto.MODEL_MAPPING_NAMES.setdefault(model_type, Blip3Model.__name__)
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault(
        model_type, Blip3ForConditionalGeneration.__name__
    )

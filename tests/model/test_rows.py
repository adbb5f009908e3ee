# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch as data sets give them: without an image, none at all, copied into another process."""

import copy
import pickle

import pytest
import torch

from support import render_image


@pytest.mark.parametrize("nest", [True, False])
def test_none_is_a_row_without_images(processor, nest):
    image = render_image(60, 90)
    texts = ["Hello", "<image> What is it?"]
    inputs = processor(text=texts, images=[None, [image] if nest else image], padding=True, return_tensors="pt")
    expected = processor(text=texts, images=[[], [image]], padding=True, return_tensors="pt")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_no_text_at_all_is_refused(processor):
    with pytest.raises(ValueError, match="text is an empty list"):
        processor(text=[])


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch))])
def test_a_copied_batch_still_keeps_image_tokens_out_of_labels(processor, copy_of):
    batch = copy_of(processor(text=["<image> What is it?"], images=[render_image(60, 90)], return_tensors="pt"))
    batch["labels"] = batch["input_ids"]
    is_image = batch["input_ids"] == processor.image_token_id
    assert is_image.any()
    assert (batch["labels"][is_image] == -100).all()

# SPDX-License-Identifier: Apache-2.0
"""The grounding engine: tags of an image -> boxes of the tags -> a caption that says where things are.

    tags.py       which things an image may show: RAM++, a column, or one list for all
    detectors.py  their boxes: Grounding DINO, MM-Grounding-DINO or OWLv2; boxes_file.py takes those of any tool
    boxes.py      boxes that are none, and boxes that say the same twice
    phrases.py    which words of a caption name a tag
    captions.py   the caption at three granularities, with and without the raw one in front
    command.py    the command's options, and the plan they make
    verify.py     all of it on rendered images, whose boxes are known

The stages hand on `tags`, a list of texts, and `entries`, a list of {"text": tag, "bbox": [x1, y1, x2, y2] of 0..1,
"confidence": score}.
"""

# SPDX-License-Identifier: Apache-2.0
"""The OCR engine: images -> rows in the form of BLIP3-OCR, as the report describes it (arXiv:2408.08872, appendix).

image -> reader -> lines -> rows

readers.py, choice.py              image -> lines: text, quadrilateral, confidence; the readers by name
rapid.py, paddle.py, tesseract.py  the readers
views.py                           where to look in an image, small or large
gaps.py, boxes.py                  lines -> strings, tight boxes, reading order
rows.py                            strings -> the columns `captions` and `metadata`
stages.py, command.py              the stage and its options
check.py                           figures on rendered pages, of which strings and boxes are known
rendered.py                        rendered pages as they were read: a training source
"""

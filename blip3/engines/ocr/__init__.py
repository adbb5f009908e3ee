# SPDX-License-Identifier: Apache-2.0
"""The OCR engine: images -> rows in the form of BLIP3-OCR, as the report describes it (arXiv:2408.08872, appendix).

image -> reader -> lines -> rows

readers.py (rapid, paddle, tesseract)   image -> lines: text, quadrilateral, confidence
views.py                                where to look in an image, small or large
boxes.py                                quadrilaterals -> tight boxes in reading order
rows.py                                 lines -> the columns `captions` and `metadata`
stages.py, command.py                   the stage and its options
check.py                                figures on rendered pages, of which strings and boxes are known
"""

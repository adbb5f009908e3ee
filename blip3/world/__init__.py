# SPDX-License-Identifier: Apache-2.0
"""The rendered world: records with their annotations from integer seeds, in the forms of the recipe's real data.

    settings                                                  how large, which words, which fonts
    splits                                                    train or held out, by a hash of the content
    instructions                                              what evaluation harnesses put around a question
    scenes, text_pages, documents, sequences,
    descriptions, alignment, cards, contrasts                 the tasks, by family
    tasks                                                     every task by name
    build                                                     records to files; a sheet of samples to look at

Each module imports only those above it.
"""

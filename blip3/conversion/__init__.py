# SPDX-License-Identifier: Apache-2.0
"""What `convert_weights.py` is made of, in the order of the data.

    names             the only table from the released names to ours, and every tensor's shape
    tensors           row ranges of stored tensors: read, fold, split, stream
    towers            vision towers of every naming -> transformers' names
    configs           released and our small JSON files, there and back
    tokenizer_files   the tokenizer of each variant
    replace           OUTPUT appears at once and keeps what the user put beside it
    card              README.md, NOTICE and .gitattributes, without a local path
    quantized         folders of quantized weights, copied as they are
    sources           a path on the command line -> a `Checkpoint`
    output_folder     a `Checkpoint` and its row ranges -> OUTPUT's files
    cli               the command line

Each module imports only those above it.
"""

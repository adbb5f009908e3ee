# SPDX-License-Identifier: Apache-2.0
"""Knowledge-augmented captions, as BLIP3-KALE (arXiv:2411.07461) has them, in two stages.

    stage 1    image --- captioner ---> dense caption --+
               alt-text --------------------------------+--- rewriter ---> fused caption ---> prompt words removed
    stage 2    image and alt-text --- a model trained on the rows of stage 1 ---> fused caption

The files:

    command    options and plan
    stages     what the runner calls: DenseCaption, TakeCaption, Fuse, FuseAtOnce
    prompts    what is asked; `engines/leaks.py` removes from the answers what speaks of that
    writers    one protocol for all that writes text: `local` (transformers, here) and `server` (OpenAI's words)
    verify     all of it on rendered images, whose alt-text has known names

A plan names its models; what each worker makes of it is a writer of its own.
"""

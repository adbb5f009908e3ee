#!/usr/bin/env bash
# What made the shipped small model, in the order it was run, from the root of the repository. This is provenance: to
# train a small model of your own, start from recipes/small. The chain is not exactly repeatable (docs/small_model.md).
#
#   01_tower - 02_tower - 03_tower - 04_resampler - 05_resampler - 06_pairs - 07_pretrain
#        07_pretrain - 08_sft - 09 to 12_sft_multi_image - 13 average of 11 and 12 - 14_sft_multi_image
#                    - 15 average of 13 and 14 - 16 to 18_sft_talk - 19 average of 15, 18 and 18 -> the root
#        07_pretrain - base/08_repetition - base/09_words - base/10_rules - base/11_rules     -> base/
#        the root    - ../4_dpo - ../5_safety                                                 -> post_trained/
#
# Until the recipes were numbered, 01 to 12 and 14 were 0, 0b, 0c, 0d, 0e, 1a, 1, 2, 3, 3b, 3c, 3d and 3e; base/08 to
# base/11 were 1c, 1d, 1e and 1f.
set -euo pipefail
cd "$(dirname "$0")/../../.."
SMALL=recipes/small RUNS=recipes/small/provenance OUT=outputs/small
run() { python -m "blip3.training.$1" "${@:2}"; }
run_on_two() { torchrun --nproc_per_node 2 -m "blip3.training.$1" "${@:2}"; }

run small.new_model $SMALL/model.yaml $OUT/new
run tower.train $RUNS/01_tower.yaml
run tower.train $RUNS/02_tower.yaml
run_on_two tower.train $RUNS/03_tower.yaml
run small.publish $OUT/03 --tower $OUT/03_tower/final
run small.new_model $SMALL/model.yaml $OUT/new --tower $OUT/03/tower
run_on_two tower.train $RUNS/04_resampler.yaml
run tower.train $RUNS/05_resampler.yaml
for stage in 06_pairs 07_pretrain 08_sft 09_sft_multi_image 10_sft_multi_image 11_sft_multi_image; do
    run train $RUNS/$stage.yaml
done
run_on_two train $RUNS/12_sft_multi_image.yaml
run average $OUT/13_average $OUT/11_sft_multi_image/final $OUT/12_sft_multi_image/final
run_on_two train $RUNS/14_sft_multi_image.yaml
run average $OUT/15_average $OUT/13_average $OUT/14_sft_multi_image/final
for stage in 16_sft_talk 17_sft_talk_more 18_sft_talk_third; do
    run train $RUNS/$stage.yaml
done
run average $OUT/19_average $OUT/15_average $OUT/18_sft_talk_third/final $OUT/18_sft_talk_third/final
for stage in 08_repetition 09_words 10_rules 11_rules; do
    run_on_two train $RUNS/base/$stage.yaml
done
run small.publish . --instruct $OUT/19_average --base $OUT/base_11_rules/final
mv recipe.yaml $RUNS/published.yaml && mv base/recipe.yaml $RUNS/base/published.yaml

run noised_answers $SMALL/4_dpo.yaml
run train $SMALL/4_dpo.yaml
run train $SMALL/5_safety.yaml
run small.publish . --post-trained $OUT/5_safety/final
mv post_trained/recipe.yaml $RUNS/post_trained/published.yaml

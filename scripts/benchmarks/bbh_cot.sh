#!/usr/bin/env bash
# BIG-Bench Hard: 27 tasks, three examples with their chain of thought in each prompt, exact match.
#
#   bash scripts/benchmarks/bbh_cot.sh MODEL_DIR [OPTION of fusejax evaluate]...
#
# MODEL_DIR is an exported model, of chat or not: the prompts are plain text. lm-eval brings tasks and prompts, fusejax
# generates (greedy). `--limit 10` tries it out; `--json` prints one object. The prompts are long: --context is 4096 here,
# cut to the model's own limit, and prompts that lose their beginning are counted in `truncated`.
#
# Needs: the extra `eval` (pip install 'fusejax[eval]'), network (Hugging Face) the first time. No key.
# Without network: fusejax evaluate --model DIR --tasks bbh/*.json answers local files, without chains of thought.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/benchmarks/common.sh
. "$here/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
fusejax_command

model="$1"
shift
exec "$FUSEJAX" evaluate --model "$model" --tasks bbh_cot_fewshot --context 4096 "$@"

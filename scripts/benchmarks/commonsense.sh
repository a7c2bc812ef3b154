#!/usr/bin/env bash
# CommonSense of FuseLLM: ARC-easy, ARC-challenge, BoolQ, HellaSwag, OpenBookQA; zero-shot, the likeliest choice.
#
#   bash scripts/benchmarks/commonsense.sh MODEL_DIR [OPTION of fusejax evaluate]...
#
# MODEL_DIR is an exported model. lm-eval brings tasks, prompts and metrics (acc, and acc_norm by the length of a
# choice), fusejax the log-likelihoods, which equal those of transformers. `--limit 100` tries it out; `--json` prints
# one object.
#
# Needs: the extra `eval` (pip install 'fusejax[eval]'), network (Hugging Face) the first time. No key.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/benchmarks/common.sh
. "$here/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
fusejax_command

model="$1"
shift
exec "$FUSEJAX" evaluate --model "$model" --tasks arc_easy arc_challenge boolq hellaswag openbookqa --fewshot 0 "$@"

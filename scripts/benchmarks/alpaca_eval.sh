#!/usr/bin/env bash
# AlpacaEval 2.0: 805 instructions; how often a judge prefers the model's answer to GPT-4 Turbo's.
#
#   bash scripts/benchmarks/alpaca_eval.sh MODEL_DIR [WORK_DIR]
#
# MODEL_DIR is an exported chat model; WORK_DIR (default runs/alpaca_eval) keeps everything, and the same command goes on
# where it was ended. fusejax generates the answers (greedy; ANSWER holds further options of `fusejax answer`),
# alpaca_eval judges them: win rate, and win rate corrected for length. Variables: NAME of the model in the tables,
# ANNOTATOR (default weighted_alpaca_eval_gpt4_turbo).
#
# Needs: curl, python3 with venv, network (Hugging Face, PyPI, OpenAI), and OPENAI_API_KEY; 805 gradings, about 10 dollars.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/benchmarks/common.sh
. "$here/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
need curl python3
need_key OPENAI_API_KEY
fusejax_command

model="$1"
work="${2:-runs/alpaca_eval}"
name="${NAME:-$(basename "$model")}"
mkdir -p "$work"
questions="$work/alpaca_eval.json"
if [ ! -f "$questions" ]; then
  curl --fail --silent --show-error --location --output "$questions.part" \
    https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/main/alpaca_eval.json
  mv "$questions.part" "$questions"
fi
answers="$work/$name.json"
read -ra more <<<"${ANSWER:-}"
[ -f "$answers" ] ||
  "$FUSEJAX" answer --model "$model" --format alpaca_eval --questions "$questions" --name "$name" \
    --max-new-tokens 2048 --out "$answers" "${more[@]}"

with_venv "$work/venv" alpaca-eval
"$work/venv/bin/alpaca_eval" --model_outputs "$answers" --name "$name" --output_path "$work/$name" \
  --annotators_config "${ANNOTATOR:-weighted_alpaca_eval_gpt4_turbo}"

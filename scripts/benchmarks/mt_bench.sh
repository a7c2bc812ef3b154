#!/usr/bin/env bash
# MT-Bench: 80 questions of two turns, each answer graded from 1 to 10 by a judge.
#
#   bash scripts/benchmarks/mt_bench.sh MODEL_DIR [WORK_DIR]
#
# MODEL_DIR is an exported chat model; WORK_DIR (default runs/mt_bench) keeps everything, and the same command goes on
# where it was ended. fusejax generates the answers, FastChat judges them. Variables: NAME of the model in the tables,
# JUDGE (default gpt-4; another one grades with gpt-4's reference answers), FASTCHAT (default v0.2.36, a tag).
#
# Needs: git, python3 with venv, network (GitHub, PyPI, OpenAI), and OPENAI_API_KEY; 160 gradings, which cost money.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/benchmarks/common.sh
. "$here/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
need git python3
need_key OPENAI_API_KEY
fusejax_command

model="$1"
work="${2:-runs/mt_bench}"
name="${NAME:-$(basename "$model")}"
judge="${JUDGE:-gpt-4}"
mkdir -p "$work"
[ -d "$work/FastChat" ] ||
  git clone --quiet --depth 1 --branch "${FASTCHAT:-v0.2.36}" https://github.com/lm-sys/FastChat "$work/FastChat"
bench="$work/FastChat/fastchat/llm_judge/data/mt_bench"
answers="$bench/model_answer/$name.jsonl"
[ -f "$answers" ] ||
  "$FUSEJAX" answer --model "$model" --format mt_bench --questions "$bench/question.jsonl" \
    --name "$name" --max-new-tokens 1024 --out "$answers"

with_venv "$work/venv" -e "$work/FastChat[model_worker,llm_judge]"
python="$(cd "$work/venv/bin" && pwd)/python"
references="$bench/reference_answer"
[ -f "$references/$judge.jsonl" ] || cp "$references/gpt-4.jsonl" "$references/$judge.jsonl"
cd "$work/FastChat/fastchat/llm_judge"
"$python" gen_judgment.py --model-list "$name" --judge-model "$judge" --parallel 2 <<<"" # it asks for Enter
"$python" show_result.py --model-list "$name" --judge-model "$judge"

#!/usr/bin/env bash
# MultiPL-E: HumanEval in other programming languages; the share of programs that pass their tests (pass@1).
#
#   bash scripts/benchmarks/multipl_e.sh MODEL_DIR [WORK_DIR]
#
# MODEL_DIR is an exported model; WORK_DIR (default runs/multipl_e) keeps everything, and the same command goes on where
# it was ended. fusejax completes the prompts (20 samples, temperature 0.2, top-p 0.95, 512 tokens: the benchmark's own
# for pass@1), MultiPL-E's container runs the programs without network. Variables: LANGUAGES (default: the ten of
# FuseLLM), SAMPLES (default 20), IMAGE (default ghcr.io/nuprl/multipl-e-evaluation), DOCKER (default docker; podman).
#
# Needs: docker or podman, python3 of fusejax's environment with `datasets`, network (Hugging Face, ghcr.io). No key.
# Programs that a model wrote are executed, in the container only.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/benchmarks/common.sh
. "$here/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
docker="${DOCKER:-docker}"
need "$docker" python3
fusejax_command
python="$(dirname "$(command -v "$FUSEJAX")")/python"
[ -x "$python" ] || python=python3

model="$1"
work="${2:-runs/multipl_e}"
name="$(basename "$model")"
mkdir -p "$work/questions" "$work/$name"
for language in ${LANGUAGES:-cpp go java js php py r rb rs ts}; do
  questions="$work/questions/$language.jsonl"
  [ -f "$questions" ] || "$python" - "$language" "$questions" <<'PY'
import os, sys
import datasets
language, path = sys.argv[1:]
rows = datasets.load_dataset("nuprl/MultiPL-E", f"humaneval-{language}", split="test")
rows.to_json(path + ".part")
os.replace(path + ".part", path)
PY
  completions="$work/$name/$language"
  [ -d "$completions" ] ||
    "$FUSEJAX" answer --model "$model" --format multipl_e --questions "$questions" --samples "${SAMPLES:-20}" \
      --temperature 0.2 --top-p 0.95 --max-new-tokens 512 --out "$completions"
  place="$(cd "$completions" && pwd)"
  "$docker" run --rm --network none --volume "$place:/work:rw" "${IMAGE:-ghcr.io/nuprl/multipl-e-evaluation}" \
    --dir /work --output-dir /work
  python3 - "$language" "$place" <<'PY'
import gzip, json, pathlib, sys
language, place = sys.argv[1:]
results = [json.loads(gzip.open(p).read())["results"] for p in pathlib.Path(place).glob("*.results.json.gz")]
shares = [sum(r["status"] == "OK" and r["exit_code"] == 0 for r in found) / len(found) for found in results if found]
print(f"{language}: pass@1 {sum(shares) / len(shares):.3f} over {len(shares)} problems" if shares else f"{language}: none")
PY
done

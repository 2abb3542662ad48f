"""Run a directory in vLLM on the CPU, in vLLM's own environment; a job on standard input, a line of JSON out.

    python vllm_log_p.py < job.json

A job: {model, overrides, length, prompts: [[ids]], count}. The answer: {log_p: [[[log p of every id] for every token
but the first] for every prompt], greedy: [[count ids] for every prompt]}.
"""

import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


def main() -> None:
    """Answer the job on standard input."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    job = json.load(sys.stdin)
    engine = LLM(
        model=job["model"],
        hf_overrides=job["overrides"],
        max_model_len=job["length"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    params = SamplingParams(
        temperature=0, max_tokens=job["count"], ignore_eos=True, detokenize=False, prompt_logprobs=-1
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    answer = {
        "log_p": [[_row(step) for step in output.prompt_logprobs[1:]] for output in outputs],
        "greedy": [list(output.outputs[0].token_ids) for output in outputs],
    }
    print(json.dumps(answer))


def _row(step: dict[int, Any]) -> list[float]:
    return [step[token].logprob for token in range(len(step))]


if __name__ == "__main__":
    main()

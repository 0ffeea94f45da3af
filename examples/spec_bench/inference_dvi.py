"""DVI as a method of Spec-Bench: copy this file into an unmodified checkout as evaluation/inference_dvi.py.

    python -m evaluation.inference_dvi --model-path lmsys/vicuna-7b-v1.3 --adapter runs/vicuna/drafter \
        --model-id vicuna-7b-v1.3-dvi-float16 --bench-name spec_bench

Prompts, warm-ups, clock and answer files are the checkout's `evaluation.eval`; here is one function that it calls.
"""

import argparse
import itertools

import torch
from evaluation.eval import reorg_answer_file, run_eval

from dvi import SelfSpeculator
from dvi.records import SamplingParams


def dvi_forward(inputs, model, tokenizer, max_new_tokens, *, speculator, learner, temperature, seeds):
    """One answer, as `run_eval` wants it.

    inputs   the tokenizer's, with input_ids [1, S]. model and tokenizer are the speculator's own, and not read.
    learner  goes on learning between rounds, within the harness's clock; None decodes with a frozen drafter.
    seeds    an iterator: every answer draws with its own, whatever seed the harness gives torch for each question.
    Returns (ids [1, S + new], new tokens, target forwards, tokens of each of them, bonus included).
    """
    prompt = inputs.input_ids[0].tolist()
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=next(seeds))
    # The harness calls under inference_mode, and what is made there can never take part in a gradient. Decoding itself
    # runs under no_grad.
    with torch.inference_mode(False):
        [result] = speculator.generate([prompt], params, batch_size=1, learner=learner, keep_transitions=False)
    output_ids = torch.tensor([prompt + result.token_ids], device=inputs.input_ids.device)
    return output_ids, len(result.token_ids), len(result.accept_lengths), result.accept_lengths


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True, help="A Hugging Face model folder or hub id.")
    parser.add_argument("--model-id", required=True, help="Names the answer file.")
    parser.add_argument("--adapter", help="Folder of a saved drafter; without it the drafter is untrained.")
    parser.add_argument("--online", action="store_true", help="Learn across the questions, in their order.")
    parser.add_argument("--num-draft-tokens", type=int, default=4, help="The most tokens drafted in a round.")
    parser.add_argument("--bench-name", default="spec_bench", help="Folder of the questions, under data/.")
    parser.add_argument("--question-begin", type=int, help="Index of the first question.")
    parser.add_argument("--question-end", type=int, help="Index after the last question.")
    parser.add_argument("--answer-file", help="Default data/BENCH_NAME/model_answer/MODEL_ID.jsonl.")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--num-choices", type=int, default=1, help="Answers to each question.")
    parser.add_argument("--num-gpus-per-model", type=int, default=1)
    parser.add_argument("--num-gpus-total", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="float16", choices=["float32", "float64", "float16", "bfloat16"])
    args = parser.parse_args()
    if args.num_gpus_total != args.num_gpus_per_model:
        # Each process would have a drafter, and learn, by itself.
        parser.error(
            f"--num-gpus-total must equal --num-gpus-per-model, got {args.num_gpus_total} and "
            f"{args.num_gpus_per_model}: one process answers all questions; split them with --question-begin and -end"
        )
    return args


def main():
    args = parse_args()
    answer_file = args.answer_file or f"data/{args.bench_name}/model_answer/{args.model_id}.jsonl"
    print(f"Output to {answer_file}")
    speculator = SelfSpeculator.from_pretrained(
        args.model_path, adapter=args.adapter, dtype=args.dtype, num_draft_tokens=args.num_draft_tokens
    )
    learner = None
    if args.online:
        from trainers import OnlineTrainer

        learner = OnlineTrainer(speculator)
    run_eval(
        model=speculator.model,
        tokenizer=speculator.tokenizer,
        forward_func=dvi_forward,
        model_id=args.model_id,
        question_file=f"data/{args.bench_name}/question.jsonl",
        question_begin=args.question_begin,
        question_end=args.question_end,
        answer_file=answer_file,
        max_new_tokens=args.max_new_tokens,
        num_choices=args.num_choices,
        num_gpus_per_model=args.num_gpus_per_model,
        num_gpus_total=args.num_gpus_total,
        speculator=speculator,
        learner=learner,
        temperature=args.temperature,
        seeds=itertools.count(),
    )
    reorg_answer_file(answer_file)
    if learner is not None:
        stats = learner.stats()
        print(f"{stats['steps']:.0f} optimizer steps, drafter version {speculator.drafter.version}")


if __name__ == "__main__":
    main()

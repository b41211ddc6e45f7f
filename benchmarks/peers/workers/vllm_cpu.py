"""vLLM's CPU build, offline in one process. `prepare MODEL FOLDER`: a link; `serve FOLDER VARIANT THREADS`."""

import os
import sys

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def prepare(model, folder):
    link = os.path.join(folder, "model")
    if os.path.islink(link):
        os.remove(link)
    os.symlink(os.path.abspath(model), link)


def serve(folder, variant, threads):
    from protocol import serve

    cores = sorted(os.sched_getaffinity(0))[: int(threads)]
    os.environ |= {
        "VLLM_CACHE_ROOT": os.path.join(os.path.abspath(folder), "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    serve(lambda: open_engine(os.path.join(folder, "model"), DTYPES[variant]))


def open_engine(model, dtype):
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,  # the same prompts come again
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    engine, made = llm.llm_engine, [0]

    def generate(prompts, count):
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        index, given = {}, [0] * len(prompts)
        for i, ids in enumerate(prompts):
            made[0] += 1
            index[str(made[0])] = i
            engine.add_request(str(made[0]), TokensPrompt(prompt_token_ids=ids), params)
        while engine.has_unfinished_requests():
            step = []
            for output in engine.step():
                i = index[output.request_id]
                new = output.outputs[0].token_ids[given[i] :]
                given[i] += len(new)
                step += [(i, token) for token in new]
            yield step

    return vllm.__version__, generate


if __name__ == "__main__":
    {"prepare": prepare, "serve": serve}[sys.argv[1]](*sys.argv[2:])

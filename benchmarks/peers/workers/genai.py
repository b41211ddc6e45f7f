"""onnxruntime-genai. `prepare MODEL FOLDER`: its model builder's graphs; `serve FOLDER VARIANT THREADS`."""

import json
import os
import shutil
import subprocess
import sys

VARIANTS = {  # the builder's precision, then options
    "fp32": ["fp32", "shared_embeddings=false"],  # shared, the graph transposes the head
    "int8": ["int8"],  # its default: MatMulNBits, 8 bits, blocks of 32, activations as int8
    "int8-block64": ["int8", "block_size=64"],  # half the scales to read; 576 and 1536 are whole blocks still
}


def prepare(model, folder):
    for name, (precision, *options) in VARIANTS.items():
        out = os.path.join(folder, name)
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out, "-p", precision]
        command += ["-e", "cpu", "-c", os.path.join(folder, "cache")]
        command += ["--extra_options", *options] if options else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def serve(folder, variant, threads):
    from protocol import serve

    serve(lambda: open_engine(os.path.join(folder, variant), int(threads)))


def open_engine(folder, threads):
    import numpy as np
    import onnxruntime_genai as og

    path = os.path.join(folder, "genai_config.json")
    with open(path) as handle:
        config = json.load(handle)
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    with open(path, "w") as handle:
        json.dump(config, handle, indent=1)
    model = og.Model(folder)

    def generate(prompts, count):
        lengths = {len(p) for p in prompts}
        if len(lengths) > 1:
            raise ValueError("a batch of prompts of different lengths needs padding, which its attention miscounts")
        end = lengths.pop() + count
        params = og.GeneratorParams(model)
        params.set_search_options(batch_size=len(prompts), max_length=end, min_length=end, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            yield list(enumerate(generator.get_next_tokens().tolist()))

    return og.__version__, generate


if __name__ == "__main__":
    {"prepare": prepare, "serve": serve}[sys.argv[1]](*sys.argv[2:])

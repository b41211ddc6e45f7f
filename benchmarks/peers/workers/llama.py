"""llama.cpp through llama-cpp-python's C API. `prepare MODEL FOLDER`: GGUF files; `serve FOLDER VARIANT THREADS`."""

import json
import os
import sys


def prepare(model, folder):
    """F32.gguf from the Hugging Face folder (its values unchanged), then llama.cpp's own Q8_0 of it."""
    import llama_cpp

    plain = os.path.join(folder, "F32.gguf")
    write_gguf(model, plain)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, os.cpu_count()
    if llama_cpp.llama_model_quantize(plain.encode(), os.path.join(folder, "Q8_0.gguf").encode(), params):
        raise RuntimeError("llama.cpp could not quantise F32.gguf to Q8_0")


def write_gguf(model, path):
    import gguf
    from safetensors import safe_open

    with open(os.path.join(model, "config.json")) as handle:
        c = json.load(handle)
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(c["max_position_embeddings"])
    out.add_embedding_length(c["hidden_size"])
    out.add_block_count(c["num_hidden_layers"])
    out.add_feed_forward_length(c["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(c["rms_norm_eps"])
    out.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    out.add_rope_dimension_count(head_dim)
    out.add_vocab_size(c["vocab_size"])
    out.add_tokenizer_model("no_vocab")  # it gets and gives token ids
    out.add_file_type(gguf.LlamaFileType.ALL_F32)

    def interleaved(w, n):  # rotary pairs: halves [n, 2, d/2, ...] here, neighbours [n, d/2, 2, ...] there
        return w.reshape(n, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    with safe_open(os.path.join(model, "model.safetensors"), "numpy") as tensors:
        for key in tensors.keys():
            stem, w = key.removesuffix(".weight"), tensors.get_tensor(key).astype("float32")
            if stem in outer:
                if stem == "lm_head" and c["tie_word_embeddings"]:
                    continue
                name = outer[stem]
            else:
                _, _, layer, part = stem.split(".", 3)
                name = f"blk.{layer}.{names[part]}"
                if part.endswith(("q_proj", "k_proj")):
                    w = interleaved(w, heads if part.endswith("q_proj") else kv_heads)
            out.add_tensor(name + ".weight", w)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def serve(folder, variant, threads):
    from protocol import serve

    serve(lambda: open_engine(os.path.join(folder, variant + ".gguf"), int(threads)))


def open_engine(path, threads):
    import llama_cpp as ll
    import numpy as np

    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot open {os.path.basename(path)}")
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    contexts = {}  # (streams, cells of each) -> context: made once a shape, as a server would

    def context_of(streams, cells):
        if (streams, cells) not in contexts:
            params = ll.llama_context_default_params()
            params.n_ctx, params.n_seq_max = streams * cells, streams
            params.n_batch = params.n_ubatch = 512
            params.n_threads = params.n_threads_batch = threads
            params.kv_unified = False
            context = ll.llama_init_from_model(model, params)
            if not context:
                raise RuntimeError(f"llama.cpp has no context of {streams} x {cells} cells")
            contexts[streams, cells] = context, ll.llama_batch_init(max(512, streams), 0, 1)
        return contexts[streams, cells]

    def generate(prompts, count):
        cells = -(-(max(map(len, prompts)) + count) // 256) * 256
        context, batch = context_of(len(prompts), cells)
        ll.llama_memory_clear(ll.llama_get_memory(context), True)

        def decode(entries):  # [(token, position, stream, whether its logits are wanted)]
            batch.n_tokens = len(entries)
            for i, (token, position, stream, wanted) in enumerate(entries):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
                batch.logits[i] = wanted
            if ll.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            best = []
            for i, entry in enumerate(entries):
                if entry[3]:
                    logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (vocab,))
                    best.append((entry[2], int(logits.argmax())))
            return best

        whole = [(t, p, s, p == len(ids) - 1) for s, ids in enumerate(prompts) for p, t in enumerate(ids)]
        last = {}
        for start in range(0, len(whole), 512):
            step = decode(whole[start : start + 512])
            last |= dict(step)
            if step:
                yield step
        for k in range(count - 1):
            step = decode([(last[s], len(ids) + k, s, True) for s, ids in enumerate(prompts)])
            last = dict(step)
            yield step

    return ll.__version__, generate


if __name__ == "__main__":
    {"prepare": prepare, "serve": serve}[sys.argv[1]](*sys.argv[2:])

"""A client for the served model on tritonclient's gRPC streaming: `Client(url).stream("Hello", max_tokens=64)`.

Knows: the ensemble's public tensors and how a decoupled stream ends. Refuses to know: how the tokens are made.

What an application copies, without this package:

    import queue
    import numpy as np
    import tritonclient.grpc as grpc
    answers, client = queue.Queue(), grpc.InferenceServerClient("127.0.0.1:8001")
    text = grpc.InferInput("text_input", [1], "BYTES").set_data_from_numpy(np.array(["Why is the sky blue?"], object))
    stream = grpc.InferInput("stream", [1], "BOOL").set_data_from_numpy(np.array([True]))
    client.start_stream(lambda result, error: answers.put(error or result), stream_timeout=120)
    client.async_stream_infer("ensemble", [text, stream])
    while not (result := answers.get(timeout=60)).as_numpy("finish_reason")[0]:
        print(result.as_numpy("text_output")[0].decode(), end="", flush=True)
    print(result.as_numpy("text_output")[0].decode())
    client.stop_stream()
"""

from .client import Chunk, Client, ClientError, Stream

__all__ = ["Chunk", "Client", "ClientError", "Stream"]

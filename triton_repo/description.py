"""The one description that every config.pbtxt is generated from: tensors, models, and how the ensemble wires them.

Knows: names, dtypes and shapes of every tensor that crosses a model's border. Refuses to know: what is done with them.

The ensemble is a chain; a tensor is wired by its name to the newest model that makes it, so a renamed tensor is an
error when the repository is built and not a stalled request later.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ENSEMBLE = "ensemble"
DSPARK = "dspark"


@dataclass(frozen=True)
class Tensor:
    """One input or output: Triton dtype without its TYPE_ prefix ("STRING" is BYTES on the wire), dims (-1 = any)."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False


@dataclass(frozen=True)
class Model:
    """One model of the repository. `control` inputs are for BLS calls and the launcher: never wired by the ensemble."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    control: tuple[Tensor, ...] = ()
    answers: tuple[Tensor, ...] = ()  # outputs of a control request
    decoupled: bool = False
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step of the ensemble: {the model's tensor: the ensemble's tensor}, both ways."""

    model: str
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


# How a request is decoded: tensors of the fields of decoding.request.SamplingParams, under its names. logit_bias is
# a JSON object {"token id": bias}; bad_words are texts (preprocessing makes token ids of them).
SAMPLING = tuple(
    Tensor(name, dtype, (-1,) if name == "bad_words" else (1,), optional=True)
    for name, dtype in (
        ("max_tokens", "INT32"),
        ("min_tokens", "INT32"),
        ("temperature", "FP32"),
        ("top_k", "INT32"),
        ("top_p", "FP32"),
        ("min_p", "FP32"),
        ("repetition_penalty", "FP32"),
        ("presence_penalty", "FP32"),
        ("frequency_penalty", "FP32"),
        ("bad_words", "STRING"),
        ("logit_bias", "STRING"),
        ("seed", "UINT64"),
        ("ignore_eos", "BOOL"),
        ("return_log_probs", "BOOL"),
        ("speculative", "BOOL"),
        ("accept", "STRING"),
        ("threshold", "FP32"),
    )
)

USER_INPUTS = (
    Tensor("text_input", "STRING", (1,), optional=True),
    Tensor("messages", "STRING", (1,), optional=True),
    Tensor("input_ids", "INT32", (-1,), optional=True),
    Tensor("raw", "BOOL", (1,), optional=True),
    Tensor("stream", "BOOL", (1,), optional=True),
    Tensor("stop_words", "STRING", (-1,), optional=True),
    *SAMPLING,
)

# What a client gets with each response. output_log_probs: one per id of output_ids where return_log_probs was
# asked, else none; cum_log_probs: the sum over the whole answer so far (0 when not asked).
USER_OUTPUTS = (
    Tensor("text_output", "STRING"),
    Tensor("output_ids", "INT32", (-1,)),
    Tensor("finish_reason", "STRING"),
    Tensor("index", "INT32"),
    Tensor("num_input_tokens", "INT32"),
    Tensor("num_output_tokens", "INT32"),
    Tensor("num_rounds", "INT32"),
    Tensor("total_draft_tokens", "INT32"),
    Tensor("total_accepted_draft_tokens", "INT32"),
    Tensor("accepted_per_position", "INT32", (-1,)),
    Tensor("acceptance_rate", "FP32"),
    Tensor("output_log_probs", "FP32", (-1,)),
    Tensor("cum_log_probs", "FP32"),
)

# Between our own models a request and a round are one tensor each: every tensor costs an allocation in each process it
# passes, 16 streams of a fast model give a thousand rounds a second. `params`: SamplingParams, JSON. `settings`: what
# only postprocessing reads (stream, stop_words; JSON); it travels through dspark because an ensemble pairs a decoupled
# model's response k with response k of every other step, and preprocessing has just one. `round`: responses.Round, JSON.
PARAMS = Tensor("params", "STRING")
SETTINGS = Tensor("settings", "STRING")
ROUND = Tensor("round", "UINT8", (-1,))

PREPROCESSING = Model(
    name="preprocessing",
    inputs=USER_INPUTS,
    outputs=(Tensor("input_ids", "INT32", (-1,)), PARAMS, SETTINGS),
    parameters=("bundle",),
)

ENGINE = Model(
    name=DSPARK,
    inputs=tuple(Tensor(t.name, t.dtype, t.dims, optional=True) for t in PREPROCESSING.outputs),
    outputs=(ROUND,),
    control=(
        Tensor("stop", "BOOL", (1,), optional=True),
        Tensor("uid", "UINT64", (1,), optional=True),
        Tensor("drain", "BOOL", (1,), optional=True),
    ),
    answers=(Tensor("active_requests", "INT32"), Tensor("waiting_requests", "INT32")),
    decoupled=True,
    parameters=(
        "bundle", "schedule", "threshold", "accept", "profile", "max_requests", "token_budget", "threads", "response_ms"
    ),  # fmt: skip
)

POSTPROCESSING = Model(
    name="postprocessing", inputs=(ROUND,), outputs=USER_OUTPUTS, decoupled=True, parameters=("bundle",)
)

CHAIN = (PREPROCESSING, ENGINE, POSTPROCESSING)


def wire(chain: tuple[Model, ...] = CHAIN, users: tuple[Tensor, ...] = USER_INPUTS) -> tuple[Step, ...]:
    """The ensemble's steps. Raises ValueError naming a tensor that nobody makes, or made with another dtype."""
    made = {t.name: (t.name, t) for t in users}
    steps = []
    for number, model in enumerate(chain):
        inputs = {}
        for t in model.inputs:
            if t.name not in made:
                raise ValueError(f"{model.name} needs the tensor {t.name!r}, which no earlier step makes.")
            wire_name, source = made[t.name]
            if source.dtype != t.dtype:
                raise ValueError(f"{model.name} reads {t.name!r} as {t.dtype}, but it is made as {source.dtype}.")
            inputs[t.name] = wire_name
        last = number == len(chain) - 1
        outputs = {t.name: t.name if last else f"_{model.name}_{t.name}" for t in model.outputs}
        made.update({t.name: (outputs[t.name], t) for t in model.outputs})
        steps.append(Step(model.name, inputs, outputs))
    return tuple(steps)

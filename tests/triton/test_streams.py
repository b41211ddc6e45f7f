"""The served ensemble on a real tritonserver: every stream its own exact text, whatever the others do."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from client import Client, ClientError
from triton_repo.families import COUNTER, FAMILIES, HISTOGRAM, PHASES
from tests.triton.support import emitted, in_flight, settled_metrics, wait_until

PROMPTS = [f"{word} {i}" for i, word in enumerate(("fox", "世界", "🚀 emoji", "мир") * 4)]


def params(i: int) -> dict:
    """Greedy and sampled ones, short and long ones."""
    return {"max_tokens": 20 + 7 * i, "temperature": 0.9 * (i % 3 > 0), "seed": i}


def collect(client: Client, prompt, **parameters):
    chunks = list(client.stream(prompt, **parameters))
    return chunks, "".join(c.text for c in chunks), [t for c in chunks for t in c.output_ids]


@pytest.fixture(scope="module")
def client(server):
    return Client(server.grpc_url, timeout=120)


def http(server, path: str, body: dict):
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/ensemble/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_sixteen_streams_each_get_their_own_text(client, alone):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: collect(client, PROMPTS[i], **params(i)), range(16)))
    want = [alone.decode(PROMPTS[i], **params(i)) for i in range(16)]
    for i, (chunks, text, ids) in enumerate(answers):
        assert ids == want[i], f"stream {i}"
        assert text == alone.text(ids)
        assert [c.index for c in chunks] == list(range(len(chunks)))
        assert [c.finish_reason for c in chunks[:-1]] == [""] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == ("stop" if ids[-1] == 2 else "length")
        assert chunks[-1].num_output_tokens == len(ids)
    texts = "".join(text for _, text, _ in answers)
    assert any(ord(c) > 0x2FF and c != "\ufffd" for c in texts), "no stream had a character of several bytes"


def test_statistics_add_up(client):
    chunks, _, ids = collect(client, "statistics", max_tokens=64, ignore_eos=True)
    last = chunks[-1]
    assert last.total_accepted_draft_tokens == sum(last.accepted_per_position)
    assert 0 < last.total_accepted_draft_tokens < last.total_draft_tokens
    assert last.acceptance_rate == pytest.approx(last.total_accepted_draft_tokens / last.total_draft_tokens)
    assert list(last.accepted_per_position) == sorted(last.accepted_per_position, reverse=True)
    # the first token comes from prefill; a round gives its accepted tokens and one more, the last one perhaps cut
    assert len(ids) <= 1 + last.num_rounds + last.total_accepted_draft_tokens < len(ids) + len(last.accepted_per_position) + 1


def test_without_speculation_greedy_is_the_same(client, alone):
    for prompt in PROMPTS[:3]:
        with_draft, without = (collect(client, prompt, max_tokens=48, speculative=on) for on in (True, False))
        assert with_draft[1:] == without[1:]
        assert without[2] == alone.decode(prompt, max_tokens=48, schedule="none")
        assert without[0][-1].total_draft_tokens == 0 < with_draft[0][-1].total_draft_tokens


def test_a_seed_decides_and_its_absence_does_not_repeat(client):
    texts = [collect(client, "seed", max_tokens=40, temperature=1.0, seed=s, ignore_eos=True)[1] for s in (7, 7, 8, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_one_response_when_not_streaming(client, server, alone):
    prompt, want = PROMPTS[5], alone.decode(PROMPTS[5], max_tokens=40)
    whole = client.generate(prompt, max_tokens=40)
    assert (whole.text, list(whole.output_ids)) == (alone.text(want), want)
    body = json.loads(http(server, "generate", {"text_input": prompt, "max_tokens": 40}))
    assert (body["text_output"], body["output_ids"]) == (alone.text(want), want)
    assert body["num_output_tokens"] == len(want)


def test_http_stream(server, alone):
    want = alone.decode("over http", max_tokens=40)
    events = http(server, "generate_stream", {"text_input": "over http", "max_tokens": 40, "stream": True})
    parts = [json.loads(line[len("data: ") :]) for line in events.splitlines() if line.startswith("data: ")]
    assert len(parts) > 1
    assert "".join(p["text_output"] for p in parts) == alone.text(want)


def test_messages_raw_and_ids(client, alone):
    chat = [{"role": "system", "content": "短い"}, {"role": "user", "content": "fox"}]
    ids = alone.chat.encode_messages(chat)
    texts = {collect(client, p, max_tokens=24)[1] for p in (chat, ids)}
    assert len(texts) == 1
    assert collect(client, "raw text", raw=True, max_tokens=1)[0][-1].num_input_tokens == len(alone.chat.encode("raw text"))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_stop_words_across_chunks(client, alone, server, temperature):
    """Many cuts of the text as stop words: tokens and rounds border them everywhere."""
    sampling = {"max_tokens": 60, "temperature": temperature, "seed": 3, "ignore_eos": True}
    ids = alone.decode("stop", **sampling)
    text = alone.text(ids)
    words = [w for w in (text[i : i + 2 + i % 2] for i in range(3, len(text) - 3)) if "\ufffd" not in w][::4]
    assert len(words) >= 4
    for word in words:
        used = next(n for n in range(len(ids) + 1) if word in alone.text(ids[:n]))
        want = (text[: text.index(word)], ids[:used], "stop", used)
        chunks, shown, got = collect(client, "stop", stop_words=["never there", word], **sampling)
        assert (shown, got, chunks[-1].finish_reason, chunks[-1].num_output_tokens) == want, word
        whole = client.generate("stop", stop_words=[word], **sampling)
        assert (whole.text, list(whole.output_ids), whole.finish_reason, whole.num_output_tokens) == want, word


def test_a_stop_word_frees_the_slot(client, server):
    before = emitted(server)
    text = client.generate("free", max_tokens=40, ignore_eos=True, raw=True).text
    client.generate("free", max_tokens=3000, ignore_eos=True, raw=True, stop_words=[text[5:8]])
    wait_until(lambda: in_flight(server) == 0, "the end of the stopped request")
    assert emitted(server) - before < 3000


def test_a_held_back_tail_is_shown_at_the_end(client, alone):
    ids = alone.decode("tail", max_tokens=30, ignore_eos=True)
    text = alone.text(ids)
    _, shown, _ = collect(client, "tail", max_tokens=30, ignore_eos=True, stop_words=[text[-4:] + "☃"])
    assert shown == text


def test_unary_grpc_is_refused_in_a_sentence(server):
    tensor = grpc.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array(["unary"], object))
    with pytest.raises(InferenceServerException, match="doesn't support models with decoupled"):
        grpc.InferenceServerClient(server.grpc_url).infer("ensemble", [tensor])


def test_metrics(client, server):
    before = settled_metrics(server)
    last = list(client.stream("metrics", max_tokens=30, ignore_eos=True))[-1]
    after = settled_metrics(server)
    grown = {name: after[name] - before[name] for name in before if name.startswith("dspark_")}
    positions = range(len(last.accepted_per_position))
    by_position = lambda name: [grown[f'dspark_{name}_total{{position="{k}"}}'] for k in positions]
    assert grown["dspark_emitted_tokens_total"] == 30
    assert grown["dspark_prompt_tokens_total"] == last.num_input_tokens
    assert grown["dspark_request_rounds_total"] == grown["dspark_drafts_total"] == last.num_rounds
    assert grown["dspark_draft_tokens_total"] == len(positions) * last.num_rounds
    assert by_position("verified_tokens") == [last.num_rounds] * len(positions)
    assert sum(by_position("verified_tokens")) == last.total_draft_tokens == grown["dspark_scheduled_tokens_sum"]
    assert by_position("accepted_tokens") == list(last.accepted_per_position)
    assert grown['dspark_requests_total{finish_reason="length"}'] == 1
    assert grown["dspark_round_seconds_count"] == grown["dspark_rounds_total"] == last.num_rounds + 1  # one of prefill
    assert grown["dspark_scheduled_tokens_count"] == last.num_rounds and grown["dspark_rounds_without_draft_total"] == 0
    assert grown["dspark_ttft_seconds_count"] == 1 and 0 < grown["dspark_ttft_seconds_sum"] < 60
    assert 0 < grown["dspark_itl_seconds_count"] <= last.num_rounds
    phases = {phase: grown[f'dspark_phase_seconds_total{{phase="{phase}"}}'] for phase in PHASES}
    assert min(phases.values()) >= 0 and phases["target"] > 0 and sum(phases.values()) < grown["dspark_round_seconds_sum"]
    gauges = ("active_requests", "waiting_requests", "kv_tokens")
    assert [after[f"dspark_{name}"] for name in gauges] == [0, 0, 0] and after["dspark_kv_capacity_bytes"] > 0
    assert 1 <= after["dspark_acceptance_length"] <= len(positions) + 1
    assert 'dspark_calibration_error{position="0"}' in after


def test_every_documented_family_is_on_the_page(server):
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=5) as page:
        text = page.read().decode()
    parts = {HISTOGRAM: ("_bucket", "_sum", "_count")}  # of a histogram: three counters
    want = {f.name + part: f for f in FAMILIES for part in parts.get(f.kind, ("",))}
    for name, f in want.items():
        assert f"# HELP {name} {f.help}\n" in text
        assert f"# TYPE {name} {COUNTER if f.kind == HISTOGRAM else f.kind}\n" in text
    assert {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE dspark_")} == set(want)


def test_http_refusal_is_a_status_and_a_sentence(server):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        http(server, "generate", {"text_input": "x", "max_tokens": 0})
    assert refusal.value.code == 400
    assert "max_tokens is 0; it must lie in 1.." in json.loads(refusal.value.read())["error"]


def test_client_says_what_the_server_said(client):
    with pytest.raises(ClientError, match=r"^text_input is empty; it must hold at least 1 character\.$"):
        list(client.stream(""))
